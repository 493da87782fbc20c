"""Files made to exhaust or to deceive whoever reads them, each a few kilobytes at the most."""

import codecs
import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch


class Call:
    """Pickles as a call of a function, and as setting items of what it gives."""

    def __init__(self, function: Callable, *arguments, items=()):
        self.reduced = function, arguments, None, None, iter(items)

    def __reduce__(self):
        return self.reduced


class Storage:
    """Pickles as a storage of some number of floats, whatever is there."""

    def __init__(self, count: int):
        self.pid = ("storage", torch.FloatStorage, "0", "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, item):
        return item.pid if isinstance(item, Storage) else None


def tensor(count: int, size: tuple, stride: tuple = (1,)) -> Call:
    """A tensor in a storage of `count` floats; its shape is an object of its own, as in torch's files."""
    shape = tuple(list(size)), tuple(list(stride))
    return Call(torch._utils._rebuild_tensor_v2, Storage(count), 0, *shape, False, collections.OrderedDict())


def dumped(content) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def archive(path: Path, data: bytes, storage: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/data/0", storage)
        file.writestr("a/version", b"3\n")


def zipped(data: bytes, **options) -> Callable[[Path], None]:
    return lambda path: archive(path, data, **options)


def model(*of_tensor, **options) -> Callable[[Path], None]:
    return zipped(dumped({"model": {"w": tensor(*of_tensor)}}), **options)


def config(value) -> Callable[[Path], None]:
    """A small checkpoint with something in its config."""
    content = {"format": 1, "model": {"w": tensor(4, (4,))}, "epoch": 1, "config": value}
    return lambda path: archive(path, dumped(content))


def shared(kind: Callable) -> object:
    """Sixty levels of lists or tuples, each twice the one below: 2^60 when written out."""
    nested: object = kind()
    for _ in range(60):
        nested = kind([nested, nested])
    return nested


def endless() -> list:
    circle: list = []
    circle.append(circle)
    return circle


def overlapping(path: Path) -> None:
    """Three hundred entries that are all the same bytes."""
    archive(path, b"", bytes(100_000))
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = data[start:end].split(b"PK\1\2")[1:]
    table = b"".join(b"PK\1\2" + entry for entry in entries + 300 * [entries[1]])
    path.write_bytes(data[:start] + table + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 303, 303, len(table), start, 0))


VIEWS = {f"w{i}": tensor(250_000, (250_000,)) for i in range(3000)}
DEEP = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."

#: Name -> writes the file.
BOMBS: dict[str, Callable[[Path], None]] = {
    "a storage of 2.2 GB in 339 bytes": model(550_000_000, (550_000_000,)),
    "a tensor larger than its storage": model(4, (550_000_000,)),
    "one number as a tensor of 4 GB": model(1, (10**9,), (0,), storage=bytes(4)),
    "a tensor of a thousand dimensions": model(4, (1,) * 1000, (1,) * 1000),
    "a tensor of negative size": model(4, (-4, -1), (1, 1)),
    "three thousand views of one storage": zipped(dumped({"model": VIEWS}), storage=bytes(1_000_000)),
    "a deflated storage": model(5_000_000, (5_000_000,), storage=bytes(20_000_000), compression=zipfile.ZIP_DEFLATED),
    "three hundred entries in one place": overlapping,
    "a memo of 2^31 places": zipped(b"\x80\x02}r\xff\xff\xff\x7f."),
    "a text of 3.8 GB": zipped(b"\x80\x02X\xff\xff\xff\xe0abc."),
    "a frame of 3.8 GB": zipped(b"\x80\x04\x95\xff\xff\xff\xe0\0\0\0\0abc."),
    "a number of eight million bits": config(1 << 8_000_000),
    "twenty million dicts": zipped(b"\x80\x02" + b"}" * 20_000_000 + b"."),
    "lists a hundred thousand deep": zipped(DEEP),
    "a bytearray of 2 GB": config(Call(bytearray, 2_000_000_000)),
    "bytes that take for ever to encode": config(
        Call(codecs.encode, "".join(map(chr, range(256, 40_000))), "punycode")
    ),
    "a list that holds itself": config({"arch": endless()}),
    "shared lists without end": config({"arch": shared(list)}),
    "tuples without end as a key": config(Call(collections.OrderedDict, items=[(shared(tuple), 1)])),
    "tuples without end in a set": config(Call(set, [shared(tuple)])),
}


def network_bomb(path: Path, arguments: dict) -> None:
    """A checkpoint whose config asks for an enormous network."""
    arch = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 2, **arguments}}
    loader = {"type": "ImbalanceDigitsDataLoader", "args": {"batch_size": 32}}
    weights = collections.OrderedDict(w=torch.zeros(3))
    torch.save({"format": 1, "model": weights, "config": {"name": "x", "arch": arch, "data_loader": loader}}, path)
