"""Learn the expert weights on the unlabeled images of every test distribution of iNaturalist 2018, then evaluate.

python test_train_inat.py -c configs/test_time_iNaturalist_resnet50_tade.json -r saved/NAME/RUN/last.pth
"""

from commands.command_line import run_script
from commands.jobs import run_test_train as main

if __name__ == "__main__":
    run_script(main, __doc__)
