"""Adapt to the unlabeled images of every test class distribution of ImageNet-LT, then evaluate.

python test_train_imagenet.py -c configs/test_time_imagenet_lt_resnext50_tade.json -r saved/NAME/RUN/last.pth
"""

from commands.command_line import run_script
from commands.jobs import run_test_train as main

if __name__ == "__main__":
    run_script(main, __doc__)
