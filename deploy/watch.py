"""Predicting the images that appear in a folder, in batches, until told to stop."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from data_loader.image_folders import scan_folder
from data_loader.image_lists import ImageList, decode
from deploy.prediction_files import readable
from evaluation.prediction import PredictionStream
from evaluation.results import Predictions
from utils.bad_images import reason_of
from utils.errors import UserError
from utils.logger import get_logger

Found = tuple[int, int]
"""Size in bytes and time of the last change of a file."""


class Inbox:
    """The image files that appear in a folder, each once, as soon as it has stopped growing.

    Args:
        folder: watched, at any depth.
        done: `readable` paths that are not wanted any more, relative to the folder.
    """

    def __init__(self, folder: Path, done: set[str]):
        self.folder = folder
        self.done = done
        self.before: dict[str, Found] = {}
        self.bad: dict[str, Found] = {}

    def poll(self) -> list[str]:
        """The new files that are not empty and have not changed since the last poll, in order of their paths.

        Raises:
            UserError: the folder is not there any more, or cannot be read.
        """
        if not self.folder.is_dir():
            raise UserError(f"There is no folder {self.folder} to watch: create it first.")
        now = {}
        for name in scan_folder(self.folder)[0]:
            if readable(name) not in self.done:
                try:
                    stat = os.stat(self.folder / name)
                except OSError:  # gone again
                    continue
                now[name] = stat.st_size, stat.st_mtime_ns
        ready = [n for n, found in now.items() if found[0] and self.before.get(n) == found != self.bad.get(n)]
        self.before = now
        return ready

    def take(self, names: Sequence[str]) -> list[str]:
        """Those of the files that are images. The others are named, and wait until they change."""
        good = []
        for name in names:
            try:
                decode(self.folder / name)
                good.append(name)
            except Exception as error:  # damaged files make Pillow's decoders raise anything
                self.bad[name] = self.before[name]
                path = self.folder / name
                get_logger().warning(f"{path} {reason_of(path, error)}: left out until it changes.")
        self.done |= {readable(name) for name in good}
        return good


def watch(
    stream: PredictionStream,
    inbox: Inbox,
    keep: Callable[[Predictions], None],
    batch_size: int,
    seconds: float,
    stop: threading.Event,
) -> None:
    """Predict new files batch by batch; between two batches nothing is unwritten.

    Args:
        stream: predicts, and keeps what it learns.
        inbox: where files appear.
        keep: writes the predictions of a batch.
        batch_size: images that are predicted together, at most.
        seconds: between two looks at the folder.
        stop: ends it, after the batch at hand.

    Raises:
        UserError: the folder is gone, or something cannot be written.
    """
    while not stop.is_set():
        names = inbox.poll()
        for start in range(0, len(names), batch_size):
            if stop.is_set():
                return
            if good := inbox.take(names[start : start + batch_size]):
                keep(stream.predict(ImageList.of(inbox.folder, good)))
                stream.save()
        stop.wait(seconds)
