"""Train, test and compare methods over seeds: one command for a whole table, its plots and its costs.

  python reproduce.py --quick                                          every step in minutes, on CIFAR-100
  python reproduce.py --data cifar100_ir100 --seeds 1 2 3              Softmax, RIDE, TADE with the published recipes
  python reproduce.py --data cifar100_ir100 --seeds 1 2 --epochs 20    the same, on a shortened schedule

Every run is train.py, then test_all_*.py and, for TADE, test_train_*.py, on the last and the best checkpoint. Stopped
or killed at any moment and started again with the same options, it goes on from there; what is done is not done again.
The folder --output gets report.md, results.csv, the plots, and every run's checkpoints, results and log.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from base.base_trainer import TrainerOptions
from data_loader.in_memory import InMemoryDataLoader
from data_loader.on_disk import usable_cores
from trainer.setup import COMPONENTS, parse_command_line
from trainer.testing import evaluate, train_at_test_time
from utils.checkpoint import load_checkpoint, sha256
from utils.comparison import cost_table, records, write_comparison
from utils.errors import UserError, unknown
from utils.gflops import cost_of
from utils.parse_config import ConfigParser, read_json

CONFIGS = Path("configs")
METHODS = ("softmax", "ride", "tade")
SCRIPTS = {"imagenet": "imagenet", "places": "places", "iNaturalist": "inat"}  # first word of a data set -> suffix
CHECKPOINTS = ("last", "model_best")
QUICK_EPOCHS = 2
QUICK = ['data_loader;args;distributions=["forward50", "uniform", "backward50"]', "aggregator;args;epochs=1"]
SHARED_GPU_RUNS = 3  # runs on small images that share a GPU
#: glibc keeps freed memory for the next step; giving it back to the system and asking again takes a third of the time.
WORKER_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967295", "MALLOC_TRIM_THRESHOLD_": "4294967295"}


@dataclass(frozen=True)
class Run:
    """One training and its tests.

    Args:
        data, method: as in configs/config_DATA_METHOD.json.
        seed: of everything random.
        folder: the run's folder.
        arguments: of train.py.
        test_arguments: of test_train_*.py, without -r; None where there are no expert weights to learn.
        device: as -d, or None.
    """

    data: str
    method: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    test_arguments: tuple[str, ...] | None
    device: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def config(self) -> ConfigParser:
        return parse_command_line("", [*self.arguments, *self.device], training=True)

    def commands(self) -> list[str]:
        """What one would type to do this run by hand."""
        suffix = SCRIPTS.get(self.data.split("_")[0], "cifar")
        lines = [("train.py", self.arguments), (f"test_all_{suffix}.py", ("-r", str(self.folder / "last.pth")))]
        if self.test_arguments:
            lines.append((f"test_train_{suffix}.py", (*self.test_arguments, "-r", str(self.folder / "last.pth"))))
        return [" ".join(["python", script, *(f"'{a}'" if set(a) & set('; "') else a for a in arguments)])
                for script, arguments in lines]


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, their configs checked.

    Raises:
        UserError: a config is missing or an option does not fit one.
    """
    runs = []
    for data in args.data:
        for method in args.methods:
            config = CONFIGS / f"config_{data}_{method}.json"
            if not config.exists():
                raise unknown("data set and method", f"{data}_{method}",
                              [path.stem.removeprefix("config_") for path in CONFIGS.glob("config_*.json")])
            assignments = args.assignments
            if args.epochs:
                assignments = scaled_schedule(read_json(config), args.epochs) + assignments
            for seed in args.seeds:
                runs.append(make_run(args, data, method, seed, config, assignments))
    for run in runs:
        config = run.config()
        TrainerOptions(**config["trainer"])
        if run.test_arguments:
            read_json(run.test_arguments[1])
    return runs


def make_run(args: argparse.Namespace, data: str, method: str, seed: int, config: Path, assignments: list[str]) -> Run:
    name = read_json(config)["name"]
    common = [a for a in assignments if not a.startswith("aggregator")]
    arguments = ["-c", str(config), "--seed", str(seed), "--save_dir", str(args.output), "--run_id", f"seed{seed}",
                 *(word for a in common for word in ("--set", a))]
    test_arguments = None
    if read_json(config).get("loss", {}).get("type") == "DiverseExpertLoss":
        kept = [a for a in assignments if a.startswith(("data_loader", "aggregator"))]
        own, usual = CONFIGS / f"test_time_{data}_{method}.json", CONFIGS / f"test_time_{data}_tade.json"
        test_arguments = ("-c", str(own if own.exists() else usual), "--seed", str(seed),
                          *(word for a in kept for word in ("--set", a)))
    device = ("-d", args.device) if args.device else ()
    return Run(data, method, seed, args.output / name / f"seed{seed}", tuple(arguments), test_arguments, device)


def scaled_schedule(config: dict, epochs: int) -> list[str]:
    """Assignments that shorten (or lengthen) a schedule: steps and re-weighting move in proportion, warm-up ends
    before half of the first step."""
    whole = config["trainer"]["epochs"]

    def scaled(epoch: int) -> int:
        return max(1, round(epoch * epochs / whole))

    changes = {"trainer;epochs": epochs}
    schedule = config["lr_scheduler"]["args"]
    changes |= {f"lr_scheduler;args;{key}": scaled(schedule[key]) for key in ("step1", "step2", "T_max")
                if key in schedule}
    if "step1" in schedule:
        changes["lr_scheduler;args;warmup_epoch"] = min(schedule.get("warmup_epoch", 0), scaled(schedule["step1"]) // 2)
    if config["loss"].get("args", {}).get("reweight_epoch", -1) > 0:
        changes["loss;args;reweight_epoch"] = scaled(config["loss"]["args"]["reweight_epoch"])
    return [f"{path}={value}" for path, value in changes.items()]


def carry_out(run: Run, threads: int) -> None:
    """All that is left to do of a run; what it prints goes to its log.

    Raises:
        UserError: see train.py and the test scripts.
    """
    torch.set_num_threads(threads)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        finish_training(run)
        for name in CHECKPOINTS:
            checkpoint = run.folder / f"{name}.pth"
            if checkpoint.exists():
                at = ["-r", str(checkpoint), *run.device]
                finish_test(run, "test_all", parse_command_line("", at))
                if run.test_arguments:
                    finish_test(run, "test_train", parse_command_line("", [*run.test_arguments, *at]))


def finish_training(run: Run) -> None:
    last = run.folder / "last.pth"
    config = run.config()
    if not last.exists():
        shutil.rmtree(run.folder, ignore_errors=True)  # killed in its first epoch: nothing to go on from
        announce(f"{run}: training, {config['trainer']['epochs']} epochs")
        train.main(config)
        return
    checkpoint = load_checkpoint(last)
    if difference := first_difference(checkpoint["config"], config.config):
        raise UserError(f"{run.folder} holds a run with other options ({difference}): choose another --output, or give "
                        "the options it was started with.")
    if not is_trained(checkpoint):
        announce(f"{run}: training goes on after epoch {checkpoint['epoch']} of {config['trainer']['epochs']}")
        train.main(parse_command_line("", ["-r", str(last), *run.device], training=True))


def is_trained(checkpoint: dict) -> bool:
    """Whether a run has all its epochs, or has stopped by itself."""
    options = TrainerOptions(**checkpoint["config"]["trainer"])
    return checkpoint["epoch"] >= options.epochs or \
        bool(options.early_stop) and checkpoint["checks_since_best"] >= options.early_stop


def first_difference(before: dict, now: dict, path: str = "") -> str | None:
    """The first value in which two configs differ, as "path: before, now"; where runs are saved does not count."""
    for key in sorted(before.keys() | now.keys()):
        here, old, new = f"{path}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := first_difference(old, new, f"{here};"):
                return found
        elif old != new and here != "trainer;save_dir":
            return f"{here} {json.dumps(old)}, now {json.dumps(new)}"
    return None


def finish_test(run: Run, job: str, config: ConfigParser) -> None:
    file = results_file(run, config.resume.stem, job)
    done = json.loads(file.read_text()) if file.exists() else None
    if done and done["checkpoint"]["sha256"] == sha256(config.resume) and done["config"] == config.config:
        return
    announce(f"{run}: {job} of {config.resume.name}")
    (train_at_test_time if job == "test_train" else evaluate)(config, job)


def results_file(run: Run, checkpoint: str, job: str) -> Path:
    return run.folder / "results" / checkpoint / job / "results.json"


def announce(message: str) -> None:
    """A line on the console, also where a worker's output goes to a log."""
    sys.__stdout__.write(message + "\n")
    sys.__stdout__.flush()


def end_with_parent() -> None:
    """Start of a worker process: it must not outlive the one that started it, not even if that one is killed."""
    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def jobs_at_once(runs: list[Run], device: str | None) -> int:
    """How many runs work side by side: on CPUs one a core; on a GPU several where images are small, else one."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if not on_gpu:
        return min(len(runs), usable_cores())
    small = all(issubclass(COMPONENTS["data_loader"][run.config()["data_loader"]["type"]], InMemoryDataLoader)
                for run in runs)
    return min(len(runs), SHARED_GPU_RUNS) if small else 1


def carry_out_all(runs: list[Run], jobs: int) -> dict[Run, UserError]:
    """Carry out all runs, `jobs` at a time; one that fails does not stop the others.

    Returns:
        The runs that failed, with their errors.
    """
    threads = max(1, usable_cores() // jobs)
    os.environ.update(WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)})
    failures = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, end_with_parent, max_tasks_per_child=1) as executor:
        pending = {executor.submit(carry_out, run, threads): run for run in runs}
        try:
            for future in as_completed(pending):
                run = pending[future]
                try:
                    future.result()
                    announce(f"{run}: done")
                except UserError as error:
                    failures[run] = error
                    announce(f"{run}: {error}")
        except BrokenProcessPool:
            raise UserError("A worker process was killed (out of memory?): start again to go on, with fewer --jobs if "
                            "memory is short.") from None
        except KeyboardInterrupt:
            announce("Stopped. Start again with the same options to go on.")
            os._exit(130)  # without waiting for the workers, which end with this process
    return failures


def compare(runs: list[Run], output: Path, command: str) -> None:
    """Write and show tables and plots of all finished runs."""
    rows, costs = [], []
    for run in runs:
        checkpoint = load_checkpoint(run.folder / "last.pth")
        tested = json.loads(results_file(run, "last", "test_all").read_text())
        for name in CHECKPOINTS:
            for job in ("test_all", "test_train"):
                file = results_file(run, name, job)
                if file.exists():
                    results = json.loads(file.read_text())
                    rows += records(results, data=run.data, method=run.method, seed=run.seed,
                                    checkpoint="last epoch" if name == "last" else "best epoch",
                                    learned=job == "test_train", weighed=run.test_arguments is not None)
        costs.append({"data": run.data, "method": run.method, "epochs": checkpoint["epoch"],
                      "seconds": checkpoint.get("seconds"), "device": tested["device"], "torch": tested["torch"]})
    first = {(run.data, run.method): run for run in reversed(runs)}
    cost = cost_table(costs, {key: cost_of(run.config()).loc["total"] for key, run in first.items()})
    commands = {key: run.commands() for key, run in sorted(first.items())}
    announce(write_comparison(output, rows, cost, command, commands))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="NAME", default=["cifar100_ir100"],
                        help="data sets with their imbalance ratio, as in the names of configs (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS),
                        help="methods, as in the names of configs (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run each (default: 1)")
    parser.add_argument("--epochs", type=int, help="shorten the schedule to so many epochs, steps in proportion")
    parser.add_argument("--quick", action="store_true", help="two epochs, three distributions, one test-time pass")
    parser.add_argument("--set", action="append", default=[], metavar="KEY;PATH=VALUE", dest="assignments",
                        help="any value of every config; may be repeated")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one a core; on a GPU "
                        f"{SHARED_GPU_RUNS} with small images, else 1)")
    parser.add_argument("-d", "--device", help="as in train.py")
    parser.add_argument("-o", "--output", type=Path, help="folder (default: saved/reproduce, saved/reproduce_quick)")
    args = parser.parse_args(arguments)
    if args.quick:
        args.epochs, args.assignments = args.epochs or QUICK_EPOCHS, [*QUICK, *args.assignments]
    args.output = args.output or Path("saved", "reproduce_quick" if args.quick else "reproduce")
    for name, least in (("epochs", 1), ("jobs", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    runs = plan(args)
    jobs = args.jobs or jobs_at_once(runs, args.device)
    jobs = min(jobs, len(runs))
    announce(f"{len(runs)} runs, {jobs} at a time; each writes a log beside its folder in {args.output}.")
    failures = carry_out_all(runs, jobs)
    if finished := [run for run in runs if run not in failures]:
        compare(finished, args.output, " ".join(["python reproduce.py", *(arguments or sys.argv[1:])]))
    if failures:
        announce(f"{len(failures)} of {len(runs)} runs failed: mend what the lines above name and start again.")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.status)
