"""Everything that a config may name, by section: what the modules list in their own `__all__`."""

import inspect
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
from utils.errors import unknown
from utils.logger import get_logger
from utils.parse_config import ConfigParser, merge, parameters_of
from utils.reference_config import from_reference


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


def make_config(config: Mapping) -> ConfigParser:
    """Check a config, this project's or the reference's.

    Raises:
        UserError: see ConfigParser.
    """
    translated, without_effect = from_reference(config)
    checked = ConfigParser(translated, COMPONENTS, SUPPLIED)
    checked.without_effect = without_effect
    kind = checked.get("trainer", {}).get("type", "Trainer")
    if kind not in TRAINERS:
        raise unknown('type in config section "trainer"', kind, TRAINERS)
    return checked


def changed_config(config: Mapping, changes: Mapping) -> ConfigParser:
    """A checked config after changes.

    Where a value by path names another "type", arguments that only the one before took are left out, and named.

    Args:
        config: sections.
        changes: see utils.parse_config.merge.
    """
    merged, left_out = merge(config, changes), []
    for section, components in COMPONENTS.items():
        content = merged.get(section)
        if f"{section};type" not in changes or not isinstance(components, Mapping) or not isinstance(content, Mapping):
            continue
        kind = components.get(str(content["type"]))
        accepted = parameters_of(kind) if kind else content.get("args", {})
        for name in sorted(content.get("args", {}).keys() - accepted):
            path = f"{section};args;{name}"
            if path not in changes:
                del content["args"][name]
                left_out.append(path)
    if left_out:
        get_logger().info(f"Left out, since the other type does not take them: {', '.join(left_out)}.")
    return make_config(merged)


def log_without_effect(config: ConfigParser) -> None:
    """Name the keys of a config that have no effect here; called once for each job."""
    if config.without_effect:
        get_logger().info(f"Without effect here: {', '.join(config.without_effect)}.")
