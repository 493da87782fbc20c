import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_json

from tade import Aggregator, StabilityAggregator, prediction_stability, weighted_logits

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
    while not aggregator.finished:
        aggregator.fit(views[0], [views], torch.Generator().manual_seed(len(aggregator.stability)))
    return aggregator


@pytest.mark.parametrize("experts", [2, 3, 4, 6])
def test_the_stable_expert_wins(experts):
    for stable in range(experts):
        aggregator = fit(make(experts=experts, batch_size=32, fallback=False), expert_views(400, experts, stable))
        assert int(aggregator.weights.argmax()) == stable and aggregator.weights.sum() == pytest.approx(1)


def test_stop_rule():
    views = expert_views()
    aggregator = fit(make(batch_size=32), views)
    passes = len(aggregator.stability)
    assert 1 <= passes < 5
    assert min(round(w, 2) for w in aggregator.history[-1]) < 0.05
    assert all(min(round(w, 2) for w in weights) >= 0.05 for weights in aggregator.history[:-1])
    assert len(fit(make(batch_size=32, stop_below=0.0), views).stability) == 5
    assert len(fit(make(batch_size=400, epochs=3), views).stability) == 3


def test_the_stop_rule_rounds_weights_to_two_decimals():
    """As the published method does: 0.046 is 0.05 and goes on, 0.044 is 0.04 and ends."""
    for smallest, ends in ((0.046, False), (0.044, True)):
        aggregator = make(epochs=5)
        aggregator.history.append([smallest, 0.4, 0.6 - smallest])
        assert aggregator.finished == ends
    aggregator = make(stop_below=0.5)
    assert not aggregator.finished  # the weights to start with do not count
    aggregator.history.append([0.0, 0.4, 0.6])
    assert aggregator.finished


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
    views = expert_views()
    aggregator = fit(make(batch_size=32), (views[0] * float("nan"), views[1]))
    torch.testing.assert_close(aggregator.weights, torch.full((3,), 1 / 3))
    json.dumps(aggregator.report(), allow_nan=False)


def test_entropy_term_moves_weights():
    views = tuple(torch.zeros(64, 3, 5) for _ in range(2))  # nothing to learn but the entropy

    def weights(coefficient):
        aggregator = make(entropy_coefficient=coefficient, batch_size=8, fallback=False)
        with torch.no_grad():
            aggregator.parameter.copy_(torch.tensor([0.5, 0.0, 0.0]))
        return fit(aggregator, views).weights

    assert weights(1.0).max() < weights(0.0).max() < weights(-1.0).max()


def test_predict_is_the_softmax_of_the_weighted_logits():
    logits = torch.randn(4, 3, 5)
    aggregator = fit(make(batch_size=32), expert_views())
    expected = torch.log_softmax(sum(aggregator.weights[e] * logits[:, e] for e in range(3)), dim=1)
    torch.testing.assert_close(aggregator.predict(logits), expected)
    torch.testing.assert_close(weighted_logits(torch.full((3,), 1 / 3), logits), logits.mean(1))


def test_predict_takes_any_images_in_any_order():
    aggregator, logits = fit(make(batch_size=32), expert_views()), torch.randn(20, 3, 5)
    everything, order = aggregator.predict(logits), torch.randperm(20)
    torch.testing.assert_close(aggregator.predict(logits[order]), everything[order])
    torch.testing.assert_close(aggregator.predict(logits[7:8]), everything[7:8])
    torch.testing.assert_close(aggregator.predict(logits), everything)


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


def test_reset_forgets_everything():
    views, aggregator = expert_views(), make(batch_size=32)
    first = fit(aggregator, views).report()
    aggregator.reset()
    assert not aggregator.finished and aggregator.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert fit(aggregator, views).report() == first


def test_a_generator_of_views_is_asked_for_no_more_than_is_needed():
    views, asked = expert_views(), []

    def passes():
        for number in range(10):
            asked.append(number)
            yield views

    aggregator = make(batch_size=400, epochs=3)
    aggregator.fit(views[0], passes(), torch.Generator().manual_seed(0))
    assert asked == [0, 1, 2] and aggregator.finished
    aggregator.fit(views[0], passes())
    assert asked == [0, 1, 2]


def test_what_is_refused():
    with pytest.raises(ValueError, match="num_experts of at least 2"):
        make(experts=1)
    with pytest.raises(ValueError, match="epochs and batch_size must be at least 1"):
        make(epochs=0)
    with pytest.raises(ValueError, match=r"must be \[E, C\] and log_prior \[C\], not \[3, 5\] and \[4\]"):
        StabilityAggregator(torch.zeros(3, 5), torch.zeros(4))
    with pytest.raises(ValueError, match=r"must be \[E, C\] and log_prior \[C\], not \[5\] and \[\]"):
        Fixed(torch.zeros(5), torch.tensor(0.0))
    with pytest.raises(ValueError, match="must be finite"):
        StabilityAggregator(torch.zeros(3, 5), torch.tensor([0.0, 0, 0, 0, -torch.inf]))
    for call in (make().fit, make().update):
        with pytest.raises(ValueError, match="needs two random views"):
            call(torch.zeros(4, 3, 5))
    one_expert, none = torch.zeros(4, 1, 5), torch.zeros(0, 3, 5)  # torch would broadcast the one, divide by the other
    for call in (
        lambda: make().predict(one_expert),
        lambda: make().update(one_expert, (one_expert, one_expert)),
        lambda: make().fit(one_expert, [(one_expert, one_expert)]),
    ):
        with pytest.raises(ValueError, match=r"expert logits must be \[N, 3, 5\], not \[4, 1, 5\]"):
            call()
    with pytest.raises(ValueError, match="one at least, not of 0 and 0"):
        make().fit(none, [(none, none)])


class Fixed(Aggregator):
    """The smallest aggregator there can be: one expert is allowed, no views, no stream."""

    def fit(self, logits, views=None, generator=None):
        pass

    def predict(self, logits):
        return torch.log_softmax((logits - self.expert_log_priors).mean(dim=1), dim=1)

    def reset(self):
        pass


def test_the_contract_has_defaults_for_what_an_aggregator_does_not_need():
    fixed = Fixed(torch.zeros(1, 5), torch.zeros(5))
    assert fixed.finished is True and fixed.num_experts == 1 and not fixed.needs and fixed.report() == {}
    assert not Fixed.follows_streams() and StabilityAggregator.follows_streams()
    with pytest.raises(NotImplementedError, match="Fixed learns from a whole test set"):
        fixed.update(torch.zeros(2, 1, 5))
    assert fixed.predict(torch.zeros(2, 1, 5)).exp().sum(dim=1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("missing", ["fit", "predict", "reset"])
def test_the_contract_demands_what_every_aggregator_does_itself(missing):
    methods = {name: getattr(Fixed, name) for name in ("fit", "predict", "reset") if name != missing}
    with pytest.raises(TypeError, match=f"abstract method '?{missing}"):
        type("Incomplete", (Aggregator,), methods)(torch.zeros(1, 5), torch.zeros(5))
