"""Peak memory of training, evaluation and test-time training, config by config, each job in a process of its own.

  python -m benchmarks.memory [--configs digits_tade ...] [--large] [--steps 3] [--jobs 1] [--output FILE.json]

A job is `trainer.train`, `evaluate` or `adapt` as the scripts call them, at the config's batch size and image size, cut
short where memory has stopped growing: `--steps` training steps instead of an epoch (validation and checkpoint
included), one pass of test-time training. CIFAR-100 is that of --data_dir, or random where there is none; image lists
are made up over a few JPEG files. Data are loaded in the same process ("num_workers": 0). Peak: the largest resident
memory of the process, from Linux's /proc.

--large takes the networks for large images, one step of 8 and one of 16 images, without validation and checkpoint; what
a step of the config's batch takes is extrapolated from these two.
"""

import argparse
import itertools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import RandomCIFAR100, write_record
from benchmarks.full_size_check import write_list
from evaluation import adapt, evaluate, load_run
from trainer import train
from trainer.registry import COMPONENTS
from trainer.trainer import Trainer
from utils.logger import get_logger
from utils.parse_config import read_json

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "digits_softmax",
    "digits_ride",
    "digits_tade",
    "cifar100_ir100_softmax",
    "cifar100_ir100_ride",
    "cifar100_ir100_tade",
    "custom_example",
)
LARGE = ("imagenet_lt_resnext50_tade", "iNaturalist_resnet50_tade", "places_lt_resnet152_tade")
LARGE_BATCHES = (8, 16)


def peak() -> float:
    """The largest resident memory of this process so far, in GiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**20


def make_up_images(folder: Path, classes: int, config: dict) -> None:
    """A few JPEG files, and lists of all classes over them, put into the config."""
    generator = np.random.default_rng(0)
    names = [f"{number}.jpg" for number in range(16)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / name)
    lists = {"train_list": 4, "test_list": 2}
    for name, per_class in lists.items():
        write_list(folder / name, np.full(classes, per_class), names)
    arguments = config["data_loader"]["args"]
    arguments |= {"data_dir": str(folder), "num_workers": 0, **{name: str(folder / name) for name in lists}}


def prepared_config(name: str, folder: Path, data_dir: Path, batch_size: int | None) -> dict:
    config = read_json(ROOT / "configs" / f"config_{name}.json")
    config["trainer"] |= {"epochs": 1, "save_dir": str(folder), "tensorboard": False}
    config.pop("weights", None)
    if "image_size" in config["data_loader"]["args"] or name in LARGE:
        make_up_images(folder, config["arch"]["args"]["num_classes"], config)
    elif "data_dir" in config["data_loader"]["args"]:
        config["data_loader"]["args"]["data_dir"] = str(data_dir)
    if batch_size:
        config["data_loader"]["args"]["batch_size"] = batch_size
        config["trainer"]["monitor"] = "off"
    return config


def job(name: str, which: str, folder: Path, data_dir: Path, steps: int, batch_size: int | None) -> float:
    """Do one job in this process; returns its peak."""
    get_logger(verbosity=0)
    config = prepared_config(name, folder, data_dir, batch_size)
    config["trainer"]["verbosity"] = 0
    kind = config["data_loader"]["type"]
    if kind == "ImbalanceCIFAR100DataLoader" and not (data_dir / "cifar-100-python").exists():
        COMPONENTS["data_loader"][kind] = RandomCIFAR100
    loader = COMPONENTS["data_loader"][kind]
    whole_epoch = loader.__iter__
    loader.__iter__ = lambda self: itertools.islice(whole_epoch(self), steps)
    if batch_size:
        Trainer.validate = lambda self, epoch: {}
        Trainer._save = lambda self, *state: None  # takes as much as a few images, and would hide them
    if which == "train":
        train(config, device="cpu", run_id="run")
    else:
        last = folder / config["name"] / "run" / "last.pth"
        own = ROOT / "configs" / f"test_time_{name}.json"
        overrides = {**read_json(own), "aggregator;args;epochs": 1} if which == "adapt" else {}
        run = load_run(last, "cpu", overrides)
        evaluate(run) if which == "evaluate" else adapt(run)
    return peak()


def measure(name: str, which: str, folder: str, args: argparse.Namespace, batch_size: int | None = None) -> float:
    """Peak of one job in a process of its own, in GiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(job, name, which, Path(folder), args.data_dir, args.steps, batch_size).result()


def measure_small(name: str, args: argparse.Namespace) -> dict:
    config = read_json(ROOT / "configs" / f"config_{name}.json")
    jobs = ["train", "evaluate", *(["adapt"] if config["loss"]["type"] == "DiverseExpertLoss" else [])]
    with tempfile.TemporaryDirectory() as folder:
        row = {"config": name, "batch_size": config["data_loader"]["args"]["batch_size"]}
        row |= {which: measure(name, which, folder, args) for which in jobs}
    print(f"{name:<28}" + "".join(f"  {which} {row[which]:.2f} GiB" for which in jobs), flush=True)
    return row


def measure_large(name: str, args: argparse.Namespace) -> dict:
    peaks = []
    for batch_size in LARGE_BATCHES:
        with tempfile.TemporaryDirectory() as folder:
            peaks.append(measure(name, "train", folder, args, batch_size))
    batch = read_json(ROOT / "configs" / f"config_{name}.json")["data_loader"]["args"]["batch_size"]
    an_image = (peaks[1] - peaks[0]) / (LARGE_BATCHES[1] - LARGE_BATCHES[0])
    row = {"config": name, "batches": LARGE_BATCHES, "train": peaks, "gib_an_image": an_image, "batch_size": batch}
    row["extrapolated"] = peaks[1] + (batch - LARGE_BATCHES[1]) * an_image
    print(
        f"{name:<28}  train {peaks[0]:.2f} GiB with 8 images, {peaks[1]:.2f} GiB with 16, so {an_image:.2f} GiB an "
        f"image and {row['extrapolated']:.0f} GiB with {batch}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="configs/config_NAME.json; default: all of a kind")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="configs at a time")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--data_dir", type=Path, default=Path("data/CIFAR100"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.large:
        args.steps = 1
    measured = measure_large if args.large else measure_small
    with ThreadPoolExecutor(args.jobs) as executor:
        names = args.configs or (LARGE if args.large else SMALL)
        rows = list(executor.map(lambda name: measured(name, args), names))
    if args.output:
        write_record(args.output, torch.device("cpu"), {"steps": args.steps, "peaks_gib": rows})


if __name__ == "__main__":
    main()
