"""Evaluate an iNaturalist 2018 checkpoint on every test class distribution, its experts weighted equally.

python test_all_inat.py -r saved/NAME/RUN/last.pth
"""

from trainer.setup import run_script
from trainer.testing import evaluate
from utils.parse_config import ConfigParser


def main(config: ConfigParser) -> dict:
    """Returns the content of results.json."""
    return evaluate(config, "test_all")


if __name__ == "__main__":
    run_script(main, __doc__)
