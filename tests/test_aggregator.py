import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_json

from trainer.aggregator import (
    StabilityAggregator,
    StreamingStabilityAggregator,
    aggregate,
    prediction_stability,
)

REFERENCE = golden_json("aggregation.json")


def make(kind=StabilityAggregator, experts=3, **options):
    return kind(experts, lambda parameters: torch.optim.SGD(parameters, **REFERENCE["sgd"]), **options)


def test_forty_updates_are_the_references():
    views, aggregator = np.load(GOLDEN / "aggregation_inputs.npz"), make()
    assert len(REFERENCE["trajectory"]) == len(views["view1"]) == 40
    for step, expected in enumerate(REFERENCE["trajectory"]):
        stability = aggregator.update(torch.from_numpy(views["view1"][step]), torch.from_numpy(views["view2"][step]))
        np.testing.assert_allclose([*aggregator.weights.tolist(), stability], expected, atol=1e-5)


def expert_views(count=400, experts=3, stable=0, seed=0):
    """Two views whose predictions agree for one expert and are independent noise for the others."""
    generator = torch.Generator().manual_seed(seed)
    view1, view2 = (3 * torch.randn(count, experts, 5, generator=generator) for _ in range(2))
    view2[:, stable] = view1[:, stable]
    return view1, view2


def fit(aggregator, views):
    passes = 0
    while not aggregator.finished:
        aggregator.fit_pass(*views, torch.Generator().manual_seed(passes))
        passes += 1
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
        aggregator = StabilityAggregator(3, lambda p: Ascent(p, lr=0.1), batch_size=32, fallback=fallback)
        return fit(aggregator, expert_views())

    aggregator = wrong(fallback=True)
    torch.testing.assert_close(aggregator.weights, torch.full((3,), 1 / 3))
    assert "less stable than equal weights" in aggregator.report()["note"]
    assert wrong(fallback=False).weights.max() > 0.4 and wrong(fallback=False).note is None


def test_falls_back_when_one_expert_takes_all():
    def fast(fallback):
        return fit(
            StabilityAggregator(
                3, lambda p: torch.optim.SGD(p, lr=20.0), batch_size=8, stop_below=0.0, fallback=fallback
            ),
            expert_views(),
        )

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


def test_predict_is_the_weighted_sum_of_logits():
    logits = torch.randn(4, 3, 5)
    aggregator = fit(make(batch_size=32), expert_views())
    expected = sum(aggregator.weights[e] * logits[:, e] for e in range(3))
    torch.testing.assert_close(aggregator.predict(logits), expected)
    torch.testing.assert_close(aggregate(torch.full((3,), 1 / 3), logits), logits.mean(1))


def test_stability_of_equal_views_is_one():
    view = torch.randn(6, 3, 5)
    assert prediction_stability(torch.tensor([0.2, 0.3, 0.5]), view, view).item() == pytest.approx(1)


def test_streaming_sees_every_image_once_and_predicts_with_the_weights_of_its_batch():
    views = expert_views(200)
    aggregator = make(StreamingStabilityAggregator, batch_size=64)
    aggregator.fit_pass(*views, torch.Generator().manual_seed(0))
    assert aggregator.finished and len(aggregator.stability) == 1
    assert len(torch.unique(aggregator.image_weights, dim=0)) == 4  # batches of 64, 64, 64, 8
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(aggregator.image_weights[order[-1]], aggregator.weights)
    logits = torch.randn(200, 3, 5)
    expected = torch.einsum("ne,nec->nc", aggregator.image_weights, logits)
    torch.testing.assert_close(aggregator.predict(logits), expected)
