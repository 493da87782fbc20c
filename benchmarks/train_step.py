"""This project's training step against the plain one, and where its time goes.

  python -m benchmarks.train_step [--device cpu] [--rounds 7] [--threads 1 2] [--bf16] [--no_compile] [--epoch]
                                  [--profile] [--data_dir data/CIFAR100] [--output FILE.json]

Both sides train TADE's ResNet-32 for CIFAR100-LT (three experts, batches of 128). Plain: eager, NCHW, fp32,
SGD(foreach=False). Here: `Trainer.train_step` on the batches of `Trainer.train_epoch`, in fp32, and with torch.compile;
in bf16 where the processor is made for it, or with --bf16. Every side is a process of its own with the same number of
threads; they take a step in turn, so that other load on the machine meets all of them; the process that does not work
sleeps. Ratios are medians over the rounds of plain seconds / seconds here. Everything is given by the clock and by CPU
time (of all threads), which other load on the machine hardly touches; on a GPU by the clock alone, 20 steps at a time,
and matrix products in fp32 are in TF32, as its convolutions are.

"Share of the matrix rate" is the step's arithmetic (three times the forward pass's convolutions and classifiers, two
operations a multiply-add) over what a large matrix product of the same precision does on the same threads in the run.
The time to compile is that of the first step, less that of an ordinary one: with an empty cache, and with the cache of
before; on a GPU with an empty one, all sides at once. --epoch trains one whole epoch, data included: on a CPU in the
last precision, not compiled; on a GPU on all sides but the plain one, after two epochs that compile for the last batch
and record its CUDA graph. --profile is for CPUs. Images are those of --data_dir, or random where there are none.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base.run_state import EpochProgress
from benchmarks.common import RandomCIFAR100, write_record
from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from model.cost import count_macs
from trainer.build import build_loss, build_network, parameter_groups
from trainer.devices import choose_device
from trainer.precision import AUTOCAST, automatic_precision
from trainer.registry import read_config
from trainer.trainer import Trainer
from utils.logger import TensorBoardLog, get_logger
from utils.parse_config import read_json
from utils.seed import seed_everything

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "config_cifar100_ir100_tade.json"
CPU = torch.device("cpu")
BATCHES = 8  # different ones that the steps go round
MATRIX = {"cpu": 2048, "cuda": 8192}
STEPS = {"cpu": 1, "cuda": 20}  # between two readings of the clock: a GPU works behind Python's back
WAYS = {"cpu": ("clock", "CPU time"), "cuda": ("clock",)}  # how long it takes; CPU time is that of all threads


@dataclass
class Side:
    """One way to train: plain, or this project's with these trainer options."""

    name: str
    plain: bool = False
    precision: str = "fp32"
    compile: bool = False


def make_trainer(side: Side, device: torch.device, data_dir: Path, folder: Path) -> Trainer:
    content = read_json(CONFIG)
    content["trainer"] |= {"precision": side.precision, "compile": side.compile, "monitor": "off"}
    if side.plain:
        content["optimizer"]["args"]["foreach"] = False
    config = read_config(content)
    seed_everything(config["seed"])
    options = dict(config["data_loader"]["args"], data_dir=str(data_dir))
    real = (data_dir / "cifar-100-python").exists()
    loader = (ImbalanceCIFAR100DataLoader if real else RandomCIFAR100)(**options)
    loader.prepare(device, config["seed"])
    network = build_network(config, loader.num_classes, device)
    optimizer = config.build("optimizer", parameter_groups(config, network))
    scheduler = config.build("lr_scheduler", optimizer)
    criterion = build_loss(config, loader.cls_num_list).to(device)
    trainer = Trainer(network, criterion, {}, loader, optimizer, scheduler, config.build("trainer"), folder, {})
    trainer.tensorboard = TensorBoardLog(folder, False)
    return trainer


def first_batches(trainer: Trainer, plain: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    trainer.loader.set_epoch(1)
    layout = torch.contiguous_format if plain else torch.channels_last
    batches = [next(iterator) for iterator in [iter(trainer.loader)] for _ in range(BATCHES)]
    return [(images.contiguous(memory_format=layout), target) for images, target in batches]


def plain_step(trainer: Trainer, images: torch.Tensor, target: torch.Tensor) -> None:
    trainer.optimizer.zero_grad()
    loss = trainer.criterion(trainer.model(images), target)
    loss.backward()
    trainer.optimizer.step()


def seconds(device: torch.device, times: int, function, *arguments) -> tuple[float, float]:
    """How long a call takes, the mean of `times`: by the clock, and in CPU time of this process."""
    wait_for(device)
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        function(*arguments)
    wait_for(device)
    return (time.perf_counter() - clock) / times, (time.process_time() - cpu) / times


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def multiply(precision: str, device: torch.device) -> tuple[float, float]:
    """Seconds of a product of two large matrices, by the clock and in CPU time."""
    size, dtype = MATRIX[device.type], AUTOCAST.get(precision, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        torch.mm(a, b)
        return seconds(device, STEPS[device.type], torch.mm, a, b)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


#: Of a side's process: side, device, trainer, batches, and the number of steps done.
own = threading.local()


def prepare(side: Side, threads: int, device: torch.device, data_dir: Path) -> None:
    """Start of a side's process."""
    torch.set_num_threads(threads)
    get_logger().setLevel("WARNING")
    own.side, own.device, own.done = side, device, 0
    own.trainer = make_trainer(side, device, data_dir, Path(tempfile.mkdtemp(prefix="train_step_")))
    own.batches = first_batches(own.trainer, side.plain)
    own.trainer.network.train()


def one_step() -> None:
    images, target = own.batches[own.done % BATCHES]
    own.done += 1
    (plain_step if own.side.plain else Trainer.train_step)(own.trainer, images, target)


def one_epoch() -> None:
    own.trainer.progress = EpochProgress.start(1, own.trainer.loader.seed, own.device)
    own.trainer.train_epoch(1)


def timed_steps(times: int) -> tuple[float, float]:
    return seconds(own.device, times, one_step)


def timed_epoch() -> tuple[float, float]:
    return seconds(own.device, 1, one_epoch)


def timed_product() -> tuple[float, float]:
    return multiply(own.side.precision, own.device)


def profile() -> list[dict]:
    """The operations with the largest share of three steps, by their own CPU time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            one_step()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [
        {"operation": row.key, "share": row.self_cpu_time_total / total, "calls a step": row.count / 3}
        for row in rows[:12]
    ]


def start(*arguments) -> ProcessPoolExecutor:
    """A side's process; see `prepare`."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare, arguments)


def time_sides(
    sides: list[Side], threads: int, rounds: int, device: torch.device, data_dir: Path, cost: float
) -> tuple[list[dict], dict]:
    """Interleaved steps of all sides at one number of threads: a row for each; the workers, which go on living."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="train_step_")  # compiles from scratch
    workers = {side.name: start(side, threads, device, data_dir) for side in sides}
    first = {name: worker.submit(timed_steps, 1) for name, worker in workers.items() if device.type != "cpu"}
    for name, worker in workers.items():
        if device.type == "cpu":  # one compiles at a time
            first[name] = worker.submit(timed_steps, 1)
        first[name].result()
        worker.submit(timed_steps, 1).result()  # the second step of a process is still slower
    times: dict[str, list] = {name: [] for name in workers}
    products: dict[str, list] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.submit(timed_steps, STEPS[device.type]).result())
        for name, worker in workers.items():
            products[name].append(worker.submit(timed_product).result())
    rows = []
    batch = read_json(CONFIG)["data_loader"]["args"]["batch_size"]
    for side in sides:
        row = {**asdict(side), "threads": threads}
        for i, way in enumerate(WAYS[device.type]):
            step = statistics.median(taken[i] for taken in times[side.name])
            rate = 2 * MATRIX[device.type] ** 3 / statistics.median(taken[i] for taken in products[side.name])
            row[way] = {
                "step_seconds": step,
                "images_per_second": batch / step,
                "ratio": statistics.median(p[i] / o[i] for p, o in zip(times["plain"], times[side.name], strict=True)),
                "matrix_gflops": rate / 1e9,
                "share_of_matrix_rate": cost * batch / step / rate,
            }
            print(
                f"{side.name:<14} {threads} thread(s) {way:<9} {step:6.4f} s a step  {batch / step:6.1f} images/s  "
                f"{row[way]['ratio']:5.2f} times plain  {row[way]['share_of_matrix_rate']:6.1%} of "
                f"{rate / 1e9:.0f} GFLOP/s",
                flush=True,
            )
        if side.compile:
            usual = row["clock"]["step_seconds"]
            row["compile_seconds"] = first[side.name].result()[0] - usual
            print(f"  compiling {row['compile_seconds']:.0f} s", flush=True)
            if device.type == "cpu":
                with start(side, threads, device, data_dir) as again:
                    row["compile_seconds_cached"] = again.submit(timed_steps, 1).result()[0] - usual
                print(f"  compiling with a cache {row['compile_seconds_cached']:.0f} s", flush=True)
        rows.append(row)
    return rows, workers


def time_epochs(
    workers: dict[str, ProcessPoolExecutor], threads: int, device: torch.device, images: int
) -> dict[str, dict]:
    """Images per second of a whole epoch, by side; on a GPU after two, all sides at once."""
    for _ in range(2 if device.type == "cuda" else 0):
        for future in [worker.submit(timed_epoch) for worker in workers.values()]:
            future.result()
    found = {}
    for name, worker in workers.items():
        spent = worker.submit(timed_epoch).result()
        found[name] = {way: images / s for way, s in zip(WAYS[device.type], spent, strict=False)}
        rates = ", ".join(f"{rate:.1f} images/s by {way}" for way, rate in found[name].items())
        print(f"whole epoch, {name}, {threads} thread(s): {rates}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1, on a CPU also all")
    parser.add_argument("--bf16", action="store_true", help="also where the processor is not made for it")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--epoch", action="store_true", help="a whole epoch, data included")
    parser.add_argument("--profile", action="store_true", help="the operations that take most of such a step")
    parser.add_argument("--data_dir", type=Path, default=Path("data/CIFAR100"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    get_logger().setLevel("WARNING")
    device, _ = choose_device(args.device)
    if args.profile and device.type != "cpu":
        parser.error("--profile is for CPUs.")
    all_threads = {1, torch.get_num_threads()} if device.type == "cpu" else {1}
    precisions = ["fp32", *(["bf16"] if args.bf16 or automatic_precision(device)[0] == "bf16" else [])]
    sides = [Side("plain", plain=True)]
    for precision in precisions:
        sides.append(Side(precision, precision=precision))
        if not args.no_compile:
            sides.append(Side(f"{precision} compiled", precision=precision, compile=True))
    network = build_network(read_config(read_json(CONFIG)), 100, CPU)
    macs = count_macs(network, 32).loc["total", ["convolutions", "cosine classifier"]].sum()
    arguments = read_json(CONFIG)["data_loader"]["args"]
    counts = RandomCIFAR100(**arguments).cls_num_list
    load = os.getloadavg()
    rows, epochs, profiles = [], {}, {}
    for threads in args.threads or sorted(all_threads):
        cost = 3 * 2 * float(macs)
        found, workers = time_sides(sides, threads, args.rounds, device, args.data_dir, cost)
        rows += found
        if args.epoch:
            chosen = [precisions[-1]] if device.type == "cpu" else [side.name for side in sides if not side.plain]
            epochs[threads] = time_epochs({name: workers[name] for name in chosen}, threads, device, sum(counts))
        if args.profile:
            profiles[threads] = workers[precisions[-1]].submit(profile).result()
            print(f"{precisions[-1]}, {threads} thread(s), share of own CPU time in a step, calls:")
            for row in profiles[threads]:
                print(f"  {row['share']:6.1%} {row['calls a step']:7.1f}  {row['operation']}")
        for worker in workers.values():
            worker.shutdown()
    if args.output:
        content = {
            "seed": read_json(CONFIG)["seed"],
            "images": "CIFAR-100" if (args.data_dir / "cifar-100-python").exists() else "random",
            "rounds": args.rounds,
            "load_before": load,
            "load_after": os.getloadavg(),
            "gflop_a_step_and_image": 6 * float(macs) / 1e9,
            "steps": rows,
            "epoch_images_per_second": epochs,
            "profile": profiles,
        }
        write_record(args.output, device, content)


if __name__ == "__main__":
    main()
