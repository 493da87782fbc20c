"""A shared stem and E experts (RIDE, Wang et al., ICLR 2021, arXiv 2010.01809), whatever the blocks are."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.layers import classifier_scale, make_classifier


class MultiExpertBackbone(nn.Module):
    """Holds the parts that exist once per expert, and runs them.

    A part `layer3` is stored as the ModuleList `layer3s` with one entry an expert; a network of one expert stores it
    as plain `layer3`. The names are those of published checkpoints.

    Subclasses build the stem, call `add_expert_part` in the order in which an expert applies its parts, then
    `add_classifiers`, and implement `stem`.

    Args:
        num_experts: E >= 1.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        self.num_experts = num_experts
        self._parts: list[str] = []

    def add_expert_part(self, name: str, make: Callable[[], nn.Module]) -> None:
        if self.num_experts == 1:
            setattr(self, name, make())
        else:
            setattr(self, name + "s", nn.ModuleList(make() for _ in range(self.num_experts)))
        self._parts.append(name)

    def add_classifiers(self, in_features: int, num_classes: int, use_norm: bool) -> None:
        self.add_expert_part("linear", lambda: make_classifier(in_features, num_classes, use_norm))
        self.scale = classifier_scale(use_norm)

    def expert_part(self, name: str, expert: int) -> nn.Module:
        """The part of one expert, counted from 0."""
        return getattr(self, name) if self.num_experts == 1 else getattr(self, name + "s")[expert]

    def expert_modules(self, expert: int) -> list[nn.Module]:
        """All parts of one expert, counted from 0, classifier last."""
        return [self.expert_part(name, expert) for name in self._parts]

    def stem(self, images: Tensor) -> Tensor:
        """The layers all experts share: [B, 3, H, W] -> [B, channels, H', W']."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {"output": [B, C], "logits": [B, E, C], "feat": [B, E, D]}."""
        shared = self.stem(images)
        feats, logits = [], []
        for expert in range(self.num_experts):
            x = shared
            *stages, classifier = self.expert_modules(expert)
            for stage in stages:
                x = stage(x)
            feats.append(x.mean(dim=(2, 3)))  # global average pooling, [B, D]
            logits.append(classifier(feats[-1]) * self.scale)
        logits = torch.stack(logits, dim=1)
        return {"output": logits.mean(dim=1), "logits": logits, "feat": torch.stack(feats, dim=1)}
