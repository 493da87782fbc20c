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
            second, third = make(kind, **options), make(kind, **options)
            second.load_state_dict(state)
            first.update(*batch(99))  # changes neither the state nor the one that took it up
            first = second
        first.update(logits, views)
    third.load_state_dict(state)
    for seed in range(3, 6):
        third.update(*batch(seed))
    logits, _ = batch(7, images=50)
    assert torch.equal(first.predict(logits), whole.predict(logits)) and first.report() == whole.report()
    assert torch.equal(third.predict(logits), whole.predict(logits))
    fresh = make(kind, **options).predict(logits)
    assert torch.equal(fresh, whole.predict(logits)) == (kind is GivenPriorAggregator)


@pytest.mark.parametrize("kind", [EMAggregator, MAPEMAggregator])
def test_an_estimate_is_kept_for_other_images(kind):
    aggregator, other = make(kind), make(kind)
    aggregator.fit(batch(0, images=200)[0])
    other.load_state_dict(through_a_file(aggregator.state_dict()))
    assert torch.equal(other.predict(batch(1)[0]), aggregator.predict(batch(1)[0]))
    assert other.report() == aggregator.report()


HELD_OUT = batch(0, images=400)[0], torch.arange(400) % CLASSES


@pytest.mark.parametrize(
    ("learned_by", "kind", "options", "message"),
    [
        ("stability", PriorAggregator, {}, "not one of this kind of aggregator"),
        ("prior", StabilityAggregator, {}, "not one of this kind of aggregator"),
        ("prior", GivenPriorAggregator, STREAMS["given"][1], "not one of this kind of aggregator"),
        ("prior", BBSEAggregator, {"held_out": HELD_OUT}, "not one of this kind of aggregator"),
        ("prior", PriorAggregator, {"buffer": 40}, "a row and a weight for each of 40 images at most"),
        (
            "forgetting, small buffer",
            PriorAggregator,
            {"calibration": [1.0, 0.0, 0.0]},
            "looks for the bias of the scores, and this one",
        ),
    ],
)
def test_each_kind_of_state_is_refused_elsewhere(learned_by, kind, options, message):
    aggregator = make(STREAMS[learned_by][0], **STREAMS[learned_by][1])
    for seed in range(3):
        aggregator.update(*batch(seed))
    with pytest.raises(ValueError, match=message):
        make(kind, **options).load_state_dict(aggregator.state_dict())


MOMENTUM = {"state": {0: {"momentum_buffer": torch.zeros(7)}}, "param_groups": [{"lr": 1, "params": [0]}]}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (PriorAggregator, "log_test_prior", torch.zeros(3)),
        (PriorAggregator, "log_test_prior", torch.full((CLASSES,), math.nan)),
        (PriorAggregator, "note", 3),
        (PriorAggregator, "skew", math.nan),
        (PriorAggregator, "sum_of_weights", torch.ones(())),
        (PriorAggregator, "likelihoods_kept", {"rows": None, "weights": torch.ones(3)}),
        (PriorAggregator, "likelihoods_kept", {"rows": torch.ones(2, 3), "weights": torch.ones(2)}),
        (PriorAggregator, "turning_gauge", torch.zeros(2, 2)),
        (StabilityAggregator, "optimizer", MOMENTUM),
        (StabilityAggregator, "history", torch.zeros(2, 5, dtype=torch.float64)),
        (StabilityAggregator, "parameter", torch.zeros(4)),
        (StabilityAggregator, "updates", 1.0),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_of_it_stays(kind, name, value):
    options = {"forgetting": 0.98} if kind is PriorAggregator else {}
    aggregator, other, fresh = (make(kind, **options) for _ in range(3))
    aggregator.update(*batch(0))
    other.update(*batch(2))
    with pytest.raises(ValueError, match="state"):
        other.load_state_dict({**aggregator.state_dict(), name: value})
    logits, _ = batch(1)
    assert torch.equal(other.predict(logits), fresh.predict(logits))


def test_an_aggregator_need_not_offer_it():
    class Own(EMAggregator):
        state_dict, load_state_dict = Aggregator.state_dict, Aggregator.load_state_dict

    with pytest.raises(NotImplementedError, match="Own cannot put aside what it learned"):
        make(Own).state_dict()
    with pytest.raises(NotImplementedError, match="Own cannot go on"):
        make(Own).load_state_dict({})
