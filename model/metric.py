"""Measures of class scores. The functions in __all__ are those that a config may name in `metrics`.

Each takes (scores [N, C], targets [N], cls_num_list [C]): logits or log probabilities, labels, and training images per
class. Figures are in percent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["accuracy", "top5_accuracy", "shot_group_accuracy", "expected_calibration_error", "per_class_accuracy"]

CONFIDENCE_BINS = 15


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
    confidence, prediction = torch.softmax(scores.double(), dim=1).max(dim=1)
    bins = (torch.ceil(confidence * CONFIDENCE_BINS).long() - 1).clamp(0, CONFIDENCE_BINS - 1)
    gap = (prediction == targets).double() - confidence  # n_bin * |accuracy - confidence| is |the bin's sum of these|
    sums = torch.zeros(CONFIDENCE_BINS, dtype=torch.float64, device=scores.device).index_add_(0, bins, gap)
    return 100 * float(sums.abs().sum()) / len(targets)


def per_class_accuracy(scores: Tensor, targets: Tensor, cls_num_list: Sequence[int]) -> list[float | None]:
    """Accuracy over the images of each class, C figures; None for a class without an image."""
    correct, total = class_hits(scores.argmax(dim=1), targets, scores.shape[1])
    return [100 * hits / images if images else None for hits, images in zip(correct.tolist(), total.tolist())]


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
