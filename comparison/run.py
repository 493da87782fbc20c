"""Does the runs of a comparison, several side by side; what is done is not done again."""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch

from commands.command_line import Options
from commands.gflops import cost_of
from commands.jobs import run_test_all, run_test_train
from comparison.plan import CHECKPOINTS, EQUAL, LEARNED, PRIOR, Run, own_name, plan_runs, write_own_configs
from comparison.tables import cost_table, records, row_label, write_comparison
from data_loader.in_memory import InMemoryDataLoader
from data_loader.workers import usable_cores
from evaluation.loaded_run import evaluation_config
from evaluation.results import Results
from evaluation.results_folder import results_dir
from report.comparison_page import Evaluated
from trainer import train
from trainer.registry import COMPONENTS, make_config
from utils.checkpoint import load_checkpoint, position, sha256, whole_epochs
from utils.errors import Interrupted, UserError
from utils.files import make_folder
from utils.lock import locked
from utils.parse_config import ConfigParser, differences
from utils.reference_config import config_of
from utils.signals import STOPPING, StopSignals, end_at_once, signal_status

METHODS = ("softmax", "ride", "tade")
JOBS = {EQUAL: run_test_all, LEARNED: run_test_train, PRIOR: run_test_train}
WAYS = {EQUAL: "equal weights", LEARNED: "test-time training", PRIOR: "estimated prior"}
QUICK_EPOCHS = 2
SHARED_GPU_RUNS = 3  # runs on small images that share a GPU
#: glibc keeps freed memory for the next step, instead of giving it back to the system and asking for it again.
WORKER_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967295", "MALLOC_TRIM_THRESHOLD_": "4294967295"}


def finish(run: Run, threads: int) -> None:
    """All that is left to do of a run; what it prints goes to its log.

    Raises:
        UserError: whatever went wrong; a traceback of what is not the user's to mend is in the log.
    """
    torch.set_num_threads(threads)
    make_folder(run.log.parent)
    with open(run.log, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            finish_training(run)
            for job, options in run.tests():
                finish_test(run, job, options)
        except UserError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise UserError(f"{type(error).__name__}: {error}; see {run.log}.") from None


def finish_training(run: Run) -> None:
    last = run.folder / "last.pth"
    config = run.config()
    if not last.exists():
        clear_first_epoch(run.folder)
        announce(f"{run}: training, {config['trainer']['epochs']} epochs")
        train(run.training, device=run.device, run_id=run.run_id)
        return
    checkpoint = load_checkpoint(last)
    if difference := first_difference(complete(trained_config(checkpoint)), complete(config)):
        raise UserError(
            f"{run.folder} holds a run with other options ({difference}): choose another --output, or give "
            "the options it was started with."
        )
    if not is_trained(checkpoint):
        announce(f"{run}: training goes on after epoch {position(checkpoint)}; {config['trainer']['epochs']} in all")
        train(resume=last, device=run.device)


def clear_first_epoch(folder: Path) -> None:
    """Remove the folder of a run that was killed in its first epoch: there is nothing to go on from.

    Raises:
        UserError: there is more than that in it.
    """
    later = [path for path in folder.glob("*.pth") if (load_checkpoint(path)["epoch"] or 2) > 1]
    if later:
        raise UserError(
            f"{folder} has {later[0].name} but no last.pth: copy it to last.pth to go on from there, or "
            "remove the folder to start again."
        )
    shutil.rmtree(folder, ignore_errors=True)


def trained_config(checkpoint: dict) -> ConfigParser:
    """The config that a run of a comparison was trained with."""
    return make_config(config_of(checkpoint))


def complete(config: ConfigParser) -> dict:
    """A training config with the trainer options it leaves out: saying a default makes no other training of it."""
    return {**config.config, "trainer": asdict(config.build("trainer"))}


def is_trained(checkpoint: dict) -> bool:
    """Whether a run has all its epochs, or has stopped by itself."""
    options = trained_config(checkpoint).build("trainer")
    stopped_early = bool(options.early_stop) and checkpoint["checks_since_best"] >= options.early_stop
    return whole_epochs(checkpoint) >= options.epochs or (stopped_early and not checkpoint.get("mid_epoch"))


def first_difference(before: dict, now: dict) -> str | None:
    """The first value in which two trainings differ, as "path before, now".

    Where runs are saved and what is tested do not count.
    """
    for path, (old, new) in differences(before, now).items():
        if path not in ("trainer;save_dir", "data_loader;args;distributions"):
            return f"{path} {json.dumps(old)}, now {json.dumps(new)}"
    return None


def finish_test(run: Run, job: str, options: Options) -> None:
    if results_file(run, options.checkpoint.stem, job).exists():
        done = read_results(run, options.checkpoint.stem, job)
        config = evaluation_config(load_checkpoint(options.checkpoint), options.config, options.checkpoint)
        if done.checkpoint.sha256 == sha256(options.checkpoint) and done.config == config.config:
            return
    announce(f"{run}: {job} of {options.checkpoint.name}")
    JOBS[job](options)


def results_file(run: Run, checkpoint: str, job: str) -> Path:
    return results_dir(run.folder / f"{checkpoint}.pth", job) / "results.json"


def read_results(run: Run, checkpoint: str, job: str) -> Results:
    return Results.from_json(json.loads(results_file(run, checkpoint, job).read_text()))


def announce(message: str) -> None:
    """A line on the console, also where a worker's output goes to a log."""
    sys.__stdout__.write(message + "\n")
    sys.__stdout__.flush()


def start_worker(stopping: multiprocessing.synchronize.Event) -> None:
    """Start of a worker process: it stops by the same signals as a run by itself, and ends with the first process."""
    if stopping.is_set():
        os._exit(1)
    StopSignals.second_ends = False  # the first process decides on that
    for number in STOPPING:
        signal.signal(number, stop_worker)
    end_with_parent()


def stop_worker(number: int, _: object) -> NoReturn:
    """Outside training, which saves its state first, there is nothing to save."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)  # one is enough
    raise Interrupted(f"Stopped by {signal.Signals(number).name}.", signal_status(number))


def end_with_parent() -> None:
    """A worker process must not outlive the one that started it, not even if that one is killed."""

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def jobs_at_once(runs: Sequence[Run], device: str | None) -> int:
    """How many runs work side by side: on CPUs one a core; on a GPU several where images are small, else one."""
    on_gpu = device != "cpu" and (torch.cuda.is_available() or device is not None)
    if not on_gpu:
        return min(len(runs), usable_cores())
    small = all(
        issubclass(COMPONENTS["data_loader"][run.config()["data_loader"]["type"]], InMemoryDataLoader) for run in runs
    )
    return min(len(runs), SHARED_GPU_RUNS) if small else 1


def finish_all(runs: Sequence[Run], jobs: int) -> dict[Run, UserError]:
    """Finish all runs, `jobs` at a time; one that fails does not stop the others.

    Returns:
        The runs that failed, with their errors.
    """
    threads = max(1, usable_cores() // jobs)
    os.environ.update(WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)})
    failures = {}
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    with (
        StopSignals(stop_waiting),
        ProcessPoolExecutor(jobs, context, start_worker, (stopping,), max_tasks_per_child=1) as executor,
    ):
        pending = {}
        try:
            pending |= {executor.submit(finish, run, threads): run for run in runs}
            for future in as_completed(pending):
                run = pending[future]
                try:
                    future.result()
                    announce(f"{run}: done")
                except BrokenProcessPool:
                    raise UserError(
                        "A worker process was killed (out of memory?): start again to go on, with fewer "
                        "--jobs if memory is short."
                    ) from None
                except UserError as error:
                    failures[run] = error
                    announce(f"{run}: {error}")
        except StopWaiting as stop:
            announce("Stopping: the runs at work finish their step and save it.")
            stopping.set()
            stop_workers()
            end_at_once("Stopped. Start again with the same options to go on.", signal_status(stop.number))
    return failures


def stop_workers() -> None:
    """Let every worker process stop, also those that are only starting, and wait until they have ended."""
    told = set()
    while workers := multiprocessing.active_children():
        for worker in workers:
            if worker.pid not in told:
                os.kill(worker.pid, signal.SIGTERM)
                told.add(worker.pid)
        workers[0].join(0.2)


class StopWaiting(BaseException):
    """A signal asks to stop: raised in the handler, since waiting for a run lasts long."""

    def __init__(self, number: int):
        self.number = number


def stop_waiting(number: int) -> None:
    raise StopWaiting(number)


def compare(runs: list[Run], output: Path, command: str, note: str) -> None:
    """Write and show tables and plots of all finished runs."""
    rows, evaluated, costs = [], [], []
    for run in runs:
        checkpoint = load_checkpoint(run.folder / "last.pth")
        tested = read_results(run, "last", EQUAL)
        for name in CHECKPOINTS:
            for job in JOBS:
                if results_file(run, name, job).exists():
                    results = read_results(run, name, job)
                    row = row_label(run.method, WAYS[job] if len(run.testing) > 2 or job == PRIOR else "")
                    kept = "last epoch" if name == "last" else "best epoch"
                    where = {"data": run.data, "row": row, "seed": run.seed, "checkpoint": kept}
                    rows += records(results, method=run.method, **where)
                    evaluated.append(Evaluated(results=results, **where))
        costs.append(
            {
                "data": run.data,
                "method": run.method,
                "epochs": checkpoint["epoch"],
                "seconds": checkpoint.get("seconds"),
                "device": checkpoint.get("device") or tested.device,
                "torch": tested.torch,
            }
        )
    first = {(run.data, run.method): run for run in reversed(runs)}
    cost = cost_table(costs, {key: cost_of(run.config()).loc["total"] for key, run in first.items()})
    commands = [line for run in reversed(first.values()) for line in run.commands]
    announce(write_comparison(output, rows, evaluated, cost, command, note, commands))


def check_data(runs: list[Run]) -> None:
    """Open every data set once, so that one is downloaded once, and a missing one is named before anything is trained.

    Raises:
        UserError: images, lists or test distributions are missing.
    """
    configs = {json.dumps(run.config()["data_loader"]): run.config() for run in runs}
    for config in configs.values():
        config.build("data_loader").test_distributions()


def main(description: str, arguments: list[str] | None = None) -> int:
    """Parse the command line of reproduce.py and do it all; returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        nargs="+",
        metavar="NAME",
        default=["cifar100_ir100"],
        help="data sets with their imbalance ratio, as in the names of configs (default: %(default)s)",
    )
    source.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="JSON",
        help="a training config of your own: the methods on its data, instead of --data",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=list(METHODS),
        help="methods, as in the names of configs (default: %(default)s)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run each (default: 1)")
    parser.add_argument("--epochs", type=int, help="shorten the schedule to so many epochs, steps in proportion")
    parser.add_argument("--quick", action="store_true", help="two epochs, three distributions, one test-time pass")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY;PATH=VALUE",
        dest="assignments",
        help="any value of the training configs; data_loader also in testing, aggregator only there",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help=f"runs side by side (default: one a core; on a GPU {SHARED_GPU_RUNS} with small images, else 1)",
    )
    parser.add_argument("-d", "--device", help="as in train.py")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder (default: saved/reproduce, with _quick or _N_epochs where that applies)",
    )
    args = parser.parse_args(arguments)
    for name in ("epochs", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    kind = "_quick" if args.quick else f"_{args.epochs}_epochs" if args.epochs else ""
    output = args.output or Path("saved", f"reproduce{kind}")
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else None)
    own = args.config and Path(args.config)
    runs = plan_runs(
        [own_name(own)] if own else args.data,
        args.methods,
        args.seeds,
        output,
        epochs=epochs,
        assignments=args.assignments,
        device=args.device,
        quick=args.quick,
        configs=write_own_configs(own, args.methods, output) if own else None,
    )
    jobs = min(args.jobs or jobs_at_once(runs, args.device), len(runs))
    make_folder(output)
    with locked(output, "choose another --output"):
        check_data(runs)
        announce(f"{len(runs)} runs, {jobs} at a time; each writes a log beside its folder in {output}.")
        failures = finish_all(runs, jobs)
        note = f"Training time is wall time; runs side by side: {jobs}."
        if failures:
            note += f" Missing, because they failed: {', '.join(map(str, failures))}."
        if finished := [run for run in runs if run not in failures]:
            typed = sys.argv[1:] if arguments is None else arguments
            compare(finished, output, shlex.join(["python", "reproduce.py", *typed]), note)
    if failures:
        announce(f"{len(failures)} of {len(runs)} runs failed: mend what the lines above name and start again.")
    return 1 if failures else 0
