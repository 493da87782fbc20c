"""Checkpoints: tensors and plain containers only, written whole or not at all, read without running anything.

`python -m commands.convert_checkpoint` says what is in one, and converts it.
"""

import contextlib
import hashlib
import io
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from utils.errors import UserError
from utils.torch_file import Damaged, Foreign, read_torch_file

FORMAT = 1

#: What no checkpoint's containers come near.
DEEPEST, MOST_VALUES = 64, 300_000

#: Seconds after which a half-written file belongs to no living process.
LEFT_BEHIND = 3600


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint aside, flush it to the disk, then rename it, so that `path` is always whole.

    Raises:
        UserError: the disk is full or the folder cannot be written; what stood at `path` before still does.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace a file by new content, or leave it as it was.

    Raises:
        UserError: the write failed, with the system's reason.
    """
    write_together(path.parent, {path.name: data})


def write_together(folder: Path, contents: Mapping[str, bytes | memoryview | None]) -> None:
    """Replace several files of a folder, so that whoever finds the last of them finds all of the same time.

    All are written aside first, under random names; then the last of the old ones is removed, and the new ones take
    their places in order.

    Args:
        folder: exists.
        contents: name -> content; None removes the file.

    Raises:
        UserError: a write failed, with the system's reason.
    """
    remove_leftovers(folder, contents)
    *_, last = contents
    target = folder / last
    asides: dict[str, Path] = {}
    try:
        for name, data in contents.items():
            if data is not None:
                aside = folder / f".{name}.{secrets.token_hex(8)}.tmp"
                target = folder / name
                with open(aside, "xb") as file:  # never through a link that is there already
                    asides[name] = aside
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        if len(contents) > 1:
            (folder / last).unlink(missing_ok=True)
        for name in contents:
            target = folder / name
            if name in asides:
                os.replace(asides[name], target)
            else:
                target.unlink(missing_ok=True)
    except OSError as error:
        kept = f"the earlier {target.name} there is untouched" if target.exists() else "nothing was written"
        needed = sum(len(data) for data in contents.values() if data is not None)
        raise UserError(
            f"Could not save {target} ({error.strerror or error}; {needed / 1e6:.1f} MB were needed): "
            f"{kept}; make room or choose another folder."
        ) from error
    finally:
        for aside in asides.values():
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what a process that was killed while writing one of these files left beside it, an hour ago or more."""
    own = "|".join(map(re.escape, names))
    for entry in os.scandir(folder) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if re.fullmatch(rf"\.({own})\.[0-9a-f]{{16}}\.tmp", entry.name):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_BEHIND:
                    os.unlink(entry)


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
    check_plain(content, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no checkpoint (a {type(content).__name__}): give a file that train.py wrote.")
    content = _normalize(content, path)
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


def check_plain(content: object, path: str | Path) -> None:
    """Raise UserError where containers are nested without end or hold more than any checkpoint does.

    Lists that share their parts can be small in a file and endless to walk: every visit counts.
    """
    visits = 0
    waiting = [(content, 0)]
    while waiting:
        item, depth = waiting.pop()
        visits += 1
        if depth > DEEPEST or visits > MOST_VALUES:
            raise _not_whole(Path(path), "its lists are nested without end")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for part in (*item.keys(), *item.values())]
        elif isinstance(item, (list, tuple, set)):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, Foreign):
            waiting.append((item.state, depth + 1))


def check_finite(state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Raise UserError where a weight or a buffer is infinite or not a number; integers always are."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
            raise UserError(
                f"{path} is damaged or comes from a training that failed: {name} is infinite or not a number; give an "
                "earlier checkpoint (its folder may hold model_best.pth or checkpoint-epoch*.pth)."
            )


def _whole(least: int = 0, most: int = 2**62) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _list_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _optimizer(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(isinstance(entry, dict) for entry in value["state"].values())
        and _list_of(lambda group: isinstance(group, dict) and isinstance(group.get("params"), list))(
            value.get("param_groups")
        )
    )


def _random(value: object) -> bool:
    def state(part: object) -> bool:
        return isinstance(part, torch.Tensor) and part.dtype == torch.uint8 and part.dim() == 1

    return isinstance(value, dict) and state(value.get("torch")) and _list_of(state)(value.get("cuda", []))


def _mid_epoch(value: object) -> bool:
    def own(part: object) -> bool:
        return (
            isinstance(part, dict)
            and _random(part.get("random"))
            and all(isinstance(part.get(name), torch.Tensor) for name in ("sums", "mixup"))
            and part["sums"].shape == (3,)
            and _whole()(part.get("skipped"))
        )

    return (
        isinstance(value, dict)
        and _whole(1)(value.get("step"))
        and _whole(value["step"])(value.get("steps"))
        and _number(value.get("seconds"))
        and _list_of(own)(value.get("processes"))
        and bool(value["processes"])
    )


def _weights(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) < 10_000


def _table(value: object) -> bool:
    return isinstance(value, dict)


def _json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _json(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_json, value))
    return isinstance(value, (str, int, float, type(None)))


#: What a checkpoint's entries are; each may also be None.
ENTRIES: dict[str, Callable[[object], bool]] = {
    "format": _whole(),
    "config": lambda value: isinstance(value, dict) and _json(value),
    "epoch": _whole(),
    "cls_num_list": _list_of(_whole()),
    "class_map": _list_of(_whole()),
    "class_names": _list_of(_text),
    "fingerprint": lambda value: isinstance(value, dict) and _json(value),
    "seed": _whole(),
    "selected_by": _text,
    "device": _text,
    "precision": lambda value: value in ("fp32", "bf16", "fp16"),
    "best": _number,
    "best_epoch": _whole(),
    "checks_since_best": _whole(),
    "seconds": lambda value: _number(value) and value >= 0,  # type: ignore[operator]
    "optimizer": _optimizer,
    "scheduler": lambda value: isinstance(value, dict) and _whole()(value.get("last_epoch")),
    "scaler": _table,
    "random": _random,
    "random_of_processes": _list_of(_random),
    "mid_epoch": _mid_epoch,
    "ema": _weights,
}


def _normalize(content: dict, path: Path) -> dict:
    if "model" not in content:  # the reference calls it state_dict; a bare state dict has neither
        state = content.get("state_dict", content)
        best = content.get("monitor_best")
        content = {
            "model": state,
            "epoch": content.get("epoch"),
            "config": _foreign_config(content.get("config")),
            "best": float(best) if _number(best) else None,
        }
    state = content["model"]
    names_and_tensors = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    )
    if not names_and_tensors or not state:
        raise UserError(f"{path} holds no network weights: give a file that train.py wrote.")
    for name, check in ENTRIES.items():
        if content.get(name) is not None and not check(content[name]):
            if "format" in content or name in ("config", "epoch", "cls_num_list"):
                raise _not_whole(path, f'its "{name}" is not what train.py writes')
            del content[name]  # a stranger's, who means something else by it
    content["model"] = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if 4 * path.stat().st_size < sum(tensor.nbytes for tensor in content["model"].values()):
        raise _not_whole(path, "its weights are larger than the file")
    return content


def _not_whole(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is truncated or not a checkpoint ({reason}): give another one (its folder may hold last.pth, "
        "model_best.pth or checkpoint-epoch*.pth), or train again."
    )


def _foreign_config(config: object) -> dict | None:
    """The plain dict inside the reference's pickled config object, if there is one."""
    if isinstance(config, Foreign) and isinstance(config.state, dict):
        config = next((v for k, v in config.state.items() if k in ("_config", "config")), None)
    if not isinstance(config, dict):
        return None

    def plain(value):
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value if isinstance(value, (int, float, str, bool, type(None))) else None

    return plain(config)
