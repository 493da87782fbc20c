"""Messages on the console and in the run folder, progress bars, TensorBoard."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, printable

LEVELS = {0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


def get_logger(verbosity: int | None = None) -> logging.Logger:
    """The project's console logger. Processes other than the first only report warnings.

    Messages of level DEBUG are for log files; the console never shows them.

    Args:
        verbosity: 0 warnings, 1 information, 2 details in log files as well; None leaves it as it is (2, at first).
    """
    logger = logging.getLogger("tade")
    if not logger.handlers:
        verbosity = 2 if verbosity is None else verbosity
        handler = _TqdmHandler(logging.INFO)
        handler.setFormatter(_Printable("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    if not distributed.is_main():
        logger.setLevel(logging.WARNING)
    elif verbosity is not None:
        logger.setLevel(LEVELS.get(verbosity, logging.DEBUG))
    return logger


class _Printable(logging.Formatter):
    """Names from files cannot command a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


class _TqdmHandler(logging.Handler):
    """Writes whole lines above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def file_log(logger: logging.Logger, path: Path) -> Iterator[None]:
    """Also append the messages, with times, to a file."""
    try:
        handler = _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The log {path} cannot be written ({error.strerror}): mend that first.") from error
    handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class _FileHandler(logging.FileHandler):
    """A log that can no longer be written is given up with a warning, and nothing else is."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the base class's name
        logger = get_logger()
        if self in logger.handlers:
            logger.removeHandler(self)
            logger.warning(f"The log {self.baseFilename} can no longer be written ({sys.exc_info()[1]}): not kept.")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written before
            super().close()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(59.6), duration(3725)
    ('0:01:00', '1:02:05')
    """
    return str(timedelta(seconds=round(seconds)))


class _Lines:
    """What a progress bar writes, as messages: for where the output is a file or a pipe."""

    def write(self, text: str) -> None:
        if text.strip():
            get_logger().info(text.strip())

    def flush(self) -> None:
        pass


#: Options of a bar that writes a line a minute.
LINES = {
    "file": _Lines(),
    "delay": 60,
    "mininterval": 60,
    "maxinterval": 60,
    "bar_format": "{desc}: {n_fmt} of {total_fmt} after {elapsed}{postfix}",
}


def progress(iterable, description: str, total: int | None = None, unit: str = "batch", initial: int = 0) -> tqdm:
    """tqdm bar on a terminal, a line a minute where the output is a file or a pipe; the first process's alone."""
    return tqdm(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        disable=not distributed.is_main(),
        leave=False,
        **({"dynamic_ncols": True} if sys.stderr.isatty() else LINES),
    )


def _forgive_tensorboard(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises its error again where something is logged: it need not be printed as well."""
    if not (type(problem.thread).__module__.startswith("tensorboard.") and issubclass(problem.exc_type, OSError)):
        threading.__excepthook__(problem)


class TensorBoardLog:
    """torch's SummaryWriter, or nothing when switched off or in a process other than the first."""

    def __init__(self, folder: Path, enabled: bool = True):
        self.writer = None
        if enabled and distributed.is_main():
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _forgive_tensorboard
            try:
                self.writer = SummaryWriter(str(folder))
            except OSError as error:
                get_logger().warning(f"TensorBoard's log cannot be written ({error}): going on without it.")

    def scalars(self, values: dict, step: int) -> None:
        """Log {"group/name": number}; None is left out."""
        for tag, value in values.items():
            if value is not None:
                self._write("add_scalar", tag, value, step)

    def images(self, tag: str, images, step: int) -> None:
        """Log images, [B, 3, H, W] in 0..1."""
        self._write("add_images", tag, images, step)

    def text(self, tag: str, text: str) -> None:
        """Log text in Markdown."""
        self._write("add_text", tag, text)

    def close(self) -> None:
        self._write("close")

    def _write(self, method: str, *arguments) -> None:
        if self.writer:
            try:
                getattr(self.writer, method)(*arguments)
            except OSError as error:
                self.writer = None
                get_logger().warning(f"TensorBoard's log can no longer be written ({error}): going on without it.")
