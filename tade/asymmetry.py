"""A gauge of the test prior's skew that needs no label: is a prediction more stable tilted one way than the other?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_ERROR = 1e-5  # of m: below it is the rounding of float32, of two views that are equal
TILT = 1.5  # how far predictions are tilted, in units of log pi


def stability_asymmetry(view1: Tensor, view2: Tensor, log_prior: Tensor, tilt: float = TILT) -> Tensor:
    """a_n = cos(p+(v1), p+(v2)) - cos(p-(v1), p-(v2)) with p+-(v) = softmax(u(v) +- tilt log pi).

    The stability of predictions over two views (TADE, arXiv 2107.09249, equation 5), tilted towards the classes that
    are frequent in training, less that tilted towards the rare ones. Its mean over a test set falls and rises with the
    skew of the test prior, in a straight line through about 0 where the classes are balanced.

    Args:
        view1, view2: prior-free scores u of two random views of the same images, [N, C].
        log_prior: log of the training prior, log pi, [C].
        tilt: exponent of pi.

    Returns:
        [N], in -1..1.
    """
    shift = (tilt * (log_prior - log_prior.mean())).to(view1)
    towards_frequent, towards_rare = (
        F.cosine_similarity((view1 + sign * shift).softmax(dim=1), (view2 + sign * shift).softmax(dim=1), dim=1)
        for sign in (1, -1)
    )
    return towards_frequent - towards_rare


def find_bias(
    evidence: Tensor,
    asymmetry: Tensor,
    weights: Tensor,
    grid: Tensor,
    log_normalizers: Tensor,
    center: float,
    scale: float,
) -> tuple[float, float]:
    """How far the scores of a network are tilted against rare classes, from unlabeled images alone.

    A network that has overfitted its rare classes finds test images of them too much like frequent ones: its scores u
    are off by -beta log pi, beta < 0. The likelihood of the images cannot tell beta from the skew s of the test prior:
    whatever beta is, the s of greatest likelihood explains the images equally well. The asymmetry can, as it has to be
    0 on balanced classes. With F_n(t) = log sum_c pi_c^t exp(u_n(c)) and G(t) = log sum_c pi_c^t:

    1. For every total tilt t, the likelihood's s solves G'(s) = mean_n F'_n(t), and beta = t - s.
    2. Images of a prior pi^s are taken back to balanced classes by the importance weights p_balanced(x) / p_s(x), which
       are proportional to exp(F_n(beta) - F_n(t)). m(t) is the weighted mean of a_n, and has a standard error.
    3. beta minimizes (m / its standard error)^2 + ((beta - center) / scale)^2: a normal prior counts where the images
       are too few to tell.

    Args:
        evidence: F_n at every t of the grid, up to a constant of the image, [N, T].
        asymmetry: a_n, [N].
        weights: what each image counts for, [N].
        grid: evenly spaced values of t, and of s, [T].
        log_normalizers: G at the grid, [T].
        center, scale: mean and standard deviation of beta's prior.

    Returns:
        beta and its standard error.
    """
    step = float(grid[1] - grid[0])
    total = weights.sum()
    skew = _skew_of_tilts((weights / total) @ evidence.double(), grid, log_normalizers)
    beta = grid - skew
    inside = (beta > grid[0]) & (beta < grid[-1]) & (skew > grid[0]) & (skew < grid[-1])

    position = ((beta - grid[0]) / step).clamp(0, len(grid) - 1.001)
    left = position.long()
    part = (position - left).to(evidence)
    at_beta = evidence[:, left].lerp(evidence[:, left + 1], part)
    importance = (at_beta - evidence).double().exp() * weights[:, None]
    importance = importance / importance.sum(dim=0)
    mean = asymmetry.double() @ importance  # m, [T]
    deviation = asymmetry.double()[:, None] - mean
    error = (importance * deviation).square().sum(dim=0).sqrt()
    return _likeliest_bias(beta, mean, error, inside, center, scale)


class TurningGauge:
    """`find_bias` for a stream whose test prior turns: the skew is of the moment, the bias is the network's and stays.

    Images go back to balanced classes by the tilts that belonged together when they came: for every beta, the t(beta)
    of the images that the caller still remembers then, and s = t - beta. Their importance weights exp(F_n(beta) -
    F_n(t) + G(s) - G(0)) have a mean of 1 without being normalized, so that images of any moments add up. Sums over
    the images are kept, [T] each, and nothing of a single image.

    Args:
        grid, log_normalizers, center, scale: see `find_bias`.
        sums: of w, w a, w^2, w^2 a and w^2 a^2 over the images before, [5, T]; `add` adds to them.
    """

    def __init__(self, grid: Tensor, log_normalizers: Tensor, center: float, scale: float, sums: Tensor):
        self.grid = grid  # values of beta, too
        self.log_normalizers = log_normalizers
        self.center, self.scale = center, scale
        self.sums = sums

    def add(self, evidence: Tensor, asymmetry: Tensor, mean_evidence: Tensor) -> None:
        """Add images.

        Args:
            evidence, asymmetry: F_n at the grid [N, T] and a_n [N]; see `find_bias`.
            mean_evidence: the mean of F over the images that are remembered, up to a constant, [T].
        """
        skew = _skew_of_tilts(mean_evidence, self.grid, self.log_normalizers)
        known = (skew > self.grid[0]) & (skew < self.grid[-1])
        if not known.any():
            return
        beta, order = (self.grid - skew)[known].sort()
        tilt = interpolate(self.grid, beta, self.grid[known][order])  # t of every beta
        reached = (self.grid >= beta[0]) & (self.grid <= beta[-1])
        zero = interpolate(torch.zeros(1, dtype=torch.float64), self.grid, self.log_normalizers)
        normalizers = interpolate(tilt - self.grid, self.grid, self.log_normalizers) - zero
        at_tilt = interpolate(tilt, self.grid, evidence.double())
        w = torch.where(reached, (evidence.double() - at_tilt + normalizers).exp(), 0.0)
        a = asymmetry.double()[:, None]
        self.sums += torch.stack([x.sum(dim=0) for x in (w, w * a, w**2, w**2 * a, (w * a) ** 2)])

    def bias(self) -> tuple[float, float]:
        """beta and its standard error, from all images so far."""
        w, wa, ww, wwa, wawa = self.sums
        some = w > 0
        mean = torch.where(some, wa / w, 0.0)
        error = (wawa - 2 * mean * wwa + mean**2 * ww).clamp(min=0).sqrt() / w
        return _likeliest_bias(self.grid, mean, error, some, self.center, self.scale)


def _skew_of_tilts(mean_evidence: Tensor, grid: Tensor, log_normalizers: Tensor) -> Tensor:
    """The s that solves G'(s) = mean_n F'_n(t), at every t of the grid, from the mean of F there: [T] -> [T]."""
    step = float(grid[1] - grid[0])
    slopes = torch.gradient(log_normalizers, spacing=step)[0]
    return interpolate(torch.gradient(mean_evidence, spacing=step)[0], slopes, grid)


def _likeliest_bias(
    beta: Tensor, mean: Tensor, error: Tensor, inside: Tensor, center: float, scale: float
) -> tuple[float, float]:
    """Step 3 of `find_bias`: beta and its standard error, from m and its standard error at values of beta, [T] each.

    Only where `inside`; where the minimum is at the border of that, beta is what its prior says.
    """
    error = error.clamp(min=SMALLEST_ERROR)
    cost = (mean / error).square() + ((beta - center) / scale).square()
    cost[~inside] = math.inf
    best = int(cost.argmin())
    if not 0 < best < len(beta) - 1 or not inside[best - 1 : best + 2].all():
        return center, scale
    slope = float(mean[best + 1] - mean[best - 1]) / float(beta[best + 1] - beta[best - 1])
    below, at, above = cost[best - 1 : best + 2].tolist()
    curvature = below + above - 2 * at
    shift = 0.5 * (below - above) / curvature if curvature > 0 else 0.0
    neighbor = best + (1 if shift > 0 else -1)
    refined = float(beta[best] + abs(shift) * (beta[neighbor] - beta[best]))
    return refined, 1 / math.hypot(slope / float(error[best]), 1 / scale)


def interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation at increasing known points, ends held: x [M], known [T], values [..., T] -> [..., M]."""
    right = torch.searchsorted(known, x.contiguous()).clamp(1, len(known) - 1)
    part = ((x - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    return values[..., right - 1].lerp(values[..., right], part)
