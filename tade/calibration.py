"""Three numbers that take the bias out of a network's class scores, learned from a few labeled images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 22  # scores [n, C] that are worked on at once: 32 MiB in float64
NEWTON_STEPS = 50


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors [N, ...] with the same images: CHUNK scores of the first one, which is [N, C] or [N, E, C]."""
    size = max(1, CHUNK // max(1, tensors[0].shape[-1]))
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)


def standardized(log_prior: Tensor) -> Tensor:
    """z: a log prior less its mean over the classes, in units of its standard deviation. [C] -> [C], float64.

    Zeros where all classes are equally frequent.
    """
    centered = log_prior.double() - log_prior.double().mean()
    deviation = centered.square().mean().sqrt()
    return centered / deviation if float(deviation) > 1e-6 else torch.zeros_like(centered)


@dataclass(frozen=True)
class Calibration:
    """Class scores u -> a u + b1 z + b2 z^2, with z the standardized log training prior.

    The scale a is below 1 for an over-confident network. b1 and b2 take back what a network adds to the scores of rare
    or frequent classes on images that it was not trained on. Vector scaling and its kin (Alexandari et al., ICML 2020,
    arXiv 1901.06852) give every class a bias of its own; a curve over z has two numbers and makes do with one image a
    class.

    Args:
        a: scale, without unit.
        b1, b2: natural-log units, for one and for the square of one standard deviation of the log training prior.
        standard_errors: of a, b1, b2; None where they are not known.
    """

    a: float = 1.0
    b1: float = 0.0
    b2: float = 0.0
    standard_errors: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in self.numbers) or self.a <= 0:
            raise ValueError(
                f"calibration needs finite numbers and a positive scale a, not {self.numbers}: a scale of zero or less "
                "means that the scores say nothing of the class"
            )

    @property
    def numbers(self) -> list[float]:
        """[a, b1, b2], which is how configs and results write it."""
        return [float(self.a), float(self.b1), float(self.b2)]

    def apply(self, scores: Tensor, log_prior: Tensor) -> Tensor:
        """Calibrated scores: u [N, C], log training prior [C] -> [N, C]."""
        z = standardized(log_prior)
        return self.a * scores + (self.b1 * z + self.b2 * z.square()).to(scores)


def as_calibration(value: Calibration | Sequence[float] | None) -> Calibration:
    """What a config or a caller gives: a Calibration, [a, b1, b2], or None for none.

    Raises:
        ValueError: not three numbers, or no calibration.
    """
    if value is None or isinstance(value, Calibration):
        return value or Calibration()
    if len(value) != 3:
        raise ValueError(f"calibration is three numbers, a, b1 and b2, not {len(value)}")
    return Calibration(value[0], value[1], value[2])


def fit_calibration(
    scores: Tensor,
    targets: Tensor,
    log_prior: Tensor,
    label_log_prior: Tensor | None = None,
    ridge: float = 4.0,
) -> Calibration:
    """The calibration by maximum likelihood on labeled images that the network was not trained on.

    Maximizes sum_n log softmax(a u + b1 z + b2 z^2 + m)[y_n] - ridge/2 * ((a - 1)^2 + b1^2 + b2^2), with m the log
    prior of the labeled images themselves, by Newton's method with step halving: the objective is concave. So the
    labeled images may have any class mix, and what is learned holds for every test prior.

    The ridge counts as one prior observation with standard deviation 1/sqrt(ridge), 0.5, of each number: next to
    nothing from a hundred images on, and what holds the numbers where the images are few or all classified correctly
    (a would run to infinity otherwise). Standard errors come from the Hessian, ridge included.

    Memory is a chunk's (CHUNK scores) beside the scores; a Newton step takes six passes over them.

    Args:
        scores: u of the labeled images, [N, C], e.g. `prior_free_logits`.
        targets: their labels, [N].
        log_prior: log of the training prior, [C].
        label_log_prior: log of the labeled images' prior, [C], where it is known by design; None for their own class
            shares. With those, classes without a labeled image do not compete.
        ridge: positive.

    Raises:
        ValueError: there is no image, the shapes do not fit, a value is not finite, a target's label_log_prior is not
            finite, or the scale comes out at zero or below.
    """
    count, classes = scores.shape
    if count < 1 or targets.shape != (count,) or log_prior.shape != (classes,):
        raise ValueError(
            "calibration needs scores [N, C], targets [N] and log_prior [C] with at least one image, not "
            f"{list(scores.shape)}, {list(targets.shape)} and {list(log_prior.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise ValueError("calibration needs finite scores: the network gives values that are not numbers")
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, not {ridge}")
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(f"targets must be classes from 0 to {classes - 1}")
    if label_log_prior is None:
        label_log_prior = torch.bincount(targets, minlength=classes).double().div(count).log()
    label_log_prior = label_log_prior.double().cpu()
    if label_log_prior.shape != (classes,) or not torch.isfinite(label_log_prior[targets.cpu()]).all():
        raise ValueError(f"label_log_prior must be [{classes}] and finite for every class that has a labeled image")

    z = standardized(log_prior).cpu()
    bias = torch.stack([z, z.square()], dim=1)  # [C, 2]
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    def derivatives(theta: Tensor) -> tuple[float, Tensor, Tensor]:
        """Objective, gradient [3] and negative Hessian [3, 3]: canonical parameters, so moments of (u, z, z^2)."""
        value = -0.5 * ridge * float((theta - start).square().sum())
        gradient = -ridge * (theta - start)
        information = ridge * torch.eye(3, dtype=torch.float64)
        for u, y in chunks(scores, targets):
            u, y = u.double().cpu(), y.cpu()
            u = u - u.mean(dim=1, keepdim=True)
            log_p = (theta[0] * u + bias @ theta[1:] + label_log_prior).log_softmax(dim=1)
            p, pick = log_p.exp(), y[:, None]
            pu = p * u
            mean = torch.cat([pu.sum(dim=1, keepdim=True), p @ bias], dim=1)  # [n, 3]
            value += float(log_p.gather(1, pick).sum())
            gradient += (torch.cat([u.gather(1, pick), bias[y]], dim=1) - mean).sum(dim=0)
            second = torch.empty(3, 3, dtype=torch.float64)
            second[0, 0] = (pu * u).sum()
            second[0, 1:] = second[1:, 0] = pu.sum(dim=0) @ bias
            second[1:, 1:] = bias.T @ (p.sum(dim=0)[:, None] * bias)
            information += second - mean.T @ mean
        return value, gradient, information

    theta = start.clone()
    value, gradient, information = derivatives(theta)
    for _ in range(NEWTON_STEPS):
        step = torch.linalg.solve(information, gradient)
        if float(gradient @ step) < 1e-10:  # twice the gain that is left, in natural-log units
            break
        for _ in range(30):
            trial = derivatives(theta + step)
            if trial[0] >= value:
                break
            step = step / 2
        else:
            break
        theta = theta + step
        value, gradient, information = trial
    errors = torch.linalg.inv(information).diagonal().sqrt().tolist()
    a, b1, b2 = theta.tolist()
    return Calibration(a, b1, b2, (errors[0], errors[1], errors[2]))
