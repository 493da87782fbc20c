"""Whether an aggregator keeps the contract, for classes of your own (as scikit-learn's check_estimator)."""

import io
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tade.aggregator import Aggregator, Views
from tade.priors import class_prior, expert_log_priors, inverse_prior

CLASSES = 5
PI = class_prior([100, 60, 30, 10, 4])


def check_aggregator(make: Callable[[Tensor, Tensor], Aggregator], experts: Sequence[int] = (1, 2, 3, 4)) -> None:
    """Check an aggregator against what `Aggregator` promises, on made-up logits of five classes.

    `fit` and `reset` forget; predictions are normalized log probabilities that depend on nothing but the image; a state
    takes learning up where it was; shapes that do not fit and logits that are not finite are refused, or do no harm to
    what is learned; arguments are not changed; `report` goes into JSON.

    Args:
        make: a class, or a function that builds one: (expert_log_priors [E, C], log_prior [C]) -> a new aggregator.
        experts: numbers of experts that it takes.

    Raises:
        AssertionError: in one sentence, what it does not keep.

    Example:
        >>> from tade import EMAggregator, check_aggregator
        >>> check_aggregator(EMAggregator)
    """
    for count in experts:
        priors = expert_log_priors(PI, inverse_prior(PI), count, 2.0), PI.log()
        for check in (_learning, _predictions, _state, _refusals):
            check(_Case(make, priors))


class _Case:
    """An aggregator to check, with the priors that it is made with."""

    def __init__(self, make: Callable[[Tensor, Tensor], Aggregator], priors: tuple[Tensor, Tensor]):
        self.maker, self.priors = make, priors
        one = self.make()
        self.name = f"{type(one).__name__} with {len(priors[0])} experts"
        self.needs_views, self.streams = "views" in one.needs, one.follows_streams()
        self.keeps_state = one.learned is not None

    def make(self) -> Aggregator:
        return self.maker(*self.priors)

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise AssertionError(f"{self.name}: {what}")

    def refuses(
        self, what: str, call: Callable[..., object], *arguments: object, error: type[Exception] = ValueError
    ) -> None:
        try:
            call(*arguments)
        except error:
            return
        except Exception as other:
            self.expect(False, f"{what} raises {type(other).__name__} and not {error.__name__}")
        self.expect(False, f"{what} does not raise {error.__name__}")

    def images(self, seed: int, count: int = 60) -> tuple[Tensor, Views]:
        """Expert logits of images of mostly rare classes, and of two views of them."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, CLASSES, generator=generator) + 2 * torch.eye(CLASSES).flip(0)[torch.arange(count) % 3]
        noise = torch.randn(2, count, CLASSES, generator=generator) / 2
        own, *views = (scores[:, None] + self.priors[0] for scores in (x, x + noise[0], x + noise[1]))
        return own, (views[0], views[1])

    def fit(self, aggregator: Aggregator, logits: Tensor, views: Views) -> Aggregator:
        passes = (views for _ in range(100)) if self.needs_views else None
        aggregator.fit(logits, passes, torch.Generator().manual_seed(0))
        return aggregator

    def update(self, aggregator: Aggregator, logits: Tensor, views: Views) -> Aggregator:
        aggregator.update(logits, views if self.needs_views else None)
        return aggregator

    def same(self, one: Aggregator, other: Aggregator, what: str) -> None:
        logits, _ = self.images(9)
        self.expect(torch.equal(one.predict(logits), other.predict(logits)), what)
        self.expect(self.report(one) == self.report(other), what)

    def report(self, aggregator: Aggregator) -> str:
        """As JSON."""
        report, text = aggregator.report(), ""
        try:
            text = json.dumps(report, allow_nan=False)
        except (TypeError, ValueError) as error:
            self.expect(False, f"report does not go into JSON ({error})")
        for key, size in (("weights", len(self.priors[0])), ("prior", CLASSES)):
            if (shares := report.get(key)) is not None:
                self.expect(
                    len(shares) == size and abs(sum(shares) - 1) < 1e-4, f'"{key}" in report is not {size} shares'
                )
        return text


def _learning(case: _Case) -> None:
    (logits, views), second = case.images(1), case.images(2)
    given = *case.priors, logits, *views
    copies = [tensor.clone() for tensor in given]
    aggregator = case.fit(case.make(), logits, views)
    if case.streams:
        case.update(case.make(), logits, views)
    else:
        case.refuses("update", case.update, case.make(), logits, views, error=NotImplementedError)
    case.expect(all(map(torch.equal, copies, given)), "learning changes the logits, the views or the priors")
    aggregator.reset()
    case.same(aggregator, case.make(), "reset does not forget what was learned")
    again = case.fit(case.fit(case.make(), logits, views), *second)
    case.same(again, case.fit(case.make(), *second), "fit does not forget what was learned")


def _predictions(case: _Case) -> None:
    aggregator, (logits, _) = case.fit(case.make(), *case.images(1)), case.images(2)
    before, scores = case.report(aggregator), aggregator.predict(logits)
    case.expect(scores.shape == (len(logits), CLASSES), f"predict gives {list(scores.shape)} and not [N, C]")
    case.expect(torch.allclose(scores.exp().sum(dim=1), torch.ones(len(logits))), "probabilities do not sum to 1")
    alone = torch.cat([aggregator.predict(image[None]) for image in logits.flip(0)]).flip(0)
    case.expect(torch.allclose(alone, scores, atol=1e-5), "a prediction depends on other images than its own")
    case.expect(aggregator.predict(logits[:0]).shape == (0, CLASSES), "predict of no image is not [0, C]")
    case.expect(case.report(aggregator) == before, "predict changes what was learned")


def _state(case: _Case) -> None:
    if not case.keeps_state:
        return
    learn, file = case.update if case.streams else case.fit, io.BytesIO()
    one, whole, other = learn(case.make(), *case.images(1)), learn(case.make(), *case.images(1)), case.make()
    state = one.state_dict()
    learn(one, *case.images(3))
    torch.save(state, file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    case.same(other, whole, "a loaded state is not what was learned until state_dict")
    case.same(learn(other, *case.images(2)), learn(whole, *case.images(2)), "a loaded state learns otherwise")
    case.refuses("a state of another kind", other.load_state_dict, {"other": 1.0})
    case.same(other, case.make(), "something is left of a state that is refused")


def _refusals(case: _Case) -> None:
    (logits, views), fitted = case.images(1), case.fit(case.make(), *case.images(1))
    learning = [case.fit, case.update] if case.streams else [case.fit]
    for wrong in (logits[:, 0], logits[:, :, 1:], torch.cat([logits, logits[:, :1]], dim=1), logits[:, :0]):
        case.refuses(f"predict of {list(wrong.shape)}", fitted.predict, wrong)
        for learn in learning:
            case.refuses(f"{learn.__name__} with {list(wrong.shape)}", learn, case.make(), wrong, (wrong, wrong))
    broken = logits.clone()
    broken[3, 0, 1] = math.nan
    case.refuses("predict of logits that are not finite", fitted.predict, broken)
    for learn in learning:
        if case.needs_views:
            case.refuses("views of other images", learn, case.make(), logits, (views[0], views[1][1:]))
        for images in ((broken, (broken, views[1])), case.images(4, 1), case.images(5, 0), (logits, views)):
            aggregator = case.make()
            try:
                learn(aggregator, *images)
            except ValueError:
                continue
            scores = aggregator.predict(logits)
            case.expect(
                bool(scores.isfinite().all()), f"{learn.__name__} on images that are broken, one, or none, spoils it"
            )
            case.report(aggregator)
            case.report(aggregator)
