"""Evaluate a Places-LT checkpoint on the balanced test set: top-1, many / medium / few-shot classes, each expert.

python test_places.py -r saved/NAME/RUN/last.pth
"""

from trainer.setup import run_script
from trainer.testing import BALANCED, evaluate
from utils.parse_config import ConfigParser


def main(config: ConfigParser) -> dict:
    """Returns the content of results.json, with the one distribution "uniform"."""
    return evaluate(config, "test", names=BALANCED)


if __name__ == "__main__":
    run_script(main, __doc__)
