"""From a command line to checked configs, and from a config to objects: what every script starts with."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import data_loader.data_loaders
import model.loss
import model.metric
import model.model
from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import TrainerOptions
from model.pretrained import read_weights, start_from
from trainer import aggregator, schedule
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.logger import get_logger
from utils.parse_config import ConfigParser, override, parse_assignment, read_json
from utils.torchvision_import import torchvision


def _public(module) -> dict:
    return {name: getattr(module, name) for name in module.__all__}


#: Everything that a config may name, by section.
COMPONENTS = {
    "arch": _public(model.model),
    "data_loader": _public(data_loader.data_loaders),
    "loss": _public(model.loss),
    "metrics": _public(model.metric),
    "optimizer": {c.__name__: c for c in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)},
    "lr_scheduler": _public(schedule),
    "aggregator": _public(aggregator),
    "trainer": TrainerOptions,
}
SUPPLIED = {
    "loss": {"cls_num_list"},
    "optimizer": {"params"},
    "lr_scheduler": {"optimizer"},
    "aggregator": {"num_experts", "make_optimizer"},
}
TRAINING_SECTIONS = ("name", "arch", "data_loader", "optimizer", "loss", "lr_scheduler", "trainer")

TESTING_SECTIONS = ("name", "n_gpu", "seed", "arch", "data_loader", "optimizer", "aggregator")

#: Command-line flags that set one value of the config: flag -> (type, path, help).
OVERRIDES = {
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
    "--precision": (str, "trainer;precision", "fp32, bf16 or fp16"),
    "--n_gpu": (int, "n_gpu", "GPUs to use in one process"),
    "--seed": (int, "seed", "seed of all random draws"),
}


def make_config(config: dict, **options) -> ConfigParser:
    """Check a config given as a dict. Options: resume, device, output, run_id (see ConfigParser)."""
    return ConfigParser(config, COMPONENTS, SUPPLIED, **options)


def parse_command_line(
    description: str,
    arguments: list[str] | None = None,
    *,
    training: bool = False,
    needs_config: bool = False,
    extra: Mapping[str, dict] | None = None,
) -> ConfigParser:
    """Parse and check a script's command line.

    The config is that of the checkpoint (`-r`), if any; sections of the `-c` file replace the checkpoint's; flags and
    `--set` replace single values.

    Args:
        description: shown by --help.
        arguments: instead of sys.argv.
        training: the script trains; otherwise it needs a checkpoint.
        needs_config: the script needs -c as well.
        extra: further flags of this script, "--flag" -> arguments of add_argument; their values are in `options`
            of the result.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, metavar="JSON", required=needs_config, help="config file")
    parser.add_argument(
        "-r",
        "--resume",
        type=Path,
        metavar="CKPT",
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
        parser.add_argument("--compile", action="store_const", const=True, help="run the network through torch.compile")
    else:
        parser.add_argument("-o", "--output", type=Path, help="folder for results (default: beside the checkpoint)")
    for flag, (kind, path, text) in OVERRIDES.items():
        if training or path in ("seed", "n_gpu"):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=f"{text} ({path})")
    for flag, settings in (extra or {}).items():
        parser.add_argument(flag, **settings)
    args = parser.parse_args(arguments)
    if not args.config and not args.resume:
        parser.error("give a config with -c, or a checkpoint to go on from with -r")

    config = _config_of_checkpoint(args.resume, training, args.config is not None) if args.resume else {}
    if args.config:
        config |= read_json(args.config)
    if not config:
        raise UserError(f"{args.resume} carries no config: give the one it was trained with, -c CONFIG.")
    for flag, (_, path, _) in OVERRIDES.items():
        value = getattr(args, flag.removeprefix("--"), None)
        if value is not None:
            override(config, path, value)
    if getattr(args, "compile", None):
        override(config, "trainer;compile", True)
    for text in args.assignments:
        override(config, *parse_assignment(text))
    checked = make_config(
        config,
        resume=args.resume,
        device=args.device,
        output=getattr(args, "output", None),
        run_id=getattr(args, "run_id", None),
    )
    checked.options = {flag.strip("-"): getattr(args, flag.strip("-")) for flag in extra or {}}
    return checked


def _config_of_checkpoint(path: Path, training: bool, has_own: bool) -> dict:
    """The sections of a checkpoint's config that this job needs.

    A reference's config may hold what is not known here; beside a config of one's own, only its network counts.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config") or {}
    if "format" not in checkpoint and has_own:
        return {key: config[key] for key in ("arch",) if key in config}
    return config if training else {key: value for key, value in config.items() if key in TESTING_SECTIONS}


def run_script(main: Callable[[ConfigParser], dict], description: str, **options) -> None:
    """Body of every script: parse, run, and turn errors that are the user's to mend into one sentence and a status."""
    try:
        main(parse_command_line(description, **options))
        distributed.wait_for_all()  # none leaves while another still needs it
    except UserError as error:
        sys.exit(_report(str(error), error.status))
    except KeyboardInterrupt:
        sys.exit(_report("Stopped.", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        distributed.stop()


def _report(message: str, status: int) -> int:
    sys.stderr.write(message + "\n")
    return status


def build_loader(config: ConfigParser, device: torch.device) -> BaseDataLoader:
    loader = config.build("data_loader")
    loader.prepare(device, config.get("seed", 1), distributed.rank(), distributed.world_size())
    return loader


TORCHVISION_NAMES = {
    "ResNet50Model": "resnet50",
    "ResNet101Model": "resnet101",
    "ResNet152Model": "resnet152",
    "ResNeXt50Model": "resnext50_32x4d",
}


def load_start_weights(config: ConfigParser, network: BaseModel) -> None:
    """Fill the network from what `weights` in the config names: a file, or "torchvision" (ImageNet; downloaded).

    Raises:
        UserError: the weights are missing or do not fit.
    """
    source = config["weights"]
    if source == "torchvision":
        arch = config["arch"]["type"]
        if arch not in TORCHVISION_NAMES:
            raise UserError(
                f'"weights": "torchvision" is there for {", ".join(TORCHVISION_NAMES)}, not for {arch}: '
                "leave it out, or give the path of a file."
            )
        try:
            plain = torchvision().models.get_model(TORCHVISION_NAMES[arch], weights="IMAGENET1K_V1").state_dict()
        except OSError as error:
            raise UserError(
                f"torchvision's weights for {arch} could not be downloaded ({error}): try again, or leave "
                '"weights" out.'
            ) from error
    else:
        plain = read_weights(source)
    filled = start_from(network, plain, source)
    get_logger().info(f"{len(filled)} entries start from {source}; the classifiers are fresh.")


def parameter_groups(config: ConfigParser, network: BaseModel) -> list[dict]:
    """Parameters for the optimizer: one group, or with `optimizer.share_lr` the classifiers and all else apart.

    The classifiers train at `lr`, the rest at `share_lr`.
    """
    share_lr = config["optimizer"].get("share_lr")
    if share_lr is None:
        return [{"params": list(network.parameters())}]
    heads = network.classifier_names()
    return [
        {"params": [p for n, p in network.named_parameters() if n in heads]},
        {"params": [p for n, p in network.named_parameters() if n not in heads], "lr": share_lr},
    ]


def check_schedule(config: ConfigParser) -> None:
    """Step the schedule once on nothing: some refuse their arguments only then, after a whole epoch.

    Raises:
        UserError: the schedule refuses its arguments.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = config.build("lr_scheduler", optimizer)
    optimizer.step()
    try:
        scheduler.step()
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f'Config section "lr_scheduler" ({type(scheduler).__name__}): {error}.') from error


def build_model(config: ConfigParser, num_classes: int, device: torch.device) -> BaseModel:
    """The network of the config, on the device.

    Raises:
        UserError: it has another number of classes than the data.
    """
    network = config.build("arch")
    if network.num_classes != num_classes:
        raise UserError(
            f"arch;args;num_classes is {network.num_classes} and the data has {num_classes} classes: "
            f'set it to {num_classes}, e.g. --set "arch;args;num_classes={num_classes}".'
        )
    get_logger().info(f"{network}, on {device}")
    return network.to(device)
