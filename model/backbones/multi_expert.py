"""A shared stem and E experts (RIDE, Wang et al., ICLR 2021, arXiv 2010.01809), whatever the blocks are.

Names of the parts that exist once per expert, as in published checkpoints: a network of one expert has `layer3`, one of
several has the ModuleList `layer3s` with one entry an expert (`layer3s.0.`, `layer3s.1.`, ...).
"""

import re
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSIFIER = "linear"  # the part that every backbone has


def experts_in(names: Iterable[str]) -> int:
    """Number of experts of the network that a state dict belongs to, by the names of its classifiers; 1 for others.

    Args:
        names: the state dict, or its keys, with or without `backbone.` before them.
    """
    found = (re.match(rf"(?:backbone\.)?{CLASSIFIER}s\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=0)


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


class MultiExpertBackbone(nn.Module):
    """Holds the parts that exist once per expert, and runs them.

    Subclasses build the stem, call `add_expert_part` in the order in which an expert applies its parts, then
    `add_classifiers`, and implement `stem`; those whose features are no feature maps override `pool`.

    Args:
        num_classes: C.
        use_norm: cosine classifiers with scale 30 instead of linear layers.
        num_experts: E >= 1.
    """

    def __init__(self, num_classes: int, use_norm: bool, num_experts: int):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        self.num_classes = num_classes
        self.num_experts = num_experts
        self.make_classifier = CosineClassifier if use_norm else nn.Linear
        self.scale = 30.0 if use_norm else 1.0
        self._parts: list[str] = []

    def add_expert_part(self, name: str, make: Callable[[], nn.Module]) -> None:
        if self.num_experts == 1:
            setattr(self, name, make())
        else:
            setattr(self, name + "s", nn.ModuleList(make() for _ in range(self.num_experts)))
        self._parts.append(name)

    def add_classifiers(self, in_features: int) -> None:
        self.add_expert_part(CLASSIFIER, lambda: self.make_classifier(in_features, self.num_classes))

    def expert_modules(self, expert: int) -> list[nn.Module]:
        """All parts of one expert, counted from 0, classifier last."""
        if self.num_experts == 1:
            return [getattr(self, name) for name in self._parts]
        return [getattr(self, name + "s")[expert] for name in self._parts]

    def plain_name(self, name: str) -> str | None:
        """The name in a plain network, as torchvision has it, of an entry of `state_dict`; None for a classifier's.

        Every expert's `layer3s.1.0.conv1.weight` is the plain network's `layer3.0.conv1.weight`.
        """
        part, _, rest = name.partition(".")
        if self.num_experts > 1 and part.removesuffix("s") in self._parts:
            part, rest = part.removesuffix("s"), rest.partition(".")[2]
        if part == CLASSIFIER:
            return None
        return f"{part}.{rest}" if rest else part

    def stem(self, images: Tensor) -> Tensor:
        """The layers all experts share: [B, 3, H, W] -> features, [B, channels, H', W'] in a convolutional network."""
        raise NotImplementedError

    def pool(self, features: Tensor) -> Tensor:
        """What a classifier sees of the last stage's features: global average pooling, [B, D, H', W'] -> [B, D]."""
        return features.mean(dim=(2, 3))

    def classify(self, classifier: nn.Module, feat: Tensor) -> Tensor:
        """[B, D] -> logits [B, C] in the precision of the classifier's weight, under autocast, too.

        Cosines times 30 would lose a digit in bfloat16: its steps between 16 and 32 are 0.125.
        """
        with torch.autocast(feat.device.type, enabled=False):
            return classifier(feat.to(classifier.weight.dtype)) * self.scale  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {"output": [B, C], "logits": [B, E, C], "feat": [B, E, D]}."""
        shared = self.stem(images)
        feats, scores = [], []
        for expert in range(self.num_experts):
            x = shared
            *stages, classifier = self.expert_modules(expert)
            for stage in stages:
                x = stage(x)
            feats.append(self.pool(x))
            scores.append(self.classify(classifier, feats[-1]))
        logits = torch.stack(scores, dim=1)
        return {"output": logits.mean(dim=1), "logits": logits, "feat": torch.stack(feats, dim=1)}
