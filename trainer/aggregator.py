"""Learning from unlabelled test images how to combine the experts (`aggregator.type` in a config)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["StabilityAggregator", "StreamingStabilityAggregator"]

COLLAPSED = 0.99  # one expert with this much of the weight is no longer an ensemble


def aggregate(weights: Tensor, logits: Tensor) -> Tensor:
    """Weighted sum of the experts' logits: weights [E] or [B, E], logits [B, E, C] -> [B, C]."""
    return (weights.unsqueeze(-1) * logits).sum(dim=1)


def prediction_stability(weights: Tensor, view1: Tensor, view2: Tensor) -> Tensor:
    """Mean cosine similarity of the predictions for two views of the same images (TADE, arXiv 2107.09249, section 4.2).

    Departs from the paper, whose equation has the inner product of the two probability vectors, as its released code
    does.

    Args:
        weights: weights of the experts, [E], summing to 1.
        view1, view2: expert logits of the views, [B, E, C].

    Returns:
        Scalar in 0..1.
    """
    p1, p2 = (F.softmax(aggregate(weights, view), dim=1) for view in (view1, view2))
    return F.cosine_similarity(p1, p2, dim=1).mean()


class Aggregator(ABC):
    """Combines the experts of one network for one unlabelled test set.

    `fit_pass` is called with a new draw of views until `finished`; then `predict` scores images and `report` says what
    was learned. The images given to `fit_pass` and `predict` are the same, in the same order.

    Attributes:
        finished: whether further passes would change nothing.
        weights: the experts' weights, [E], summing to 1.
    """

    finished: bool
    weights: Tensor

    @abstractmethod
    def fit_pass(self, view1: Tensor, view2: Tensor, generator: torch.Generator) -> None:
        """Learn from one draw of two views of every image.

        Args:
            view1, view2: expert logits, [N, E, C].
            generator: for shuffling.
        """

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """Expert logits of the un-augmented images [N, E, C] -> class scores [N, C]."""

    @abstractmethod
    def report(self) -> dict:
        """What was learned, as plain numbers and lists."""


class StabilityAggregator(Aggregator):
    """The published method: expert weights that maximize prediction stability over two views, by SGD.

    The network is frozen, so all there is to learn is one number an expert; its logits are given and no gradient passes
    through the network.

    Args:
        num_experts: E.
        make_optimizer: parameters -> optimizer over them (the config's `optimizer`).
        epochs: passes over the test images, at most.
        batch_size: images in an update.
        stop_below: after a pass, stop if any weight rounded to two decimals is below this.
        entropy_coefficient: the objective gains this times the entropy of the weights (iNaturalist: -0.01).
        fallback: return to equal weights when the learned ones have collapsed onto one expert or are less stable than
            equal weights on the views of the last pass.
    """

    def __init__(
        self,
        num_experts: int,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        epochs: int = 5,
        batch_size: int = 128,
        stop_below: float = 0.05,
        entropy_coefficient: float = 0.0,
        fallback: bool = True,
    ):
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, not {epochs} and {batch_size}")
        self.epochs, self.batch_size, self.stop_below = epochs, batch_size, stop_below
        self.entropy_coefficient, self.fallback = entropy_coefficient, fallback
        self.parameter = nn.Parameter(torch.full((num_experts,), 1 / num_experts))
        self.optimizer = make_optimizer([self.parameter])
        self.history = [self.weights.tolist()]
        self.stability: list[float] = []  # mean over the updates of a pass, before each update
        self.note: str | None = None
        self.finished = False

    @property
    def weights(self) -> Tensor:
        return F.softmax(self.parameter.detach(), dim=0)

    def update(self, view1: Tensor, view2: Tensor) -> float:
        """One step on a batch, expert logits [B, E, C] each; returns the stability before it."""
        weights = F.softmax(self.parameter, dim=0)
        stability = prediction_stability(weights, view1, view2)
        objective = stability
        if self.entropy_coefficient:
            objective = objective - self.entropy_coefficient * (weights * torch.log(weights + 1e-9)).sum()
        self.optimizer.zero_grad()
        (-objective).backward()
        self.optimizer.step()
        return float(stability.detach())

    def fit_pass(self, view1: Tensor, view2: Tensor, generator: torch.Generator) -> None:
        order = torch.randperm(len(view1), generator=generator)
        steps = [self.update(view1[rows], view2[rows]) for rows in order.split(self.batch_size)]
        self.stability.append(sum(steps) / len(steps))
        self.history.append(self.weights.tolist())
        too_small = any(round(w, 2) < self.stop_below for w in self.history[-1])
        self.finished = too_small or len(self.stability) >= self.epochs
        if self.finished and self.fallback:
            self._fall_back_if_worse(view1, view2)

    def _fall_back_if_worse(self, view1: Tensor, view2: Tensor) -> None:
        equal = torch.full_like(self.weights, 1 / len(self.weights))
        learned, before = (float(prediction_stability(w, view1, view2)) for w in (self.weights, equal))
        if not learned >= before:  # also when not a number
            self.note = f"less stable than equal weights ({learned:.4f} against {before:.4f})"
        elif len(equal) > 1 and float(self.weights.max()) >= COLLAPSED:
            self.note = f"collapsed onto one expert ({', '.join(f'{w:.2f}' for w in self.weights)})"
        if self.note:
            self.note += ": equal weights are used instead"
            with torch.no_grad():
                self.parameter.zero_()

    def predict(self, logits: Tensor) -> Tensor:
        return aggregate(self.weights, logits)

    def report(self) -> dict:
        return {
            "weights_after_pass": [[_finite(w) for w in weights] for weights in self.history],
            "stability_in_pass": [_finite(s) for s in self.stability],
            "note": self.note,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class StreamingStabilityAggregator(StabilityAggregator):
    """The same for images that arrive one batch after the other: update on a batch, then predict that batch.

    Every image is seen once; the weights that an image is predicted with are those after its own batch. There is no
    falling back, since earlier predictions are already given away.

    Args:
        num_experts, make_optimizer, entropy_coefficient: as in StabilityAggregator.
        batch_size: images that arrive together.
    """

    def __init__(
        self,
        num_experts: int,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        batch_size: int = 64,
        entropy_coefficient: float = 0.0,
    ):
        super().__init__(
            num_experts,
            make_optimizer,
            epochs=1,
            batch_size=batch_size,
            fallback=False,
            entropy_coefficient=entropy_coefficient,
        )

    def fit_pass(self, view1: Tensor, view2: Tensor, generator: torch.Generator) -> None:
        order = torch.randperm(len(view1), generator=generator)
        self.image_weights = view1.new_empty(len(view1), view1.shape[1])  # [N, E]
        steps = []
        for rows in order.split(self.batch_size):
            steps.append(self.update(view1[rows], view2[rows]))
            self.image_weights[rows] = self.weights
        self.stability.append(sum(steps) / len(steps))
        self.history.append(self.weights.tolist())
        self.finished = True

    def predict(self, logits: Tensor) -> Tensor:
        return aggregate(self.image_weights, logits)
