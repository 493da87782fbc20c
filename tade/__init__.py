"""Test-agnostic adaptation of long-tailed classifiers: from the logits of one or several experts and unlabeled test
images to class probabilities under the test images' own class distribution. Needs torch and nothing else."""

from tade.aggregator import Aggregator, Views
from tade.priors import class_prior, expert_log_priors, inverse_prior
from tade.stability import StabilityAggregator, prediction_stability, weighted_logits

__all__ = [
    "Aggregator",
    "StabilityAggregator",
    "Views",
    "class_prior",
    "expert_log_priors",
    "inverse_prior",
    "prediction_stability",
    "weighted_logits",
]
