"""Worker processes that decode images."""

import atexit
import os
import weakref
from collections.abc import Iterator

from torch.utils.data import DataLoader

from utils.errors import UserError


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


#: Iterators that may have worker processes, and these processes.
_iterators: weakref.WeakSet = weakref.WeakSet()
_workers: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _end_workers() -> None:
    """End the worker processes that are still there when Python exits.

    They ignore signals (utils.signals.ignore_in_worker), by which torch and multiprocessing would end them, and wait
    for ever: so would those that have missed what their iterator told them, on a busy machine.
    """
    for iterator in list(_iterators):
        iterator._shutdown_workers()
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


def fetched(batches: DataLoader) -> Iterator:
    """The batches, with one sentence where a worker process is killed.

    Raises:
        UserError: it was.
    """
    try:
        iterator = iter(batches)
        if batches.num_workers:
            _iterators.add(iterator)
            _workers.update(iterator._workers)
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "A worker process that decodes images was killed (out of memory?): start again, with a smaller "
            "data_loader;args;num_workers if memory is short."
        ) from error
