"""Reads what torch.save wrote, without running anything of it and without believing what it says of itself.

Of a pickle only tensors, containers and plain values are rebuilt; whatever else it names becomes inert. Memory and time
are bounded by the length of the file and the limits below, and every checksum is verified. Both formats of torch.save
are read, the zip archive and the one before torch 1.6.
"""

import collections
import io
import math
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

#: What no checkpoint comes near: steps of a pickle, bytes of an archive's table of contents, bytes of its
#: pickle, characters of a name in it.
MOST_STEPS = 1_000_000
MOST_CONTENTS = 8_000_000
MOST_PICKLE = 32_000_000
LONGEST_NAME = 500

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "Untyped": torch.uint8,
    }.items()
}


class Damaged(Exception):
    """The file is no whole file of torch.save, or asks for more than such a file does; says why."""


class Foreign:
    """Inert stand-in for any class or function that a pickle names and this reader does not know."""

    def __init__(self, *args: object, **kwargs: object):
        self.state: Any = {}


class StorageType:
    """What a pickle means by the name of a storage."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


def read_torch_file(path: str | Path) -> tuple[Any, set[str]]:
    """The content of a file that torch.save wrote, tensors on the CPU.

    Args:
        path: the file.

    Returns:
        The content, and the names in it that were not resolved: in their place stand objects of class Foreign.

    Raises:
        Damaged: see there.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        length = file.seek(0, io.SEEK_END)
        try:
            is_archive = zipfile.is_zipfile(file)
            file.seek(0)
            return _read_zip(file, length) if is_archive else _read_legacy(file, length)
        except (Damaged, OSError):
            raise
        except Exception as error:  # whatever a damaged or hostile file provokes, nothing of it was run
            raise Damaged(f"it cannot be understood ({type(error).__name__})") from error


class Bounded:
    """A file that is asked for no more than is left: Python reserves the memory that a read asks for."""

    def __init__(self, file: BinaryIO, length: int):
        self.file = file
        self.length = length
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self.length - self.file.tell()))


class Restricted(pickle._Unpickler):  # type: ignore[name-defined]
    """Rebuilds tensors and containers; calls nothing that a pickle names.

    Python's own pickle machine, step by step, with another answer wherever a file could choose what happens: which
    names are resolved, what is called, what gets attributes, what is hashed.

    Args:
        file: where the pickle starts.
        storage_of: persistent id -> (dtype, tensor of the storage's bytes).
        foreign: gets the names that were not resolved.
    """

    STEPS = (
        "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
        "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
        "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET "
        "ADDITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ "
        "NEWOBJ_EX BUILD BINPERSID"
    )
    dispatch = {
        code[0]: pickle._Unpickler.dispatch[code[0]]  # type: ignore[attr-defined]
        for code in (getattr(pickle, name) for name in STEPS.split())
    }

    def __init__(self, file: BinaryIO | Bounded, storage_of: Callable[[tuple], tuple], foreign: set[str]):
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storage_of = storage_of
        self.foreign = foreign

    def load(self) -> Any:
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]
        self.read, self.readline, self.readinto = (
            self._unframer.read,
            self._unframer.readline,
            self._unframer.readinto,
        )
        self.metastack: list = []
        self.stack: list = []
        self.append = self.stack.append
        self.proto = 0
        try:
            for _ in range(MOST_STEPS):
                code = self.read(1)
                if not code:
                    raise Damaged("it is truncated")
                self.dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise Damaged(f"it takes more than {MOST_STEPS} steps to read")

    def find_class(self, module: str, name: str) -> object:
        if module in ("torch", "torch.storage") and name in DTYPES:
            return StorageType(DTYPES[name])
        if (module, name) in REBUILT:
            return REBUILT[module, name]
        if len(module) + len(name) > LONGEST_NAME:
            raise Damaged("it names something at great length")
        self.foreign.add(f"{module}.{name}")
        return Foreign

    def persistent_load(self, pid: Any) -> tuple:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise Damaged("it names something outside itself")
        return self.storage_of(pid)

    def load_call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise Damaged("it is no checkpoint")
        known = called if called in REBUILT.values() else Foreign
        self.stack.append(known(*arguments))

    def load_call_ex(self) -> None:
        self.stack.pop()
        self.load_call()

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = load_call
    dispatch[pickle.NEWOBJ_EX[0]] = load_call_ex

    def load_build(self) -> None:
        """Attributes go to what is inert; an OrderedDict's (the versions of a state dict) are left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Foreign):
            target.state = state
        elif not isinstance(target, collections.OrderedDict):
            raise Damaged("it sets attributes")

    dispatch[pickle.BUILD[0]] = load_build

    def load_items(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_checked_pairs(zip(items[::2], items[1::2], strict=True)))
        elif isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_checked_key, items))
        elif not isinstance(target, Foreign):
            raise Damaged("it is no checkpoint")

    def load_marked_items(self) -> None:
        self.load_items(self.pop_mark())

    def load_one_item(self) -> None:
        self.load_items([self.stack.pop()])

    def load_pair(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.load_items([key, value])

    for code in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
        dispatch[code[0]] = load_marked_items
    dispatch[pickle.APPEND[0]] = load_one_item
    dispatch[pickle.SETITEM[0]] = load_pair


def _checked_key(key: Any) -> Any:
    """Only what is hashed at once: tuples in tuples can take for ever."""
    if not isinstance(key, (str, int, float, bytes, type(None), Foreign)):
        raise Damaged(f"it has a {type(key).__name__} as a key")
    return key


def _checked_pairs(pairs: Any) -> list[tuple]:
    return [(_checked_key(key), value) for key, value in pairs]


def _rebuild_dict(pairs: Any = ()) -> collections.OrderedDict:
    return collections.OrderedDict(_checked_pairs(pairs))


def _rebuild_set(items: Any = ()) -> set:
    return set(map(_checked_key, items))


def _rebuild_size(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(sizes)


def _rebuild_parameter(data: Any, *_: object) -> Any:
    return data


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> torch.Tensor:
    """A tensor inside its storage: [size], as torch._utils._rebuild_tensor_v2 makes it."""
    dtype, data = storage
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 64 or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
        raise Damaged("a tensor in it has an impossible shape")
    flat = data.view(dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(flat) or (math.prod(size) and last >= len(flat)):
        raise Damaged("a tensor in it is larger than its storage")
    return flat.as_strided(tuple(size), tuple(stride), offset)


#: What a pickle may name and gets called: each returns plain values and tensors alone.
REBUILT: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): _rebuild_dict,
    ("torch", "Size"): _rebuild_size,
    ("builtins", "set"): _rebuild_set,
    ("__builtin__", "set"): _rebuild_set,
}


def _storage_bytes(pid: tuple, available: int) -> tuple[torch.dtype, int]:
    kind, count = pid[1], pid[4]
    if not isinstance(kind, StorageType) or type(count) is not int or count < 0:
        raise Damaged("it holds tensors that are sparse, quantized or otherwise not of plain numbers")
    size = count * torch.empty(0, dtype=kind.dtype).element_size()
    if size > available:
        raise Damaged(f"a storage in it claims {size} bytes, and {available} are there")
    return kind.dtype, size


def _read_zip(file: BinaryIO, length: int) -> tuple[Any, set[str]]:
    ending = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if ending is None or ending[zipfile._ECD_SIZE] > MOST_CONTENTS:  # type: ignore[attr-defined]
        raise Damaged("its table of contents is missing or too long")
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                raise Damaged("it is compressed, which torch.save never does")
            if len(records) < len(archive.infolist()) or sum(i.file_size for i in records.values()) > length:
                raise Damaged("its parts are longer than the whole")
            main = [name for name in records if name.partition("/")[2] == "data.pkl"]
            if len(main) != 1 or records[main[0]].file_size > MOST_PICKLE:
                raise Damaged("it is no file of torch.save")
            folder = main[0].removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in records and archive.read(order) != sys.byteorder.encode():
                raise Damaged("it was written on a machine of another byte order")
            damaged = archive.testzip()
            if damaged:
                raise Damaged(f"the checksum of {damaged} in it is wrong")
            storages: dict[object, torch.Tensor] = {}

            def storage_of(pid: tuple) -> tuple[torch.dtype, torch.Tensor]:
                key = _checked_key(pid[2])
                info = records[f"{folder}data/{key}"]
                dtype, size = _storage_bytes(pid, info.file_size)
                if key not in storages:
                    storages[key] = torch.empty(info.file_size, dtype=torch.uint8)
                    with archive.open(info) as part:
                        _fill(storages[key], part)
                return dtype, storages[key][:size]

            foreign: set[str] = set()
            return Restricted(io.BytesIO(archive.read(main[0])), storage_of, foreign).load(), foreign
    except zipfile.BadZipFile as error:
        raise Damaged("it is truncated, or a checksum in it is wrong") from error


def _fill(storage: torch.Tensor, source: Any) -> None:
    if len(storage) and source.readinto(memoryview(storage.numpy())) != len(storage):
        raise Damaged("it is truncated")


def _read_legacy(file: BinaryIO, length: int) -> tuple[Any, set[str]]:
    """Magic number, protocol, machine, content and the storages' names as pickles; then each storage."""
    storages: dict[object, torch.Tensor] = {}
    kinds: dict[object, int] = {}
    foreign: set[str] = set()

    def storage_of(pid: tuple) -> tuple[torch.dtype, torch.Tensor]:
        key = _checked_key(pid[2])
        taken = sum(map(len, storages.values())) if key not in storages else 0
        dtype, size = _storage_bytes(pid, length - taken)
        if pid[5:] not in ((), (None,)):
            raise Damaged("its storages are views of one another, which is not read here")
        if key not in storages:
            storages[key] = torch.zeros(size, dtype=torch.uint8)
            kinds[key] = torch.empty(0, dtype=dtype).element_size()
        if size > len(storages[key]):
            raise Damaged("a storage in it has two sizes")
        return dtype, storages[key][:size]

    def next_pickle() -> Any:
        return Restricted(Bounded(file, length), storage_of, foreign).load()

    if next_pickle() != 0x1950A86A20F9469CFC6C or next_pickle() != 1001:
        raise Damaged("it is no file of torch.save")
    machine = next_pickle()
    if isinstance(machine, dict) and machine.get("little_endian") != (sys.byteorder == "little"):
        raise Damaged("it was written on a machine of another byte order")
    content, keys = next_pickle(), next_pickle()
    if not isinstance(keys, list) or set(map(_checked_key, keys)) != storages.keys():
        raise Damaged("it is truncated")
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        if count * kinds[key] != len(storages[key]):
            raise Damaged("a storage in it has two sizes")
        _fill(storages[key], file)
    return content, foreign
