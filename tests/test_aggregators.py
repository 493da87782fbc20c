"""The contract of aggregators: all of them keep it, and `check_aggregator` finds those that do not."""

import inspect
import math
import re
from functools import partial

import pytest
import torch
from conftest import ROOT

import tade
from tade import (
    Aggregator,
    BBSEAggregator,
    EMAggregator,
    GivenPriorAggregator,
    MAPEMAggregator,
    PriorAggregator,
    StabilityAggregator,
    check_aggregator,
)
from trainer.registry import AGGREGATORS, read_config


def with_held_out(carried, log_prior):
    targets = torch.arange(400) % 5
    scores = 2 * torch.eye(5)[targets] + torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    return BBSEAggregator(carried, log_prior, held_out=(scores[:, None] + carried, targets))


KINDS = {
    "EM": EMAggregator,
    "MAP-EM": MAPEMAggregator,
    "BBSE": with_held_out,
    "given": partial(GivenPriorAggregator, prior=[1, 2, 3, 4, 5]),
    "prior": PriorAggregator,
    "prior, forgetting, small buffer": partial(PriorAggregator, forgetting=0.98, buffer=40),
    "prior, calibrated": partial(PriorAggregator, calibration=[0.8, -0.1, 0.0]),
    "prior, skew alone": partial(PriorAggregator, debias=False, classwise=False),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_aggregator_keeps_the_contract(kind):
    check_aggregator(kind)


@pytest.mark.parametrize("fallback", [True, False])
def test_the_published_one_keeps_it_with_two_experts_or_more(fallback):
    check_aggregator(partial(StabilityAggregator, fallback=fallback), experts=(2, 3, 4))
    with pytest.raises(ValueError, match="num_experts of at least 2"):
        check_aggregator(StabilityAggregator)


@pytest.fixture(scope="module")
def own() -> type[Aggregator]:
    """The class that CONTRIBUTING.md writes."""
    code = re.search(
        r"```python\n(   \"\"\"The test prior as the mean.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    names: dict = {}
    exec(inspect.cleandoc(code[1]), names)
    return names["MeanPosteriorAggregator"]


def test_a_class_of_ones_own_keeps_it(own):
    check_aggregator(own)
    whole_sets = {"update": Aggregator.update, "fit_pass": lambda self, logits, views, _: own.update(self, logits)}
    check_aggregator(type("Smallest", (own,), {"learned": None, **whole_sets}))


BROKEN = {
    "fit does not forget": {"fit": lambda self, logits, views=None, generator=None: self.update(logits)},
    "reset does not forget": {"reset": lambda self: vars(self).setdefault("counts", torch.ones(5))},
    "do not sum to 1": {"predict": lambda self, logits: self._likelihood(logits)},
    "depends on other images": {
        "predict": lambda self, logits: (self._likelihood(logits) - logits.mean(dim=(0, 1))).log_softmax(dim=1)
    },
    "not \\[N, C\\]": {"predict": lambda self, logits: self._likelihood(logits).log_softmax(dim=1).T},
    "learning changes": {"update": lambda self, logits, views=None: logits.mul_(2)},
    "not what was learned until": {"state_dict": lambda self: {"counts": self.reset() or self.counts}},
    "learns otherwise": {
        "load_state_dict": lambda self, state: vars(self).update(counts=state["counts"], update=print)
    },
    "not .*ValueError": {"check_finite": lambda self, logits: None},
    "does not go into JSON": {"report": lambda self: {"prior": self.prior}},
    '"prior" in report': {"report": lambda self: {"prior": [1.0]}},
    "update does not raise Not": {"follows_streams": classmethod(lambda cls: False)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_breaks_the_contract_is_named(own, message):
    with pytest.raises(AssertionError, match=f"^Broken with 1 experts: .*{message}"):
        check_aggregator(type("Broken", (own,), BROKEN[message]))


@pytest.mark.parametrize("missing", ["fit_pass", "predict", "reset"])
def test_the_contract_demands_what_every_aggregator_does_itself(own, missing):
    with pytest.raises(TypeError, match=f"abstract method '?{missing}"):
        type("Incomplete", (own,), {missing: getattr(Aggregator, missing)})(torch.zeros(1, 5), torch.zeros(5))


def test_priors_that_do_not_fit_are_refused(own):
    for carried, log_prior, message in (
        (torch.zeros(3, 5), torch.zeros(4), r"must be \[E, C\] and log_prior \[C\], not \[3, 5\] and \[4\]"),
        (torch.zeros(5), torch.tensor(0.0), r"not \[5\] and \[\]"),
        (torch.zeros(3, 5), torch.tensor([0.0, 0, 0, 0, -math.inf]), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            own(carried, log_prior)


def test_no_aggregator_has_a_place_for_labels_but_what_says_so():
    for name, kind in AGGREGATORS.items():
        for method in (kind.fit, kind.fit_pass, kind.update, kind.predict):
            assert set(inspect.signature(method).parameters) <= {"self", "logits", "views", "generator"}, name
        takes = {"prior", "held_out"} & set(inspect.signature(kind).parameters)
        assert takes == {"GivenPriorAggregator": {"prior"}, "BBSEAggregator": {"held_out"}}.get(name, set())


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("PriorAggregator", {"calibration": [0.7, -0.3, 0], "classwise": False, "forgetting": 0.999}),
        ("GivenPriorAggregator", {"prior": [5, 3, 2], "calibration": [0.7, -0.3, 0]}),
        ("EMAggregator", {"steps": 10}),
        ("MAPEMAggregator", {"largest": 10.0, "steps": 10}),
    ],
)
def test_a_config_can_name_them(kind, arguments):
    config = read_config({"aggregator": {"type": kind, "args": arguments}})
    built = config.build("aggregator", expert_log_priors=torch.zeros(2, 3), log_prior=torch.zeros(3))
    assert type(built) is getattr(tade, kind)


# States: what check_aggregator does not try


def learned(kind=PriorAggregator, **options):
    """After a batch of a stream, and the state."""
    carried = torch.stack([torch.zeros(5), torch.linspace(1, -1, 5)])
    aggregator = kind(carried, torch.linspace(0, -3, 5).log_softmax(dim=0), **options)
    logits, *views = torch.randn(3, 30, 2, 5, generator=torch.Generator().manual_seed(0))
    aggregator.update(logits, tuple(views))
    return aggregator, aggregator.state_dict()


WRONG = {
    "log_test_prior": [torch.zeros(3), torch.full((5,), math.nan), [0.0] * 5],
    "note": [3],
    "skew": [math.nan, "1", True],
    "kept": [{}, {"likelihoods": (torch.ones(2, 5), torch.ones(3)), "views": (), "gauge": ()}],
    "gauge_sums": [torch.zeros(2, 2)],
    "parameter": [torch.zeros(4)],
    "history": [torch.zeros(2, 5)],
    "updates": [1.0, ["1"]],
    "optimizer": [
        {},
        {"state": {0: {"momentum_buffer": torch.zeros(7)}}, "param_groups": [{"lr": 1, "params": [0]}]},
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_state_is_refused_and_nothing_of_it_stays(name):
    kind = PriorAggregator if hasattr(learned()[0], name) else StabilityAggregator
    for value in WRONG[name]:
        aggregator, state = learned(kind)
        with pytest.raises(ValueError, match="state"):
            aggregator.load_state_dict({**state, name: value})
        assert aggregator.report() == kind(aggregator.expert_log_priors, aggregator.log_prior).report()


def test_a_state_of_a_larger_buffer_is_cut_with_the_next_batch():
    state = learned()[1]
    aggregator, _ = learned(buffer=10)
    aggregator.load_state_dict(state)
    assert len(aggregator.kept["likelihoods"][0]) == 30
    aggregator.update(torch.randn(4, 2, 5))
    assert len(aggregator.kept["likelihoods"][0]) == 10


def test_without_learned_there_is_no_state(own):
    aggregator = type("Own", (own,), {"learned": None})(torch.zeros(1, 5), torch.zeros(5))
    for call in (aggregator.state_dict, lambda: aggregator.load_state_dict({})):
        with pytest.raises(NotImplementedError, match="Own has no state_dict"):
            call()
