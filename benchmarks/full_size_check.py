"""Start-up time, memory and one step of the large data sets at full size, on lists made up over a few real images.

  python -m benchmarks.full_size_check LIST.txt DATA_DIR [--images 256] [--image_size 64]

Lists with the numbers of images and classes of ImageNet-LT, Places-LT and iNaturalist 2018 (an exponential profile with
the published total, largest and smallest class) repeat the images of LIST. For each data set's config: the time and
memory to set the loader up, one training step, and the evaluation of some images.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data_loader.image_lists import ImageList
from model.inference import inference_copy
from model.logits import expert_logits
from trainer.build import build_loader, build_loss, build_network, parameter_groups
from trainer.registry import read_config
from utils.logger import get_logger
from utils.parse_config import read_json

ROOT = Path(__file__).resolve().parents[1]
DATA_SETS = {
    "config_imagenet_lt_resnext50_tade.json": ("ImageNet_LT/ImageNet_LT", 50),
    "config_places_lt_resnet152_tade.json": ("Places_LT_v2/Places_LT", 100),
    "config_iNaturalist_resnet50_tade.json": ("iNaturalist18/iNaturalist18", 3),
}


def profile(total: int, classes: int, largest: int, smallest: int) -> np.ndarray:
    """A falling profile with the given total, first and last count: largest * (smallest / largest)^(x^p)."""
    x = np.linspace(0, 1, classes)
    low, high = 0.05, 5.0
    for _ in range(60):
        power = (low + high) / 2
        counts = np.floor(largest * (smallest / largest) ** (x**power)).astype(int)
        low, high = (power, high) if counts.sum() < total else (low, power)
    counts[classes // 2] += total - counts.sum()
    return counts


def write_list(path: Path, counts: np.ndarray, pool: list[str]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    path.write_text("".join(f"{pool[i % len(pool)]} {label}\n" for i, label in enumerate(labels)))


def memory() -> float:
    """Resident memory of this process in GB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--image_size", type=int, default=64)
    args = parser.parse_args()
    get_logger().setLevel("ERROR")
    pool = ImageList.read(args.list, args.data_dir).names()
    manifest = json.loads((ROOT / "data_txt" / "manifest.json").read_text())["files"]
    for name, (lists, per_class) in DATA_SETS.items():
        config = read_json(ROOT / "configs" / name)
        classes = config["arch"]["args"]["num_classes"]
        with tempfile.TemporaryDirectory() as folder:
            figures = manifest[f"{lists}_train.txt"]
            counts = profile(figures["lines"], classes, figures["max_per_class"], figures["min_per_class"])
            for split, split_counts in (
                ("train", counts),
                ("val", np.full(classes, per_class)),
                ("test", np.full(classes, per_class)),
            ):
                path = Path(folder) / f"{lists}_{split}.txt"
                path.parent.mkdir(exist_ok=True)
                write_list(path, split_counts, pool)
            config["data_loader"]["args"] |= {
                "data_dir": str(args.data_dir),
                "list_dir": folder,
                "num_workers": 1,
                "batch_size": 8,
                "image_size": args.image_size,
            }
            config = read_config(config)
            before, start = memory(), time.perf_counter()
            loader = build_loader(config, torch.device("cpu"))
            ready = time.perf_counter() - start
            loader_memory = memory() - before
            start = time.perf_counter()
            batches = iter(loader)
            images, target = next(batches)
            first_batch = time.perf_counter() - start
        network = build_network(config, loader.num_classes, torch.device("cpu"))
        criterion = build_loss(config, loader.cls_num_list)
        optimizer = config.build("optimizer", parameter_groups(config, network))
        start = time.perf_counter()
        loss = criterion(network(images), target)
        loss.backward()
        optimizer.step()
        step = time.perf_counter() - start
        images = loader.test.select(np.arange(min(args.images, len(loader.test.targets))))
        start = time.perf_counter()
        copy = inference_copy(network, loader.image_size)
        logits = expert_logits(copy, [images.batches()], torch.device("cpu"), "test images")
        print(
            f"{lists.split('/')[1]}: {sum(loader.cls_num_list)} training images, loader ready in {ready:.2f} s and "
            f"{loader_memory:.2f} GB, first batch after {first_batch:.1f} s, a step of 8 images {step:.1f} s (loss "
            f"{loss.item():.2f}), logits {list(logits.shape)} in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        del batches, loader, network, optimizer


if __name__ == "__main__":
    main()
