"""Test-agnostic adaptation of long-tailed classifiers: from the logits of one or several experts and unlabeled test
images to class probabilities under the test images' own class distribution. Needs torch and nothing else."""

from tade.aggregator import Aggregator, Views
from tade.baselines import BBSEAggregator, EMAggregator, MAPEMAggregator
from tade.calibration import Calibration, fit_calibration
from tade.checks import check_aggregator
from tade.likelihood import GivenPriorAggregator, prior_free_logits
from tade.prior import PriorAggregator
from tade.priors import class_prior, expert_log_priors, inverse_prior
from tade.stability import StabilityAggregator, prediction_stability, weighted_logits

__all__ = [
    "Aggregator",
    "BBSEAggregator",
    "Calibration",
    "EMAggregator",
    "GivenPriorAggregator",
    "MAPEMAggregator",
    "PriorAggregator",
    "StabilityAggregator",
    "Views",
    "check_aggregator",
    "class_prior",
    "expert_log_priors",
    "fit_calibration",
    "inverse_prior",
    "prediction_stability",
    "prior_free_logits",
    "weighted_logits",
]
