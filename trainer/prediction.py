"""Predicting images that nobody has labelled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.adaptation import STREAM_BATCH, calibration_used, fit_all, follow_streams, new_aggregator, view_source
from trainer.build import AggregatorMaker
from trainer.loaded_run import LoadedRun
from trainer.results import Predictions


def predict(
    run: LoadedRun,
    images: Path | str | Tensor,
    make_aggregator: AggregatorMaker | None = None,
    stream: bool = False,
    stream_batch: int = STREAM_BATCH,
) -> Predictions:
    """Adapt to unlabeled images, and predict each of them that can be decoded.

    Args:
        run: from `load_run`.
        images: a folder of image files at any depth, where the run's loader reads files; or [N, 3, S, S] uint8, where
            it holds its images in memory.
        make_aggregator: see `adapt`; None weights the experts equally.
        stream, stream_batch: see `adapt`; images arrive in random order.

    Raises:
        UserError: there is no image, or the run's loader takes no such images.
    """
    aggregator = new_aggregator(run, make_aggregator, stream, stream_batch) if make_aggregator else None
    used = calibration_used(run, aggregator) if aggregator else None
    whole = replace(run, loader=run.loader.with_test_images(images))
    run = whole.without_bad_images()
    count = len(run.targets)
    learning = {}
    if aggregator is None:
        log_probabilities = torch.log_softmax(run.test_logits.mean(dim=1), dim=1)
    else:
        everything, views_of = {"images": np.arange(count)}, view_source(run)
        job = {"images": aggregator}, run.test_logits, everything, views_of, run.seed
        if stream:
            ((_, log_probabilities),) = follow_streams(*job, stream_batch)
        else:
            fit_all(*job)
            log_probabilities = aggregator.predict(run.test_logits)
        learning = aggregator.report()
    names = run.loader.test_names
    calibration = used.to_json() if used else None
    bad = list(whole.bad_images.values())
    return Predictions(names, log_probabilities, run.loader.class_names, learning, run.checkpoint, calibration, bad)
