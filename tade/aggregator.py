"""The contract of everything that adapts a trained classifier to unlabeled test images."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tade.state import copied, fitting

Views = tuple[Tensor, Tensor]
"""Expert logits of two random views of the same images, two of [N, E, C]."""


class Aggregator(ABC):
    """Turns the logits of E experts into class probabilities for one unlabeled test set.

    It sees logits and what is known about training, never a label. `fit` on the test images, or `update` on a stream
    of them, learns; `predict` then scores any images, in any order. A class of your own writes `fit_pass`, `predict`
    and `reset`, for streams also `update` and `learned`; `check_aggregator` tells whether it keeps this contract.

    Args:
        expert_log_priors: the log prior that each expert's logits carry, up to a constant, [E, C]: zeros for a uniform
            one, log pi for a plain network trained by cross entropy (E is 1).
        log_prior: log of the training set's class prior, [C].

    Raises:
        ValueError: the shapes do not fit each other, or a value is not finite.
    """

    #: What `fit` and `update` want beside logits: "views" for two random views of the images.
    needs: frozenset[str] = frozenset()

    #: Names of the attributes that hold what was learned: tensors, numbers, text, lists of numbers, and dicts or tuples
    #: of these. `reset` gives each its first value. None where there is no `state_dict`.
    learned: tuple[str, ...] | None = None

    def __init__(self, expert_log_priors: Tensor, log_prior: Tensor):
        if expert_log_priors.ndim != 2 or log_prior.shape != expert_log_priors.shape[1:]:
            raise ValueError(
                "expert_log_priors must be [E, C] and log_prior [C], not "
                f"{list(expert_log_priors.shape)} and {list(log_prior.shape)}"
            )
        if not (torch.isfinite(expert_log_priors).all() and torch.isfinite(log_prior).all()):
            raise ValueError("log priors must be finite: give every class at least one training image")
        self.expert_log_priors = expert_log_priors
        self.log_prior = log_prior

    @property
    def num_experts(self) -> int:
        """E."""
        return self.expert_log_priors.shape[0]

    def fit(
        self, logits: Tensor, views: Iterable[Views] | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Forget what was learned, and learn from a whole test set.

        Args:
            logits: expert logits of the images, [N, E, C].
            views: where `needs` has "views": pairs of views of the same images in the same order, one pair for each
                pass over them, new random views every time. No more are taken than are of use, so that a generator
                computes no views in vain.
            generator: for whatever is random, on the CPU.

        Raises:
            ValueError: views are needed and missing, or shapes do not fit.
        """
        self.reset()
        pairs = iter(views or ())
        pair = next(pairs, None)
        while self.fit_pass(logits, pair, generator):
            if (pair := next(pairs, None)) is None:
                return

    @abstractmethod
    def fit_pass(self, logits: Tensor, views: Views | None, generator: torch.Generator | None) -> bool | None:
        """One pass of `fit` over the images, for callers that share views between several aggregators.

        Args:
            logits, generator: see `fit`.
            views: one pair, or None where there is none.

        Returns:
            Whether another pass with new views is of use.
        """

    def update(self, logits: Tensor, views: Views | None = None) -> None:
        """Learn from one more batch of a stream.

        Args:
            logits: expert logits of the batch, [B, E, C].
            views: where `needs` has "views": two random views of the batch.

        Raises:
            NotImplementedError: this aggregator needs a whole test set.
            ValueError: views are needed and missing, or shapes do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} learns from a whole test set (fit), not from a stream")

    @classmethod
    def follows_streams(cls) -> bool:
        """Whether there is an `update`."""
        return cls.update is not Aggregator.update

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """log p(y|x) under the test distribution as far as it is known. [N, E, C] -> [N, C]; keeps no state.

        Raises:
            ValueError: the logits have another number of experts or classes than the priors, or are not finite.
        """

    def check(self, *logits: Tensor) -> None:
        """Raise ValueError unless each is [N, E, C], with E and C of the priors: torch would broadcast in silence."""
        experts, classes = self.expert_log_priors.shape
        for tensor in logits:
            if tensor.ndim != 3 or tensor.shape[1:] != self.expert_log_priors.shape:
                raise ValueError(f"expert logits must be [N, {experts}, {classes}], not {list(tensor.shape)}")

    def check_finite(self, *logits: Tensor) -> None:
        """`check`, and raise ValueError unless all logits are finite."""
        self.check(*logits)
        for tensor in logits:
            if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
                raise ValueError("logits must be finite: the network gives values that are not numbers")

    @abstractmethod
    def reset(self) -> None:
        """Forget what was learned."""

    def state_dict(self) -> dict[str, Any]:
        """What was learned, so that a stream can go on in another process: tensors, plain values, containers of them.

        Raises:
            NotImplementedError: this aggregator does not offer it.
        """
        if self.learned is None:
            raise NotImplementedError(f"{type(self).__name__} has no state_dict: it does not say what it has learned")
        return {name: copied(getattr(self, name)) for name in self.learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, as if everything before had been learned here.

        Args:
            state: of an aggregator of the same class, made with the same arguments.

        Raises:
            NotImplementedError: this aggregator does not offer it.
            ValueError: the state does not fit; then nothing is known of the images, as after `reset`.
        """
        self.reset()
        vars(self).update(fitting("learned", state, Aggregator.state_dict(self)))

    def report(self) -> dict[str, Any]:
        """What was learned, as plain numbers, lists and strings.

        Keys with a meaning everywhere: "weights" [E], "prior" [C] (the estimated test prior), "note" (why it fell back,
        or None). Numbers that are not finite are None.
        """
        return {}
