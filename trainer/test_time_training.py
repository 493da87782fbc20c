"""Test-time training on many test distributions of one image set at once."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import BaseDataLoader
from trainer.aggregator import Aggregator
from trainer.evaluator import RowBuffer, network_logits
from utils.logger import get_logger, progress
from utils.seed import SHUFFLE, epoch_generator


def two_view_logits(
    network: nn.Module, loader: BaseDataLoader, rows: np.ndarray, draw: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Expert logits of two random views of the test images `rows`: two of [M, E, C]."""
    buffers = RowBuffer(len(rows)), RowBuffer(len(rows))
    batches = loader.two_view_batches(rows, draw)
    for views in progress(batches, f"test-time pass {draw + 1}", total=len(batches)):
        for view, buffer in zip(views, buffers, strict=True):
            buffer.append(network_logits(network, view, device))
    return buffers[0].filled(), buffers[1].filled()


def fit_aggregators(
    network: nn.Module,
    loader: BaseDataLoader,
    distributions: Mapping[str, np.ndarray],
    make_aggregator: Callable[[], Aggregator],
    seed: int,
    device: torch.device,
) -> dict[str, Aggregator]:
    """One aggregator for each distribution, fitted on that distribution's unlabelled images alone.

    Each distribution by itself is the published algorithm. They share the random views: in a pass every image that any
    unfinished distribution contains is augmented and passed through the network once, and each distribution picks the
    logits of its own images.

    Args:
        network: inference network on `device`; frozen, so no gradient passes through it.
        distributions: name -> rows of the test images.
        make_aggregator: makes a fresh aggregator.
        seed: of views and shuffling.
    """
    logger = get_logger()
    aggregators = {name: make_aggregator() for name in distributions}
    draw = 0
    while active := [name for name, aggregator in aggregators.items() if not aggregator.finished]:
        rows = np.unique(np.concatenate([distributions[name] for name in active]))
        view1, view2 = two_view_logits(network, loader, rows, draw, device)
        for name in active:
            own = torch.from_numpy(np.searchsorted(rows, distributions[name]))
            aggregators[name].fit_pass(view1[own], view2[own], epoch_generator(seed, draw, SHUFFLE))
            moved = " ".join(f"{w:.3f}" for w in aggregators[name].weights)
            logger.info(f"pass {draw + 1}  {name:<11} expert weights {moved}")
            if note := aggregators[name].report().get("note"):
                logger.warning(f"{name}: {note}.")
        draw += 1
    return aggregators
