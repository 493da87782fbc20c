"""Estimating the test images' own class prior, instead of weighting experts against each other."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tade.aggregator import Aggregator, Views
from tade.calibration import CHUNK, Calibration, as_calibration, standardized
from tade.priors import EPSILON

GRID = 121  # values of the skew s at which the likelihood is kept
LARGEST_ERROR = 1.0  # a standard error of s beyond which nothing is known of it
DEVIATION_STEPS = 200


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

    def reset(self) -> None:
        self.log_test_prior = torch.zeros(self.log_prior.shape, dtype=torch.float64)  # [C], up to a constant
        self.note: str | None = None

    def scores(self, logits: Tensor) -> Tensor:
        """Calibrated u: [N, E, C] -> [N, C]."""
        return self.calibration.apply(prior_free_logits(logits.float(), self.expert_log_priors), self.log_prior)

    def likelihoods(self, logits: Tensor) -> Tensor:
        """p(x|y) over its largest value for the image: [N, E, C] -> [N, C], float32, in 0..1.

        The logits are taken in chunks, so that this is the only array of its size.
        """
        result = logits.new_empty(len(logits), logits.shape[2], dtype=torch.float32)
        size = max(1, CHUNK // max(1, logits.shape[2]))
        for part, out in zip(torch.split(logits, size), torch.split(result, size), strict=True):
            u = self.scores(part)
            torch.exp(u - u.amax(dim=1, keepdim=True), out=out)
        return result

    def can_learn_from(self, logits: Tensor) -> bool:
        """Whether all logits are finite; if not, return to the prior-free ensemble and say so."""
        broken = len(logits) - int(torch.isfinite(logits).all(dim=2).all(dim=1).sum())
        if broken:
            self.reset_prior(f"{broken} of {len(logits)} images have logits that are not finite")
        return not broken

    def reset_prior(self, reason: str) -> None:
        """Fall back to the prior-free ensemble."""
        self.log_test_prior = torch.zeros_like(self.log_test_prior)
        self.note = f"{reason}: the prior-free ensemble is used instead"

    def predict(self, logits: Tensor) -> Tensor:
        """See Aggregator.

        Raises:
            ValueError: a logit is not finite.
        """
        if not torch.isfinite(logits).all():
            raise ValueError("logits must be finite: the network gives values that are not numbers for these images")
        return (self.scores(logits) + self.log_test_prior.to(logits.device, torch.float32)).log_softmax(dim=1)

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

    def __init__(
        self,
        expert_log_priors: Tensor,
        log_prior: Tensor,
        calibration: list[float] | Calibration | None = None,
        prior: Sequence[float] | Tensor | None = None,
    ):
        if prior is None:
            raise ValueError(
                "GivenPriorAggregator needs the test prior: give prior, the images or shares of each class"
            )
        shares = torch.as_tensor(prior, dtype=torch.float64).cpu()
        if shares.shape != log_prior.shape:
            raise ValueError(f"prior needs one number for each of {len(log_prior)} classes, not {list(shares.shape)}")
        if not torch.isfinite(shares).all() or bool((shares < 0).any()) or float(shares.sum()) <= 0:
            raise ValueError("prior needs finite numbers of at least 0, and one above 0")
        self.given = shares / shares.sum()
        super().__init__(expert_log_priors, log_prior, calibration)

    def reset(self) -> None:
        super().reset()
        self.log_test_prior = torch.log(self.given + EPSILON)

    def fit(
        self, logits: Tensor, views: Iterable[Views] | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Nothing to learn."""

    def update(self, logits: Tensor, views: Views | None = None) -> None:
        """Nothing to learn."""


class PriorAggregator(LikelihoodAggregator):
    """Finds the test prior from unlabeled images: its skew, and with images enough, its value class by class.

    1. Skew. q_s(c) is proportional to pi_c^s: s is 1 for the training prior, 0 for uniform, below 0 for the other way
       round. The likelihood of the images is L(s) = sum_n log sum_c q_s(c) exp(u_n(c)) (Saerens et al., 2002, section
       2.2, whose q is free; here one number). s maximizes it within -`bound`..`bound`: L is taken at GRID values of s,
       the best is refined by the parabola through it and its neighbors, and its standard error is
       1 / sqrt(-L''(s)). The error is that of sampling images; it knows nothing of a bias of the scores, which a
       calibration takes away.
    2. Class by class. log q = slope * z + e with e ~ N(0, 1) for each class and z the standardized log pi, by maximum a
       posteriori: L - |e|^2 / 2 is maximized by LBFGS. Then r is e without its mean and its regression on z, and is
       believed as far as its variance is more than the class-wise miscalibration's: kappa = max(0, 1 - `class_noise`^2
       / var(r)) (the shrinkage of James and Stein). The answer is
       log q = (1 - kappa) * s log pi + kappa * (slope z + r). With few images e stays near 0 and kappa is 0. With two
       classes r is always 0.

    It falls back to the prior-free ensemble, and says so in "note", where logits are not finite, where all images are
    predicted as one class (one image always is), and where s stays unknown: a standard error above LARGEST_ERROR. Where
    the likelihood still rises at the bound of s, s is taken as 0, and the class-wise part is kept.

    What is kept between calls: L at GRID values of s, the predicted images of each class [C], and, for the class-wise
    part, the likelihoods of the latest `buffer` images, [buffer, C] in float32. A `fit` uses all images it is given for
    both parts, beside what was kept.

    Cost: `fit` makes one float32 array [N, C], multiplies it by [C, GRID] once, and reads it twice for each LBFGS
    evaluation (at most DEVIATION_STEPS iterations; 20 to 60 are usual). 24,426 images of 8142 classes: 1.4 GiB beside
    the logits and 12 to 20 s on one core of a CPU. An `update` refits the class-wise part on the buffer: 0.5 s for 64
    images of 8142 classes (`benchmarks/prior_cost.py`).

    Args:
        expert_log_priors, log_prior, calibration: see LikelihoodAggregator. E is 1 or more, C is 2 or more.
        classwise: whether to do step 2.
        class_noise: standard deviation over the classes of how much a class's scores are off, in natural-log units. On
            CIFAR100-LT, where the test prior follows pi, r alone has one of 0.65 to 0.9; on free shifts 0.8 to 1.5.
        bound: largest |s|.
        forgetting: what an image counts for relative to the one after it in `update`, in 0..1: 1 forgets nothing, 0.999
            remembers about 1000 images. `fit` counts all its images fully.
        buffer: images kept for the class-wise part.

    Raises:
        ValueError: an argument is out of range; see LikelihoodAggregator.
    """

    def __init__(
        self,
        expert_log_priors: Tensor,
        log_prior: Tensor,
        calibration: list[float] | Calibration | None = None,
        classwise: bool = True,
        class_noise: float = 0.8,
        bound: float = 3.0,
        forgetting: float = 1.0,
        buffer: int = 2048,
    ):
        if class_noise < 0 or bound <= 0 or buffer < 1:
            raise ValueError(
                "class_noise must be at least 0, bound positive and buffer at least 1, not "
                f"{class_noise}, {bound} and {buffer}"
            )
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting must be above 0 and at most 1, not {forgetting}")
        self.classwise = classwise
        self.class_noise = class_noise
        self.forgetting = forgetting
        self.buffer = buffer
        self.grid = torch.linspace(-bound, bound, GRID, dtype=torch.float64)
        self.z = standardized(log_prior.cpu())
        centered = log_prior.double().cpu() - log_prior.double().cpu().mean()
        self.unit = float(centered.square().mean().sqrt())  # log pi = unit * z + constant
        super().__init__(expert_log_priors, log_prior, calibration)

    def reset(self) -> None:
        super().reset()
        self.skew, self.skew_error, self.kappa = 0.0, math.inf, 0.0
        self.log_likelihood = torch.zeros_like(self.grid)  # L at every s, natural-log units
        self.predicted = torch.zeros_like(self.log_test_prior)  # images by the class that u predicts
        self.sum_of_weights, self.sum_of_squares = 0.0, 0.0  # of the images, for the standard error
        self.kept = torch.zeros(0, len(self.log_prior))  # likelihoods of the latest images
        self.kept_weights = torch.zeros(0, dtype=torch.float64)

    def fit(
        self, logits: Tensor, views: Iterable[Views] | None = None, generator: torch.Generator | None = None
    ) -> None:
        self._learn(logits, torch.ones(len(logits), dtype=torch.float64), 1.0)

    def update(self, logits: Tensor, views: Views | None = None) -> None:
        ages = torch.arange(len(logits) - 1, -1, -1, dtype=torch.float64)
        self._learn(logits, self.forgetting**ages, self.forgetting ** len(logits))

    def _learn(self, logits: Tensor, weights: Tensor, decay: float) -> None:
        """Add images of the given weights [N], after what is known has lost all but `decay` of its own."""
        if not self.can_learn_from(logits):
            self.skew, self.skew_error, self.kappa = 0.0, math.inf, 0.0
            return
        likelihoods = self.likelihoods(logits)
        self._count(likelihoods, weights, decay)
        self.note = None
        certain = self._find_skew()
        log_q = self.skew * self.unit * self.z
        self.kappa = 0.0
        if self.classwise:
            kept = torch.cat([self.kept.to(likelihoods), likelihoods]) if len(self.kept) else likelihoods
            kept_weights = torch.cat([decay * self.kept_weights, weights])
            if certain:
                slope, deviations = self._find_deviations(kept, kept_weights)
                variance = float(deviations.square().mean())
                if variance > self.class_noise**2:
                    self.kappa = 1 - self.class_noise**2 / variance
                    log_q = (1 - self.kappa) * log_q + self.kappa * (slope * self.z + deviations)
            self.kept, self.kept_weights = kept[-self.buffer :].clone(), kept_weights[-self.buffer :].clone()
        self.log_test_prior = log_q

    def _count(self, likelihoods: Tensor, weights: Tensor, decay: float) -> None:
        """Add images to the statistics of step 1: L at every s is a product of matrices, [N, C] by [C, GRID]."""
        for statistic in (self.log_likelihood, self.predicted):
            statistic.mul_(decay)
        self.sum_of_weights = decay * self.sum_of_weights + float(weights.sum())
        self.sum_of_squares = decay**2 * self.sum_of_squares + float(weights.square().sum())
        priors = (self.grid[:, None] * self.unit * self.z).softmax(dim=1).T.to(likelihoods)  # q_s, [C, GRID]
        size = max(1, CHUNK // likelihoods.shape[1])
        for part, w in zip(torch.split(likelihoods, size), torch.split(weights, size), strict=True):
            evidence = torch.log((part @ priors).double()).cpu()  # log sum_c q_s(c) p(x_n|c), [n, GRID]
            self.log_likelihood += w @ evidence
            self.predicted.index_add_(0, part.argmax(dim=1).cpu(), w)

    def _find_skew(self) -> bool:
        """Step 1, from the statistics; whether anything can be told of the prior."""
        self.skew, self.skew_error = 0.0, math.inf
        if float(self.predicted.sum() - self.predicted.max()) < 0.5:  # not one image's weight
            self.reset_prior("all images are predicted as one class" if self.sum_of_weights else "there is no image")
            return False
        if self.unit < 1e-6:  # training classes equally frequent: s means nothing
            return True
        best = int(self.log_likelihood.argmax())
        if best in (0, GRID - 1):
            self.note = f"the likelihood still rises at a skew of {float(self.grid[best]):.1f}: the skew is taken as 0"
            return True
        below, at, above = self.log_likelihood[best - 1 : best + 2].tolist()
        curvature = 2 * at - below - above  # -L'' times the square of the grid's step
        step = float(self.grid[1] - self.grid[0])
        if curvature > 0:
            spread = self.sum_of_squares / self.sum_of_weights  # 1 unless images are forgotten
            self.skew_error = step * math.sqrt(spread / curvature)
        if not self.skew_error <= LARGEST_ERROR:
            self.reset_prior(f"the skew cannot be told from these images (standard error {self.skew_error:.1f})")
            return False
        self.skew = float(self.grid[best]) + step * (above - below) / (2 * curvature)
        return True

    def _find_deviations(self, likelihoods: Tensor, weights: Tensor) -> tuple[float, Tensor]:
        """Step 2: slope and r [C]. The gradient is written out, so that nothing but [N] and [C] is made anew."""
        total, z = float(weights.sum()), self.z
        x = torch.zeros(1 + len(z), dtype=torch.float64)  # slope, e
        x[0] = self.skew * self.unit

        def closure() -> float:
            log_q = (x[0] * z + x[1:]).log_softmax(dim=0)
            q = log_q.exp()
            evidence = (likelihoods @ q.to(likelihoods)).double().cpu()  # sum_c q(c) p(x_n|c), [N]
            images = (
                q * (likelihoods.T @ (weights / evidence).to(likelihoods)).double().cpu()
            )  # expected, of each class
            gradient = images - total * q
            x.grad = torch.cat([-(z @ gradient)[None], x[1:] - gradient])
            return float(0.5 * x[1:].square().sum() - weights @ evidence.log())

        optimizer = torch.optim.LBFGS(
            [x], max_iter=DEVIATION_STEPS, tolerance_grad=1e-3, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        e = x[1:] - x[1:].mean()
        on_z = float(z @ e) / max(float(z @ z), 1e-12)
        return float(x[0]), e - on_z * z

    def report(self) -> dict[str, Any]:
        """LikelihoodAggregator's keys, "skew" s, "skew_standard_error" (None where unknown) and "kappa" in 0..1."""
        return {
            **super().report(),
            "skew": self.skew,
            "skew_standard_error": self.skew_error if math.isfinite(self.skew_error) else None,
            "kappa": self.kappa,
        }
