"""Learn the expert weights on a folder of unlabelled images, and predict the class of each.

python predict_folder.py -c configs/test_time_custom_example.json -r saved/NAME/RUN/last.pth --images FOLDER
"""

from pathlib import Path

from trainer.setup import run_script
from trainer.testing import predict_folder
from utils.parse_config import ConfigParser

IMAGES = {"--images": {"type": Path, "required": True, "metavar": "FOLDER", "help": "folder of images, at any depth"}}


def main(config: ConfigParser) -> dict:
    """Returns the weights and where the predictions are (trainer.testing.predict_folder)."""
    return predict_folder(config, config.options["images"])


if __name__ == "__main__":
    run_script(main, __doc__, needs_config=True, extra=IMAGES)
