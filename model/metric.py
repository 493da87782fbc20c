"""Accuracy, overall and by class group. The functions in __all__ are those that a config may name in `metrics`."""

import torch
from torch import Tensor

__all__ = ["accuracy", "top5_accuracy"]


def accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Share of samples whose highest score is the target's. scores [B, C], target [B] -> scalar in 0..1."""
    return (scores.argmax(dim=1) == target).float().mean()


def top5_accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Share of samples with the target among the five highest scores (or all, if fewer). [B, C], [B] -> scalar."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return (top == target[:, None]).any(dim=1).float().mean()


def class_hits(prediction: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Correct predictions and samples of every class: prediction [B], target [B] -> ([C], [C]), int64."""
    total = torch.bincount(target, minlength=num_classes)
    correct = torch.bincount(target[prediction == target], minlength=num_classes)
    return correct, total


def percent_correct(correct: Tensor, total: Tensor, classes: Tensor | None = None) -> float | None:
    """Accuracy in percent over the samples of the given classes; None where there is no sample.

    Args:
        correct, total: [C] from `class_hits`.
        classes: boolean [C], the classes to count; all by default.
    """
    if classes is not None:
        correct, total = correct[classes], total[classes]
    samples = int(total.sum())
    return 100 * int(correct.sum()) / samples if samples else None
