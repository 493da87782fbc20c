"""Checkpoints: tensors and plain containers only, written whole or not at all, read without running anything.

`python -m utils.convert_checkpoint` says what is in one, and converts it.
"""

import collections
import contextlib
import functools
import hashlib
import io
import os
import pickle
import types
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.errors import UserError

FORMAT = 1


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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = f"the earlier {path.name} there is untouched" if path.exists() else "nothing was written"
        raise UserError(
            f"Could not save {path} ({error.strerror or error}; {len(data) / 1e6:.1f} MB were needed): "
            f"{kept}; make room or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.pth")) if path.parent.is_dir() else []
        hint = f" There are: {', '.join(near)}." if near else ""
        raise UserError(f"There is no checkpoint {path}: give the path of a .pth file with -r.{hint}")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read ({error.strerror}): mend that first.") from error
    try:
        foreign = []
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            content, foreign = _load_foreign(path)
        if not isinstance(content, dict):
            raise UserError(
                f"{path} holds no checkpoint (a {type(content).__name__}): give a file that train.py wrote."
            )
        content = _normalize(content, path)
        return content if "format" in content else {**content, "foreign": foreign}
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes, nothing of it was run
        raise _not_whole(path) from error


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


def _normalize(content: dict, path: Path) -> dict:
    if "model" not in content:  # the reference calls it state_dict; a bare state dict has neither
        state = content.get("state_dict", content)
        best = content.get("monitor_best")
        content = {
            "model": state,
            "epoch": content.get("epoch"),
            "config": _foreign_config(content.get("config")),
            "best": float(best) if isinstance(best, (int, float)) else None,
        }
    state = content["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} holds no network weights: give a file that train.py wrote.")
    config, counts = content.get("config"), content.get("cls_num_list")
    if (
        not isinstance(config, dict | None)
        or not isinstance(counts, list | None)
        or not isinstance(content.get("epoch"), int | None)
        or not _is_progress(content.get("mid_epoch"))
    ):
        raise _not_whole(path)
    content["model"] = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return content


def _is_progress(progress: object) -> bool:
    """Whether this may be the entry "mid_epoch" of a checkpoint."""
    if progress is None:
        return True
    return (
        isinstance(progress, dict)
        and all(isinstance(progress.get(key), int) for key in ("step", "steps"))
        and isinstance(progress.get("processes"), list)
        and bool(progress["processes"])
        and all(isinstance(own, dict) for own in progress["processes"])
    )


def _not_whole(path: Path) -> UserError:
    return UserError(
        f"{path} is truncated or not a checkpoint: give another one (its folder may hold last.pth, "
        "model_best.pth or checkpoint-epoch*.pth), or train again."
    )


# The reference's checkpoints are pickles that name classes of its own code.


class Foreign:
    """Inert stand-in for any class or function that a pickle names and this reader does not know."""

    def __new__(cls, *args, **kwargs):
        instance = super().__new__(cls)
        instance.state = {}
        return instance

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


_IMMUTABLE = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
_IMMUTABLE |= {("builtins", t.__name__): t for t in (dict, list, set, tuple, int, float, str)}
_IMMUTABLE |= {("__builtin__", t.__name__): t for t in (dict, list, set, tuple, int, float, str)}
_FUNCTIONS = {
    ("torch._utils", name): getattr(torch._utils, name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")
}


def _restricted_unpickler(foreign: set[str]) -> type[pickle.Unpickler]:
    """A reader that rebuilds tensors and containers; whatever else a pickle names becomes inert and is never called.

    A pickle can set attributes of what it names, so it only gets types that cannot be changed, and functions and a
    stand-in made for this one file. (torch itself resolves the names of storages.)

    Args:
        foreign: gets the names that were not resolved.
    """

    class Inert(Foreign):
        pass

    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in _IMMUTABLE:
                return _IMMUTABLE[module, name]
            if (module, name) in _FUNCTIONS:
                return functools.partial(_FUNCTIONS[module, name])
            foreign.add(f"{module}.{name}")
            return Inert

    return Restricted


def _load_foreign(path: Path) -> tuple[dict, list[str]]:
    foreign: set[str] = set()
    restricted = _restricted_unpickler(foreign)
    reader = types.SimpleNamespace(
        Unpickler=restricted,
        __name__="restricted_pickle",
        load=lambda file, **kwargs: restricted(file, **kwargs).load(),
    )
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader), sorted(foreign)


def _foreign_config(config: object) -> dict | None:
    """The plain dict inside the reference's pickled config object, if there is one."""
    if isinstance(config, Foreign) and isinstance(config.state, dict):
        config = next((v for k, v in config.state.items() if k in ("_config", "config")), None)
    if not isinstance(config, dict):
        return None

    def plain(value):
        if isinstance(value, (dict, collections.OrderedDict)):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value if isinstance(value, (int, float, str, bool, type(None))) else None

    return plain(config)
