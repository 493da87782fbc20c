"""Measures of class scores. The functions in __all__ are those that a config may name in `metrics`.

Each takes (scores [N, C], targets [N], cls_num_list [C]): logits or log probabilities, labels, and training images per
class. Figures are in percent.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "accuracy",
    "top5_accuracy",
    "shot_group_accuracy",
    "expected_calibration_error",
    "per_class_accuracy",
    "balanced_accuracy",
    "macro_f1",
]

CONFIDENCE_BINS = 15
ROWS = 1024  # images whose probabilities are in memory at once
RESAMPLES = 2000
NORMAL_QUANTILE = 1.959963984540054  # of 0.975


def accuracy(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> float:
    """Share of images whose highest score is their own class's."""
    return 100 * float((scores.argmax(dim=1) == targets).float().mean())


def top5_accuracy(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> float:
    """Share of images whose class is among the five with the highest scores (or all, if there are fewer)."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return 100 * float((top == targets[:, None]).any(dim=1).float().mean())


def shot_group_accuracy(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> dict[str, float | None]:
    """Accuracy over the images of each group of classes (see `shot_groups`); None for a group without an image."""
    hits = class_hits(scores.argmax(dim=1), targets, scores.shape[1])
    return {name: percent_correct(*hits, classes) for name, classes in shot_groups(cls_num_list).items()}


def expected_calibration_error(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> float:
    """Mean distance of accuracy from confidence, over 15 equal bins of confidence (Guo et al., ICML 2017, eq. 3).

    Confidence is the highest class probability, the maximum of softmax(scores). ECE = sum over the bins of
    n_bin / N * |accuracy in the bin - mean confidence in the bin| (arXiv 1706.04599); bin k is (k / 15, (k + 1) / 15].
    """
    prediction, confidence = predicted(scores)
    return calibration_error(reliability(confidence, prediction == targets))


def per_class_accuracy(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> list[float | None]:
    """Accuracy over the images of each class, C figures; None for a class without an image."""
    correct, total = class_hits(scores.argmax(dim=1), targets, scores.shape[1])
    return [100 * hits / images if images else None for hits, images in zip(correct.tolist(), total.tolist())]


def balanced_accuracy(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> float:
    """Mean of the accuracies of the classes that have images."""
    correct, total = class_hits(scores.argmax(dim=1), targets, scores.shape[1])
    return 100 * float((correct[total > 0].double() / total[total > 0]).mean())


def macro_f1(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> float:
    """Mean F1 score, 2 TP / (2 TP + FP + FN), of the classes that have images or are predicted."""
    prediction = scores.argmax(dim=1)
    correct, total = class_hits(prediction, targets, scores.shape[1])
    named = total + torch.bincount(prediction, minlength=scores.shape[1])  # 2 TP + FP + FN
    return 100 * float((2 * correct[named > 0].double() / named[named > 0]).mean())


def predicted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The class with the highest score and its probability, max softmax(scores): [N, C] -> [N] int64, [N] float64."""
    parts = [torch.softmax(part.double(), dim=1).max(dim=1) for part in scores.split(ROWS)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def reliability(confidence: Tensor, correct: Tensor) -> Tensor:
    """Images, sum of their confidences and correct predictions in each of 15 equal bins of confidence, [15, 3].

    Args:
        confidence: in 0..1, [N]; bin k is (k / 15, (k + 1) / 15].
        correct: boolean [N].
    """
    bins = (torch.ceil(confidence * CONFIDENCE_BINS).long() - 1).clamp(0, CONFIDENCE_BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, correct.to(confidence)], dim=1)
    return values.new_zeros(CONFIDENCE_BINS, 3).index_add_(0, bins, values)


def calibration_error(bins: Tensor) -> float:
    """`expected_calibration_error` of `reliability`, [15, 3]."""
    images, confidence, correct = bins.unbind(dim=1)
    return 100 * float((correct - confidence).abs().sum() / images.sum())


def wilson_interval(correct: int, images: int) -> list[float]:
    """95 % interval of an accuracy in percent, by Wilson's score (Journal of the American Statistical Association 22,
    1927, pp. 209-212): the accuracies p that lie within 1.96 sqrt(p (1 - p) / images) of the one measured."""
    z2 = NORMAL_QUANTILE**2
    share = correct / images
    center = share + z2 / (2 * images)
    half = (z2 * (share * (1 - share) / images + z2 / (4 * images**2))) ** 0.5
    low, high = (end / (1 + z2 / images) for end in (center - half, center + half))
    return [100 * max(0.0, min(low, share)), 100 * min(1.0, max(high, share))]  # whatever rounding does


def paired_difference(correct: Tensor, other: Tensor) -> dict[str, float | list[float]]:
    """How much more accurate one prediction of the same images is than another, in points.

    The interval is the 95 % percentile interval of a bootstrap over the images (Efron, Annals of Statistics 7, 1979):
    images are drawn with replacement, each with both of its predictions, 2,000 times, always with the same random
    numbers. An image's difference is -1, 0 or 1, so that it is enough to draw how often each is met.

    Args:
        correct, other: boolean [N].

    Returns:
        {"points": difference, "interval": [low, high]}.
    """
    images = len(correct)
    won, lost = int((correct & ~other).sum()), int((other & ~correct).sum())
    shares = np.array([won, lost, images - won - lost]) / images
    drawn = np.random.default_rng(0).multinomial(images, shares, size=RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 0] - drawn[:, 1]) / images, [2.5, 97.5])
    return {"points": 100 * (won - lost) / images, "interval": [float(low), float(high)]}


def shot_groups(cls_num_list: Sequence[int]) -> dict[str, Tensor]:
    """Classes by their number of training images: many (> 100), medium (20 to 100), few (< 20); boolean [C] each."""
    counts = torch.as_tensor(cls_num_list)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


def class_hits(prediction: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Correct predictions and images of every class: prediction [N], targets [N] -> ([C], [C]), int64."""
    total = torch.bincount(targets, minlength=num_classes)
    correct = torch.bincount(targets[prediction == targets], minlength=num_classes)
    return correct, total


def percent_correct(correct: Tensor, total: Tensor, classes: Tensor | None = None) -> float | None:
    """Accuracy in percent over the images of the given classes; None where there is no image.

    Args:
        correct, total: [C] from `class_hits`.
        classes: boolean [C], the classes to count; all by default.
    """
    if classes is not None:
        correct, total = correct[classes], total[classes]
    images = int(total.sum())
    return 100 * int(correct.sum()) / images if images else None
