"""Classifier heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineClassifier(nn.Module):
    """Cosine similarity between features and class weights, both L2-normalized (`use_norm` in configs).

    Args:
        in_features: D.
        num_classes: C. The weight is [D, C], one column a class.
    """

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(in_features, num_classes).uniform_(-1, 1), dim=0))

    def forward(self, feat: Tensor) -> Tensor:
        """feat [B, D] -> cosines [B, C], in -1..1 (the backbone multiplies them by its scale s)."""
        return F.normalize(feat, dim=1) @ F.normalize(self.weight, dim=0)


def make_classifier(in_features: int, num_classes: int, use_norm: bool) -> nn.Module:
    """Cosine classifier where `use_norm`, else a linear layer with bias; both map [B, D] to [B, C]."""
    return CosineClassifier(in_features, num_classes) if use_norm else nn.Linear(in_features, num_classes)


def classifier_scale(use_norm: bool) -> float:
    """Factor s on the classifier's output: 30 for cosines, 1 for linear logits."""
    return 30.0 if use_norm else 1.0
