import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_json

from tade import StabilityAggregator, prediction_stability, weighted_logits

REFERENCE = golden_json("aggregation.json")


def make(experts=3, classes=5, sgd=REFERENCE["sgd"], **options):
    return StabilityAggregator(
        torch.zeros(experts, classes),
        torch.zeros(classes),
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, **sgd),
        **options,
    )


def test_forty_updates_are_the_references():
    views, aggregator = np.load(GOLDEN / "aggregation_inputs.npz"), make(classes=20)
    assert len(REFERENCE["trajectory"]) == len(views["view1"]) == 40
    for step, expected in enumerate(REFERENCE["trajectory"]):
        pair = torch.from_numpy(views["view1"][step]), torch.from_numpy(views["view2"][step])
        aggregator.update(pair[0], pair)
        np.testing.assert_allclose([*aggregator.weights.tolist(), aggregator.updates[-1]], expected, atol=1e-5)


def test_the_defaults_are_the_published_recipe():
    plain = StabilityAggregator(torch.zeros(3, 5), torch.zeros(5))
    assert (plain.epochs, plain.batch_size, plain.stop_below) == (5, 128, 0.05) and plain.needs == {"views"}
    settings = plain.optimizer.param_groups[0]
    assert {key: settings[key] for key in REFERENCE["sgd"]} == REFERENCE["sgd"]


def expert_views(count=400, experts=3, stable=0, seed=0):
    """Two views whose predictions agree for one expert and are independent noise for the others."""
    generator = torch.Generator().manual_seed(seed)
    view1, view2 = (3 * torch.randn(count, experts, 5, generator=generator) for _ in range(2))
    view2[:, stable] = view1[:, stable]
    return view1, view2


def fit(aggregator, views):
    """Every pass with the same views."""
    aggregator.fit(views[0], (views for _ in range(10)), torch.Generator().manual_seed(0))
    return aggregator


@pytest.mark.parametrize("experts", [2, 3, 4, 6])
def test_the_stable_expert_wins(experts):
    for stable in range(experts):
        aggregator = fit(make(experts=experts, batch_size=32, fallback=False), expert_views(400, experts, stable))
        assert int(aggregator.weights.argmax()) == stable and aggregator.weights.sum() == pytest.approx(1)


def test_stop_rule():
    views = expert_views()
    stopped = fit(make(batch_size=32, fallback=False), views)
    smallest = [min(round(w, 2) for w in weights) for weights in stopped.history.tolist()]
    assert 1 <= len(smallest) < 5 and smallest[-1] < 0.05 and all(w >= 0.05 for w in smallest[:-1])
    assert len(fit(make(batch_size=32, stop_below=0.0), views).stability) == 5
    assert len(fit(make(batch_size=400, epochs=3), views).stability) == 3


def at_weights(weights, **options):
    """With these weights, [3]."""
    aggregator = make(**options)
    with torch.no_grad():
        aggregator.parameter.copy_(torch.tensor(weights).log())
    return aggregator


def test_the_stop_rule_rounds_weights_to_two_decimals():
    """As the published method does: 0.046 is 0.05 and goes on, 0.044 is 0.04 and ends."""
    views = expert_views(8)
    for smallest, more in ((0.046, True), (0.044, False)):
        aggregator = at_weights([smallest, 0.4, 0.6 - smallest], sgd={"lr": 0.0})
        assert aggregator.fit_pass(views[0], views, None) is more


def test_the_stability_of_a_pass_is_the_mean_over_its_updates():
    views = expert_views(count=8)
    aggregator = make(batch_size=4, epochs=1, fallback=False, sgd={"lr": 0.0})
    aggregator.fit(views[0], [views], torch.Generator().manual_seed(1))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    halves = [prediction_stability(torch.full((3,), 1 / 3), *(v[batch] for v in views)) for batch in order.split(4)]
    assert aggregator.stability == [pytest.approx(float(sum(halves)) / 2)]
    assert aggregator.report()["stability_in_pass"] == aggregator.stability


def test_starts_equal_and_reports_how_weights_moved():
    aggregator = make(batch_size=400, epochs=2)
    torch.testing.assert_close(aggregator.weights, torch.full((3,), 1 / 3))
    report = fit(aggregator, expert_views()).report()
    assert len(report["weights_after_pass"]) == 3 and len(report["stability_in_pass"]) == 2
    assert report["stability_in_pass"][1] > report["stability_in_pass"][0] and report["note"] is None


def test_falls_back_when_the_objective_gets_worse():
    class Ascent(torch.optim.SGD):  # walks the wrong way
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.neg_()
            return super().step(closure)

    def wrong(fallback):
        aggregator = StabilityAggregator(
            torch.zeros(3, 5),
            torch.zeros(5),
            make_optimizer=lambda p: Ascent(p, lr=0.1),
            batch_size=32,
            fallback=fallback,
        )
        return fit(aggregator, expert_views())

    aggregator = wrong(fallback=True)
    torch.testing.assert_close(aggregator.weights, torch.full((3,), 1 / 3))
    assert "less stable than equal weights" in aggregator.report()["note"]
    assert wrong(fallback=False).weights.max() > 0.4 and wrong(fallback=False).note is None


def test_falls_back_when_one_expert_takes_all():
    def fast(fallback):
        return fit(make(sgd={"lr": 20.0}, batch_size=8, stop_below=0.0, fallback=fallback), expert_views())

    assert fast(fallback=False).weights.max() > 0.99
    assert "collapsed" in fast(fallback=True).note and fast(fallback=True).weights.max() < 0.34


def test_falls_back_when_weights_are_not_numbers():
    aggregator = fit(make(batch_size=32, sgd={"lr": float("inf")}), expert_views())
    torch.testing.assert_close(aggregator.weights, torch.full((3,), 1 / 3))
    assert aggregator.report()["weights_after_pass"][-1] == [None] * 3


def test_entropy_term_moves_weights():
    views = tuple(torch.zeros(64, 3, 5) for _ in range(2))  # nothing to learn but the entropy

    def weights(coefficient):
        aggregator = at_weights([0.5, 0.25, 0.25], entropy_coefficient=coefficient, batch_size=4, fallback=False)
        aggregator.fit_pass(views[0], views, None)
        return aggregator.weights

    assert weights(1.0).max() < weights(0.0).max() < weights(-1.0).max()


def test_predict_is_the_softmax_of_the_weighted_logits():
    logits = torch.randn(4, 3, 5)
    aggregator = fit(make(batch_size=32), expert_views())
    expected = torch.log_softmax(sum(aggregator.weights[e] * logits[:, e] for e in range(3)), dim=1)
    torch.testing.assert_close(aggregator.predict(logits), expected)
    torch.testing.assert_close(weighted_logits(torch.full((3,), 1 / 3), logits), logits.mean(1))


def test_stability_of_equal_views_is_one():
    view = torch.randn(6, 3, 5)
    assert prediction_stability(torch.tensor([0.2, 0.3, 0.5]), view, view).item() == pytest.approx(1)


def test_a_stream_learns_and_predicts_at_any_moment():
    views, aggregator = expert_views(200), make()
    before = aggregator.predict(views[0])
    for batch in torch.arange(200).split(64):
        aggregator.update(views[0][batch], (views[0][batch], views[1][batch]))
        assert aggregator.predict(views[0][batch]).shape == (len(batch), 5)
    assert len(aggregator.updates) == 4 and int(aggregator.weights.argmax()) == 0
    report = aggregator.report()
    assert report["weights"] == report["weights_after_pass"][-1] == pytest.approx(aggregator.weights.tolist())
    assert report["stability_in_pass"] == [pytest.approx(np.mean(aggregator.updates))]
    aggregator.reset()
    torch.testing.assert_close(aggregator.predict(views[0]), before)
    assert aggregator.report()["stability_in_pass"] == []


def test_a_generator_of_views_is_asked_for_no_more_than_is_needed():
    views, asked = expert_views(), []

    def passes():
        for number in range(10):
            asked.append(number)
            yield views

    make(batch_size=400, epochs=3).fit(views[0], passes())
    assert asked == [0, 1, 2]


def test_what_is_refused():
    with pytest.raises(ValueError, match="epochs and batch_size must be at least 1"):
        make(epochs=0)
    for call in (make().fit, make().update):
        with pytest.raises(ValueError, match="needs two random views"):
            call(torch.zeros(4, 3, 5))
    none = torch.zeros(0, 3, 5)
    with pytest.raises(ValueError, match="one at least, not of 0 and 0"):
        make().fit(none, [(none, none)])
    with pytest.raises(ValueError, match=r"expert logits must be \[N, 3, 5\], not \[4, 1, 5\]"):
        make().predict(torch.zeros(4, 1, 5))
