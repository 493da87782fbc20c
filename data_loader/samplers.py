"""The order in which training images are visited."""

import torch
from torch import Tensor


def epoch_order(count: int, shuffle: bool, generator: torch.Generator) -> Tensor:
    """Every image once: [N] row numbers, shuffled or in file order."""
    return torch.randperm(count, generator=generator) if shuffle else torch.arange(count)


def balanced_order(targets: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Class-balanced sampling with replacement: a class at random, then one of its images; [size] row numbers.

    Args:
        targets: labels, [N].
        size: draws in the epoch.
        generator: of the draws.
    """
    by_class = torch.argsort(targets, stable=True)
    counts = torch.bincount(targets)
    classes = torch.randint(len(counts), (size,), generator=generator)
    within = (torch.rand(size, generator=generator, dtype=torch.float64) * counts[classes]).long()
    return by_class[(counts.cumsum(0) - counts)[classes] + within]


def process_share(batch: slice, count: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that one of several processes works on; shares differ by at most one image.

    Args:
        batch: rows of the global batch.
        count: images in the epoch (the last batch may be cut short).
        rank, world_size: number of the process, and of processes.
    """
    start, stop = batch.start, min(batch.stop, count)
    size = stop - start
    return slice(start + size * rank // world_size, start + size * (rank + 1) // world_size)


def batch_slices(count: int, batch_size: int, smallest: int = 1) -> list[slice]:
    """Consecutive batches over `count` images; a last batch of fewer than `smallest` images is left out.

    In training, batch statistics of a single image would be no batch's, so every process gets two or the batch goes.
    """
    slices = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    if slices and slices[-1].stop - slices[-1].start < smallest:
        slices.pop()
    return slices
