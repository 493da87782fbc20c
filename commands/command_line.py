"""A script's command line, parsed once, as plain options."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.export import FORMATS as EXPORTED
from deploy.prediction_files import FORMATS
from evaluation.adaptation import STREAM_BATCH
from utils import distributed
from utils.errors import UserError
from utils.parse_config import parse_assignment, read_json

#: Flags that set one value of the config: flag -> (type, path, help).
FLAGS = {
    "--name": (str, "name", "name of the run's folder"),
    "--lr": (float, "optimizer;args;lr", "learning rate"),
    "--bs": (int, "data_loader;args;batch_size", "global batch size"),
    "--epochs": (int, "trainer;epochs", "epochs in all"),
    "--step1": (int, "lr_scheduler;args;step1", "epoch of the first step down of the learning rate"),
    "--step2": (int, "lr_scheduler;args;step2", "epoch of the second step down"),
    "--num_experts": (int, "arch;args;num_experts", "number of experts"),
    "--imb_factor": (float, "data_loader;args;imb_factor", "inverse of the imbalance ratio, in (0, 1]"),
    "--save_period": (int, "trainer;save_period", "epochs between checkpoints that are kept"),
    "--save_dir": (str, "trainer;save_dir", "folder of all runs"),
    "--precision": (
        str,
        "trainer;precision",
        "auto (bf16 where the processor is made for it), fp32, bf16 or fp16",
    ),
    "--n_gpu": (int, "n_gpu", "GPUs to use in one process"),
    "--seed": (int, "seed", "seed of everything random"),
    "--averaged_views": (
        int,
        "averaged_views",
        "average logits over image, mirror image, so many random crops; 0: off",
    ),
}
TESTING_ONLY = ("averaged_views",)  # what flags of the scripts that test can set, and those of train.py cannot
TESTING = ("seed", "n_gpu", *TESTING_ONLY)  # all that flags of the scripts that test can set


@dataclass(frozen=True)
class Options:
    """What a script was asked for.

    Args:
        config: sections of the -c file, and single values by path: what is to change in the checkpoint's config, or
            where there is no checkpoint the whole of it.
        checkpoint: to go on from, or to evaluate.
        device: see trainer.devices.choose_device.
        run_id: name of a training run's folder, or None for date and time.
        allow_changes: a resumed run may go on with other data or another training than before.
        output: folder for results, or None for one beside the checkpoint.
        stream: images arrive in batches of `stream_batch`.
        images: folder of images to predict; or the labeled images to calibrate on, a list file or a folder.
        prior: a known test prior, see evaluation.given_prior.read_prior.
        top_k: likeliest classes to write of every image.
        format: of the tables of predictions, see deploy.prediction_files.FORMATS.
        state: file that keeps what was learned of a stream from one run to the next.
        watch: predict images that appear in the folder, until told to stop.
        poll: seconds between two looks at the folder.
        formats: to export to, see deploy.export.FORMATS.
        calibrate_on_test: labeled test images a class to calibrate on and to leave out; 0 for none.
    """

    config: Mapping[str, object] = field(default_factory=dict)
    checkpoint: Path | None = None
    device: str | None = None
    run_id: str | None = None
    allow_changes: bool = False
    output: Path | None = None
    stream: bool = False
    stream_batch: int = STREAM_BATCH
    images: Path | None = None
    prior: str | None = None
    top_k: int = 5
    format: str = "csv"
    state: Path | None = None
    watch: bool = False
    poll: float = 2.0
    formats: list[str] = field(default_factory=lambda: list(EXPORTED))
    calibrate_on_test: int = 0


def parse(
    description: str,
    arguments: list[str] | None = None,
    *,
    training: bool = False,
    adapting: bool = False,
    predicting: bool = False,
    calibrating: bool = False,
    exporting: bool = False,
) -> Options:
    """Parse a script's command line. Nothing but the -c file is read.

    Sections of the -c file replace the checkpoint's; flags and `--set` replace single values.

    Args:
        description: shown by --help.
        arguments: instead of sys.argv.
        training: the script trains; otherwise it needs a checkpoint.
        adapting: the script adapts to test images; it needs -c as well, unless it predicts.
        predicting: the script asks for a folder of images.
        calibrating: the script fits a calibration, which goes beside the checkpoint.
        exporting: the script writes the network in other formats.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = adapting and not predicting
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
        "-d", "--device", help="cpu, cuda, cuda:1, or GPU numbers such as 0,1 (default: CUDA if present)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY;PATH=VALUE",
        dest="assignments",
        help='any value of the config, e.g. --set "optimizer;args;lr=0.05"; may be repeated',
    )
    if training:
        parser.add_argument("--run_id", help="name of this run's folder (default: date and time)")
        parser.add_argument(
            "--allow_changes", action="store_true", help="with -r: go on even with other data, seed, loss, ..."
        )
        parser.add_argument("--compile", action="store_true", help="compile the network; gains: docs/speed_and_cost.md")
    elif not calibrating:
        parser.add_argument("-o", "--output", type=Path, help="folder for results (default: beside the checkpoint)")
    if adapting:
        parser.add_argument("--stream", action="store_true", help="images arrive in batches, each predicted at once")
        parser.add_argument(
            "--stream_batch", type=int, default=STREAM_BATCH, help="images that arrive together (default: %(default)s)"
        )
        parser.add_argument(
            "--prior",
            help="a known test prior: a JSON, CSV or text file of classes and their counts or shares, "
            "CLASS=NUMBER,..., uniform or training",
        )
    if adapting and not predicting:
        parser.add_argument(
            "--calibrate_on_test",
            type=int,
            default=0,
            metavar="N",
            help="calibrate on N labeled test images a class, and leave them out of every figure",
        )
    if calibrating:
        parser.add_argument(
            "--images",
            type=Path,
            metavar="LIST",
            help='labeled images that were not trained on: a file of "path label" lines, or a folder of class folders '
            "(default: the held-out validation images of the data)",
        )
    if exporting:
        parser.add_argument(
            "--formats", nargs="+", choices=EXPORTED, default=list(EXPORTED), help="what to write (default: all)"
        )
    if predicting:
        parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="images, at any depth")
        parser.add_argument(
            "--top_k", type=int, default=5, metavar="N", help="likeliest classes of every image (default: %(default)s)"
        )
        parser.add_argument(
            "--format", choices=FORMATS, default="csv", help="of the tables (default: %(default)s; parquet: pyarrow)"
        )
        parser.add_argument(
            "--watch",
            action="store_true",
            help="go on with images that appear in the folder, in batches of --stream_batch at most, until Ctrl-C or "
            "SIGTERM",
        )
        parser.add_argument(
            "--poll", type=float, default=2.0, metavar="SECONDS", help="with --watch: between looks (default: 2)"
        )
        parser.add_argument(
            "--state",
            type=Path,
            metavar="FILE",
            help="keeps what was learned for the next run (default: none; with --watch: stream.state in the output "
            "folder)",
        )
    for flag, (kind, path, text) in FLAGS.items():
        if path not in TESTING_ONLY if training else path in TESTING:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{text} ({path})")
    args = vars(parser.parse_args(arguments))
    if not args["config"] and not args["checkpoint"]:
        parser.error("give a config with -c, or a checkpoint to go on from with -r")

    config: dict[str, object] = read_json(args["config"]) if args["config"] else {}
    for flag, (_, path, _) in FLAGS.items():
        value = args.get(flag.removeprefix("--"))
        if value is not None:
            config[path] = value
    if args.get("compile"):
        config["trainer;compile"] = True
    for text in args["assignments"]:
        path, value = parse_assignment(text)
        config[path] = value
    return Options(config, **{key: args[key] for key in vars(Options()) if key != "config" and key in args})


def run_script(main: Callable[[Options], object], description: str, **kinds: bool) -> None:
    """Body of every script: parse, run, and turn errors that are the user's to mend into one sentence and a status.

    Args:
        main: what the script does.
        description: shown by --help.
        kinds: training, adapting, predicting, calibrating, exporting; see `parse`.
    """
    if launcher := os.environ.get(distributed.LAUNCHER):
        distributed.end_with(int(launcher))
    try:
        with distributed.lost_process_named():
            main(parse(description, **kinds))
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
