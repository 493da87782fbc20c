"""The bias of a network from the asymmetry of its stability, against NumPy and against what can be solved by hand."""

import math

import numpy as np
import pytest
import torch

from tade.asymmetry import SMALLEST_ERROR, TurningGauge, find_bias, interpolate, stability_asymmetry

LOG_PI = np.linspace(0, -3, 6)  # of six classes
GRID = np.linspace(-3, 3, 61)
NORMALIZERS = np.log(np.exp(GRID[:, None] * LOG_PI).sum(axis=1))  # G
CENTER, SCALE = 0.1, 0.4


def tensors(*arrays):
    return [torch.as_tensor(array) for array in arrays]


def images(skew: float, count: int = 300, seed: int = 0, bias: float = 0.4):
    """F_n at the grid [N, T], a_n [N] and weights [N] of images with the class prior pi^skew."""
    generator = np.random.RandomState(seed)
    prior = np.exp(skew * LOG_PI)
    targets = generator.choice(len(LOG_PI), count, p=prior / prior.sum())
    u = 2 * (2 * np.eye(len(LOG_PI))[targets] + generator.standard_normal((count, len(LOG_PI)))) - bias * LOG_PI
    evidence = np.log(np.exp(GRID[:, None] * LOG_PI + u[:, None]).sum(axis=2))
    asymmetry = 0.1 * (targets < 3) - 0.05 + 0.1 * generator.standard_normal(count) + 0.02 * skew
    return evidence, asymmetry, generator.rand(count) + 0.5


def skew_of_tilts(mean_evidence):
    """Step 1."""
    step = GRID[1] - GRID[0]
    return np.interp(np.gradient(mean_evidence, step), np.gradient(NORMALIZERS, step), GRID)


def likeliest(beta, mean, error, inside):
    """Step 3, by the parabola through the three best points."""
    cost = (mean / error) ** 2 + ((beta - CENTER) / SCALE) ** 2
    best = int(np.argmin(np.where(inside, cost, math.inf)))
    assert inside[best - 1] and inside[best + 1]
    a, b, _ = np.polyfit([-1, 0, 1], cost[best - 1 : best + 2], 2)
    found = np.interp(-b / (2 * a), [-1, 0, 1], beta[best - 1 : best + 2])
    slope = (mean[best + 1] - mean[best - 1]) / (beta[best + 1] - beta[best - 1])
    return found, 1 / math.sqrt((slope / error[best]) ** 2 + SCALE**-2)


@pytest.mark.parametrize("skew", [-0.7, 0.0, 0.8])
def test_the_bias_is_that_of_the_three_steps(skew):
    evidence, asymmetry, weights = images(skew)
    s = skew_of_tilts(weights / weights.sum() @ evidence)
    beta = GRID - s
    mean, error = np.zeros(len(GRID)), np.zeros(len(GRID))
    for t, value in enumerate(beta):
        at_beta = np.array([np.interp(value, GRID, row) for row in evidence])
        importance = np.exp(at_beta - evidence[:, t]) * weights
        importance /= importance.sum()
        mean[t] = importance @ asymmetry
        error[t] = np.sqrt((importance**2 * (asymmetry - mean[t]) ** 2).sum())
    inside = (np.abs(beta) < 3) & (np.abs(s) < 3)
    found = find_bias(*tensors(evidence, asymmetry, weights, GRID, NORMALIZERS), CENTER, SCALE)
    assert found == pytest.approx(likeliest(beta, mean, error, inside), rel=1e-6)
    assert abs(found[0] - CENTER) > 0.05 and found[1] < SCALE  # the images count


def test_the_bias_of_a_turning_stream_adds_up_images_of_all_moments():
    gauge = TurningGauge(*tensors(GRID, NORMALIZERS), CENTER, SCALE, torch.zeros(5, len(GRID), dtype=torch.float64))
    w, a = [], []
    for moment, skew in enumerate((0.8, -0.5)):
        evidence, asymmetry, _ = images(skew, seed=moment)
        gauge.add(*tensors(evidence, asymmetry, evidence.mean(axis=0)))
        s = skew_of_tilts(evidence.mean(axis=0))
        known = (s > GRID[0]) & (s < GRID[-1])
        beta, tilts = (GRID - s)[known], GRID[known]
        order = np.argsort(beta)
        beta, tilts = beta[order], tilts[order]
        t = np.interp(GRID, beta, tilts)
        moved = np.array([np.interp(t, GRID, row) for row in evidence])
        g = np.interp(t - GRID, GRID, NORMALIZERS) - np.log(len(LOG_PI))
        w.append(np.where((GRID >= beta[0]) & (GRID <= beta[-1]), np.exp(evidence - moved + g), 0))
        a.append(asymmetry)
    w, a = np.concatenate(w), np.concatenate(a)
    some = w.sum(axis=0) > 0
    total = np.where(some, w.sum(axis=0), 1)
    mean = a @ w / total
    error = np.sqrt((w**2 * (a[:, None] - mean) ** 2).sum(axis=0)) / total
    error = np.maximum(error, SMALLEST_ERROR)
    assert gauge.bias() == pytest.approx(likeliest(GRID, mean, error, some), rel=1e-6)


def test_images_without_a_known_skew_add_nothing():
    gauge = TurningGauge(*tensors(GRID, NORMALIZERS), CENTER, SCALE, torch.zeros(5, len(GRID), dtype=torch.float64))
    evidence, asymmetry, _ = images(0.5)
    gauge.add(*tensors(evidence, asymmetry, -50 * GRID))  # steeper than any skew
    assert not gauge.sums.any() and gauge.bias() == (CENTER, SCALE)


def test_interpolation_is_numpys():
    generator = np.random.RandomState(0)
    x, known, values = generator.randn(40), np.sort(generator.randn(9)), generator.randn(3, 9)
    found = interpolate(*tensors(x, known, values))
    np.testing.assert_allclose(found, [np.interp(x, known, row) for row in values])
    np.testing.assert_allclose(interpolate(*tensors(known, known, values)), values, atol=1e-12)


def test_asymmetry_is_the_difference_of_two_cosines():
    generator = np.random.RandomState(0)
    views = generator.randn(2, 7, 6)

    def cosine(tilt):
        p, q = np.exp(views + tilt * LOG_PI)
        return (p * q).sum(axis=1) / np.sqrt((p**2).sum(axis=1) * (q**2).sum(axis=1))

    for tilt in (1.5, 0.5):
        found = stability_asymmetry(*tensors(*views, LOG_PI), tilt)
        np.testing.assert_allclose(found, cosine(tilt) - cosine(-tilt))
    np.testing.assert_allclose(stability_asymmetry(*tensors(*views, LOG_PI)), cosine(1.5) - cosine(-1.5))
