"""Files made to exhaust or to deceive whoever reads them, each a few kilobytes at the most."""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + pickle.dumps({"little_endian": True}, 2)


class Call:
    """Pickles as a call of something by its name."""

    def __init__(self, name: str, *arguments):
        self.name, self.arguments = name, arguments


class Pair:
    """Pickles as a dict of one key, which may be one that takes for ever to hash."""

    def __init__(self, key, value):
        self.key, self.value = key, value


class _Pickler(pickle._Pickler):
    dispatch = dict(pickle._Pickler.dispatch)

    def save_call(self, call: Call):
        module, _, name = call.name.rpartition(".")
        self.write(b"c" + module.encode() + b"\n" + name.encode() + b"\n")
        self.save(call.arguments)
        self.write(pickle.REDUCE)

    dispatch[Call] = save_call

    def save_pair(self, pair: Pair):
        self.write(pickle.EMPTY_DICT)
        self.save(pair.key)
        self.save(pair.value)
        self.write(pickle.SETITEM)

    dispatch[Pair] = save_pair

    def persistent_id(self, item):
        return item.pid if isinstance(item, Storage) else None

    def save_storage_type(self, kind: type):
        self.write(b"ctorch\nFloatStorage\n")


class FloatStorage:
    pass


_Pickler.dispatch[type(FloatStorage)] = _Pickler.save_storage_type


class Storage:
    """A storage of some number of floats, whatever is there."""

    def __init__(self, count: int, key: str = "0", legacy: bool = False):
        self.pid = ("storage", FloatStorage, key, "cpu", count) + ((None,) if legacy else ())


def tensor(storage: Storage, size: tuple, stride: tuple) -> Call:
    return Call("torch._utils._rebuild_tensor_v2", storage, 0, size, stride, False, Call("collections.OrderedDict"))


def dumped(content) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def archive(path: Path, data: bytes, storage: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/data/0", storage)
        file.writestr("a/version", b"3\n")


def with_model(**more) -> bytes:
    """A small checkpoint's pickle with more in it."""
    return dumped({"format": 1, "model": {"w": tensor(Storage(4), (4,), (1,))}, "epoch": 1, **more})


def shared_lists(kind: Callable) -> object:
    nested: object = kind()
    for _ in range(60):
        nested = kind([nested, nested])
    return nested


def endless() -> list:
    circle: list = []
    circle.append(circle)
    return circle


def deep(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def overlapping(path: Path) -> None:
    """A hundred records that are all the same bytes."""
    archive(path, with_model(), bytes(100_000))
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end].split(b"PK\1\2")[1:]
    table = b"".join(b"PK\1\2" + entry for entry in entries + 300 * [entries[1]])
    path.write_bytes(data[:start] + table + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 303, 303, len(table), start, 0))


def big_storage_claimed(path: Path) -> None:
    content = {"model": {"w": tensor(Storage(550_000_000, legacy=True), (550_000_000,), (1,))}}
    path.write_bytes(MAGIC + dumped(content) + dumped(["0"]) + struct.pack("<q", 550_000_000))


def legacy(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(MAGIC + data + dumped([])) and None


def zipped(data: bytes, **options) -> Callable[[Path], None]:
    return lambda path: archive(path, data, **options)


def many_views(path: Path) -> None:
    views = {f"w{i}": tensor(Storage(250_000), (250_000,), (1,)) for i in range(3000)}
    archive(path, dumped({"model": views}), bytes(1_000_000))


def deflated(path: Path) -> None:
    content = {"model": {"w": tensor(Storage(5_000_000), (5_000_000,), (1,))}}
    archive(path, dumped(content), bytes(20_000_000), zipfile.ZIP_DEFLATED)


#: Name -> writes the file.
BOMBS: dict[str, Callable[[Path], None]] = {
    "a storage of 2.2 GB in 339 bytes": big_storage_claimed,
    "the same in an archive": zipped(dumped({"model": {"w": tensor(Storage(550_000_000), (550_000_000,), (1,))}})),
    "one number as a tensor of 4 GB": zipped(dumped({"model": {"w": tensor(Storage(1), (10**9,), (0,))}})),
    "three thousand views of one storage": many_views,
    "a deflated storage": deflated,
    "three hundred records in one place": overlapping,
    "a memo of 2^31 places": legacy(b"\x80\x02}r\xff\xff\xff\x7f."),
    "a text of 3.8 GB": legacy(b"\x80\x02X\xff\xff\xff\xe0abc."),
    "a frame of 3.8 GB": legacy(b"\x80\x04\x95\xff\xff\xff\xe0\0\0\0\0abc."),
    "a bytearray of 2 GB": zipped(with_model(config=Call("builtins.bytearray", 2_000_000_000))),
    "twenty million dicts": zipped(b"\x80\x02" + b"}" * 20_000_000 + b"."),
    "shared lists without end": zipped(with_model(config={"arch": shared_lists(list)})),
    "a list that holds itself": zipped(with_model(config={"arch": endless()})),
    "tuples without end as a key": zipped(with_model(config=Pair(shared_lists(tuple), 1))),
    "tuples without end in a set": zipped(with_model(config=Call("builtins.set", [shared_lists(tuple)]))),
    "lists without end as a text": zipped(with_model(config={"name": Call("builtins.str", shared_lists(list))})),
    "lists a hundred thousand deep": zipped(deep(100_000)),
    "a number of eight million bits": zipped(with_model(epoch=1 << 8_000_000)),
    "a tensor of a thousand dimensions": zipped(dumped({"model": {"w": tensor(Storage(4), (1,) * 1000, (1,) * 1000)}})),
    "a tensor of negative size": zipped(dumped({"model": {"w": tensor(Storage(4), (-4, -1), (1, 1))}})),
}


def network_bomb(path: Path, arguments: dict) -> None:
    """A checkpoint whose config asks for an enormous network."""
    arch = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 2, **arguments}}
    loader = {"type": "ImbalanceDigitsDataLoader", "args": {"batch_size": 32}}
    content = {
        "format": 1,
        "model": collections.OrderedDict(w=torch.zeros(3)),
        "epoch": 1,
        "config": {"name": "x", "arch": arch, "data_loader": loader},
    }
    torch.save(content, path)
