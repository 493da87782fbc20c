"""Predicting the images that appear in a folder, in batches, until told to stop."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_loader.image_folders import scan_folder
from data_loader.image_lists import ImageList, decode
from deploy.prediction_files import PredictionWriter, paths_in, readable
from evaluation.prediction import PredictionStream
from utils.bad_images import reason_of
from utils.errors import UserError
from utils.files import make_folder
from utils.logger import get_logger
from utils.signals import StopSignals


class Inbox:
    """The image files that appear in a folder, each once, as soon as it has stopped growing.

    Args:
        folder: watched, at any depth.
        done: `readable` paths that are not wanted any more, relative to the folder.
    """

    def __init__(self, folder: Path, done: set[str]):
        self.folder = folder
        self.done = done
        #: Path -> size in bytes and time of the last change: of all files at the last poll, and of those of no use.
        self.before: dict[str, tuple[int, int]] = {}
        self.bad: dict[str, tuple[int, int]] = {}

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


def watch(writer: PredictionWriter, stream: PredictionStream, batch_size: int, seconds: float) -> dict[str, Any]:
    """Predict the images that appear in a folder batch by batch, until a signal asks to stop.

    Writes predictions/000001.csv, ... in the folder of results, one a batch, and after each batch class_mix.csv and
    weights.json of all images so far, and the state: between two batches nothing is unwritten. Images that have
    predictions there are not predicted again.

    Args:
        writer: knows the folders.
        stream: predicts, and keeps what it learns.
        batch_size: images that are predicted together, at most.
        seconds: between two looks at the folder.

    Returns:
        The content of weights.json; of a run without an image an empty one.

    Raises:
        UserError: the folder is gone, or something cannot be written.
    """
    make_folder(writer.tables)
    inbox, stop, record = Inbox(writer.images, paths_in(writer.tables)), threading.Event(), {}
    get_logger().info(
        f"Watching {writer.images}: {len(inbox.done)} images there have predictions already, and {stream.images} were "
        "learned from. Ctrl-C or SIGTERM ends it."
    )
    with StopSignals(lambda _: stop.set()):
        while not stop.is_set():
            names = inbox.poll()
            for start in range(0, len(names), batch_size):
                if stop.is_set():
                    break
                if good := inbox.take(names[start : start + batch_size]):
                    record = writer.save_batch(stream.predict(ImageList.of(inbox.folder, good)), stream)
                    stream.save()
            stop.wait(seconds)
    get_logger().info(f"Stopped after {stream.images} images; everything is written: {writer.folder}")
    return record
