"""A script's command line: made of its job's signature, parsed into the arguments of the call."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.export import FORMATS as EXPORTED
from deploy.prediction_files import FORMATS
from utils import distributed
from utils.errors import UserError
from utils.parse_config import parse_assignment, read_json


def _argument(*flags: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, options


#: Argument of a job -> its flags. Its default, and so whether it is required or a switch, is in the job's signature.
ARGUMENTS = {
    "config": _argument("-c", "--config", type=Path, metavar="JSON", help="config file"),
    "resume": _argument("-r", "--resume", type=Path, metavar="CKPT", help="checkpoint to go on from"),
    "checkpoint": _argument("-r", "--resume", type=Path, metavar="CKPT", help="checkpoint to evaluate"),
    "device": _argument(
        "-d", "--device", help="cpu, cuda, cuda:1, or GPU numbers such as 0,1 (default: CUDA if present)"
    ),
    "run_id": _argument("--run_id", help="name of this run's folder (default: date and time)"),
    "allow_changes": _argument("--allow_changes", help="with -r: go on even with other data, seed, loss, ..."),
    "output": _argument("-o", "--output", type=Path, help="folder for results (default: beside the checkpoint)"),
    "stream": _argument("--stream", help="images arrive in batches, each predicted at once"),
    "stream_batch": _argument("--stream_batch", type=int, help="images that arrive together (default: %(default)s)"),
    "prior": _argument(
        "--prior",
        help="a known test prior: a JSON, CSV or text file of classes and their counts or shares, "
        "CLASS=NUMBER,..., uniform or training",
    ),
    "calibrate_on_test": _argument(
        "--calibrate_on_test",
        type=int,
        metavar="N",
        help="calibrate on N labeled test images a class, and leave them out of every figure",
    ),
    "labeled": _argument(
        "--images",
        type=Path,
        metavar="LIST",
        help='labeled images that were not trained on: a file of "path label" lines, or a folder of class folders '
        "(default: the held-out validation images of the data)",
    ),
    "formats": _argument("--formats", nargs="+", choices=EXPORTED, help="what to write (default: all)"),
    "images": _argument("--images", type=Path, metavar="FOLDER", help="images, at any depth"),
    "top_k": _argument(
        "--top_k", type=int, metavar="N", help="likeliest classes of every image (default: %(default)s)"
    ),
    "file_format": _argument(
        "--format", choices=FORMATS, help="of the tables (default: %(default)s; parquet: pyarrow)"
    ),
    "watch": _argument(
        "--watch",
        help="go on with images that appear in the folder, in batches of --stream_batch at most, until Ctrl-C or "
        "SIGTERM",
    ),
    "poll": _argument(
        "--poll", type=float, metavar="SECONDS", help="with --watch: between looks (default: %(default)s)"
    ),
    "state": _argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="keeps what was learned for the next run (default: none; with --watch: stream.state in the output folder)",
    ),
}

#: Flags that set one value of the config: flag -> (path, type, help).
_BOTH = {
    "--n_gpu": ("n_gpu", int, "GPUs to use in one process"),
    "--seed": ("seed", int, "seed of everything random"),
}
TRAINING = {
    "--name": ("name", str, "name of the run's folder"),
    "--lr": ("optimizer;args;lr", float, "learning rate"),
    "--bs": ("data_loader;args;batch_size", int, "global batch size"),
    "--epochs": ("trainer;epochs", int, "epochs in all"),
    "--step1": ("lr_scheduler;args;step1", int, "epoch of the first step down of the learning rate"),
    "--step2": ("lr_scheduler;args;step2", int, "epoch of the second step down"),
    "--num_experts": ("arch;args;num_experts", int, "number of experts"),
    "--imb_factor": ("data_loader;args;imb_factor", float, "inverse of the imbalance ratio, in (0, 1]"),
    "--save_period": ("trainer;save_period", int, "epochs between checkpoints that are kept"),
    "--save_dir": ("trainer;save_dir", str, "folder of all runs"),
    "--precision": ("trainer;precision", str, "auto (bf16 where the processor is made for it), fp32, bf16 or fp16"),
    "--compile": ("trainer;compile", bool, "compile the network; gains: docs/speed_and_cost.md"),
    **_BOTH,
}
VIEWS = "average logits over image, mirror image, so many random crops; 0: off"
TESTING = {**_BOTH, "--averaged_views": ("averaged_views", int, VIEWS)}


def parse(job: Callable, description: str | None = None, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse a script's command line into its job's arguments. Nothing but the -c file is read.

    Sections of the -c file replace the checkpoint's; flags and `--set` replace single values.

    Args:
        job: what the script does; its signature says which of ARGUMENTS there are. With a `run_id` it trains.
        description: shown by --help.
        arguments: instead of sys.argv.
    """
    parameters = inspect.signature(job).parameters
    flags = TRAINING if "run_id" in parameters else TESTING
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in parameters.items():
        names, options = ARGUMENTS[name]
        if parameter.default is False:
            parser.add_argument(*names, dest=name, action="store_true", **options)
        elif parameter.default is parameter.empty:
            parser.add_argument(*names, dest=name, required=True, **options)
        else:
            parser.add_argument(*names, dest=name, default=parameter.default, **options)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY;PATH=VALUE",
        help='any value of the config, e.g. --set "optimizer;args;lr=0.05"; may be repeated',
    )
    for flag, (path, kind, text) in flags.items():
        if kind is bool:
            parser.add_argument(flag, dest=path, action="store_const", const=True, help=f"{text} ({path})")
        else:
            metavar = kind.__name__.upper()
            parser.add_argument(flag, dest=path, type=kind, metavar=metavar, help=f"{text} ({path})")
    args = vars(parser.parse_args(arguments))
    if not args["config"] and not args.get("resume", args.get("checkpoint")):
        parser.error("give a config with -c, or a checkpoint to go on from with -r")
    config: dict[str, Any] = read_json(args["config"]) if args["config"] else {}
    values = {path: args.pop(path) for path, _, _ in flags.values()}
    config |= {path: value for path, value in values.items() if value is not None}
    config |= map(parse_assignment, args.pop("set"))
    return {**args, "config": config}


def run_script(job: Callable, description: str) -> None:
    """Body of every script: parse, run, and turn errors that are the user's to fix into one sentence and a status.

    Args:
        job: see `parse`.
        description: shown by --help.
    """
    if launcher := os.environ.get(distributed.LAUNCHER):
        distributed.end_with(int(launcher))
    try:
        with distributed.lost_process_named():
            job(**parse(job, description))
            distributed.barrier()  # none leaves while another still needs it
    except UserError as error:
        if distributed.is_main() or not error.shared:
            _report(str(error), error.status)
        distributed.leave(error.status)
    except KeyboardInterrupt:
        distributed.leave(_report("Stopped.", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        distributed.stop()


def _report(message: str, status: int) -> int:
    sys.stderr.write(message + "\n")
    return status
