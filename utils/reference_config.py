"""The reference's own JSON files (TADE's release) in this project's words."""

from collections.abc import Mapping
from copy import deepcopy


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
        The config, and the paths of the keys that have no effect here; they are left out.
    """
    config = deepcopy(dict(config))
    trainer, loader = config.get("trainer"), config.get("data_loader")
    ignored = [
        (config, "add_extra_info", "add_extra_info"),
        (trainer if isinstance(trainer, dict) else {}, "add_extra_info", "trainer;add_extra_info"),
        (arguments_of(config, "arch"), "returns_feat", "arch;args;returns_feat"),
    ]
    if isinstance(loader, dict) and str(loader.get("type")).startswith("ImbalanceCIFAR"):
        ignored.append((arguments_of(config, "data_loader"), "num_workers", "data_loader;args;num_workers"))
    without_effect = [path for section, key, path in ignored if section.pop(key, None) is not None]
    arguments = arguments_of(config, "optimizer")
    if "share_lr" in arguments:
        config["optimizer"]["share_lr"] = arguments.pop("share_lr")
    if "epochs" in config:
        epochs = config.pop("epochs")
        config.setdefault("aggregator", published_aggregator(config, epochs))
    return config, without_effect


def arguments_of(config: Mapping, section: str) -> dict:
    """The arguments in a section of a config that nobody has checked, empty where there are none."""
    content = config.get(section)
    arguments = content.get("args") if isinstance(content, dict) else None
    return arguments if isinstance(arguments, dict) else {}
