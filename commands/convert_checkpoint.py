"""What is in a checkpoint, and the same in another format.

python -m commands.convert_checkpoint inspect FILE.pth                  what is in it, whoever wrote it
python -m commands.convert_checkpoint convert IN.pth OUT.pth            the reference's or RIDE's -> ours, or back
python -m commands.convert_checkpoint convert IN.pth OUT.pth --to tade  weights and description alone, to share
python -m commands.convert_checkpoint convert IN.pth OUT.pth --ema      the same with the moving average of the weights
"""

import argparse
import io
import sys
from pathlib import Path

import torch

from model.backbones.multi_expert import experts_in
from trainer.build import SizeLimit
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, load_weights, position, save_checkpoint, sha256
from utils.errors import UserError, printable
from utils.files import write_atomically
from utils.parse_config import read_json
from utils.reference_config import from_reference

LONGEST_LINE = 480  # characters: four lines of a wide terminal


def describe(path: Path) -> str:
    """What is in a checkpoint, a line each; nothing of it is run.

    Raises:
        UserError: see load_checkpoint.
    """
    content = load_checkpoint(path)
    state, config, counts = content["model"], content.get("config") or {}, content.get("cls_num_list")
    writer = "this project" if "format" in content else "the reference or RIDE, or a bare state dict"
    arch, loss = (config.get(key) if isinstance(config.get(key), dict) else {} for key in ("arch", "loss"))
    weights = sum(t.numel() for name, t in state.items() if t.is_floating_point() and "running_" not in name)
    lines = {
        "written by": writer,
        "SHA-256": sha256(path),
        "size": f"{path.stat().st_size / 1e6:.2f} MB",
        "epoch": position(content) if content.get("epoch") is not None else None,
        "selected as": content.get("selected_by"),
        "best value": content.get("best"),
        "name": config.get("name"),
        "network": f"{arch['type']} {arch.get('args', {})}" if "type" in arch else None,
        "loss": loss.get("type"),
        "weights": f"{weights:,} in {len(state)} entries, {', '.join(sorted({str(t.dtype) for t in state.values()}))}",
        "experts": experts_in(state),
        "trained on": counts and f"{sum(counts)} images, {len(counts)} classes, {max(counts)} to {min(counts)} each",
        "average": "of the weights as well (convert --ema)" if content.get("ema") else None,
        "can be resumed": "yes" if "optimizer" in content and "format" in content else "no, weights alone",
        "not resolved": ", ".join(content.get("foreign", [])) or None,
    }
    shown = {key: printable(str(value)) for key, value in lines.items() if value is not None}
    return "\n".join(
        f"{key + ':':<16}{text[:LONGEST_LINE]}{' ...' * (len(text) > LONGEST_LINE)}" for key, text in shown.items()
    )


def convert(
    source: Path, target: Path, to: str | None = None, config_path: Path | None = None, ema: bool = False
) -> str:
    """Write the weights and description of a checkpoint in another format; optimizer states are left out.

    Args:
        source: checkpoint of this project, the reference or RIDE, or a bare state dict.
        target: file to write.
        to: "tade" (this project's format), "reference", or None for the other one.
        config_path: config that names the network, where the checkpoint carries none that is understood. RIDE's expert
            assignment, which networks here do not have, is left out.
        ema: write the moving average of the weights (trainer;ema_decay) in the place of the last ones.

    Returns:
        What was written.

    Raises:
        UserError: the source cannot be read, the target exists, or the weights do not fit the network.
    """
    if target.exists():
        raise UserError(f"{target} exists already: give another name, or remove it first.")
    content = load_checkpoint(source)
    to = to or ("reference" if "format" in content and not ema else "tade")
    if ema:
        if not content.get("ema"):
            raise UserError(f"{source} has no moving average of the weights: leave --ema out.")
        content["model"] = content["ema"]
        content["selected_by"] = f"moving average of the weights, {content.get('selected_by')}"
    config, _ = from_reference(read_json(config_path) if config_path else content.get("config") or {})
    state, note = content["model"], "The network was not checked: the checkpoint names none; give one with -c."
    if "arch" in config:
        with SizeLimit(state):
            network = read_config({"arch": config["arch"]}).build("arch")
        surplus = sorted(name for name in state if "expert_help_pred" in name)  # RIDE's expert assignment
        state = {name: tensor for name, tensor in state.items() if name not in surplus}
        load_weights(network, state, source)
        note = f"Fits {config['arch']['type']}." + (f" Left out: {', '.join(surplus)}." if surplus else "")
    if to == "tade":
        kept = "epoch best cls_num_list class_map class_names fingerprint seed selected_by seconds".split()
        description = {key: content[key] for key in kept if key in content}
        save_checkpoint(target, {"model": state, "config": config or None, **description})
    else:
        description = {"arch": config.get("arch", {}).get("type"), "epoch": content.get("epoch"), "config": config}
        buffer = io.BytesIO()
        torch.save({**description, "monitor_best": content.get("best"), "state_dict": state}, buffer)
        write_atomically(target, buffer.getbuffer())
    return f"{note} Written in {'this project' if to == 'tade' else 'the reference'}'s format: {target}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="say what is in a checkpoint without running anything of it")
    inspecting.add_argument("file", type=Path)
    converting = commands.add_parser("convert", help="write weights and description in another format")
    converting.add_argument("source", type=Path, metavar="IN")
    converting.add_argument("target", type=Path, metavar="OUT")
    converting.add_argument("--to", choices=("tade", "reference"), help="format to write (default: the other one)")
    converting.add_argument(
        "-c", "--config", type=Path, metavar="JSON", help="config of the network, where the checkpoint carries none"
    )
    converting.add_argument("--ema", action="store_true", help="the moving average of the weights, for evaluation")
    args = parser.parse_args(arguments)
    if args.command == "inspect":
        print(describe(args.file))
    else:
        print(convert(args.source, args.target, args.to, args.config, args.ema))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
