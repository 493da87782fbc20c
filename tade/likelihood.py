"""Class probabilities under a test prior: the prior-free ensemble, and aggregators that add a prior to it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tade.aggregator import Aggregator, Views
from tade.calibration import Calibration, as_calibration, chunks
from tade.priors import EPSILON


def prior_free_logits(logits: Tensor, expert_log_priors: Tensor) -> Tensor:
    """u_n(c) = mean over experts of v_ne(c) - log prior_e(c): log p(x_n|c) up to a constant of the image.

    Each expert's logits learn log p(x|y) plus the log prior of what it was trained for (logit adjustment, Menon et al.,
    ICLR 2021, arXiv 2007.07314; Balanced Softmax, Ren et al., NeurIPS 2020). Without it, all of them estimate the
    same.

    Args:
        logits: v, [N, E, C].
        expert_log_priors: [E, C]; see Aggregator.

    Returns:
        [N, C]. No further array of the logits' size is made.
    """
    return logits.mean(dim=1) - expert_log_priors.mean(dim=0).to(logits)


class LikelihoodAggregator(Aggregator):
    """What aggregators by a test prior q have in common: log p(y|x) = u_y + log q_y - log sum_c q_c exp(u_c).

    u is the prior-free ensemble, calibrated where a calibration is given. A subclass learns `log_test_prior`; before
    that it is 0, the prior-free ensemble itself.

    Args:
        expert_log_priors: [E, C], E at least 1; see Aggregator.
        log_prior: [C]; see Aggregator.
        calibration: a Calibration or its three numbers [a, b1, b2]; None for none.

    Raises:
        ValueError: see Aggregator and Calibration.
    """

    def __init__(
        self,
        expert_log_priors: Tensor,
        log_prior: Tensor,
        calibration: list[float] | Calibration | None = None,
    ):
        super().__init__(expert_log_priors, log_prior)
        self.calibration = as_calibration(calibration)
        self.reset()

    learned: tuple[str, ...] = ("log_test_prior", "correction", "note")

    def reset(self) -> None:
        self.log_test_prior = torch.zeros(self.log_prior.shape, dtype=torch.float64)  # [C], up to a constant
        self.correction = torch.zeros_like(self.log_test_prior)  # [C], added to u: a bias found without labels
        self.note: str | None = None

    def scores(self, logits: Tensor) -> Tensor:
        """Calibrated u: [N, E, C] -> [N, C]."""
        return self.calibration.apply(prior_free_logits(logits.float(), self.expert_log_priors), self.log_prior)

    def likelihoods(self, logits: Tensor) -> Tensor:
        """p(x|y) over its largest value for the image: [N, E, C] -> [N, C], float32, in 0..1.

        The logits are taken in chunks, so that this is the only array of its size.
        """
        result = logits.new_empty(len(logits), logits.shape[2], dtype=torch.float32)
        for part, out in chunks(logits, result):
            u = self.scores(part)
            torch.exp(u - u.amax(dim=1, keepdim=True), out=out)
        return result

    def can_learn_from(self, logits: Tensor, *views: Tensor) -> bool:
        """Whether all logits are finite, of the images and of views of them; if not, use the prior-free ensemble.

        Raises:
            ValueError: shapes do not fit.
        """
        self.check(logits, *views)
        if any(len(view) != len(logits) for view in views):
            raise ValueError(f"views must be of the same {len(logits)} images, not of {[len(view) for view in views]}")
        finite = [torch.isfinite(tensor).all(dim=2).all(dim=1).cpu() for tensor in (logits, *views)]
        broken = len(logits) - int(torch.stack(finite).all(dim=0).sum())
        if broken:
            self.reset_prior(f"{broken} of {len(logits)} images have logits that are not finite")
        return not broken

    def reset_prior(self, reason: str) -> None:
        """Fall back to the prior-free ensemble."""
        self.log_test_prior = torch.zeros_like(self.log_test_prior)
        self.correction = torch.zeros_like(self.correction)
        self.note = f"{reason}: the prior-free ensemble is used instead"

    def predict(self, logits: Tensor) -> Tensor:
        self.check_finite(logits)
        shift = (self.log_test_prior + self.correction).to(logits.device, torch.float32)
        return (self.scores(logits) + shift).log_softmax(dim=1)

    @property
    def prior(self) -> Tensor:
        """The test prior q, [C], float64, summing to 1."""
        return self.log_test_prior.softmax(dim=0)

    def report(self) -> dict[str, Any]:
        """The keys "prior" [C] and "note" of Aggregator, and "calibration": [a, b1, b2]."""
        return {"prior": self.prior.tolist(), "calibration": self.calibration.numbers, "note": self.note}


class GivenPriorAggregator(LikelihoodAggregator):
    """For those who know the test prior: nothing is learned.

    With the test labels' own shares it is the oracle, a bound and no method.

    Args:
        expert_log_priors, log_prior, calibration: see LikelihoodAggregator.
        prior: images or shares of each class, [C], in any unit; a class of 0 is taken as having one in 10^9.

    Raises:
        ValueError: the prior is missing, has another length, a negative value, or no positive one.
    """

    learned = ()

    def __init__(self, *arguments: Any, prior: Sequence[float] | Tensor | None = None, **options: Any):
        if prior is None:
            raise ValueError(
                "GivenPriorAggregator needs the test prior: give prior, the images or shares of each class"
            )
        shares = torch.as_tensor(prior, dtype=torch.float64).cpu()
        if not torch.isfinite(shares).all() or bool((shares < 0).any()) or float(shares.sum()) <= 0:
            raise ValueError("prior needs finite numbers of at least 0, and one above 0")
        self.given = shares / shares.sum()
        super().__init__(*arguments, **options)
        classes = len(self.log_prior)
        if shares.shape != (classes,):
            raise ValueError(f"prior needs one number for each of {classes} classes, not {list(shares.shape)}")

    def reset(self) -> None:
        super().reset()
        self.log_test_prior = torch.log(self.given + EPSILON)

    def fit_pass(self, logits: Tensor, views: Views | None, generator: torch.Generator | None) -> None:
        """Nothing to learn."""
        self.check(logits)

    def update(self, logits: Tensor, views: Views | None = None) -> None:
        """Nothing to learn."""
        self.check(logits)
