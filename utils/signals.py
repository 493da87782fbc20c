"""Signals that ask a process to stop: noted at once, obeyed where nothing is lost."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

#: A scheduler's or launcher's request, a lost terminal, Ctrl-C, a cluster's warning before its time limit.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1") if hasattr(signal, name))
#: Seconds within which a further signal is the same request: launchers pass it on to a process group that has it.
SAME_REQUEST = 1.0


class StopSignals:
    """Context manager: the first signal is noted in `received`, a second one ends the process at once.

    SIGINT counts also where a shell script started the process in the background, which ignores it; SIGHUP stays
    ignored where nohup has set that. In a thread other than the main one no signal can be caught.

    Args:
        on_first: called with the number of the first signal, inside the signal handler.
    """

    def __init__(self, on_first: Callable[[int], None] | None = None):
        self.received = 0
        self._on_first = on_first
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if now - self._since > SAME_REQUEST:
                end_at_once("Ended at once by a second signal: what was not saved by then is lost.")
            return
        self.received, self._since = number, now
        if self._on_first:
            self._on_first(number)


def end_at_once(message: str, status: int = 1) -> NoReturn:
    """End the process with one sentence, from any thread or signal handler."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{message}\n".encode())
    os._exit(status)


def signal_status(number: int) -> int:
    """The exit status of a process that a signal stopped: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


def ignore_in_worker(worker: int = 0) -> None:
    """Start of a worker process that decodes images: it ends with the process that started it, not by signals.

    Signals to a process group reach it as well, and without it the last step could not be finished.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
