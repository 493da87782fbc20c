"""Estimating the test images' own class prior, instead of weighting experts against each other."""

import math
from typing import Any

import torch
from torch import Tensor

from tade.aggregator import Views
from tade.asymmetry import TurningGauge, find_bias, interpolate, stability_asymmetry
from tade.calibration import Calibration, chunks, standardized
from tade.likelihood import LikelihoodAggregator
from tade.priors import EPSILON
from tade.state import finite_or_none

GRID = 121  # values of the skew s at which the likelihood is kept
LARGEST_ERROR = 1.0  # a standard error of s beyond which nothing is known of it
DEVIATION_STEPS = 200
LARGEST_DRIFT = -0.05  # correlation of class-wise deviations with the drift of a random view, from which they are noise
LARGEST_CARRIED = 0.6  # power of pi that an ensemble's logits may carry if the bias is to be found from stability
SAME = 1e-6  # standard deviation of log pi below which all classes are equally frequent


class PriorAggregator(LikelihoodAggregator):
    """Finds the test prior from unlabeled images: its skew, and with images enough, its value class by class.

    1. Skew. q_s(c) is proportional to pi_c^s: s is 1 for the training prior, 0 for uniform, below 0 for the other way
       round. The likelihood of the images is L(s) = sum_n log sum_c q_s(c) exp(u_n(c)) (Saerens et al., 2002, section
       2.2, whose q is free; here one number). s maximizes it within -`bound`..`bound`: L is taken at GRID values of s,
       the best is refined by the parabola through it and its neighbors, and drawn to 0 as far as its standard error is
       large against `skew_scale`.
    2. Bias. A long-trained network has overfitted its rare classes and under-scores them on new images: u is off by
       -beta log pi. A calibration takes that away. Without one, and with two random views of the images, beta is found
       from the stability of predictions (`tade.asymmetry.find_bias`), and u + beta log pi takes the place of u in step
       1. Not where the experts' mean carries more than log pi to the power of LARGEST_CARRIED: on a plain network
       (Softmax) the gauge is off by far. There, and without views, beta is the mean of its prior.
    3. Class by class. log q = slope * z + e with e ~ N(0, 1) for each class and z the standardized log pi, by maximum a
       posteriori: L - |e|^2 / 2 is maximized by LBFGS. Then r is e without its mean and its regression on z, and is
       believed as far as its variance is more than the class-wise miscalibration's: kappa = max(0, 1 - `class_noise`^2
       / var(r)) (the shrinkage of James and Stein). The answer is
       log q = (1 - kappa) * s log pi + kappa * (slope z + r). With few images e stays near 0 and kappa is 0. With two
       classes r is always 0. Where there are views, r has to pass a test (`_drifts_back`): the scores of briefly
       trained networks are off by more than `class_noise`.

    The standard error of s is that of sampling images, 1 / sqrt(-L''(s)), and with step 2 that of beta beside it.
    Without step 2 and without a calibration, s carries the bias of the scores, of which its error knows nothing.

    It falls back to the prior-free ensemble, and says so in "note", where logits are not finite, where all images are
    predicted as one class (one image always is), and where s stays unknown: a standard error above LARGEST_ERROR, or a
    likelihood that still rises at the bound of s, as with networks that were hardly trained.

    What is kept between calls: L at GRID values of s, the predicted images of each class [C], and of the latest
    `buffer` images [buffer, GRID] for step 2 and their likelihoods [buffer, C] in float32 for step 3, twice with views.
    A `fit` uses all images it is given. With forgetting, step 2 forgets nothing, as the bias is the network's
    (`tade.asymmetry.TurningGauge`), and keeps [5, GRID] instead.

    Cost: `fit` makes a float32 array [N, C], for step 3 with views a second one, multiplies it by [C, GRID] once, and
    reads it twice for each LBFGS evaluation (at most DEVIATION_STEPS iterations; 20 to 60 are usual). 24,426 images of
    8142 classes with views: 1.8 GiB beside all logits, and 14 s on two cores of a CPU. An `update` refits the
    class-wise part on the buffer: 0.5 s for 64 images of 8142 classes (`benchmarks/prior_cost.py`).

    Args:
        expert_log_priors, log_prior, calibration: see LikelihoodAggregator. E is 1 or more, C is 2 or more.
        debias: whether to do step 2, where no calibration is given. It takes views, as the test of step 3 does: they
            are asked for (`needs`), and `fit` and `update` can do without.
        bias_center, bias_scale: mean and standard deviation of the prior of b1 = beta times the standard deviation of
            log pi, in natural-log units. Calibrations on the labeled test images (`--calibrate_on_test` prints them)
            gave b1 / a of -0.41 (TADE, 200 epochs), -0.12 (30 epochs), -0.28 (RIDE) and -0.09 (Softmax, both 200) on
            CIFAR100-LT, and -0.08 on Caltech-101-LT: no network scores rare classes too high.
        largest_bias: of b1. What step 2 finds above it is taken as this: on hardly trained networks stability misleads.
        skew_scale: standard deviation of the prior of s, N(0, skew_scale^2), which counts where images are few.
        classwise: whether to do step 3.
        class_noise: standard deviation over the classes of how much a class's scores are off, in natural-log units. On
            CIFAR100-LT, where the test prior follows pi, r alone has one of 0.6 to 1.2; on free shifts 0.8 to 1.5.
        bound: largest |s|.
        forgetting: what an image counts for relative to the one after it in `update`, in 0..1: 1 forgets nothing, 0.999
            remembers about 1000 images. `fit` counts all its images fully. Over 2000 images that turn from forward50 to
            backward50 in batches of 32, 0.98 to 0.995 did equally well on CIFAR100-LT, 0.98 and 0.99 on the digits
            (`examples/turning_stream.py`).
        buffer: images kept for steps 2 and 3.

    Raises:
        ValueError: an argument is out of range; see LikelihoodAggregator.
    """

    def __init__(
        self,
        expert_log_priors: Tensor,
        log_prior: Tensor,
        calibration: list[float] | Calibration | None = None,
        debias: bool = True,
        bias_center: float = -0.2,
        bias_scale: float = 0.3,
        largest_bias: float = 0.0,
        skew_scale: float = 0.5,
        classwise: bool = True,
        class_noise: float = 0.65,
        bound: float = 3.0,
        forgetting: float = 1.0,
        buffer: int = 2048,
    ):
        if class_noise < 0 or min(bound, bias_scale, skew_scale) <= 0 or buffer < 1:
            raise ValueError(
                "class_noise must be at least 0, bound, bias_scale and skew_scale positive and buffer at least 1, not "
                f"{class_noise}, {bound}, {bias_scale}, {skew_scale} and {buffer}"
            )
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting must be above 0 and at most 1, not {forgetting}")
        self.largest_bias = largest_bias
        self.skew_scale = skew_scale
        self.classwise = classwise
        self.class_noise = class_noise
        self.forgetting = forgetting
        self.buffer = buffer
        self.grid = torch.linspace(-bound, bound, GRID, dtype=torch.float64)
        self.z = standardized(log_prior.cpu())
        centered = log_prior.double().cpu() - log_prior.double().cpu().mean()
        self.unit = float(centered.square().mean().sqrt())  # log pi = unit * z + constant
        self.log_normalizers = torch.logsumexp(self.grid[:, None] * centered, dim=1)  # of q_s, at every s
        super().__init__(expert_log_priors, log_prior, calibration)
        # The carried priors' mean as a power of pi: 0 for RIDE, about -1/3 for TADE, 1 for a plain network.
        carried = float(self.z @ expert_log_priors.double().cpu().mean(dim=0)) / len(log_prior) / max(self.unit, SAME)
        self.bias_prior: tuple[float, float] | None = None  # mean and standard deviation of beta's
        if debias and calibration is None and self.unit > SAME:
            self.bias_prior = bias_center / self.unit, bias_scale / self.unit
        self.finds_bias = self.bias_prior is not None and abs(carried) < LARGEST_CARRIED
        if self.finds_bias or classwise:
            self.needs = frozenset({"views"})

    def reset(self) -> None:
        super().reset()
        self._know_nothing()
        self.log_likelihood = torch.zeros_like(self.grid)  # L at every s, natural-log units
        self.predicted = torch.zeros_like(self.log_test_prior)  # images by the class that u predicts
        self.sum_of_weights, self.sum_of_squares = 0.0, 0.0  # of the images, for the standard error
        # Rows [K, .] and weights [K] of the latest images: their likelihoods [., C], those of a random view of them,
        # log evidence at every s with the asymmetry in the last column [., GRID + 1].
        widths = {"likelihoods": len(self.log_prior), "views": len(self.log_prior), "gauge": GRID + 1}
        none = torch.zeros(0, dtype=torch.float64)
        self.kept = {name: (torch.zeros(0, width), none) for name, width in widths.items()}
        self.gauge_sums = torch.zeros(5, GRID, dtype=torch.float64)  # of a TurningGauge

    learned = (
        *LikelihoodAggregator.learned,
        *("skew", "skew_error", "kappa", "beta", "beta_error"),
        *("log_likelihood", "predicted", "sum_of_weights", "sum_of_squares", "kept", "gauge_sums"),
    )

    def _know_nothing(self) -> None:
        self.skew, self.skew_error, self.kappa = 0.0, math.inf, 0.0
        self.beta, self.beta_error = 0.0, math.inf  # in units of log pi

    def fit_pass(self, logits: Tensor, views: Views | None, generator: torch.Generator | None) -> None:
        self._learn(logits, views if self.needs else None, torch.ones(len(logits), dtype=torch.float64), 1.0)

    def update(self, logits: Tensor, views: Views | None = None) -> None:
        ages = torch.arange(len(logits) - 1, -1, -1, dtype=torch.float64)
        self._learn(logits, views if self.needs else None, self.forgetting**ages, self.forgetting ** len(logits))

    def _learn(self, logits: Tensor, views: Views | None, weights: Tensor, decay: float) -> None:
        """Add images of the given weights [N], after what is known has lost all but `decay` of its own."""
        self._know_nothing()
        if not self.can_learn_from(logits, *(views or ())):
            return
        likelihoods = self.likelihoods(logits)
        evidence = self._count(likelihoods, weights, decay)
        self.kept = {name: (rows, decay * of_rows) for name, (rows, of_rows) in self.kept.items()}
        self.note = None
        certain = self._can_tell()
        if certain and self.unit > SAME:
            if views and self.finds_bias:
                self._find_bias(evidence, self._asymmetry(*views), weights)
                self.beta = min(self.beta, self.largest_bias / self.unit)
            elif self.bias_prior:
                self.beta, self.beta_error = self.bias_prior
            certain = self._find_skew()
        log_q = self.skew * self.unit * self.z
        if self.classwise:
            kept, kept_weights = self._keep("likelihoods", likelihoods, weights)
            kept_views = self._keep("views", self.likelihoods(views[0]), weights)[0] if views else None
            if certain:
                slope, deviations = self._find_deviations(kept, kept_weights)
                variance = float(deviations.square().mean())
                if variance > self.class_noise**2:
                    kappa = 1 - self.class_noise**2 / variance
                    classwise = (1 - kappa) * log_q + kappa * (slope * self.z + deviations)
                    if kept_views is None or self._drifts_back(deviations, classwise, kept, kept_views, kept_weights):
                        self.kappa, log_q = kappa, classwise
        self.log_test_prior = log_q
        self.correction = self.beta * self.unit * self.z

    def _count(self, likelihoods: Tensor, weights: Tensor, decay: float) -> Tensor:
        """Add images to the statistics of step 1: L at every s is a product of matrices, [N, C] by [C, GRID].

        Returns:
            log sum_c q_s(c) p(x_n|c) at every s, [N, GRID], float32.
        """
        for statistic in (self.log_likelihood, self.predicted):
            statistic.mul_(decay)
        self.sum_of_weights = decay * self.sum_of_weights + float(weights.sum())
        self.sum_of_squares = decay**2 * self.sum_of_squares + float(weights.square().sum())
        priors = (self.grid[:, None] * self.unit * self.z).softmax(dim=1).T.to(likelihoods)  # q_s, [C, GRID]
        evidence = torch.empty(len(likelihoods), GRID)
        for part, w, out in chunks(likelihoods, weights, evidence):
            log_evidence = torch.log((part @ priors).double()).cpu()
            self.log_likelihood += w @ log_evidence
            self.predicted.index_add_(0, part.argmax(dim=1).cpu(), w)
            out.copy_(log_evidence)
        return evidence

    def _keep(self, name: str, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Add images to those kept, of which the latest `buffer` stay; returns those before and all the new ones."""
        old_rows, old_weights = self.kept[name]
        if len(old_rows):  # a whole test set is not copied
            rows, weights = torch.cat([old_rows.to(rows), rows]), torch.cat([old_weights, weights])
        self.kept[name] = rows[-self.buffer :].clone(), weights[-self.buffer :].clone()
        return rows, weights

    def _asymmetry(self, view1: Tensor, view2: Tensor) -> Tensor:
        """a_n of the images, from expert logits of two views, [N, E, C] each: [N] on the CPU."""
        pairs = ((self.scores(one), self.scores(other)) for one, other in chunks(view1, view2))
        return torch.cat([stability_asymmetry(*pair, self.log_prior).cpu() for pair in pairs])

    def _can_tell(self) -> bool:
        """Whether anything can be told of the prior; if not, return to the prior-free ensemble."""
        if float(self.predicted.sum() - self.predicted.max()) < 0.5:  # not one image's weight
            self.reset_prior("all images are predicted as one class" if self.sum_of_weights else "there is no image")
            return False
        return True

    def _find_bias(self, evidence: Tensor, asymmetry: Tensor, weights: Tensor) -> None:
        """Step 2, with new images' log evidence [N, GRID], asymmetry and weights, [N] each."""
        assert self.bias_prior
        if self.forgetting < 1:
            gauge = TurningGauge(self.grid, self.log_normalizers, *self.bias_prior, self.gauge_sums)
            mean = self.log_likelihood / self.sum_of_weights + self.log_normalizers
            gauge.add(evidence + self.log_normalizers.float(), asymmetry, mean)
            self.beta, self.beta_error = gauge.bias()
            return
        kept, weights = self._keep("gauge", torch.cat([evidence, asymmetry[:, None]], dim=1), weights)
        evidence, asymmetry = kept[:, :-1] + self.log_normalizers.float(), kept[:, -1]
        self.beta, self.beta_error = find_bias(
            evidence, asymmetry, weights, self.grid, self.log_normalizers, *self.bias_prior
        )

    def _find_skew(self) -> bool:
        """Step 1, from the statistics; whether anything can be told of the prior."""
        found = self._likeliest_skew(self.beta)
        if isinstance(found, str):
            return self._give_up(found)
        self.skew, self.skew_error = found
        if math.isfinite(self.beta_error):
            other = self._likeliest_skew(self.beta + self.beta_error)
            if not isinstance(other, str):
                self.skew_error = math.hypot(self.skew_error, other[0] - self.skew)
        if not self.skew_error <= LARGEST_ERROR:
            return self._give_up(f"standard error {self.skew_error:.1f}")
        return True

    def _give_up(self, reason: str) -> bool:
        self.skew, self.skew_error, self.beta = 0.0, math.inf, 0.0
        self.reset_prior(f"the skew cannot be told from these images ({reason})")
        return False

    def _likeliest_skew(self, beta: float) -> tuple[float, float] | str:
        """The s of greatest likelihood and its standard error, of scores u + beta log pi; or why there is none."""
        step = float(self.grid[1] - self.grid[0])
        likelihood, grid = self.log_likelihood, self.grid
        if beta:  # L(s) = sum_n F_n(s + beta) - N G(s), for every s whose s + beta is in the grid
            log_sums = self.log_likelihood + self.sum_of_weights * self.log_normalizers
            grid = grid[(grid + beta > grid[0]) & (grid + beta < grid[-1])]
            likelihood = interpolate(grid + beta, self.grid, log_sums)
            likelihood = likelihood - self.sum_of_weights * interpolate(grid, self.grid, self.log_normalizers)
        best = int(likelihood.argmax())
        if best in (0, len(grid) - 1):
            return f"the likelihood still rises at a skew of {float(grid[best]):.1f}"
        below, at, above = likelihood[best - 1 : best + 2].tolist()
        curvature = 2 * at - below - above  # -L'' times the square of the grid's step
        spread = self.sum_of_squares / self.sum_of_weights  # 1 unless images are forgotten
        error = step * math.sqrt(spread / curvature) if curvature > 0 else math.inf
        if not error <= LARGEST_ERROR:
            return 0.0, error
        likeliest = float(grid[best]) + step * (above - below) / (2 * curvature)
        belief = 1 / (1 + (error / self.skew_scale) ** 2)  # in the images, against s ~ N(0, skew_scale^2)
        return belief * likeliest, math.sqrt(belief) * error

    def _find_deviations(self, likelihoods: Tensor, weights: Tensor) -> tuple[float, Tensor]:
        """Step 3: slope and r [C]. The gradient is written out, so that nothing but [N] and [C] is made anew."""
        total, z = float(weights.sum()), self.z
        corrected = (self.beta * self.unit * z).exp()  # of u + beta log pi over those of u
        x = torch.zeros(1 + len(z), dtype=torch.float64)  # slope, e
        x[0] = self.skew * self.unit

        def closure() -> float:
            q = (x[0] * z + x[1:]).softmax(dim=0)
            p = q * corrected
            evidence = (likelihoods @ p.to(likelihoods)).double().cpu()  # sum_c q(c) p(x_n|c), [N]
            images = (
                p * (likelihoods.T @ (weights / evidence).to(likelihoods)).double().cpu()
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

    def _drifts_back(
        self, deviations: Tensor, log_q: Tensor, likelihoods: Tensor, view_likelihoods: Tensor, weights: Tensor
    ) -> bool:
        """Whether a random view takes predictions away from the classes whose share is found to be large.

        A view hides what tells classes apart. Of classes that are frequent indeed it takes images away. Classes that
        only seem to be frequent, as hard images look like them, get still more.

        Args:
            deviations: r, [C].
            log_q: the test prior that would be taken, [C], up to a constant.
            likelihoods, view_likelihoods, weights: of the same images and of a view of them, [N, C] each, and [N].
        """
        p = log_q.softmax(dim=0) * (self.beta * self.unit * self.z).exp()

        def shares(of: Tensor) -> Tensor:
            """Expected images of each class, [C]."""
            evidence = (of @ p.to(of)).double().cpu()
            return p * (of.T @ (weights / evidence).to(of)).double().cpu()

        drift = (shares(view_likelihoods) + EPSILON).log() - (shares(likelihoods) + EPSILON).log()
        drift = drift - drift.mean()
        drift = drift - float(self.z @ drift) / max(float(self.z @ self.z), 1e-12) * self.z
        correlation = float(deviations @ drift) / max(float(deviations.norm() * drift.norm()), 1e-12)
        return correlation < LARGEST_DRIFT

    def report(self) -> dict[str, Any]:
        """LikelihoodAggregator's keys, "skew" s, "kappa" in 0..1, and "bias" b1: scores are u + b1 z, in natural-log
        units. "skew_standard_error" and "bias_standard_error" are None where unknown."""
        return {
            **super().report(),
            "skew": self.skew,
            "skew_standard_error": finite_or_none(self.skew_error),
            "bias": self.beta * self.unit,
            "bias_standard_error": finite_or_none(self.beta_error * self.unit),
            "kappa": self.kappa,
        }
