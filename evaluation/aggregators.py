"""From a checked config to the aggregator that it names."""

from collections.abc import Callable, Mapping

from torch import Tensor

from tade import Aggregator, Calibration
from trainer.registry import AGGREGATORS, read_config
from utils.parse_config import ConfigParser, parameters_of
from utils.reference_config import published_aggregator

AggregatorMaker = Callable[[Tensor, Tensor], Aggregator]
"""(expert_log_priors [E, C], log_prior [C]) -> an aggregator that has learned nothing yet."""


def aggregator_section(config: Mapping | ConfigParser) -> dict:
    """What the config says of aggregation; the published method where it says nothing."""
    return config.get("aggregator") or published_aggregator({"data_loader": config.get("data_loader")})


def wants_calibration(config: ConfigParser) -> bool:
    """Whether the config's aggregator takes a calibration and the config gives none, not even null."""
    section = aggregator_section(config)
    takes = "calibration" in parameters_of(AGGREGATORS[section["type"]])
    return takes and "calibration" not in section.get("args", {})


def build_aggregator(
    config: ConfigParser,
    expert_log_priors: Tensor,
    log_prior: Tensor,
    calibration: Callable[[], Calibration | None] | None = None,
) -> Aggregator:
    """The config's aggregator, its weights learned by the config's optimizer, if any.

    Args:
        config: of the run.
        expert_log_priors, log_prior: [E, C] and [C]; see tade.Aggregator.
        calibration: asked only where the aggregator takes one and the config gives none.
    """
    chosen = read_config({**config.config, "aggregator": aggregator_section(config)})
    supplied: dict[str, object] = {"expert_log_priors": expert_log_priors, "log_prior": log_prior}
    if calibration and wants_calibration(chosen):
        supplied["calibration"] = calibration()
    if "optimizer" in chosen:
        supplied["make_optimizer"] = lambda parameters: chosen.build("optimizer", parameters)
    return chosen.build("aggregator", **supplied)
