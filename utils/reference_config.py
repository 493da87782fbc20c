"""The reference's own JSON files (TADE's release), and configs of earlier versions, in this project's words."""

from collections.abc import Mapping
from copy import deepcopy

from utils.errors import UserError

FORMER_STREAMING = "StreamingStabilityAggregator"


def published_aggregator(config: Mapping, epochs: int = 5) -> dict:
    """The published test-time training as an `aggregator` section.

    Args:
        config: its data loader decides whether the entropy of the weights counts (on iNaturalist alone).
        epochs: passes over the test images.
    """
    args: dict[str, object] = {"epochs": epochs, "batch_size": 128, "stop_below": 0.05}
    loader = config.get("data_loader")
    if isinstance(loader, Mapping) and loader.get("type") == "iNaturalistDataLoader":
        args["entropy_coefficient"] = -0.01
    return {"type": "StabilityAggregator", "args": args}


def from_reference(config: Mapping) -> tuple[dict, list[str]]:
    """Translate what the reference writes elsewhere or otherwise; a config of this project comes back as it is.

    `optimizer.args.share_lr` moves out of `args`; `epochs` at the top of a test-time file becomes the published
    aggregator with so many passes.

    Returns:
        The config, and the paths of the keys that have no effect here.

    Raises:
        UserError: it names an aggregator that is now an option of the scripts.
    """
    if _follows_streams(config):
        raise UserError(
            f"{FORMER_STREAMING} is now StabilityAggregator with --stream (and --stream_batch): name "
            "StabilityAggregator in the config and add that flag."
        )
    config = deepcopy(dict(config))
    without_effect = []
    if config.pop("add_extra_info", None) is not None:
        without_effect.append("add_extra_info")
    trainer = config.get("trainer")
    if isinstance(trainer, dict) and trainer.pop("add_extra_info", None) is not None:
        without_effect.append("trainer;add_extra_info")
    if "returns_feat" in arguments_of(config, "arch"):
        without_effect.append("arch;args;returns_feat")
    loader = config.get("data_loader")
    if "num_workers" in arguments_of(config, "data_loader") and "CIFAR" in str(loader.get("type")):
        without_effect.append("data_loader;args;num_workers")
    arguments = arguments_of(config, "optimizer")
    if "share_lr" in arguments:
        config["optimizer"]["share_lr"] = arguments.pop("share_lr")
    if "epochs" in config:
        epochs = config.pop("epochs")
        config.setdefault("aggregator", published_aggregator(config, epochs))
    return config, without_effect


def config_of(checkpoint: Mapping) -> dict:
    """The config that a checkpoint carries, empty where it carries none.

    An earlier version's streaming aggregator, which no test script could use without a config of its own, becomes the
    one that it derived from, so that the checkpoint can still be evaluated and trained further.
    """
    config = dict(checkpoint.get("config") or {})
    if _follows_streams(config):
        kept = {key: value for key, value in arguments_of(config, "aggregator").items() if key == "entropy_coefficient"}
        config["aggregator"] = {"type": "StabilityAggregator", "args": kept}
    return config


def _follows_streams(config: Mapping) -> bool:
    aggregator = config.get("aggregator")
    return isinstance(aggregator, Mapping) and aggregator.get("type") == FORMER_STREAMING


def arguments_of(config: Mapping, section: str) -> dict:
    """The arguments in a section of a config that nobody has checked, empty where there are none."""
    content = config.get(section)
    arguments = content.get("args") if isinstance(content, dict) else None
    return arguments if isinstance(arguments, dict) else {}
