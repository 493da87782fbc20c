"""Messages on the console and in the run folder, progress bars, TensorBoard."""

import contextlib
import logging
import sys
import threading
from pathlib import Path

from tqdm import tqdm

from utils import distributed
from utils.errors import UserError, printable

LEVELS = {0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


def get_logger(verbosity: int | None = None) -> logging.Logger:
    """The project's console logger. Processes other than the first only report warnings.

    Args:
        verbosity: 0 warnings, 1 information, 2 everything; None leaves it as it is (everything, at first).
    """
    logger = logging.getLogger("tade")
    if not logger.handlers:
        verbosity = 2 if verbosity is None else verbosity
        handler = _TqdmHandler()
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


class file_log:
    """Context manager: also append the messages, with times, to a file."""

    def __init__(self, logger: logging.Logger, path: Path):
        self.logger, self.path = logger, path

    def __enter__(self) -> None:
        try:
            self.handler = _FileHandler(self.path, encoding="utf-8")
        except OSError as error:
            raise UserError(f"The log {self.path} cannot be written ({error.strerror}): mend that first.") from error
        self.handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
        self.logger.addHandler(self.handler)

    def __exit__(self, *_) -> None:
        self.logger.removeHandler(self.handler)
        self.handler.close()


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


def progress(iterable, description: str, total: int | None = None, unit: str = "batch", initial: int = 0):
    """tqdm bar on a terminal; nothing where the output is a file or a pipe."""
    quiet = not sys.stderr.isatty() or not distributed.is_main()
    return tqdm(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        disable=quiet,
        leave=False,
        dynamic_ncols=True,
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

    def figure(self, tag: str, figure, step: int = 0) -> None:
        self._write("add_figure", tag, figure, step)

    def close(self) -> None:
        self._write("close")

    def _write(self, method: str, *arguments) -> None:
        """Where TensorBoard's file can no longer be written, work goes on without it."""
        if not self.writer:
            return
        try:
            getattr(self.writer, method)(*arguments)
        except OSError as error:
            self.writer = None
            get_logger().warning(f"TensorBoard's log can no longer be written ({error}): going on without it.")
