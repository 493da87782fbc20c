"""What the checks of files cost: reading a checkpoint of 100 MB, comparing lists of half a million lines.

python -m benchmarks.file_checks
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_loader.image_lists import ImageList
from data_loader.overlaps import compare_lists
from model.model import ResNet50Model
from utils.checkpoint import load_checkpoint, save_checkpoint

ROUNDS = 7
IMAGES = {"train": 437_513, "val": 62_487}  # as many as iNaturalist 2018 has


def median_time(job: Callable[[], object]) -> float:
    """Median processor time of a call, in seconds."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        save_checkpoint(path, {"model": ResNet50Model(1000).state_dict()})
        size = path.stat().st_size / 1e6
        print(f"A checkpoint of {size:.0f} MB, load_checkpoint: {median_time(lambda: load_checkpoint(path)):.2f} s")
        print(f"  unchecked, by torch.load: {median_time(lambda: torch.load(path, weights_only=True)):.2f} s")
        lists = []
        for split, count in IMAGES.items():
            lines = (f"train_val2018/{i % 8142}/{split}{i:032x}.jpg {i % 8142}\n" for i in range(count))
            (Path(folder) / f"{split}.txt").write_text("".join(lines))
            lists.append(ImageList.read(Path(folder) / f"{split}.txt", folder))
        train, val = lists
        compared = median_time(lambda: compare_lists(train, val, val))
        print(f"Lists of {len(train):,} and {len(val):,} images, compared: {compared:.2f} s")


if __name__ == "__main__":
    main()
