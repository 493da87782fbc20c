"""Messages on the console and in the run folder, progress bars, TensorBoard."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from utils import distributed
from utils.errors import printable

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
        self.handler = logging.FileHandler(self.path, encoding="utf-8")
        self.handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
        self.logger.addHandler(self.handler)

    def __exit__(self, *_) -> None:
        self.logger.removeHandler(self.handler)
        self.handler.close()


def progress(iterable, description: str, total: int | None = None, unit: str = "batch"):
    """tqdm bar on a terminal; nothing where the output is a file or a pipe."""
    quiet = not sys.stderr.isatty() or not distributed.is_main()
    return tqdm(iterable, desc=description, total=total, unit=unit, disable=quiet, leave=False, dynamic_ncols=True)


class TensorBoardLog:
    """torch's SummaryWriter, or nothing when switched off or in a process other than the first."""

    def __init__(self, folder: Path, enabled: bool = True):
        self.writer = None
        if enabled and distributed.is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))

    def scalars(self, values: dict, step: int) -> None:
        """Log {"group/name": number}; None is left out."""
        if self.writer:
            for tag, value in values.items():
                if value is not None:
                    self.writer.add_scalar(tag, value, step)

    def images(self, tag: str, images, step: int) -> None:
        """Log images, [B, 3, H, W] in 0..1."""
        if self.writer:
            self.writer.add_images(tag, images, step)

    def figure(self, tag: str, figure, step: int = 0) -> None:
        if self.writer:
            self.writer.add_figure(tag, figure, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
