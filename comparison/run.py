"""Runs the commands of a comparison, several side by side; what is done is not done again."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from commands.gflops import cost_of
from comparison.plan import CHECKPOINTS, EQUAL, LEARNED, PRIOR, Run, config_path, plan_runs, write_own_configs
from comparison.tables import cost_table, records, row_label, write_comparison
from data_loader.in_memory import InMemoryDataLoader
from data_loader.workers import usable_cores
from evaluation.results import Results
from report.comparison_page import Evaluated
from trainer.registry import COMPONENTS, read_config
from utils.checkpoint import load_checkpoint, position, sha256, whole_epochs
from utils.distributed import LAUNCHER
from utils.errors import Interrupted, UserError
from utils.files import make_folder
from utils.lock import locked
from utils.parse_config import ConfigParser, differences
from utils.signals import StopSignals, signal_status

ROOT = Path(__file__).resolve().parents[1]
WAYS = {EQUAL: "equal weights", LEARNED: "test-time training", PRIOR: "estimated prior"}
QUICK_EPOCHS = 2
SHARED_GPU_RUNS = 3  # runs on small images that share a GPU
#: glibc keeps freed memory for the next step, instead of giving it back to the system and asking for it again.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967295", "MALLOC_TRIM_THRESHOLD_": "4294967295"}


def finish_all(runs: Sequence[Run], jobs: int) -> dict[Run, UserError]:
    """Finish all runs, `jobs` at a time; one that fails does not stop the others.

    Returns:
        The runs that failed, with their errors.

    Raises:
        Interrupted: a signal asked to stop; every command has ended.
    """
    threads = max(1, usable_cores() // jobs)
    environment = {**os.environ, **MEMORY, "OMP_NUM_THREADS": str(threads), LAUNCHER: str(os.getpid())}
    failures = {}
    with StopSignals() as stop, ThreadPoolExecutor(jobs) as executor:
        pending = {executor.submit(finish, run, environment, stop): run for run in runs}
        for future in as_completed(pending):
            run = pending[future]
            try:
                future.result()
                announce(f"{run}: {'stopped' if stop.received else 'done'}")
            except UserError as error:
                failures[run] = error
                announce(f"{run}: {error}")
    if stop.received:
        raise Interrupted("Stopped. Start again with the same options to go on.", signal_status(stop.received))
    return failures


def finish(run: Run, environment: Mapping[str, str], stop: StopSignals) -> None:
    """Run what is left to do of a run.

    Args:
        run: the run; what its commands print goes to its log.
        environment: of the commands.
        stop: when it has received a signal, the command at work is told to stop, and no other starts.

    Raises:
        UserError: a command failed; with the last line of the log.
    """
    for title, command in commands_left(run):
        if stop.received:
            return
        make_folder(run.log.parent)
        announce(f"{run}: {title}")
        status = call(command, run.log, environment, stop)
        if status and not stop.received:
            killed = "killed (out of memory? then take fewer --jobs), after: " if status < 0 else ""
            *_, last = ["nothing was printed", *filter(str.strip, run.log.read_text(errors="replace").splitlines())]
            raise UserError(f"{killed}{last} See {run.log}.")


def call(command: Sequence[str], log: Path, environment: Mapping[str, str], stop: StopSignals) -> int:
    """Run a script in a process of its own; returns its exit status, negative if a signal killed it."""
    words = [sys.executable, str(ROOT / command[1]), *command[2:]]
    with open(log, "ab") as file:
        # In a session of its own, Ctrl-C in the terminal does not reach it: it is told to stop once, by SIGTERM.
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    told = False
    while process.poll() is None:
        if stop.received and not told:
            process.terminate()
            told = True
        time.sleep(0.1)
    return process.returncode


def commands_left(run: Run) -> Iterator[tuple[str, list[str]]]:
    """What is left to do of a run, as title and command; each is done before the next is asked for.

    Raises:
        UserError: the folder holds a run with other options, or a damaged checkpoint.
    """
    epochs = run.config["trainer"]["epochs"]
    last = run.checkpoint("last")
    # Killed in its first epoch, a run may have saved others before last.pth.
    saved = [last] if last.exists() else sorted(run.folder.glob("*.pth"))
    if not saved:
        yield f"training, {epochs} epochs", run.train
    else:
        checkpoint = load_checkpoint(saved[0])
        trained = read_config(checkpoint.get("config") or {})
        if difference := first_difference(trained, run.config):
            raise UserError(
                f"{run.folder} holds a run with other options ({difference}): choose another --output, or give "
                "the options it was started with."
            )
        if saved != [last] or not is_trained(checkpoint, trained):
            title = f"training goes on after epoch {position(checkpoint)}; {epochs} in all"
            yield title, [*run.resume, "-r", str(saved[0])]
    for name in CHECKPOINTS:
        for job in run.tests:
            wanted = name == "last" or job != PRIOR
            if wanted and run.checkpoint(name).exists() and not is_tested(run, job, name):
                yield f"{job} of {name}.pth", run.test(job, name)


def first_difference(before: ConfigParser, now: ConfigParser) -> str | None:
    """The first value in which two trainings differ, as "path before, now".

    Where runs are saved and what is tested do not count.
    """
    for path, (old, new) in differences(before.complete(), now.complete()).items():
        if path not in ("trainer;save_dir", "data_loader;args;distributions"):
            return f"{path} {json.dumps(old)}, now {json.dumps(new)}"
    return None


def is_trained(checkpoint: Mapping, config: ConfigParser) -> bool:
    """Whether a run has all its epochs, or has stopped by itself."""
    options = config.build("trainer")
    stopped_early = bool(options.early_stop) and checkpoint["checks_since_best"] >= options.early_stop
    return whole_epochs(checkpoint) >= options.epochs or (stopped_early and not checkpoint.get("mid_epoch"))


def is_tested(run: Run, job: str, name: str) -> bool:
    """Whether a job's results are of this checkpoint and these options."""
    if not run.results(job, name).exists():
        return False
    done, path = read_results(run, job, name), run.checkpoint(name)
    config = read_config(run.changes(job), load_checkpoint(path), path)
    return done.checkpoint.sha256 == sha256(path) and done.config == config.config


def read_results(run: Run, job: str, name: str) -> Results:
    return Results.from_json(json.loads(run.results(job, name).read_text()))


def announce(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def jobs_at_once(runs: Sequence[Run], device: str | None) -> int:
    """How many runs work side by side: on CPUs one a core; on a GPU several where images are small, else one."""
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return usable_cores()
    loaders = [COMPONENTS["data_loader"][run.config["data_loader"]["type"]] for run in runs]
    return SHARED_GPU_RUNS if all(issubclass(loader, InMemoryDataLoader) for loader in loaders) else 1


def compare(runs: list[Run], output: Path, command: str, note: str) -> None:
    """Write and show tables and plots of all finished runs."""
    rows, evaluated, costs = [], [], []
    for run in runs:
        checkpoint = load_checkpoint(run.checkpoint("last"))
        for name, kept in CHECKPOINTS.items():
            for job in run.tests:
                if run.results(job, name).exists():
                    results = read_results(run, job, name)
                    row = row_label(run.method, WAYS[job] if LEARNED in run.tests or job == PRIOR else "")
                    where = {"data": run.data, "row": row, "seed": run.seed, "checkpoint": kept}
                    rows += records(results, method=run.method, **where)
                    evaluated.append(Evaluated(results=results, **where))
        cost = {"data": run.data, "method": run.method, "epochs": checkpoint["epoch"]}
        cost |= {"seconds": checkpoint["seconds"], "device": checkpoint["device"]}
        costs.append({**cost, "torch": read_results(run, EQUAL, "last").torch})
    first = {(run.data, run.method): run for run in reversed(runs)}
    total = cost_table(costs, {key: cost_of(run.config).loc["total"] for key, run in first.items()})
    commands = [shlex.join(words) for run in reversed(first.values()) for words in run.commands]
    announce(write_comparison(output, rows, evaluated, total, command, note, commands))


def check_data(runs: list[Run]) -> None:
    """Open every data set once, so that one is downloaded once, and a missing one is named before anything is trained.

    Raises:
        UserError: images, lists or test distributions are missing.
    """
    configs = {json.dumps(run.config["data_loader"]): run.config for run in runs}
    for config in configs.values():
        config.build("data_loader").test_distributions()


def main(description: str, arguments: list[str] | None = None) -> int:
    """Parse the command line of reproduce.py and do it all; returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = {"nargs": "+", "metavar": "NAME"}
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", **names, default=["cifar100_ir100"], help="data sets and ratios, as in names of configs"
    )
    source.add_argument(
        "-c", "--config", type=Path, metavar="JSON", help="a training config of your own, to take its data"
    )
    add("--methods", **names, default=["softmax", "ride", "tade"], help="as in names of configs (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[1], help="one run each (default: 1)")
    add("--epochs", type=int, help="shorten the schedule to so many epochs, steps in proportion")
    add("--quick", action="store_true", help="two epochs, three distributions, one test-time pass")
    text = "any value of the training configs; data_loader also in testing, aggregator only there"
    add("--set", action="append", default=[], metavar="KEY;PATH=VALUE", dest="assignments", help=text)
    text = f"runs side by side (default: one a core; on a GPU {SHARED_GPU_RUNS} with small images, else 1)"
    add("--jobs", type=int, help=text)
    add("-d", "--device", help="as in train.py")
    add(
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
    if args.config:
        configs = write_own_configs(args.config, args.methods, output)
    else:
        configs = {(data, method): config_path(data, method) for data in args.data for method in args.methods}
    runs = plan_runs(
        configs,
        args.seeds,
        output,
        epochs=args.epochs or (QUICK_EPOCHS if args.quick else None),
        assignments=args.assignments,
        device=args.device,
        quick=args.quick,
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
