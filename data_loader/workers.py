"""Worker processes that decode images."""

import os
from collections.abc import Iterator

from torch.utils.data import DataLoader

from utils.errors import UserError


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fetched(batches: DataLoader) -> Iterator:
    """The batches, with one sentence where a worker process is killed.

    Raises:
        UserError: it was.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "A worker process that decodes images was killed (out of memory?): start again, with a smaller "
            "data_loader;args;num_workers if memory is short."
        ) from error
