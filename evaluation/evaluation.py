"""Every metric of every test distribution, from expert logits that are computed once."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation.loaded_run import LoadedRun
from evaluation.outcomes import Outcomes
from evaluation.results import DistributionResult, Results
from model.metric import (
    accuracy,
    balanced_accuracy,
    calibration_error,
    class_hits,
    macro_f1,
    paired_difference,
    per_class_accuracy,
    percent_correct,
    predicted,
    reliability,
    shot_group_accuracy,
    wilson_interval,
)
from trainer.build import chosen_metrics
from trainer.devices import device_name
from utils.errors import UserError, unknown


class Scorer:
    """Metrics of class scores on any selection of the test images.

    Args:
        logits: expert logits of all test images, [N, E, C].
        targets: their labels, [N].
        cls_num_list: training images per class, which the shot groups go by, [C].
        metrics: further ones by name, functions of (scores, targets, cls_num_list) as in model/metric.py.
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        cls_num_list: Sequence[int],
        metrics: Mapping[str, Callable] | None = None,
    ):
        self.targets = targets
        self.cls_num_list = cls_num_list
        self.metrics = {k: m for k, m in (metrics or {}).items() if m not in (accuracy, shot_group_accuracy)}
        self.mean_logits = logits.mean(dim=1)  # [N, C]
        self.expert_hits = logits.argmax(dim=2) == targets[:, None]  # [N, E]

    def score(self, indices: np.ndarray, scores: Tensor) -> DistributionResult:
        """Results on the images `indices` [M], from their class scores [M, C]."""
        chosen = torch.as_tensor(indices)
        targets = self.targets[chosen]
        outcomes = Outcomes(chosen, targets, *predicted(scores))
        values = {"top1": percent_correct(*class_hits(scores.argmax(dim=1), targets, scores.shape[1]))}
        values |= shot_group_accuracy(scores, targets, self.cls_num_list)
        for name, metric in self.metrics.items():
            value = metric(scores, targets, self.cls_num_list)
            values |= value if isinstance(value, dict) else {name: value}
        values |= {
            "top1_interval": wilson_interval(int(outcomes.correct.sum()), len(chosen)),
            "balanced_accuracy": balanced_accuracy(scores, targets, self.cls_num_list),
            "macro_f1": macro_f1(scores, targets, self.cls_num_list),
            "expected_calibration_error": calibration_error(reliability(outcomes.confidence, outcomes.correct)),
            "per_class_accuracy": per_class_accuracy(scores, targets, self.cls_num_list),
        }
        experts = (100 * self.expert_hits[chosen].double().mean(dim=0)).tolist()
        return DistributionResult(len(chosen), values, experts, outcomes=outcomes)

    def score_beside_equal_weights(self, indices: np.ndarray, scores: Tensor) -> DistributionResult:
        """`score`, and how it compares with the mean of the experts' logits on the same images."""
        result, equal = self.score(indices, scores), self.score_equal_weights(indices)
        result.equal_weights_top1 = equal.top1
        result.equal_outcomes = equal.outcomes
        result.difference_to_equal_weights = paired_difference(result.outcomes.correct, equal.outcomes.correct)
        return result

    def score_equal_weights(self, indices: np.ndarray) -> DistributionResult:
        """Results of the mean of the experts' logits on the images `indices` [M]."""
        result = self.score(indices, self.mean_logits[torch.as_tensor(indices)])
        experts = self.expert_hits.shape[1]
        result.weights = [1 / experts] * experts
        return result


def scorer_of(run: LoadedRun) -> Scorer:
    return Scorer(run.test_logits, run.targets, run.cls_num_list, chosen_metrics(run.config))


def results_of(run: LoadedRun, protocol: str) -> Results:
    """The record of an evaluation, still without distributions; names in it what is left out of every distribution."""
    results = Results(run.checkpoint, protocol, run.seed, torch.__version__, device_name(run.device), run.config.config)
    results.classes = {"names": list(run.loader.class_names), "training_images": list(run.cls_num_list)}
    results.thumbnails = run.images.thumbnails
    remarks = []
    if labeled := len(run.left_out):
        results.protocol += (
            f" {labeled} labeled test images were used to calibrate and are left out of every distribution: not "
            "comparable with published figures, which are of all images."
        )
        remarks.append(f"{labeled} labeled test images calibrate and are left out of every figure")
    if bad := len(run.bad_images):
        results.protocol += (
            f" {bad} of {len(run.targets)} test images cannot be decoded and are left out, see bad_images.csv."
        )
        remarks.append(f"{bad} test images cannot be decoded and are left out")
    results.remark = "; ".join(remarks) or None
    return results


def views_text(run: LoadedRun) -> str:
    """Which views of the test images the logits are the mean of, in words; empty where images are used as they are."""
    views = run.mild_views
    mirrored = ", mirror image" if 1 in views else ""
    crops = sum(number > 1 for number in views)
    averaged = f"{len(views)} averaged views of the test images (image{mirrored}, random crops: {crops})"
    return averaged if views else ""


def evaluate(run: LoadedRun, names: Sequence[str] | None = None) -> Results:
    """Evaluate a network on test distributions, its experts weighted equally.

    Args:
        run: from `load_run`.
        names: of the distributions; all of the data loader's by default.

    Raises:
        UserError: the data have no test distribution of that name.
    """
    return _evaluate(run, chosen_distributions(run, names))


def evaluate_test_set(run: LoadedRun) -> Results:
    """The same on the whole test set, which is named "uniform"; asks for no list of a distribution."""
    return _evaluate(run, {"uniform": np.setdiff1d(np.arange(len(run.targets)), run.excluded)})


def _evaluate(run: LoadedRun, distributions: Mapping[str, np.ndarray]) -> Results:
    scorer, views = scorer_of(run), views_text(run)
    passes = f"each of {views}" if views else "the un-augmented test images"
    results = results_of(
        run,
        f"Experts weighted equally (mean of their logits). One pass of the network over {passes}; "
        "every distribution is a selection of them.",
    )
    results.distributions = {name: scorer.score_equal_weights(d) for name, d in distributions.items()}
    return results


def chosen_distributions(run: LoadedRun, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """The run's test distributions: name -> indices of test images, without those that are left out.

    Args:
        run: from `load_run`.
        names: of the distributions wanted; None for all.

    Raises:
        UserError: there is no distribution of that name, or `names` is empty; nothing is left of one.
    """
    if run.other_images is not None:
        raise UserError("The test images are unlabeled, and test distributions need labels: name no distribution.")
    distributions = run.loader.test_distributions()
    if isinstance(names, str):
        names = [names]
    if names is not None and not names:
        raise UserError("names is empty: name at least one test distribution, or leave it out for all of them.")
    for name in names or ():
        if name not in distributions:
            raise unknown("test distribution", name, distributions)
    excluded = run.excluded
    chosen = {name: distributions[name][~np.isin(distributions[name], excluded)] for name in names or distributions}
    for name, indices in chosen.items():
        if not len(indices):
            raise UserError(f'No image of the test distribution "{name}" can be used: leave it out.')
    return chosen
