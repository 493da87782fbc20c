import pytest
import torch

from tade import Calibration, fit_calibration
from tade.calibration import standardized

LOG_PRIOR = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()


def simulate(count=4000, a=0.7, b1=-0.4, b2=0.2, mix=None, seed=0):
    """Scores u and labels for which a u + b1 z + b2 z^2 is exactly log p(x|y) up to a constant of the image."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.full((5,), 0.2) if mix is None else mix
    targets = torch.multinomial(mix, count, replacement=True, generator=generator)
    x = 2 * torch.eye(5)[targets] + torch.randn(count, 5, generator=generator)  # log p(x|y) = 2 x_y + constant
    z = standardized(LOG_PRIOR).float()
    return (2 * x - b1 * z - b2 * z.square()) / a, targets


def test_the_numbers_are_found_within_their_standard_errors():
    found = fit_calibration(*simulate(), LOG_PRIOR)
    for value, truth, error in zip(found.numbers, [0.7, -0.4, 0.2], found.standard_errors, strict=True):
        assert 0 < error < 0.06 and abs(value - truth) < 3 * error


def test_standard_errors_are_the_spread_over_samples():
    fits = [fit_calibration(*simulate(300, seed=seed), LOG_PRIOR) for seed in range(60)]
    spread = torch.tensor([fit.numbers for fit in fits]).std(dim=0)
    claimed = torch.tensor([fit.standard_errors for fit in fits]).mean(dim=0)
    torch.testing.assert_close(spread, claimed, rtol=0.35, atol=0)
    assert claimed[0] < 2 * fits[0].standard_errors[0] < 0.3


def test_any_class_mix_of_the_labeled_images_will_do():
    tail = torch.tensor([0.7, 0.15, 0.1, 0.03, 0.02])
    found = fit_calibration(*simulate(8000, mix=tail), LOG_PRIOR)
    known = fit_calibration(*simulate(8000, mix=tail), LOG_PRIOR, label_log_prior=tail.log())
    for fit in (found, known):
        assert all(abs(v - t) < 3 * e for v, t, e in zip(fit.numbers, [0.7, -0.4, 0.2], fit.standard_errors))
    wrong = fit_calibration(*simulate(8000, mix=tail), LOG_PRIOR, label_log_prior=torch.full((5,), 0.2).log())
    assert abs(wrong.b1 + 0.4) > 10 * wrong.standard_errors[1]  # the mix matters


def test_it_maximizes_the_likelihood():
    u, y = simulate(200)
    found, mix = fit_calibration(u, y, LOG_PRIOR), torch.bincount(y, minlength=5).double().log()
    z = standardized(LOG_PRIOR)

    def objective_of(numbers):
        a, b1, b2 = numbers
        scores = a * u.double() + b1 * z + b2 * z.square() + mix
        ridge = 2 * ((a - 1) ** 2 + b1**2 + b2**2)
        return scores.log_softmax(dim=1).gather(1, y[:, None]).sum() - ridge

    def objective(numbers):
        return float(objective_of(numbers))

    curvature = torch.autograd.functional.hessian(
        lambda numbers: -objective_of(numbers), torch.tensor(found.numbers, dtype=torch.float64)
    )
    expected = curvature.inverse().diagonal().sqrt()
    torch.testing.assert_close(torch.tensor(found.standard_errors).double(), expected, rtol=1e-3, atol=0)
    best = objective(found.numbers)
    for place in range(3):
        for step in (-0.02, 0.02):
            moved = list(found.numbers)
            moved[place] += step
            assert objective(moved) < best - 1e-4
            assert objective(moved) > best - 1  # the curve is followed, not left


def test_classes_without_a_labeled_image_are_allowed_and_do_not_compete():
    u, y = simulate(2000)
    some = y != 2
    found = fit_calibration(u[some], y[some], LOG_PRIOR)
    assert found.numbers == pytest.approx([0.7, -0.4, 0.2], abs=0.15)
    u[:, 2] += 100  # the absent class, whatever its scores
    shifted = fit_calibration(u[some] - u[some].mean(dim=1, keepdim=True), y[some], LOG_PRIOR)
    assert shifted.numbers == pytest.approx(found.numbers, abs=1e-3)


def test_few_images_stay_near_no_calibration():
    one = fit_calibration(torch.tensor([[3.0, 0, 0, 0, 0]]), torch.tensor([0]), LOG_PRIOR)
    assert one.numbers == [1, 0, 0]  # its class is the only one that competes
    assert one.standard_errors == pytest.approx([0.5] * 3)  # the ridge's
    perfect = 5 * torch.eye(5)  # all right: without the ridge the scale would be infinite
    assert 1 < fit_calibration(perfect, torch.arange(5), LOG_PRIOR).a < 3


def test_nothing_depends_on_class_order_or_constants_per_image():
    u, y = simulate(500)
    expected = fit_calibration(u, y, LOG_PRIOR)
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    for again in (
        fit_calibration(u[:, order], place[y], LOG_PRIOR[order]),
        fit_calibration(u + torch.arange(500.0)[:, None] / 10, y, LOG_PRIOR),
        fit_calibration(u, y, LOG_PRIOR + 7),
    ):
        assert again.numbers == pytest.approx(expected.numbers, abs=1e-4)


def test_chunks_change_nothing(monkeypatch):
    u, y = simulate(500)
    whole = fit_calibration(u, y, LOG_PRIOR)
    monkeypatch.setattr("tade.calibration.CHUNK", 35)
    assert fit_calibration(u, y, LOG_PRIOR).numbers == pytest.approx(whole.numbers, abs=1e-9)


def test_apply_is_the_formula():
    u, z = torch.randn(3, 5), (LOG_PRIOR - LOG_PRIOR.mean()) / LOG_PRIOR.std(correction=0)
    torch.testing.assert_close(Calibration(0.5, 2, -1).apply(u, LOG_PRIOR), 0.5 * u + 2 * z - z.square())
    torch.testing.assert_close(Calibration().apply(u, LOG_PRIOR), u)
    torch.testing.assert_close(Calibration(0.5, 2, -1).apply(u, torch.zeros(5)), 0.5 * u)  # all equally frequent


def test_what_is_refused():
    u, y = simulate(20)
    for arguments, message in (
        ((u[:0], y[:0], LOG_PRIOR), "at least one image"),
        ((u, y[:3], LOG_PRIOR), r"not \[20, 5\], \[3\] and \[5\]"),
        ((u * float("nan"), y, LOG_PRIOR), "finite scores"),
        ((u, y + 5, LOG_PRIOR), "classes from 0 to 4"),
        ((u, y, LOG_PRIOR, torch.full((5,), -torch.inf)), "finite for every class"),
        ((u, y, LOG_PRIOR, None, 0.0), "ridge must be positive"),
        ((-u.repeat(100, 1), y.repeat(100), LOG_PRIOR), "positive scale"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_calibration(*arguments)
    with pytest.raises(ValueError, match="positive scale"):
        Calibration(0.0)
