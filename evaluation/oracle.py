"""The bound: predictions that know each test distribution's true label shares. No method, and never a default."""

from collections.abc import Sequence

import torch

from evaluation.adaptation import adapted_results
from evaluation.evaluation import chosen_distributions, predicted_on
from evaluation.loaded_run import LoadedRun
from evaluation.results import Results
from tade import Calibration, GivenPriorAggregator


def adapt_oracle(run: LoadedRun, names: Sequence[str] | None = None, calibration: Calibration | None = None) -> Results:
    """Evaluate each test distribution with its own true label shares as the prior, which takes its labels.

    What an estimate of the test prior can reach at best, with the same network, views and calibration.

    Args:
        run: from `load_run`.
        names: of the distributions; all of the data loader's by default.
        calibration: e.g. `run.calibration`; none by default.

    Raises:
        UserError: the data have no test distribution of that name.
    """
    distributions, oracles = chosen_distributions(run, names), {}
    for name, indices in distributions.items():
        counts = torch.bincount(run.targets[torch.as_tensor(indices)], minlength=len(run.cls_num_list))
        oracles[name] = GivenPriorAggregator(run.expert_log_priors, run.log_prior, calibration, prior=counts)
    protocol = (
        "Oracle (GivenPriorAggregator): a bound, uses the labels: each distribution's true label shares are its prior; "
        f"predictions on {predicted_on(run)}."
    )
    results = adapted_results(run, distributions, oracles, protocol)
    results.remark = "oracle: a bound, uses the labels"
    return results
