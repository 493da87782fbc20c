"""Several processes, as torchrun starts them. Everything is a no-op in an ordinary single process."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from utils.errors import LostProcess, UserError
from utils.signals import end_at_once

T = TypeVar("T")

#: Environment variable of scripts that another process starts and that end with it: its process id.
LAUNCHER = "TADE_LAUNCHER"
#: Seconds that a process waits for the others once it is told to stop. torchrun kills 30 s after its signal.
PATIENCE = 25.0


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: torch.device) -> torch.device:
    """Join the process group that torchrun announces; returns the device of this process."""
    if not launched_by_torchrun():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # What processes agree upon is on the CPU; a lost process is noticed there at once, by its closed connection.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        end_with(os.getppid())
    return device


def end_with(launcher: int) -> None:
    """If the process that started this one is killed, send this one the signal that it would have sent."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)  # for a training to save its state
        end_at_once("The launcher of this process was killed: ended with it.")

    threading.Thread(target=watch, daemon=True).start()


def barrier() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Exit where something went wrong: without waiting for the other processes, which may not come any more."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and logs."""
    return rank() == 0


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """In place, in every process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def numbers_of_all(*numbers: int) -> list[list[int]]:
    """Each process's numbers, in every process: a list a process."""
    own = torch.tensor(numbers)
    every = [own] * world_size()
    if dist.is_initialized():
        every = [torch.empty_like(own) for _ in every]
        dist.all_gather(every, own)
    return [of_one.tolist() for of_one in every]


def objects_of_all(value: T) -> list[T]:
    """Each process's value, in every process."""
    values: list = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_first_process(value: T) -> T:
    """The first process's value, in every process."""
    return objects_of_all(value)[0]


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Inside, the first process goes ahead and the others wait for it; for downloads that all would start."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def by_first_process(action: Callable[[], T]) -> T:
    """What the first process's call of `action` gives, in every process.

    Raises:
        UserError: in every process, if it was raised in the first.
    """
    result, error = None, None
    if is_main():
        try:
            result = action()
        except UserError as raised:
            raised.shared, error = True, raised
    result, error = from_first_process((result, error))
    if error:
        barrier()  # all know of it before the first one leaves
        raise error
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def lost_process_named(advice: Callable[[], str] = str) -> Iterator[None]:
    """Turn the failure of a connection to another process into one sentence.

    Args:
        advice: gives what follows that sentence.

    Raises:
        LostProcess: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text):
            raise
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's would cut the sentence short
        raise LostProcess(f"Another process of this run has ended, see what it said. {advice()}".strip()) from error
