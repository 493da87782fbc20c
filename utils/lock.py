"""One writer a folder."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.logger import get_logger

NAME = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system


@contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """Hold a folder against a second writer. The system frees the lock when the process ends, however it does.

    Args:
        folder: exists.
        advice: what to do if another process holds it, the end of a sentence: "choose another --output".

    Raises:
        UserError: another process holds it (the message names it), or the folder cannot be written.
    """
    lock = FileLock(folder / NAME, blocking=False, fallback_to_soft=False, on_acquired=_sign)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise UserError(f"{_holder(folder)} is at work in {folder}: wait for it, or {advice}.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{folder} cannot be written ({error.strerror}): mend that, or {advice}.") from error
            get_logger().warning(f"{folder} cannot be locked ({error.strerror}): see that nothing else writes there.")
        yield


def _sign(lock: int) -> None:
    """Write who holds the lock. It is the first byte that Windows locks against readers: that one is a blank."""
    os.ftruncate(lock, 0)
    os.write(lock, f" Process {os.getpid()} on {socket.gethostname()}\n".encode())


def _holder(folder: Path) -> str:
    holder = ""
    with suppress(OSError), open(folder / NAME, "rb", buffering=0) as file:
        file.seek(1)
        holder = file.read(200).decode(errors="replace").strip()
    return holder or "another process"
