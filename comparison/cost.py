"""The cost of the network that a config describes."""

import pandas as pd

from model.cost import count_macs
from trainer.registry import COMPONENTS
from utils.parse_config import ConfigParser


def image_size(config: ConfigParser) -> int:
    """Side of the images that the config's data loader gives, in pixels, without building it."""
    loader = COMPONENTS["data_loader"][config["data_loader"]["type"]]
    return config["data_loader"].get("args", {}).get("image_size", getattr(loader, "image_size", 224))


def cost_of(config: ConfigParser) -> pd.DataFrame:
    """`count_macs` of the network that a config describes."""
    return count_macs(config.build("arch"), image_size(config))
