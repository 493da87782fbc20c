"""Reads what torch.save wrote. Nothing in an untrusted file runs, and its length bounds memory and time.

The archive and its pickle are checked first; then `torch.load(weights_only=True)` reads a copy of what was checked.
"""

import io
import itertools
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

#: Limits far above any real checkpoint: bytes of the table of contents; steps of the pickle and values in its
#: containers; names in it; containers and tensors that it uses again; levels of its containers.
MOST_CONTENTS, MOST_STEPS, MOST_NAMES, MOST_SHARED, DEEPEST = 2_000_000, 300_000, 32, 16, 64

#: What a file may have torch call: all that makes tensors of plain numbers and containers. Others of torch's reserve as
#: much memory as a file asks for.
KNOWN = re.compile(
    r"torch\.((BFloat16|Bool|Byte|Char|Double|Float|Half|Int|Long|Short)Storage|b?float\d+|u?int\d+|bool|Size|device)"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)|collections\.(OrderedDict|Counter)|builtins\.set|_codecs\.encode"
)


class Damaged(Exception):
    """The file is no whole file of torch.save, or asks for more than such a file does; says why."""


class Foreign:
    """Inert stand-in for any class or function that a file names and torch does not know."""

    args: tuple
    state: Any

    def __new__(cls, *args: object) -> "Foreign":
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_torch_file(path: str | Path) -> tuple[Any, set[str]]:
    """Read a file that torch.save wrote.

    Args:
        path: the file.

    Returns:
        The content: tensors on the CPU, dicts, lists, tuples, sets and plain values; and the names in it that torch
        does not know: in their place stand objects of class Foreign.

    Raises:
        Damaged: see there.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            archive, names = _checked(file)
            foreign = {name for name in names if not KNOWN.fullmatch(name)}
            if not foreign <= set(torch.serialization.get_unsafe_globals_in_checkpoint(archive)):
                raise Damaged("it holds tensors that are sparse, quantized or otherwise not of plain numbers")
            archive.seek(0)
            with torch.serialization.safe_globals([(Foreign, name) for name in foreign]):
                content = torch.load(archive, map_location="cpu", weights_only=True)
            return _plain(content, itertools.count()), foreign
        except (Damaged, OSError):
            raise
        except zipfile.BadZipFile as error:
            raise Damaged("it is truncated, or a checksum in it is wrong") from error
        except Exception as error:  # whatever a damaged or hostile file provokes, nothing of it was run
            raise Damaged(f"it cannot be understood ({type(error).__name__})") from error


def _checked(file: BinaryIO) -> tuple[io.BytesIO, set[str]]:
    """A copy of the archive, which no two readers can understand differently, and the names in its pickle."""
    if not zipfile.is_zipfile(file):
        raise Damaged("it is no archive; a file of torch before 1.6 becomes one if torch loads and saves it again")
    length = file.seek(0, io.SEEK_END)
    if zipfile._EndRecData(file)[zipfile._ECD_SIZE] > MOST_CONTENTS:  # type: ignore[attr-defined]
        raise Damaged("its table of contents is too long")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        parts = {entry.filename.partition("/")[2].lower(): entry for entry in entries}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Damaged("it is compressed, which torch.save never does")
        if len(parts) < len(entries) or sum(entry.file_size for entry in entries) > length:
            raise Damaged("its parts are named twice, or longer than the whole")
        if "data.pkl" not in parts:
            raise Damaged("it is no file of torch.save")
        names = _names(archive.read(parts["data.pkl"]))
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as target:
            for name, entry in parts.items():
                target.writestr(f"checkpoint/{name}", archive.read(entry))
    copy.seek(0)
    return copy, names


def _names(pickled: bytes) -> set[str]:
    """The classes and functions that a pickle names; Damaged where it could take for ever to read.

    Short texts and names may be used again and again. Of anything else, uses of uses grow exponentially.
    """
    names: set[str] = set()
    memo: dict[int, str | None] = {}
    values: list[str | None] = [None, None]  # what each step makes, where it is a text or a name
    shared = 0
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = values[-1]
            continue
        values.append(None)
        if code.name == "PROTO" and argument != 2:
            raise Damaged("its pickle is of another protocol than torch.save's")
        if code.name == "BINUNICODE" and len(argument) < 500:
            values[-1] = argument
        elif code.name == "GLOBAL":
            values[-1] = argument.replace("__builtin__", "builtins").replace(" ", ".")
            names.add(values[-1])
        elif code.name in ("BINGET", "LONG_BINGET"):
            values[-1] = memo.get(argument)
            shared += values[-1] is None
        if len(values) > MOST_STEPS or len(names) > MOST_NAMES or shared > MOST_SHARED:
            raise Damaged("its pickle is longer, or refers to itself more often, than any checkpoint's")
        if values[-3] == "_codecs.encode" and values[-1] != "latin1":
            raise Damaged("it holds bytes in an encoding that pickles do not have")
    return names


def _plain(value: Any, visits: "itertools.count[int]", depth: int = 0) -> Any:
    """A value without attributes, gradients and hooks, which a file could set; Damaged where it has no end."""
    if depth > DEEPEST or next(visits) > MOST_STEPS:
        raise Damaged("its lists are nested without end")
    if isinstance(value, torch.Tensor):
        if value.dim() > DEEPEST:
            raise Damaged("a tensor in it has an impossible shape")
        return value.detach()
    if isinstance(value, dict):
        if odd := {type(key).__name__ for key in value if not isinstance(key, str | int | float | bytes | None)}:
            raise Damaged(f"it has a {odd.pop()} as a key")
        return {key: _plain(part, visits, depth + 1) for key, part in dict.items(value)}
    if isinstance(value, list | tuple | set):
        return type(value)([_plain(part, visits, depth + 1) for part in value])
    if isinstance(value, Foreign):
        match value.args:
            case Foreign(args=(str(kind), *_)), bytes(data) if re.fullmatch("[iufb][1248]", kind):
                return np.frombuffer(data, f"<{kind}")[0].item()  # a scalar of NumPy
        value.state = _plain(value.state, visits, depth + 1)
    return value
