"""Adapt to the unlabeled images of every test class distribution of Places-LT, then evaluate.

python test_train_places.py -c configs/test_time_places_lt_resnet152_tade.json -r saved/NAME/RUN/last.pth
"""

from commands.command_line import run_script
from commands.jobs import run_test_train as main

if __name__ == "__main__":
    run_script(main, __doc__)
