"""A gauge of the test prior's skew that needs no label: is a prediction more stable tilted one way than the other?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
    3. beta minimizes (m / its standard error)^2 + (beta / scale)^2: a normal prior of mean 0 takes beta to 0 where the
       images are too few to tell.

    Args:
        evidence: F_n at every t of the grid, up to a constant of the image, [N, T].
        asymmetry: a_n, [N].
        weights: what each image counts for, [N].
        grid: evenly spaced values of t, and of s, [T].
        log_normalizers: G at the grid, [T].
        scale: standard deviation of beta's prior.

    Returns:
        beta and its standard error.
    """
    step = float(grid[1] - grid[0])
    total = weights.sum()
    mean_slope = torch.gradient((weights / total) @ evidence.double(), spacing=step)[0]
    skew = interpolate(mean_slope, torch.gradient(log_normalizers, spacing=step)[0], grid)  # s of every t
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
    error = (importance * deviation).square().sum(dim=0).sqrt().clamp(min=1e-9)
    cost = (mean / error).square() + (beta / scale).square()
    cost[~inside] = math.inf
    best = int(cost.argmin())
    if not 0 < best < len(grid) - 1 or not inside[best - 1 : best + 2].all():
        return 0.0, scale
    slope = float(mean[best + 1] - mean[best - 1]) / float(beta[best + 1] - beta[best - 1])
    below, at, above = cost[best - 1 : best + 2].tolist()
    curvature = below + above - 2 * at
    shift = 0.5 * (below - above) / curvature if curvature > 0 else 0.0
    neighbor = best + (1 if shift > 0 else -1)
    refined = float(beta[best] + abs(shift) * (beta[neighbor] - beta[best]))
    return refined, 1 / math.hypot(slope / float(error[best]), 1 / scale)


def interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of values at increasing known points, ends held: x [M], known [T], values [T] -> [M]."""
    right = torch.searchsorted(known, x.contiguous()).clamp(1, len(known) - 1)
    part = ((x - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    return values[right - 1].lerp(values[right], part)
