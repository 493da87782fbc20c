"""What the checks of files cost: reading a checkpoint of 100 MB, comparing lists of half a million lines.

python benchmarks/file_checks.py
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from data_loader.image_lists import ImageList  # noqa: E402
from data_loader.overlaps import compare_lists  # noqa: E402
from model.model import ResNet50Model  # noqa: E402
from utils.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

ROUNDS = 7
IMAGES = {"train": 437_513, "val": 62_487}  # as many as iNaturalist 2018 has


def seconds(job: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    job()
    return time.process_time() - start


def compare(title: str, jobs: dict[str, Callable[[], object]]) -> None:
    """Median times of several ways, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    print(title)
    for name, measured in times.items():
        print(f"  {name:<42} {statistics.median(measured):.2f} s")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        save_checkpoint(path, {"model": ResNet50Model(1000).state_dict()})
        compare(
            f"A checkpoint of {path.stat().st_size / 1e6:.0f} MB, processor time",
            {
                "checked (load_checkpoint)": lambda: load_checkpoint(path),
                "unchecked (torch.load, weights_only)": lambda: torch.load(path, weights_only=True),
            },
        )
        lists = []
        for split, count in IMAGES.items():
            lines = (f"train_val2018/{i % 8142}/{split}{i:032x}.jpg {i % 8142}\n" for i in range(count))
            (Path(folder) / f"{split}.txt").write_text("".join(lines))
            lists.append(ImageList.read(Path(folder) / f"{split}.txt", folder))
        train, val = lists
        compare(
            f"Lists of {len(train):,} and {len(val):,} images, processor time",
            {"compared": lambda: compare_lists(train, val, val)},
        )


if __name__ == "__main__":
    main()
