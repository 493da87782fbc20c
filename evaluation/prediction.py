"""Predicting images that nobody has labelled, at once or batch by batch as they come."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_loader.image_lists import ImageList
from evaluation.adaptation import STREAM_BATCH, calibration_used, fit_all, follow_streams, new_aggregator, view_source
from evaluation.aggregators import AggregatorMaker, aggregator_section
from evaluation.calibration import CalibrationRecord
from evaluation.loaded_run import LoadedRun
from evaluation.results import ClassCounts, Predictions
from tade import Aggregator
from tade.state import fitting
from utils import distributed
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.logger import get_logger
from utils.torch_file import Damaged, read_torch_file

Images = Path | str | Tensor | ImageList | Sequence[Path | str]
"""A folder of image files, at any depth; an ImageList; paths of files; or [N, 3, S, S] uint8, where the run's data are
held in memory."""


def predict(
    run: LoadedRun,
    images: Images,
    make_aggregator: AggregatorMaker | None = None,
    stream: bool = False,
    stream_batch: int = STREAM_BATCH,
) -> Predictions:
    """Adapt to unlabeled images, and predict each of them that can be decoded.

    Args:
        run: from `load_run`; one that was opened without its data will do.
        images: see Images.
        make_aggregator: see `adapt`; None weights the experts equally.
        stream, stream_batch: see `adapt`; images arrive in random order.

    Raises:
        UserError: there is no image, or the run's loader takes no such images.
    """
    if stream and make_aggregator:
        new_aggregator(run, make_aggregator, stream, stream_batch)  # refuses stream_batch
        return PredictionStream(run, make_aggregator).predict(images, stream_batch)
    aggregator = new_aggregator(run, make_aggregator, False, stream_batch) if make_aggregator else None
    used = calibration_used(run, aggregator)
    run = with_images(run, images)
    if aggregator is None:
        log_probabilities = torch.log_softmax(run.test_logits.mean(dim=1), dim=1)
    else:
        everything = {"images": np.arange(len(run.targets))}
        fit_all({"images": aggregator}, run.test_logits, everything, view_source(run), run.seed)
        log_probabilities = aggregator.predict(run.test_logits)
    return _predictions(run, log_probabilities, aggregator, used)


def with_images(run: LoadedRun, images: Images) -> LoadedRun:
    """A copy of a run whose test images are these, unlabeled, without those that cannot be decoded.

    Raises:
        UserError: there is no image, or the run's loader takes no such images.
    """
    if isinstance(images, Sequence) and not isinstance(images, str):
        if not len(images):
            raise UserError("There is no image to predict: give one at least.")
        images = ImageList.of(Path(), [str(path) for path in images])
    return run.with_images(run.loader.read(images)).without_bad_images()


def _predictions(
    run: LoadedRun, log_probabilities: Tensor, aggregator: Aggregator | None, calibration: CalibrationRecord | None
) -> Predictions:
    """The record of predictions [N, C] of a run's test images."""
    probability, label = torch.log_softmax(run.test_logits.mean(dim=1), dim=1).max(dim=1)
    learning = aggregator.report() if aggregator else {}
    if note := learning.get("note"):
        get_logger().warning(f"{type(aggregator).__name__}: {note}.")
    return Predictions(
        names=run.images.names,
        log_probabilities=log_probabilities,
        class_names=run.loader.class_names,
        learning=learning,
        checkpoint=run.checkpoint,
        equal_weights=(label, probability.exp()),
        cls_num_list=run.cls_num_list,
        calibration=calibration.to_json() if calibration else None,
        bad_images=run.images.skipped,
    )


class PredictionStream:
    """Predicts batches as they come. What was learned stays from batch to batch, and in a file from run to run.

    Args:
        run: from `load_run`; one that was opened without its data will do.
        make_aggregator: see `adapt`; None for `run.make_aggregator`.
        state: file that keeps what was learned: read if it is there, written by `save`. One process may use it at a
            time.

    Raises:
        UserError: the aggregator cannot follow a stream or put aside what it learned, or the file is damaged or of
            another checkpoint or aggregator.
    """

    def __init__(self, run: LoadedRun, make_aggregator: AggregatorMaker | None = None, state: Path | str | None = None):
        self.run = run
        self.aggregator = new_aggregator(run, make_aggregator or run.make_aggregator, True, 1)
        self.calibration = calibration_used(run, self.aggregator)
        self.state = Path(state) if state else None
        if state and self.aggregator.learned is None:
            raise UserError(f"{type(self.aggregator).__name__} has no state_dict: leave --state out.")
        self.batches = 0
        #: Of all images so far.
        self.counts = ClassCounts.none(len(run.cls_num_list))
        if self.state and self.state.exists():
            self._load(self.state)

    @property
    def images(self) -> int:
        """Images so far."""
        return int(self.counts.predicted.sum())

    def predict(self, images: Images, batch_size: int | None = None) -> Predictions:
        """Learn from a batch, then predict it.

        Args:
            images: see Images.
            batch_size: for many images: they arrive in batches of this size, in random order; None for one batch.

        Raises:
            UserError: there is no image, or the run's loader takes no such images.
        """
        run, number = with_images(self.run, images), self.batches
        count, views_of = len(run.targets), view_source(run)
        job = {"images": self.aggregator}, run.test_logits, {"images": np.arange(count)}
        # Another number for other views than those of the batches before.
        scores = follow_streams(*job, lambda indices, _: views_of(indices, number), run.seed, batch_size or count)
        ((_, log_probabilities),) = scores
        predictions = _predictions(run, log_probabilities, self.aggregator, self.calibration)
        self.batches += 1
        self.counts += predictions.counts()
        return predictions

    @property
    def _identity(self) -> dict[str, object]:
        """What a state belongs to."""
        return {
            "checkpoint": self.run.checkpoint.sha256,
            "aggregator": {**aggregator_section(self.run.config), "type": type(self.aggregator).__name__},
            "calibration": getattr(self.aggregator, "calibration", None) and self.aggregator.calibration.numbers,
            "averaged_views": self.run.averaged_views,
        }

    def save(self) -> None:
        """Write the state, whole or not at all; nothing where no file was given. The first process does.

        Raises:
            UserError: it cannot be written.
        """
        if self.state:
            path, learned = self.state, {"batches": self.batches, "counts": asdict(self.counts)}
            content = {"stream": self._identity, **learned, "learned": self.aggregator.state_dict()}
            distributed.by_first_process(lambda: save_checkpoint(path, content))

    def _load(self, path: Path) -> None:
        """Go on from a state.

        Raises:
            UserError: see PredictionStream.
        """
        try:
            content, foreign = read_torch_file(path)
            identity, batches, counts, learned = (content[key] for key in ("stream", "batches", "counts", "learned"))
            if foreign or type(batches) is not int or not isinstance(identity, dict) or not isinstance(counts, dict):
                raise Damaged("it holds something else")
        except OSError as error:
            raise UserError(f"The state {path} cannot be read ({error.strerror}): mend that first.") from error
        except (Damaged, KeyError, TypeError, UserError) as error:
            raise UserError(
                f"{path} is no state of a stream, or a damaged one: give another --state, or remove it to start anew."
            ) from error
        for what, own in self._identity.items():
            other = identity.get(what)
            if other != own:
                raise UserError(
                    f"The state {path} is of another {what.replace('_', ' ')} ({shortened(other)}, and here it is "
                    f"{shortened(own)}): give another --state, or remove it to start anew."
                )
        try:
            self.aggregator.load_state_dict(learned)
            self.counts = ClassCounts(**fitting("counts", counts, vars(self.counts)))
        except (TypeError, ValueError) as error:
            raise UserError(f"The state {path} cannot be used ({error}): remove it to start anew.") from error
        self.batches = batches


def shortened(value: object) -> str:
    """A value for a message."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def predict_stream(
    run: LoadedRun,
    batches: Iterable[Images],
    make_aggregator: AggregatorMaker | None = None,
    state: Path | str | None = None,
) -> Iterator[Predictions]:
    """Predict batches of images as they come: each is learned from, then predicted with what is known so far.

    Args:
        run, make_aggregator, state: see PredictionStream. The state is written before a batch is handed out.
        batches: see Images.

    Yields:
        The predictions of one batch after the other.

    Raises:
        UserError: see PredictionStream; a batch cannot be used, or the state cannot be written.
    """
    stream = PredictionStream(run, make_aggregator, state)
    for images in batches:
        predictions = stream.predict(images)
        stream.save()
        yield predictions
