"""One writer a folder."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError
from utils.logger import get_logger

try:
    import fcntl
except ImportError:  # Windows: there it is up to the user
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_held: set[int] = set()  # file descriptors


@contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """Hold a folder against a second writer. The system frees the lock when the process ends, however it does.

    Args:
        folder: exists.
        advice: what to do where another process holds it, the end of a sentence: "choose another --output".

    Raises:
        UserError: another process holds it (the message names it), or the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    try:
        lock = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): mend that, or {advice}.") from error
    _held.add(lock)
    try:
        _take(lock, folder, advice)
        yield
    finally:
        _held.discard(lock)
        os.close(lock)


def _take(lock: int, folder: Path, advice: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
            get_logger().warning(f"{folder} cannot be locked ({error.strerror}): see that nothing else writes there.")
            return
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise UserError(f"{holder} is at work in {folder}: wait for it, or {advice}.") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"Process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _close_in_child() -> None:
    """A worker process inherits the descriptor, and would hold the lock longer than its killed parent."""
    for lock in _held:
        os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
