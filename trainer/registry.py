"""Everything that a config may name, by section: what the modules list in their own `__all__`."""

import inspect
import json
from collections.abc import Mapping
from types import ModuleType

import torch

import data_loader.data_loaders
import model.loss
import model.metric
import model.model
import tade
import trainer.schedule
import trainer.trainer
from trainer.options import TrainerOptions
from trainer.schedule import moved_schedule
from utils.errors import UserError, unknown
from utils.logger import get_logger
from utils.parse_config import ConfigParser, merge, parameters_of
from utils.reference_config import arguments_of, from_reference


def _public(module: ModuleType) -> dict:
    return {name: getattr(module, name) for name in module.__all__}


AGGREGATORS = {
    name: kind
    for name, kind in _public(tade).items()
    if inspect.isclass(kind) and issubclass(kind, tade.Aggregator) and not inspect.isabstract(kind)
}
TRAINERS = _public(trainer.trainer)
METRICS = _public(model.metric)

COMPONENTS = {
    "arch": _public(model.model),
    "data_loader": _public(data_loader.data_loaders),
    "loss": _public(model.loss),
    "metrics": METRICS,
    "optimizer": {c.__name__: c for c in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)},
    "lr_scheduler": _public(trainer.schedule),
    "aggregator": AGGREGATORS,
    "trainer": TrainerOptions,
}

#: Arguments that the code supplies, so that configs need not.
SUPPLIED = {
    "data_loader": {"trained_on"},
    "loss": {"cls_num_list"},
    "optimizer": {"params"},
    "lr_scheduler": {"optimizer"},
    "aggregator": {"expert_log_priors", "log_prior", "make_optimizer"},
}

#: Sections that a training needs.
TRAINED = ("name", "arch", "data_loader", "optimizer", "loss", "lr_scheduler", "trainer")
#: Sections that still count after training.
TESTED = (
    *("name", "n_gpu", "seed", "arch", "data_loader", "loss", "optimizer", "metrics"),
    *("aggregator", "averaged_views"),
)


def read_config(
    changes: Mapping, checkpoint: Mapping | None = None, source: object = "", training: bool = False
) -> ConfigParser:
    """Check a config, or what a checkpoint's becomes by changes: this project's or the reference's.

    Args:
        changes: sections ("data_loader": {...}) and single values by path ("optimizer;args;lr": 0.05), in the order in
            which they count. A path that names another "type" drops the arguments that only the type before took.
        checkpoint: content of one whose config is changed. To test it, only the sections TESTED of its config count; of
            a checkpoint that another project wrote, only the sections that are understood.
        source: path of the checkpoint, for messages.
        training: every section of TRAINED must be there. In a new run, a path "trainer;epochs" rescales the schedule,
            which was made for the epochs of the section "trainer" in `changes`.

    Raises:
        UserError: see ConfigParser; or there is no config at all.
    """
    config = dict((checkpoint or {}).get("config") or {})
    if checkpoint is not None and not training:
        config = {key: config[key] for key in TESTED if key in config}
    if checkpoint is not None and "format" not in checkpoint:
        config = {key: section for key, section in config.items() if _is_understood(key, section)}
    if checkpoint is not None and not config and not changes:
        raise UserError(f"{source} carries no config: give the one it was trained with, -c CONFIG.")
    config = merge(config, changes)
    _drop_arguments(config, changes)
    config, without_effect = from_reference(config)
    checked = ConfigParser(config, COMPONENTS, SUPPLIED)
    kind = checked.get("trainer", {}).get("type", "Trainer")
    if kind not in TRAINERS:
        raise unknown('type in config section "trainer"', kind, TRAINERS)
    if without_effect:
        get_logger().info(f"Without effect here: {', '.join(without_effect)}.")
    if not training:
        return checked
    for section in TRAINED:
        checked[section]  # names the first that is missing
    return checked if checkpoint else _rescaled(checked, changes)


def _is_understood(key: str, section: object) -> bool:
    try:
        ConfigParser(from_reference({key: section})[0], COMPONENTS, SUPPLIED)
    except UserError:
        return False
    return True


def _drop_arguments(config: dict, changes: Mapping) -> None:
    """Drop, in place, the arguments that the type before took and the one that a path in `changes` names does not."""
    dropped = []
    for section, components in COMPONENTS.items():
        kind, arguments = changes.get(f"{section};type"), arguments_of(config, section)
        if isinstance(components, Mapping) and isinstance(kind, str) and kind in components:
            for name in sorted(arguments.keys() - parameters_of(components[kind])):
                if (path := f"{section};args;{name}") not in changes:
                    del arguments[name]
                    dropped.append(path)
    if dropped:
        get_logger().info(f"Left out, since the other type does not take them: {', '.join(dropped)}.")


def _rescaled(checked: ConfigParser, changes: Mapping) -> ConfigParser:
    """The config of a new run, with its schedule rescaled if the epochs differ from those that it was made for."""
    section = changes.get("trainer")
    whole = section.get("epochs") if isinstance(section, Mapping) else None
    if "trainer;epochs" not in changes or not isinstance(whole, int) or whole < 1:
        return checked
    made_for = merge(checked.config, {"trainer;epochs": whole})
    moved = moved_schedule(made_for, checked["trainer"]["epochs"], kept=changes)
    if not moved:
        return checked
    shown = ", ".join(f"{path} {json.dumps(value)}" for path, value in moved.items())
    get_logger().info(f"The schedule moves with the epochs, which were {whole}: {shown}.")
    return ConfigParser(merge(checked.config, moved), COMPONENTS, SUPPLIED)
