"""The published method: expert weights that maximize prediction stability (TADE, arXiv 2107.09249, section 4.2)."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tade.aggregator import Aggregator, Views
from tade.state import copied, finite_or_none, fitting

COLLAPSED = 0.99  # one expert with this much of the weight is no longer an ensemble


def weighted_logits(weights: Tensor, logits: Tensor) -> Tensor:
    """Weighted sum of the experts' logits: weights [E] or [B, E], logits [B, E, C] -> [B, C]."""
    return (weights.unsqueeze(-1) * logits).sum(dim=1)


def prediction_stability(weights: Tensor, view1: Tensor, view2: Tensor) -> Tensor:
    """Mean cosine similarity of the predictions for two views of the same images (arXiv 2107.09249, equation 5).

    Departs from the paper, whose equation has the inner product of the two probability vectors, as its released code
    does.

    Args:
        weights: weights of the experts, [E], summing to 1.
        view1, view2: expert logits of the views, [B, E, C].

    Returns:
        Scalar in 0..1.
    """
    p1, p2 = (F.softmax(weighted_logits(weights, view), dim=1) for view in (view1, view2))
    return F.cosine_similarity(p1, p2, dim=1).mean()


def published_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """SGD as the paper trains CIFAR100-LT and the weights of its experts."""
    return SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


class StabilityAggregator(Aggregator):
    """Learns one weight an expert by SGD on the stability of predictions over two views.

    The network is frozen, so its logits are all that is needed and no gradient passes through it. Prediction is the
    softmax of the weighted sum of the experts' logits. The defaults are the published recipe.

    Args:
        expert_log_priors: [E, C], E at least 2; see Aggregator. Only its shape is of use here.
        log_prior: [C]; not used.
        epochs: passes over the test images, at most; each takes a new pair of views.
        batch_size: images in an update of `fit`.
        stop_below: after a pass, stop if any weight rounded to two decimals is below this.
        entropy_coefficient: the objective gains this times the entropy of the weights (iNaturalist: -0.01).
        fallback: return to equal weights at the end of `fit` when the learned ones have collapsed onto one expert or
            are less stable than equal weights on the views of the last pass.
        make_optimizer: parameters -> optimizer over them; default: `published_optimizer`.

    Raises:
        ValueError: there is one expert only, or an argument is out of range.
    """

    needs = frozenset({"views"})

    def __init__(
        self,
        expert_log_priors: Tensor,
        log_prior: Tensor,
        epochs: int = 5,
        batch_size: int = 128,
        stop_below: float = 0.05,
        entropy_coefficient: float = 0.0,
        fallback: bool = True,
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer] = published_optimizer,
    ):
        super().__init__(expert_log_priors, log_prior)
        if self.num_experts < 2:
            raise ValueError(
                "test-time training weights experts against each other and this network has one: use a network with "
                "num_experts of at least 2"
            )
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, not {epochs} and {batch_size}")
        self.epochs = epochs
        self.batch_size = batch_size
        self.stop_below = stop_below
        self.entropy_coefficient = entropy_coefficient
        self.fallback = fallback
        self.make_optimizer = make_optimizer
        self.reset()

    learned = ("history", "stability", "updates", "note")  # the parameter and the state of its optimizer beside these

    def reset(self) -> None:
        device = self.expert_log_priors.device
        self.parameter = nn.Parameter(torch.full((self.num_experts,), 1 / self.num_experts, device=device))
        self.optimizer = self.make_optimizer([self.parameter])
        self.history = torch.zeros(0, self.num_experts)  # weights after every pass
        self.stability: list[float] = []  # mean over the updates of a pass, before each update
        self.updates: list[float] = []  # stability before each update on a stream
        self.note: str | None = None

    @property
    def weights(self) -> Tensor:
        """Weights of the experts, [E], summing to 1."""
        return F.softmax(self.parameter.detach(), dim=0)

    def fit_pass(self, logits: Tensor, views: Views | None, generator: torch.Generator | None) -> bool:
        """One update for each batch. The last pass is number `epochs`, or leaves a weight below `stop_below`."""
        view1, view2 = self._checked(views)
        order = torch.randperm(len(view1), generator=generator)
        steps = [self._step(view1[batch], view2[batch]) for batch in torch.split(order, self.batch_size)]
        self.stability.append(sum(steps) / len(steps))
        self.history = torch.cat([self.history, self.weights.cpu()[None]])
        too_small = any(round(w, 2) < self.stop_below for w in self.weights.tolist())
        more = not too_small and len(self.stability) < self.epochs
        if not more and self.fallback:
            self._fall_back_if_worse(view1, view2)
        return more

    def _checked(self, views: Views | None) -> Views:
        if views is None:
            raise ValueError("StabilityAggregator needs two random views of the images for every pass: give views")
        self.check_finite(*views)
        view1, view2 = views
        if len(view1) != len(view2) or not len(view1):
            raise ValueError(f"views must be of the same images, one at least, not of {len(view1)} and {len(view2)}")
        return views

    def _step(self, view1: Tensor, view2: Tensor) -> float:
        """One update on a batch, expert logits [B, E, C] each; returns the stability before it."""
        weights = F.softmax(self.parameter, dim=0)
        stability = prediction_stability(weights, view1, view2)
        objective = stability
        if self.entropy_coefficient:
            objective = objective - self.entropy_coefficient * (weights * torch.log(weights + 1e-9)).sum()
        self.optimizer.zero_grad()
        (-objective).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(stability.detach())

    def _fall_back_if_worse(self, view1: Tensor, view2: Tensor) -> None:
        equal = torch.full_like(self.weights, 1 / self.num_experts)
        learned, before = (float(prediction_stability(w, view1, view2)) for w in (self.weights, equal))
        if not learned >= before:  # also when not a number
            self.note = f"less stable than equal weights ({learned:.4f} against {before:.4f})"
        elif float(self.weights.max()) >= COLLAPSED:
            self.note = f"collapsed onto one expert ({', '.join(f'{w:.2f}' for w in self.weights)})"
        if self.note:
            self.note += ": equal weights are used instead"
            with torch.no_grad():
                self.parameter.zero_()

    def update(self, logits: Tensor, views: Views | None = None) -> None:
        """One SGD step on a batch of a stream (the paper's streaming form has batches of 64). See Aggregator."""
        self.updates.append(self._step(*self._checked(views)))

    def state_dict(self) -> dict[str, Any]:
        own = {"parameter": copied(self.parameter), "optimizer": deepcopy(self.optimizer.state_dict())}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict({name: state[name] for name in state if name not in ("parameter", "optimizer")})
        try:
            parameter = fitting("parameter", state["parameter"], self.parameter.detach())
            self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
            kept = [value for entry in self.optimizer.state.values() for value in entry.values()]
            if any(isinstance(value, Tensor) and value.shape not in ((), parameter.shape) for value in kept):
                raise ValueError("a tensor of another shape than the weights'")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.reset()
            raise ValueError('"parameter" or "optimizer" in the state is not of this optimizer') from error
        with torch.no_grad():
            self.parameter.copy_(parameter)

    def predict(self, logits: Tensor) -> Tensor:
        self.check_finite(logits)
        return F.log_softmax(weighted_logits(self.weights, logits), dim=1)

    def report(self) -> dict[str, Any]:
        """Aggregator's keys, "weights_after_pass" [passes + 1, E] and "stability_in_pass" [passes]."""
        passes = [sum(self.updates) / len(self.updates)] if self.updates else self.stability
        equal = torch.full((1, self.num_experts), 1 / self.num_experts)
        history = torch.cat([equal, self.weights.cpu()[None] if self.updates else self.history])
        return {
            "weights": list(map(finite_or_none, self.weights.tolist())),
            "weights_after_pass": [list(map(finite_or_none, weights)) for weights in history.tolist()],
            "stability_in_pass": list(map(finite_or_none, passes)),
            "note": self.note,
        }
