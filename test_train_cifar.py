"""Learn the expert weights on the unlabelled images of every test class distribution of CIFAR-LT, then evaluate.

python test_train_cifar.py -c configs/test_time_cifar100_ir100_tade.json -r saved/NAME/RUN/last.pth
"""

from trainer.setup import run_script
from trainer.testing import train_at_test_time
from utils.parse_config import ConfigParser


def main(config: ConfigParser) -> dict:
    """Returns the content of results.json."""
    return train_at_test_time(config, "test_train")


if __name__ == "__main__":
    run_script(main, __doc__, needs_config=True)
