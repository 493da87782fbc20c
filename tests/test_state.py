"""What an aggregator has learned is put aside and taken up again as if nothing had been between."""

import io
import math

import pytest
import torch

from tade import (
    Aggregator,
    BBSEAggregator,
    EMAggregator,
    GivenPriorAggregator,
    MAPEMAggregator,
    PriorAggregator,
    StabilityAggregator,
    class_prior,
    expert_log_priors,
    inverse_prior,
)
from tade.state import taken_up

CLASSES = 12
PI = class_prior([int(500 * 0.02 ** (c / (CLASSES - 1))) for c in range(CLASSES)])
CARRIED = expert_log_priors(PI, inverse_prior(PI), 3, 2.0)


def batch(seed: int, images: int = 32) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Expert logits of images of rare classes, and of two views of them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(PI.flip(0), images, True, generator=generator)
    x = 2 * torch.eye(CLASSES)[targets] + torch.randn(images, CLASSES, generator=generator)
    own, *views = (
        (1.5 * (x + noise * torch.randn(x.shape, generator=generator)))[:, None] + CARRIED for noise in (0, 0.5, 0.5)
    )
    return own, tuple(views)


def make(kind, **options):
    return kind(CARRIED, PI.log(), **options)


def through_a_file(state: dict) -> dict:
    """Only tensors and plain values survive this."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


STREAMS = {
    "prior": (PriorAggregator, {}),
    "forgetting, small buffer": (PriorAggregator, {"forgetting": 0.98, "buffer": 40}),
    "calibrated": (PriorAggregator, {"calibration": [0.8, -0.1, 0.0]}),
    "skew alone": (PriorAggregator, {"debias": False, "classwise": False}),
    "stability": (StabilityAggregator, {}),
    "given": (GivenPriorAggregator, {"prior": list(range(1, CLASSES + 1))}),
}


@pytest.mark.parametrize(("kind", "options"), STREAMS.values(), ids=STREAMS)
def test_a_stream_in_two_halves_is_one_stream(kind, options):
    whole, first = make(kind, **options), make(kind, **options)
    for seed in range(6):
        logits, views = batch(seed)
        whole.update(logits, views)
        if seed == 3:
            state = through_a_file(first.state_dict())
            second = make(kind, **options)
            second.load_state_dict(state)
            first.update(*batch(99))  # changes neither the state nor the one that took it up
            first = second
        first.update(logits, views)
    logits, _ = batch(7, images=50)
    assert torch.equal(first.predict(logits), whole.predict(logits)) and first.report() == whole.report()
    fresh = make(kind, **options).predict(logits)
    assert torch.equal(fresh, whole.predict(logits)) == (kind is GivenPriorAggregator)


@pytest.mark.parametrize("kind", [EMAggregator, MAPEMAggregator])
def test_an_estimate_is_kept_for_other_images(kind):
    aggregator, other = make(kind), make(kind)
    aggregator.fit(batch(0, images=200)[0])
    other.load_state_dict(through_a_file(aggregator.state_dict()))
    assert torch.equal(other.predict(batch(1)[0]), aggregator.predict(batch(1)[0]))
    assert other.report() == aggregator.report()


def test_each_kind_of_state_is_refused_elsewhere():
    states = {}
    for name, (kind, options) in STREAMS.items():
        aggregator = make(kind, **options)
        for seed in range(3):
            aggregator.update(*batch(seed))
        states[name] = aggregator.state_dict()
    for name, (kind, options) in STREAMS.items():
        for other, state in states.items():
            if STREAMS[other][0] is not kind:
                with pytest.raises(ValueError, match="not one of this kind of aggregator"):
                    make(kind, **options).load_state_dict(state)
    with pytest.raises(ValueError, match="a row and a weight for each of 40 images at most"):
        make(PriorAggregator, buffer=40).load_state_dict(states["prior"])
    with pytest.raises(ValueError, match="looks for the bias of the scores, and this one does not"):
        make(PriorAggregator, calibration=[1.0, 0.0, 0.0]).load_state_dict(states["forgetting, small buffer"])
    held_out = batch(0, images=400)[0], torch.arange(400) % CLASSES
    with pytest.raises(ValueError, match="not one of this kind"):
        make(BBSEAggregator, held_out=held_out).load_state_dict(states["prior"])


WRONG = {
    "log_test_prior": [torch.zeros(3), torch.full((CLASSES,), math.nan), [0.0] * CLASSES],
    "note": [3],
    "skew": [math.nan, "1", True],
    "sum_of_weights": [torch.ones(())],
    "likelihoods_kept": [
        {},
        {"rows": None, "weights": torch.ones(3)},
        {"rows": torch.ones(2, 3), "weights": torch.ones(2)},
    ],
    "turning_gauge": [torch.zeros(2, 2)],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_state_is_refused_and_nothing_of_it_stays(name):
    aggregator = make(PriorAggregator, forgetting=0.98)
    aggregator.update(*batch(0))
    logits, _ = batch(1)
    fresh = make(PriorAggregator, forgetting=0.98).predict(logits)
    for value in WRONG[name]:
        other = make(PriorAggregator, forgetting=0.98)
        other.update(*batch(2))
        with pytest.raises(ValueError, match="state"):
            other.load_state_dict({**aggregator.state_dict(), name: value})
        assert torch.equal(other.predict(logits), fresh)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", {}),
        ("optimizer", {"state": {0: {"momentum_buffer": torch.zeros(7)}}, "param_groups": [{"lr": 1, "params": [0]}]}),
        ("history", torch.zeros(0, 3, dtype=torch.float64)),
        ("history", torch.zeros(2, 5, dtype=torch.float64)),
        ("parameter", torch.zeros(4)),
        ("updates", 1.0),
    ],
)
def test_a_damaged_state_of_weights_is_refused(name, value):
    aggregator = make(StabilityAggregator)
    aggregator.update(*batch(0))
    other = make(StabilityAggregator)
    with pytest.raises(ValueError, match="state"):
        other.load_state_dict({**aggregator.state_dict(), name: value})
    assert other.weights.tolist() == pytest.approx([1 / 3] * 3) and not other.updates


def test_an_aggregator_need_not_offer_it():
    class Own(EMAggregator):
        state_dict, load_state_dict = Aggregator.state_dict, Aggregator.load_state_dict

    with pytest.raises(NotImplementedError, match="Own cannot put aside what it learned"):
        make(Own).state_dict()
    with pytest.raises(NotImplementedError, match="Own cannot go on"):
        make(Own).load_state_dict({})


def test_what_is_taken_up_shares_no_memory_with_the_state():
    kept = torch.zeros(2)
    taken_up("prior", kept, torch.ones(2)).add_(1)
    assert kept.tolist() == [0, 0]
