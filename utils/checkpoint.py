"""Checkpoints: tensors and plain containers only, written whole or not at all, read without running anything.

`python -m commands.convert_checkpoint` says what is in one, and converts it.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import write_atomically
from utils.torch_file import Damaged, Foreign, read_torch_file

FORMAT = 1


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint aside, flush it to the disk, then rename it, so that `path` is always whole.

    Raises:
        UserError: the disk is full or the folder cannot be written; what stood at `path` before still does.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of this project, of the published reference, or a bare state dict.

    Returns:
        A dict with at least "model" (state dict on the CPU, without the `module.` prefix that multi-GPU training
        leaves) and "epoch" (int or None); of this project's own also "format", "config", "cls_num_list",
        "optimizer", ...; of others "foreign", the names in it that were not resolved.

    Raises:
        UserError: the file is missing, truncated, or not a checkpoint.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, never an exception
        near = sorted(str(p) for p in path.parent.glob("*.pth")) if os.path.isdir(path.parent) else []
        hint = f" There are: {', '.join(near)}." if near else ""
        raise UserError(f"There is no checkpoint {path}: give the path of a .pth file with -r.{hint}")
    try:
        content, foreign = read_torch_file(path)
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read ({error.strerror}): mend that first.") from error
    except Damaged as error:
        raise _not_whole(path, str(error)) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no checkpoint (a {type(content).__name__}): give a file that train.py wrote.")
    content = _entries(content, path)
    check_finite(content["model"], path)
    return content if "format" in content else {**content, "foreign": sorted(foreign)}


def whole_epochs(checkpoint: Mapping) -> int:
    """Epochs that a checkpoint has whole: one that was saved in an epoch has those before it."""
    return (checkpoint["epoch"] or 0) - bool(checkpoint.get("mid_epoch"))


def position(checkpoint: Mapping) -> str:
    """When a checkpoint was saved: "3" is after epoch 3, "3, step 12 of 40" in it."""
    if progress := checkpoint.get("mid_epoch"):
        return f"{checkpoint['epoch']}, step {progress['step']} of {progress['steps']}"
    return str(checkpoint.get("epoch"))


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: torch.nn.Module, state: dict, path: str | Path) -> None:
    """Load a state dict by name, strictly.

    Raises:
        UserError: the checkpoint belongs to another architecture or number of classes; says which entry differs.
    """
    own = model.state_dict()
    where = f"The checkpoint {path} does not fit the architecture of the config"
    advice = "use the config it was trained with, or leave -c out."
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        parts = [f"it lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
        parts += [f"it has {surplus[0]} (and {len(surplus) - 1} more) too many"] if surplus else []
        raise UserError(f"{where}: {' and '.join(parts)}; {advice}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{where}: {name} is {list(state[name].shape)} there and {list(tensor.shape)} here "
                f"(another width or number of classes); {advice}"
            )
    model.load_state_dict(state)


def check_finite(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raise UserError where a weight or a buffer is infinite or not a number; integers always are."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
            raise UserError(
                f"{path} is damaged or comes from a training that failed: {name} is infinite or not a number; give an "
                "earlier checkpoint (its folder may hold model_best.pth or checkpoint-epoch*.pth)."
            )


def _json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _json(part) for key, part in value.items())
    return all(map(_json, value)) if isinstance(value, list | tuple) else isinstance(value, str | int | float | None)


def _weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a type, a check, a list of one kind, or a dict of them; other keys are free."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(part, kind[0]) for part in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), part) for name, part in kind.items())
    if kind is int:
        return type(value) is int and 0 <= value <= 2**62
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    if kind is str:
        return isinstance(value, str) and len(value) < 10_000
    return isinstance(value, kind) if isinstance(kind, type) else kind(value)


PROCESS = {"random": dict, "sums": torch.Tensor, "mixup": torch.Tensor, "skipped": int}
MID_EPOCH = {"step": int, "steps": int, "seconds": float, "processes": [PROCESS]}

#: What a checkpoint's entries are; each may also be None.
ENTRIES: dict[str, Any] = {
    "format": int,
    "config": lambda value: isinstance(value, dict) and _json(value),
    "epoch": int,
    "cls_num_list": [int],
    "class_map": [int],
    "class_names": [str],
    "fingerprint": lambda value: isinstance(value, dict) and _json(value),
    "seed": int,
    "selected_by": str,
    "device": str,
    "precision": lambda value: value in ("fp32", "bf16", "fp16"),
    "best": float,
    "best_epoch": int,
    "checks_since_best": int,
    "seconds": float,
    "optimizer": dict,
    "scheduler": {"last_epoch": int},
    "scaler": dict,
    "random": dict,
    "random_of_processes": [dict],
    "mid_epoch": lambda value: _fits(value, MID_EPOCH) and 0 < value["step"] <= value["steps"] and value["processes"],
    "ema": _weights,
}


def _entries(content: dict, path: Path) -> dict:
    """The checked entries of a checkpoint; of another project's those that mean the same here."""
    state = content.get("model", content.get("state_dict", content))  # the reference's, or a bare state dict
    if not state or not _weights(state):
        raise UserError(f"{path} holds no network weights: give a file that train.py wrote.")
    if 4 * path.stat().st_size < sum(tensor.nbytes for tensor in state.values()):
        raise _not_whole(path, "its weights are larger than the file")
    model = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "format" in content:
        for name, pattern in ENTRIES.items():
            if content.get(name) is not None and not _fits(content[name], pattern):
                raise _not_whole(path, f'its "{name}" is not what train.py writes')
        return {**content, "model": model}
    found = {"best": content.get("monitor_best"), **content, "config": _foreign_config(content.get("config"))}
    known = {name: found[name] for name, pattern in ENTRIES.items() if name in found and _fits(found[name], pattern)}
    return {"epoch": None, "config": None, **known, "model": model}


def _not_whole(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is truncated or not a checkpoint ({reason}): give another one (its folder may hold last.pth, "
        "model_best.pth or checkpoint-epoch*.pth), or train again."
    )


def _foreign_config(config: Any) -> dict | None:
    """The plain dict inside the reference's pickled config object, if there is one."""
    if isinstance(config, Foreign) and isinstance(config.state, dict):
        config = config.state.get("_config") or config.state.get("config")
    if not isinstance(config, dict):
        return None
    return json.loads(json.dumps(config, default=lambda value: None, skipkeys=True))
