"""Drives an aggregator over the unlabeled images of test distributions, whole or as a stream."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from base.base_data_loader import ImageSource
from evaluation.aggregators import AggregatorMaker, aggregator_section
from evaluation.calibration import CalibrationRecord
from evaluation.evaluation import chosen_distributions, results_of, scorer_of, views_text
from evaluation.loaded_run import LoadedRun
from evaluation.results import DistributionResult, Results
from model.logits import LogitsBuffer, check_finite, network_logits, numbered, selected, shard_of_process
from tade import Aggregator, Calibration, GivenPriorAggregator, StabilityAggregator, Views
from utils import distributed
from utils.errors import UserError
from utils.logger import get_logger
from utils.seed import SHUFFLE, epoch_generator

STREAM_BATCH = 64  # as in the paper

ViewsOf = Callable[[np.ndarray, int], Views]
"""(indices of test images, number of the pass) -> expert logits of two random views of them."""


def adapt(
    run: LoadedRun,
    make_aggregator: AggregatorMaker | None = None,
    names: Sequence[str] | None = None,
    stream: bool = False,
    stream_batch: int = STREAM_BATCH,
) -> Results:
    """Adapt to each test distribution by its own unlabeled images, then evaluate on it.

    Args:
        run: from `load_run`.
        make_aggregator: (expert_log_priors, log_prior) -> a fresh aggregator, e.g. a class of `tade`; None for the one
            that the run's config names, or the published method.
        names: of the distributions; all of the data loader's by default.
        stream: images arrive in batches; each is learned from, then predicted with what is known so far.
        stream_batch: images that arrive together.

    Raises:
        UserError: an argument of the aggregator is refused, or it cannot follow a stream.
    """
    distributions = chosen_distributions(run, names)
    chosen = make_aggregator or run.make_aggregator
    aggregators = {name: new_aggregator(run, chosen, stream, stream_batch) for name in distributions}
    one = next(iter(aggregators.values()))
    kind = type(one).__name__
    if isinstance(one, GivenPriorAggregator):
        protocol = f"Known test prior ({kind}), the same for all: nothing learned"
    else:
        what = "Test-time training" if isinstance(one, StabilityAggregator) else "Adaptation"
        images = "on each distribution's own unlabeled test images"
        if stream:
            batches = f"batches of {stream_batch}, each predicted right after learning from it"
            images = f"from a stream of the test images in {batches}"
        views = ", random views shared between distributions" if "views" in one.needs else ""
        protocol = f"{what} ({kind}): learned {images}{views}"
    results = adapted_results(run, distributions, aggregators, protocol, stream, stream_batch)
    if make_aggregator is None:
        results.config = {**results.config, "aggregator": aggregator_section(run.config)}
    return results


def adapted_results(
    run: LoadedRun,
    distributions: Mapping[str, np.ndarray],
    aggregators: Mapping[str, Aggregator],
    protocol: str,
    stream: bool = False,
    stream_batch: int = STREAM_BATCH,
) -> Results:
    """Have a fresh aggregator learn each distribution, and evaluate it there.

    Args:
        run: from `load_run`.
        distributions, aggregators: by name of the distribution.
        protocol: how, in words; what is predicted on and which calibration is used are added.
        stream, stream_batch: see `adapt`.
    """
    one = next(iter(aggregators.values()))
    used = calibration_used(run, one)
    calibrated = used.sentence() if used else "Not calibrated." if hasattr(one, "calibration") else ""
    predicted = views_text(run) or "un-augmented images"
    results = results_of(run, f"{protocol}; predictions on {predicted}. {calibrated}".rstrip())
    results.calibration = used.to_json() if used else None
    scorer, work = scorer_of(run), (aggregators, run.test_logits, distributions, view_source(run), run.seed)
    if stream:
        scores = follow_streams(*work, stream_batch)
    else:
        fit_all(*work)
        scores = ((name, a.predict(selected(run.test_logits, distributions[name]))) for name, a in aggregators.items())
    for name, of_distribution in scores:
        result = scorer.score_beside_equal_weights(distributions[name], of_distribution)
        report = aggregators[name].report()
        result.weights = report.pop("weights", None)
        result.learning = report
        results.distributions[name] = result
        log_learned(name, result)
    return results


def calibration_used(run: LoadedRun, aggregator: Aggregator | None) -> CalibrationRecord | None:
    """The calibration of an aggregator with its source; None where it takes or has none."""
    used = getattr(aggregator, "calibration", None)
    if used in (None, Calibration()):
        return None
    record = vars(run).get("calibration_record")  # never computed just to compare
    if record and record.calibration == used:
        return record
    return CalibrationRecord(used, "numbers that were given")


def new_aggregator(run: LoadedRun, make: AggregatorMaker, stream: bool, stream_batch: int) -> Aggregator:
    """A fresh aggregator for a run.

    Raises:
        UserError: it refuses the run, or cannot follow a stream.
    """
    try:
        aggregator = make(run.expert_log_priors, run.log_prior)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    if stream and not aggregator.follows_streams():
        raise UserError(f"{type(aggregator).__name__} needs a whole test set: leave --stream out.")
    if stream and stream_batch < 1:
        raise UserError(f"A stream's batches have at least one image, not {stream_batch}.")
    return aggregator


def view_source(run: LoadedRun) -> ViewsOf:
    """Where a run's views come from: two passes of the network for each pass of an aggregator."""
    return lambda indices, number: two_view_logits(run.inference_network, run.images, indices, number, run.device)


def two_view_logits(
    network: torch.nn.Module, images: ImageSource, indices: np.ndarray, pass_number: int, device: torch.device
) -> Views:
    """Expert logits of two random views of the images `indices` [M]: two of [M, E, C], on the CPU.

    All processes call this, share the work, and get all of the logits.
    """
    buffers = LogitsBuffer(len(indices)), LogitsBuffer(len(indices))
    batches = shard_of_process(images.views(indices, pass_number))
    for part, views in numbered(batches, f"test-time pass {pass_number + 1}"):
        for view, buffer in zip(views, buffers, strict=True):
            buffer.put(part, network_logits(network, view, device))
    view1, view2 = (check_finite(buffer.gathered(), "random views of test images") for buffer in buffers)
    return view1, view2


def fit_all(
    aggregators: Mapping[str, Aggregator],
    logits: Tensor,
    distributions: Mapping[str, np.ndarray],
    views_of: ViewsOf,
    seed: int,
) -> None:
    """Fit one aggregator a distribution, on that distribution's unlabeled images alone.

    Each distribution by itself is the published algorithm. They share the random views: in a pass every image that any
    unfinished distribution contains is augmented and passed through the network once, and each distribution picks the
    logits of its own images.

    Args:
        aggregators: by distribution; what they have learned before is forgotten.
        logits: expert logits of all test images, [N, E, C].
        distributions: name -> indices of test images.
        views_of: asked once for each pass.
        seed: of shuffling.
    """
    for aggregator in aggregators.values():
        aggregator.reset()
    active, pass_number = list(aggregators), 0
    while active:
        pair = shared_views({name: aggregators[name] for name in active}, distributions, views_of, pass_number)
        unfinished = []
        for name in active:
            own, generator = selected(logits, distributions[name]), epoch_generator(seed, pass_number, SHUFFLE)
            if aggregators[name].fit_pass(own, pair(name), generator):
                unfinished.append(name)
            log_pass(name, aggregators[name], pass_number)
        # Another processor may round otherwise: the first process's answer keeps all in step.
        active = distributed.from_first_process(unfinished)
        pass_number += 1


def follow_streams(
    aggregators: Mapping[str, Aggregator],
    logits: Tensor,
    distributions: Mapping[str, np.ndarray],
    views_of: ViewsOf,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """One shuffled pass over each distribution: learn from a batch, then predict it with what is known so far.

    Every image is seen once. Arguments as in `fit_all`, but what the aggregators have learned before stays.

    Yields:
        Name of a distribution and the log probabilities of its images, [M, C], in the order of its indices.
    """
    pair = shared_views(aggregators, distributions, views_of, 0)
    for name, aggregator in aggregators.items():
        own = selected(logits, distributions[name])
        scores = own.new_empty(len(own), own.shape[2])
        order = torch.randperm(len(own), generator=epoch_generator(seed, 0, SHUFFLE))
        for batch in order.split(batch_size):
            aggregator.update(own[batch], pair(name, batch.numpy()))
            scores[batch] = aggregator.predict(own[batch])
        log_pass(name, aggregator, 0)
        yield name, scores


def shared_views(
    aggregators: Mapping[str, Aggregator],
    distributions: Mapping[str, np.ndarray],
    views_of: ViewsOf,
    pass_number: int,
) -> Callable[..., Views | None]:
    """Views for a pass, each image's once: (name of a distribution, which of its images) -> a pair of views of them."""
    needing = [name for name, aggregator in aggregators.items() if "views" in aggregator.needs]
    if not needing:
        return lambda name, batch=None: None
    indices = np.unique(np.concatenate([distributions[name] for name in needing]))
    views = views_of(indices, pass_number)

    def pair(name: str, batch: np.ndarray | slice = slice(None)) -> Views | None:
        if name not in needing:
            return None
        positions = np.searchsorted(indices, distributions[name][batch])
        return selected(views[0], positions), selected(views[1], positions)

    return pair


def log_pass(name: str, aggregator: Aggregator, pass_number: int) -> None:
    """A line for the log file."""
    if weights := aggregator.report().get("weights"):
        get_logger().debug(f"pass {pass_number + 1}  {name:<11} expert weights {_numbers(weights)}")


def log_learned(name: str, result: DistributionResult) -> None:
    """What was learned of a distribution, in one line: the aggregator's numbers that are not in the table."""
    learning = result.learning or {}
    shown = {key: value for key, value in learning.items() if isinstance(value, float) and not key.endswith("_error")}
    if passes := learning.get("stability_in_pass"):
        shown["passes"] = len(passes)
    if result.weights:
        shown["expert weights"] = _numbers(result.weights)
    text = "  ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
    note = learning.get("note")
    line = f"{name:<11} {text}" + (f"  ({note})" if note else "")
    (get_logger().warning if note else get_logger().info)(line.rstrip())


def _numbers(weights: Sequence[float | None]) -> str:
    return " ".join("nan" if w is None else f"{w:.3f}" for w in weights)
