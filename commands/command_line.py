"""A script's command line: the arguments that its job takes, parsed once."""

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

TRAINING, TESTING, BOTH = {"train"}, {"test"}, {"train", "test"}

#: Flags that set one value of the config: flag -> (type, path, help, scripts that have it).
FLAGS = {
    "--name": (str, "name", "name of the run's folder", TRAINING),
    "--lr": (float, "optimizer;args;lr", "learning rate", TRAINING),
    "--bs": (int, "data_loader;args;batch_size", "global batch size", TRAINING),
    "--epochs": (int, "trainer;epochs", "epochs in all", TRAINING),
    "--step1": (int, "lr_scheduler;args;step1", "epoch of the first step down of the learning rate", TRAINING),
    "--step2": (int, "lr_scheduler;args;step2", "epoch of the second step down", TRAINING),
    "--num_experts": (int, "arch;args;num_experts", "number of experts", TRAINING),
    "--imb_factor": (float, "data_loader;args;imb_factor", "inverse of the imbalance ratio, in (0, 1]", TRAINING),
    "--save_period": (int, "trainer;save_period", "epochs between checkpoints that are kept", TRAINING),
    "--save_dir": (str, "trainer;save_dir", "folder of all runs", TRAINING),
    "--precision": (
        str,
        "trainer;precision",
        "auto (bf16 where the processor is made for it), fp32, bf16 or fp16",
        TRAINING,
    ),
    "--n_gpu": (int, "n_gpu", "GPUs to use in one process", BOTH),
    "--seed": (int, "seed", "seed of everything random", BOTH),
    "--averaged_views": (
        int,
        "averaged_views",
        "average logits over image, mirror image, so many random crops; 0: off",
        TESTING,
    ),
}

#: Parameter of a job -> names and options of its argument. A parameter without a default is required.
ARGUMENTS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "device": (
        ("-d", "--device"),
        {"help": "cpu, cuda, cuda:1, or GPU numbers such as 0,1 (default: CUDA if present)"},
    ),
    "run_id": (("--run_id",), {"help": "name of this run's folder (default: date and time)"}),
    "allow_changes": (("--allow_changes",), {"help": "with -r: go on even with other data, seed, loss, ..."}),
    "output": (("-o", "--output"), {"type": Path, "help": "folder for results (default: beside the checkpoint)"}),
    "stream": (("--stream",), {"help": "images arrive in batches, each predicted at once"}),
    "stream_batch": (("--stream_batch",), {"type": int, "help": "images that arrive together (default: %(default)s)"}),
    "prior": (
        ("--prior",),
        {
            "help": "a known test prior: a JSON, CSV or text file of classes and their counts or shares, "
            "CLASS=NUMBER,..., uniform or training"
        },
    ),
    "calibrate_on_test": (
        ("--calibrate_on_test",),
        {
            "type": int,
            "metavar": "N",
            "help": "calibrate on N labeled test images a class, and leave them out of every figure",
        },
    ),
    "labeled": (
        ("--images",),
        {
            "type": Path,
            "metavar": "LIST",
            "help": 'labeled images that were not trained on: a file of "path label" lines, or a folder of class '
            "folders (default: the held-out validation images of the data)",
        },
    ),
    "formats": (("--formats",), {"nargs": "+", "choices": EXPORTED, "help": "what to write (default: all)"}),
    "images": (("--images",), {"type": Path, "metavar": "FOLDER", "help": "images, at any depth"}),
    "top_k": (
        ("--top_k",),
        {"type": int, "metavar": "N", "help": "likeliest classes of every image (default: %(default)s)"},
    ),
    "file_format": (
        ("--format",),
        {"choices": FORMATS, "help": "of the tables (default: %(default)s; parquet: pyarrow)"},
    ),
    "watch": (
        ("--watch",),
        {
            "help": "go on with images that appear in the folder, in batches of --stream_batch at most, until Ctrl-C "
            "or SIGTERM"
        },
    ),
    "poll": (
        ("--poll",),
        {"type": float, "metavar": "SECONDS", "help": "with --watch: between looks (default: 2)"},
    ),
    "state": (
        ("--state",),
        {
            "type": Path,
            "metavar": "FILE",
            "help": "keeps what was learned for the next run (default: none; with --watch: stream.state in the output "
            "folder)",
        },
    ),
}


def parse(job: Callable, description: str = "", arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse a script's command line. Nothing but the -c file is read.

    Sections of the -c file replace the checkpoint's; flags and `--set` replace single values.

    Args:
        job: what the script does; its signature says which arguments there are.
        description: shown by --help.
        arguments: instead of sys.argv.

    Returns:
        The job's arguments.
    """
    parameters = inspect.signature(job).parameters
    training = "run_id" in parameters
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = parameters["config"].default is inspect.Parameter.empty
    parser.add_argument("-c", "--config", type=Path, metavar="JSON", required=needed, help="config file")
    parser.add_argument(
        "-r",
        "--resume",
        type=Path,
        metavar="CKPT",
        dest="checkpoint",
        required=not training,
        help="checkpoint to go on from" if training else "checkpoint to evaluate",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY;PATH=VALUE",
        dest="assignments",
        help='any value of the config, e.g. --set "optimizer;args;lr=0.05"; may be repeated',
    )
    for name, parameter in parameters.items():
        if name in ARGUMENTS:
            names, options = ARGUMENTS[name]
            required = parameter.default is parameter.empty
            kind = {"action": "store_true"} if parameter.default is False else {"required": required}
            parser.add_argument(*names, dest=name, default=None if required else parameter.default, **kind, **options)
    if training:
        parser.add_argument("--compile", action="store_true", help="compile the network; gains: docs/speed_and_cost.md")
    flags = {flag: entry for flag, entry in FLAGS.items() if ("train" if training else "test") in entry[3]}
    for flag, (kind, path, text, _) in flags.items():
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{text} ({path})")
    args = vars(parser.parse_args(arguments))
    if not args["config"] and not args["checkpoint"]:
        parser.error("give a config with -c, or a checkpoint to go on from with -r")

    config: dict[str, object] = read_json(args["config"]) if args["config"] else {}
    for flag, (_, path, _, _) in flags.items():
        value = args[flag.removeprefix("--")]
        if value is not None:
            config[path] = value
    if args.get("compile"):
        config["trainer;compile"] = True
    config |= dict(map(parse_assignment, args["assignments"]))
    return {**{name: args[name] for name in parameters if name in args}, "config": config}


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
