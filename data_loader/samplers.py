"""The order in which images are visited: which images an epoch has, how they form batches, who gets which part.

An index is the number of an image in its data set.
"""

import torch
from torch import Tensor


def balanced_order(targets: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Class-balanced sampling with replacement: a random class, then a random image of it; [size] indices.

    Args:
        targets: labels, [N]; every class has an image.
        size: samples in the epoch.
        generator: of the random numbers.
    """
    by_class = torch.argsort(targets, stable=True)
    counts = torch.bincount(targets)
    classes = torch.randint(len(counts), (size,), generator=generator)
    within = (torch.rand(size, generator=generator, dtype=torch.float64) * counts[classes]).long()
    return by_class[(counts.cumsum(0) - counts)[classes] + within]


def batch_slices(count: int, batch_size: int, smallest: int = 1) -> list[slice]:
    """Consecutive batches over `count` images; a last batch of fewer than `smallest` images is left out.

    Training asks for two images per process at least: batch norm cannot train on a single one.
    """
    slices = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    if slices and slices[-1].stop - slices[-1].start < smallest:
        slices.pop()
    return slices


def shard(batch: slice, rank: int, world_size: int) -> slice:
    """The part of a global batch that one of several processes works on; parts differ by at most one image.

    Args:
        batch: one of `batch_slices`.
        rank, world_size: number of the process, and of processes.
    """
    size = batch.stop - batch.start
    return slice(batch.start + size * rank // world_size, batch.start + size * (rank + 1) // world_size)
