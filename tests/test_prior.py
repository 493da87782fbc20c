import math

import numpy as np
import pytest
import torch

from tade import (
    BBSEAggregator,
    Calibration,
    EMAggregator,
    GivenPriorAggregator,
    MAPEMAggregator,
    PriorAggregator,
    prior_free_logits,
)

CLASSES = 20
PI = torch.tensor([0.02 ** (c / (CLASSES - 1)) for c in range(CLASSES)])
PI = PI / PI.sum()
CARRIED = torch.stack([PI.log(), torch.zeros(CLASSES), -PI.log()])  # what three experts carry
LEARNERS = [PriorAggregator, EMAggregator, MAPEMAggregator]


def likelihood_logits(prior, count, signal=3.0, seed=0):
    """log p(x|y) up to a constant [N, C] of images with that class prior [C], exactly, and their labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(prior, count, replacement=True, generator=generator)
    x = signal * torch.eye(len(prior))[targets] + torch.randn(count, len(prior), generator=generator)
    return signal * x, targets


def expert_logits(prior, count, carried=CARRIED, **options):
    """The same as logits of the experts, [N, E, C]."""
    u, targets = likelihood_logits(prior, count, **options)
    return u[:, None] + carried, targets


def skewed(s):
    return (s * PI.log()).softmax(dim=0)


def make(kind=PriorAggregator, carried=CARRIED, log_prior=None, **options):
    if kind is PriorAggregator:  # biases of both signs are found here
        options = {"largest_bias": math.inf} | options
    return kind(carried, PI.log() if log_prior is None else log_prior, **options)


def fitted(logits, kind=PriorAggregator, **options):
    """From logits alone, and not looking for a bias."""
    aggregator = make(kind, **({"debias": False} if kind is PriorAggregator else {}), **options)
    aggregator.fit(logits)
    return aggregator


def gaussians(count=4000, share=0.8, seed=0):
    """Images x ~ N(-1 or 1, 1) of two classes: log p(x|y) = -x or x up to a constant. [N, 1, 2]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) + torch.where(torch.rand(count, generator=generator) < share, -1.0, 1.0)
    return torch.stack([-x, x], dim=1)[:, None]


TWO = torch.tensor([0.9, 0.1]).log()


def best_share(logits):
    """The share of the first class that maximizes the likelihood, by search."""
    likelihood = logits[:, 0].double().exp()
    shares = torch.linspace(0.001, 0.999, 1997, dtype=torch.float64)
    return float(shares[torch.log(likelihood @ torch.stack([shares, 1 - shares])).sum(dim=0).argmax()])


# The prior-free ensemble


def test_without_their_priors_all_experts_say_the_same():
    logits, _ = expert_logits(PI, 50)
    free = prior_free_logits(logits, CARRIED)
    torch.testing.assert_close(free, likelihood_logits(PI, 50)[0], atol=1e-4, rtol=0)
    for expert in range(3):
        one = prior_free_logits(logits[:, expert : expert + 1], CARRIED[expert : expert + 1])
        torch.testing.assert_close(one, free, atol=1e-4, rtol=0)


# The skew


@pytest.mark.parametrize("truth", [1.0, 0.4, 0.0, -0.7])
def test_a_known_skew_is_found_within_its_standard_error(truth):
    report = fitted(expert_logits(skewed(truth), 3000)[0]).report()
    assert 0 < report["skew_standard_error"] < 0.05
    assert abs(report["skew"] - truth) < 3 * report["skew_standard_error"]
    assert report["note"] is None
    torch.testing.assert_close(torch.tensor(report["prior"]).float(), skewed(truth), atol=0.02, rtol=0)


def test_the_standard_error_is_the_spread_over_samples():
    fits = [fitted(expert_logits(skewed(0.5), 200, seed=seed)[0], classwise=False) for seed in range(80)]
    spread = torch.tensor([fit.skew for fit in fits]).std()
    assert float(spread) == pytest.approx(np.mean([fit.skew_error for fit in fits]), rel=0.25)


def test_two_gaussian_classes_by_grid_search():
    logits = gaussians()
    aggregator = fitted(logits, carried=torch.zeros(1, 2), log_prior=TWO)
    best = best_share(logits)
    assert best == pytest.approx(0.8, abs=0.03)
    assert float(aggregator.prior[0]) == pytest.approx(best, abs=1e-3)
    assert aggregator.kappa == 0  # a slope and a constant leave two classes nothing
    expected = logits[:, 0] + torch.tensor([best, 1 - best]).log()
    torch.testing.assert_close(aggregator.predict(logits), expected.log_softmax(dim=1), atol=0.01, rtol=0)


def test_few_images_draw_the_skew_to_zero():
    logits, _ = expert_logits(skewed(0.8), 20, signal=1.5)
    free, drawn = fitted(logits, skew_scale=1e6, classwise=False), fitted(logits, classwise=False)
    belief = 0.25 / (0.25 + free.skew_error**2)
    assert belief < 0.9 and drawn.skew == pytest.approx(belief * free.skew)
    assert drawn.skew_error == pytest.approx(belief**0.5 * free.skew_error)


# Class by class


def test_classes_out_of_order_are_found_with_many_images_and_left_alone_with_few():
    shuffled = skewed(1.2)[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))]
    logits, targets = expert_logits(shuffled, 4000, signal=2.0)
    both, skew = fitted(logits), fitted(logits, classwise=False)
    assert both.kappa > 0.3 and skew.kappa == 0
    error = {a: float((a.prior.log() - shuffled.double().log()).square().mean()) for a in (both, skew)}
    assert error[both] < 0.5 * error[skew]
    accuracy = {a: float((a.predict(logits).argmax(dim=1) == targets).float().mean()) for a in (both, skew)}
    assert accuracy[both] > accuracy[skew] + 0.01
    assert fitted(logits[:30]).kappa == 0


def test_priors_that_follow_training_need_no_classes():
    logits, _ = expert_logits(skewed(0.8), 4000)
    both, skew = fitted(logits), fitted(logits, classwise=False)
    assert both.kappa == 0 and torch.equal(both.prior, skew.prior)


def test_the_deviations_maximize_the_posterior():
    logits, _ = expert_logits(skewed(1.0).flip(0)[torch.randperm(CLASSES)], 1000)
    aggregator = make(class_noise=0.0, debias=False)
    aggregator.fit(logits)
    assert aggregator.kappa == 1  # nothing is held back
    z, log_q = aggregator.z, aggregator.log_test_prior
    u = prior_free_logits(logits, CARRIED).double()

    def objective(log_q):
        e = log_q - log_q.mean() - (z @ log_q) / (z @ z) * z
        return float(torch.logsumexp(u + log_q.log_softmax(dim=0), dim=1).sum() - 0.5 * e.square().sum())

    best = objective(log_q)
    for c in range(CLASSES):
        for step in (-0.1, 0.1):
            assert objective(log_q + step * torch.eye(CLASSES)[c]) < best


def test_equally_frequent_training_classes_have_no_skew_but_deviations():
    uniform = torch.full((CLASSES,), 1 / CLASSES)
    logits, _ = expert_logits(skewed(1.5), 4000, carried=torch.zeros(1, CLASSES))
    aggregator = fitted(logits, carried=torch.zeros(1, CLASSES), log_prior=uniform.log())
    assert aggregator.skew == 0 and aggregator.report()["skew_standard_error"] is None
    assert aggregator.kappa > 0.3 and aggregator.prior[0] > aggregator.prior[-1]


# What nothing depends on


def test_nothing_depends_on_class_order_or_constants_per_image():
    shuffled = skewed(1.2)[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))]
    logits, _ = expert_logits(shuffled, 1500, signal=2.0)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(2))
    constants = 5 * torch.randn(1500, 3, 1)
    for kind in LEARNERS:
        plain, moved = fitted(logits, kind), fitted(logits + constants, kind)
        turned = fitted(logits[..., order], kind, carried=CARRIED[:, order], log_prior=PI.log()[order])
        torch.testing.assert_close(moved.prior, plain.prior, atol=1e-4, rtol=1e-2)
        torch.testing.assert_close(turned.prior, plain.prior[order], atol=1e-4, rtol=1e-2)
        torch.testing.assert_close(
            turned.predict(logits[..., order]), plain.predict(logits)[:, order], atol=0.02, rtol=0
        )
    assert fitted(logits).kappa > 0  # so that the class-wise part is among what was compared


@pytest.mark.parametrize("chunk", [7 * CLASSES, 1])  # more classes than a chunk has scores: one image at a time
def test_chunks_change_nothing(monkeypatch, chunk):
    logits, _ = expert_logits(skewed(0.5), 60)
    views = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)), logits
    held_out = logits[:, :1], torch.arange(60) % CLASSES

    def learned() -> list[torch.Tensor]:
        prior, bbse = make(), make(BBSEAggregator, carried=CARRIED[:1], held_out=held_out)
        prior.fit(logits, [views])
        bbse.fit(logits[:, :1])
        return [fitted(logits).prior, prior.prior, bbse.prior, prior.predict(logits)]

    whole = learned()
    monkeypatch.setattr("tade.calibration.CHUNK", chunk)
    torch.testing.assert_close(learned(), whole)


def test_many_classes_make_no_array_of_images_by_classes_squared():
    classes, count = 3000, 300  # [N, C, C] in float32 would take 10 GB, [C, C] for each image
    prior = torch.linspace(3, 1, classes).softmax(dim=0)
    logits, _ = likelihood_logits(prior, count, signal=5.0)
    aggregator = PriorAggregator(torch.zeros(1, classes), prior.log())
    aggregator.fit(logits[:, None])
    assert abs(aggregator.skew - 1) < 3 * aggregator.skew_error and aggregator.kappa == 0


# Streams


def test_a_stream_that_forgets_nothing_learns_what_fit_learns():
    shuffled = skewed(1.2)[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))]
    logits, _ = expert_logits(shuffled, 1000, signal=2.0)
    whole, stream = fitted(logits), make(debias=False)
    for batch in logits.split(250):
        stream.update(batch)
    assert stream.skew == pytest.approx(whole.skew, abs=1e-4)
    assert stream.skew_error == pytest.approx(whole.skew_error, rel=1e-3)
    assert stream.kappa == pytest.approx(whole.kappa, abs=1e-3) and whole.kappa > 0
    torch.testing.assert_close(stream.prior, whole.prior, atol=1e-5, rtol=1e-2)


def test_how_a_stream_is_cut_into_batches_does_not_matter():
    logits, _ = expert_logits(skewed(0.5), 200)
    skews = []
    for size in (25, 200):
        stream = make(forgetting=0.98)
        for batch in logits.split(size):
            stream.update(batch)
        skews.append((stream.skew, stream.skew_error, stream.sum_of_weights))
    assert skews[0] == pytest.approx(skews[1], rel=1e-4)
    assert skews[0][2] == pytest.approx((1 - 0.98**200) / 0.02)


def test_a_stream_that_forgets_follows_the_turn():
    forgetful, faithful = make(forgetting=0.99), make(forgetting=1.0)
    for truth, seed in ((1.0, 0), (-1.0, 1)):
        for batch in expert_logits(skewed(truth), 600, seed=seed)[0].split(100):
            forgetful.update(batch)
            faithful.update(batch)
        assert abs(forgetful.skew - truth) < 0.4
    assert abs(faithful.skew) < 0.5
    assert forgetful.skew_error > faithful.skew_error  # of fewer images


# The bias, from stability

Z = (PI.log() - PI.log().mean()) / PI.log().std(correction=0)


def biased_images(truth, bias, count, seed=0, noise=0.7):
    """Logits [N, 1, C] of images whose scores are off by -bias * z, of two views of them, and the labels."""
    u, targets = likelihood_logits(skewed(truth), count, signal=1.7, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    views = [u + noise * torch.randn(u.shape, generator=generator) for _ in range(2)]
    return *((scores - bias * Z)[:, None] for scores in (u, *views)), targets


def unbiased(truth, bias, count, seed=0, **options):
    logits, *views, targets = biased_images(truth, bias, count, seed)
    aggregator = make(carried=torch.zeros(1, CLASSES), classwise=False, **options)
    aggregator.fit(logits, [tuple(views)])
    return aggregator, logits, targets


def test_skew_and_bias_are_told_apart():
    errors = {}
    for bias in (-0.5, 0.0, 0.5):
        for truth in (0.6, 0.0, -0.6):
            aggregator, logits, targets = unbiased(truth, bias, 4000)
            plain = fitted(logits, carried=torch.zeros(1, CLASSES), classwise=False)
            assert (
                plain.report()["bias_standard_error"] is None and 0 < aggregator.report()["bias_standard_error"] < 0.5
            )
            hits = [float((a.predict(logits).argmax(dim=1) == targets).double().mean()) for a in (aggregator, plain)]
            errors[bias, truth] = abs(aggregator.skew - truth), abs(plain.skew - truth), hits[0] - hits[1]
    with_bias = np.mean([value for (bias, _), value in errors.items() if bias], axis=0)
    without = np.mean([value for (bias, _), value in errors.items() if not bias], axis=0)
    assert with_bias[0] < 0.6 * with_bias[1] and with_bias[2] > 0.005  # s is nearer, and more images are right
    assert without[0] < 0.12 and abs(without[2]) < 0.005


def test_scores_are_not_taken_to_favor_rare_classes():
    """A bias above largest_bias is taken as that; one below it is found as before."""
    for bias in (0.5, -0.5):
        found, free = (unbiased(0.6, bias, 2000, **options)[0] for options in ({"largest_bias": 0.0}, {}))
        assert found.report()["bias"] == pytest.approx(min(0.0, free.report()["bias"]), abs=1e-6)
    assert PriorAggregator(CARRIED, PI.log()).largest_bias == 0


def test_when_there_is_no_bias_to_look_for():
    assert make().finds_bias and not make(debias=False).finds_bias
    assert not make(calibration=[0.8, -0.2, 0.0]).finds_bias
    assert not make(log_prior=torch.zeros(CLASSES)).finds_bias  # equally frequent classes have no skew
    assert not make(carried=PI.log()[None]).finds_bias  # a plain network: stability misleads there
    for options, needs in (({}, True), ({"classwise": False}, True), ({"classwise": False, "debias": False}, False)):
        assert make(**options).needs == ({"views"} if needs else set())
    calibrated, logits, _ = unbiased(0.6, 0.5, 500, calibration=[1.0, 0.5, 0.0])
    assert calibrated.report()["bias"] == 0 and calibrated.skew == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("shifted", [True, False])
def test_frequent_classes_are_told_from_those_that_hard_images_look_like(shifted):
    generator = torch.Generator().manual_seed(3)
    deviations = 1.5 * torch.randn(CLASSES, generator=generator)
    uniform = torch.full((CLASSES,), 1 / CLASSES)
    u, targets = likelihood_logits(deviations.softmax(dim=0) if shifted else uniform, 4000, signal=2.0)
    looks_like = uniform if shifted else deviations.softmax(dim=0)  # what a hard image looks like
    hard = torch.rand(4000, generator=generator) < 0.3
    scores = torch.where(hard[:, None], likelihood_logits(looks_like, 4000, signal=2.0, seed=8)[0], u)
    harder = torch.rand(4000, generator=generator) < 0.4  # a view hides what tells some more images apart
    view = torch.where(harder[:, None], likelihood_logits(looks_like, 4000, signal=2.0, seed=9)[0], scores)
    with_views, without = (
        make(carried=torch.zeros(1, CLASSES), calibration=[1.0, 0, 0], class_noise=0.2) for _ in range(2)
    )
    with_views.fit(scores[:, None], [(view[:, None], view[:, None])])
    without.fit(scores[:, None])
    right = [(a.predict(scores[:, None]).argmax(dim=1) == targets).double().mean() for a in (with_views, without)]
    if shifted:
        assert with_views.kappa == without.kappa > 0.3 and right[0] == right[1]
    else:
        assert with_views.kappa == 0 and without.kappa > 0.3 and right[0] > right[1]


def test_the_class_wise_part_knows_the_bias():
    prior = skewed(0.0)[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))].clone()
    prior[::3] *= 8
    prior /= prior.sum()
    u, targets = likelihood_logits(prior, 4000, signal=1.7)
    views = [u + 0.7 * torch.randn(u.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    logits, *pair = ((scores - 0.5 * Z)[:, None] for scores in (u, *views))
    aggregator = make(carried=torch.zeros(1, CLASSES), class_noise=0.2)
    aggregator.fit(logits, [tuple(pair)])
    assert aggregator.kappa > 0.8
    torch.testing.assert_close(aggregator.prior.float(), prior, atol=0.03, rtol=0.4)


def test_a_stream_with_views_ends_where_the_whole_set_does():
    logits, *views, _ = biased_images(0.5, 0.5, 1000)
    whole, stream, small = (make(carried=torch.zeros(1, CLASSES), **options) for options in ({}, {}, {"buffer": 100}))
    whole.fit(logits, [tuple(views)])
    for part in torch.arange(1000).split(64):
        for aggregator in (stream, small):
            aggregator.update(logits[part], (views[0][part], views[1][part]))
    assert stream.beta == pytest.approx(whole.beta, abs=1e-3) and stream.skew == pytest.approx(whole.skew, abs=1e-3)
    assert small.sum_of_weights == 1000 and whole.beta_error < small.beta_error
    rows, weights = small.kept["likelihoods"]
    assert rows.shape == (100, CLASSES) and weights.shape == (100,)
    assert rows.untyped_storage().nbytes() == 4 * 100 * CLASSES  # and no view of more


def test_a_stream_that_forgets_remembers_the_bias():
    """It is the network's: what was learned before the class mix turned says more than the last images alone."""
    off, wide = [], {"bias_center": 0.0, "bias_scale": 0.4}
    for seed in (0, 10):
        stream = make(carried=torch.zeros(1, CLASSES), forgetting=0.99, classwise=False, **wide)
        for turn, truth in enumerate((-0.8, 0.0, 0.8)):
            logits, *views, _ = biased_images(truth, -0.5, 800, seed=seed + turn)
            for part in torch.arange(800).split(50):
                stream.update(logits[part], (views[0][part], views[1][part]))
        alone = unbiased(0.8, -0.5, 800, seed=seed + 2, **wide)[0]
        off.append([(abs(a.skew - 0.8), abs(a.report()["bias"] + 0.5)) for a in (stream, alone)])
        assert stream.report()["bias_standard_error"] < 0.1 < alone.report()["bias_standard_error"]
    assert all(s1 < 0.5 * s2 and b1 < 0.6 * b2 for (s1, b1), (s2, b2) in off)


# Guards


def free(aggregator, logits):
    """Whether it predicts by the prior-free ensemble."""
    expected = prior_free_logits(logits, aggregator.expert_log_priors).log_softmax(dim=1)
    return torch.allclose(aggregator.predict(logits), expected, atol=1e-5)


def test_a_network_that_knows_nothing_is_left_alone():
    flat = torch.zeros(500, 3, CLASSES) + CARRIED
    aggregator = fitted(flat)
    assert free(aggregator, flat) and "prior-free ensemble" in aggregator.note
    noise = flat + 0.01 * torch.randn(500, 3, CLASSES, generator=torch.Generator().manual_seed(0))
    aggregator = fitted(noise)
    assert aggregator.note is not None and aggregator.skew == 0
    assert free(aggregator, noise)


def test_scores_that_contradict_every_skew_are_left_alone():
    logits, _ = expert_logits(torch.full((CLASSES,), 1 / CLASSES), 300)
    aggregator = fitted(logits + 6 * PI.log())  # a network that carries far more of the prior than it is said to
    assert aggregator.skew == 0 and "still rises at a skew of 3.0" in aggregator.note
    assert free(aggregator, logits + 6 * PI.log())


def test_one_image_or_one_predicted_class_falls_back():
    logits, targets = expert_logits(skewed(0.5), 500, signal=6.0)
    for few in (logits[:1], logits[targets == 3], logits[:0]):
        aggregator = fitted(few)
        assert free(aggregator, logits) and "the prior-free ensemble is used instead" in aggregator.note
        assert aggregator.kappa == 0 and aggregator.skew == 0
    aggregator = fitted(logits[:1])
    aggregator.update(logits)  # and it is no end
    assert aggregator.note is None and aggregator.skew == pytest.approx(fitted(logits).skew, abs=0.05)


def test_a_broken_batch_of_a_stream_costs_nothing_that_was_learned():
    logits, _ = expert_logits(skewed(1.0), 300)
    stream = make()
    stream.update(logits[:200])
    stream.update(logits[200:250] * math.nan)
    assert stream.note is not None and free(stream, logits)
    stream.update(logits[250:])
    assert stream.note is None and stream.sum_of_weights == 250 and stream.skew == pytest.approx(1, abs=0.3)


# The others


def test_em_finds_its_fixed_point():
    logits = gaussians(1000, share=0.7)
    aggregator = fitted(logits, EMAggregator, carried=torch.zeros(1, 2), log_prior=TWO, tolerance=1e-8)
    q = aggregator.prior
    posterior = (logits[:, 0].double() + q.log()).softmax(dim=1)
    torch.testing.assert_close(posterior.mean(dim=0), q, atol=1e-6, rtol=0)
    assert float(q[0]) == pytest.approx(best_share(logits), abs=1e-3)


def test_em_finds_any_prior_of_exact_likelihoods():
    truth = torch.tensor([0.5, 0.05, 0.2, 0.25])
    u, _ = likelihood_logits(truth, 20000)
    aggregator = EMAggregator(torch.zeros(1, 4), torch.full((4,), 0.25).log())
    aggregator.fit(u[:, None])
    torch.testing.assert_close(aggregator.prior.float(), truth, atol=0.015, rtol=0)
    short = EMAggregator(torch.zeros(1, 4), torch.full((4,), 0.25).log(), steps=1)
    short.fit(u[:, None])
    torch.testing.assert_close(short.prior.float(), u.softmax(dim=1).mean(dim=0), atol=1e-5, rtol=0)


def test_pseudo_counts_follow_the_data():
    even, _ = expert_logits(torch.full((CLASSES,), 1 / CLASSES), 500)
    uneven, _ = expert_logits(skewed(1.5), 500)
    strong, weak = fitted(even, MAPEMAggregator), fitted(uneven, MAPEMAggregator)
    assert strong.report()["alpha"] > 10 * weak.report()["alpha"] > 0
    uniform = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    for_em = fitted(even, EMAggregator)
    assert (strong.prior - uniform).abs().sum() < 0.5 * (for_em.prior - uniform).abs().sum()
    torch.testing.assert_close(weak.prior.float(), skewed(1.5), atol=0.05, rtol=0)


def test_pseudo_counts_fixed_point():
    aggregator = fitted(expert_logits(skewed(1.0), 500)[0], MAPEMAggregator, tolerance=1e-7)
    q, alpha = aggregator.prior, aggregator.alpha
    images = (q * (500 + CLASSES * alpha) - alpha).double()  # expected, of each class
    assert float(images.sum()) == pytest.approx(500, rel=1e-4)

    def evidence(alpha):
        alpha = torch.tensor(alpha, dtype=torch.float64)
        one = torch.lgamma(images + alpha) - torch.lgamma(alpha)
        return float(one.sum() + torch.lgamma(CLASSES * alpha) - torch.lgamma(500 + CLASSES * alpha))

    assert evidence(alpha) > max(evidence(0.9 * alpha), evidence(1.1 * alpha))


def test_bbse_inverts_the_confusion():
    uniform = torch.full((CLASSES,), 1 / CLASSES)
    held_out = expert_logits(uniform, 8000, signal=2.0, seed=1)
    logits, _ = expert_logits(skewed(1.0), 8000, signal=2.0)
    aggregator = fitted(logits, BBSEAggregator, held_out=held_out)
    torch.testing.assert_close(aggregator.prior.float(), skewed(1.0), atol=0.02, rtol=0)
    naive = torch.bincount(prior_free_logits(logits, CARRIED).argmax(dim=1), minlength=CLASSES) / len(logits)
    assert (aggregator.prior - skewed(1.0)).abs().sum() < 0.5 * (naive - skewed(1.0)).abs().sum()
    tail = expert_logits(skewed(0.5), 8000, signal=2.0, seed=1)  # any mix of the held-out images
    torch.testing.assert_close(fitted(logits, BBSEAggregator, held_out=tail).prior, aggregator.prior, atol=0.02, rtol=0)


def test_a_given_prior_is_bayes_rule():
    logits, targets = expert_logits(skewed(1.0), 500, signal=1.5)
    counts = [float(1000 * p) for p in skewed(1.0)]
    aggregator = fitted(logits, GivenPriorAggregator, prior=counts)
    expected = (likelihood_logits(skewed(1.0), 500, signal=1.5)[0] + skewed(1.0).log()).log_softmax(dim=1)
    torch.testing.assert_close(aggregator.predict(logits), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(aggregator.prior.float(), skewed(1.0), atol=1e-6, rtol=0)
    aggregator.update(logits)
    aggregator.reset()
    torch.testing.assert_close(aggregator.predict(logits), expected, atol=1e-3, rtol=0)
    never = fitted(logits, GivenPriorAggregator, prior=[0.0] + counts[1:])
    assert torch.isfinite(never.predict(logits)).all() and not (never.predict(logits).argmax(dim=1) == 0).any()


def test_calibration_takes_the_bias_away():
    u, targets = likelihood_logits(skewed(-0.5), 3000)
    z = (PI.log() - PI.log().mean()) / PI.log().std(correction=0)
    biased = (u + 0.8 * z)[:, None]  # rare classes look less likely than they are
    carried = torch.zeros(1, CLASSES)
    raw, calibrated = fitted(biased, carried=carried), fitted(biased, carried=carried, calibration=[1.0, -0.8, 0.0])
    assert abs(raw.skew + 0.5) > 0.2 and calibrated.skew == pytest.approx(-0.5, abs=0.1)
    same = fitted(biased, carried=carried, calibration=Calibration(1.0, -0.8))
    assert same.report() == calibrated.report() and same.report()["calibration"] == [1.0, -0.8, 0.0]
    hits = [(a.predict(biased).argmax(dim=1) == targets).float().mean() for a in (raw, calibrated)]
    assert hits[1] >= hits[0]


def test_what_is_refused():
    for options, message in (
        ({"class_noise": -1}, "class_noise must be at least 0"),
        ({"bound": 0}, "bound, bias_scale and skew_scale positive"),
        ({"skew_scale": 0}, "bound, bias_scale and skew_scale positive"),
        ({"bias_scale": 0}, "bound, bias_scale and skew_scale positive"),
        ({"buffer": 0}, "buffer at least 1"),
        ({"forgetting": 0.0}, "forgetting must be above 0"),
        ({"forgetting": 1.1}, "forgetting must be above 0"),
        ({"calibration": [1.0]}, "three numbers"),
        ({"calibration": [-1.0, 0, 0]}, "positive scale"),
        ({"log_prior": torch.zeros(3)}, r"must be \[E, C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    for prior, message in (
        (None, "give prior"),
        ([1.0, 2.0], "each of 20 classes"),
        ([-1.0] + [1.0] * 19, "at least 0"),
        ([0.0] * 20, "one above 0"),
        ([math.nan] * 20, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make(GivenPriorAggregator, prior=prior)
    with pytest.raises(ValueError, match="give held_out from Python"):
        make(BBSEAggregator)
    with pytest.raises(ValueError, match="images of all 20 classes"):
        make(BBSEAggregator, held_out=(torch.zeros(5, 3, 20), torch.arange(5)))
    assert not EMAggregator.follows_streams() and PriorAggregator.follows_streams()
