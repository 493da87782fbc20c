"""Whatever a config, an option, a list, a folder or a checkpoint holds: it is read, or refused in one sentence.

FUZZ_CASES says how many cases each test tries (500; `make test-slow` 10,000).
"""

import copy
import json
import logging
import os
import pickletools
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CASES, ROOT, SLOW
from hostile import archive
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_choices import Scripted

from commands.command_line import parse
from commands.convert_checkpoint import describe
from commands.make_data_txt import from_folder
from data_loader.data_loaders import ListDataLoader
from data_loader.image_folders import image_suffixes, is_leftover
from data_loader.image_lists import ImageList
from trainer import train
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.parse_config import merge, parse_assignment, read_json

# The same cases every time in `make test`, others each time in `make test-slow`.
fuzzed = settings(
    max_examples=CASES,
    derandomize=not SLOW,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """The log of ten thousand cases is nobody's to read."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def one_sentence(error: UserError) -> None:
    text = str(error)
    assert text and text.isprintable() and len(text) < 5000
    event("refused")


BASE = read_json(ROOT / "configs" / "config_digits_tade.json")


def paths_in(config: dict, start: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found.append(f"{start}{key}")
        if isinstance(value, dict):
            found += paths_in(value, f"{start}{key};")
    return found


numbers = st.one_of(
    st.integers(), st.sampled_from([0, -1, 2**63, 2**64, 10**400, -(10**400), 10**9]), st.floats(), st.booleans()
)
json_values = st.recursive(
    st.none() | numbers | st.text(max_size=20) | st.sampled_from(["Adam", "SGD", "max val_accuracy", "fp16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
some_paths = st.sampled_from([*paths_in(BASE), "freeze", "metrics", "aggregator", "weights", "trainer;mixup_alpha"])
any_paths = some_paths | st.lists(st.text(max_size=8), min_size=1, max_size=4).map(";".join)


@fuzzed
@given(st.dictionaries(any_paths, json_values, min_size=1, max_size=3))
def test_configs(changes):
    try:
        config = read_config(merge(BASE, changes))
        config.complete()
        read_config(changes, {"format": 1, "config": copy.deepcopy(BASE)}, "a.pth", training=True)
        config.build("trainer")
        config.build("loss", cls_num_list=[50, 20, 5])
        optimizer = config.build("optimizer", [torch.nn.Parameter(torch.zeros(2))])
        config.build("lr_scheduler", optimizer)
    except UserError as error:
        one_sentence(error)


@fuzzed
@given(
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(st.text(max_size=10), json_values, max_size=4).map(lambda value: json.dumps(value).encode()),
        st.integers(1, 100_000).map(lambda depth: b"[" * depth),
        st.integers(1, 9000).map(lambda digits: b'{"seed": ' + b"9" * digits + b"}"),
    )
)
def test_config_files(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c.json").write_bytes(data)
        try:
            read_config(read_json(Path(folder) / "c.json"))
        except UserError as error:
            one_sentence(error)


values_of_set = st.one_of(
    st.text(max_size=30), json_values.map(json.dumps), st.integers(1, 9000).map(lambda n: "9" * n)
)


@fuzzed
@given(any_paths, values_of_set)
def test_assignments(path, value):
    text = f"{path}={value}"
    arguments = ["-c", str(ROOT / "configs" / "config_digits_tade.json"), f"--set={text}"]
    try:
        parse_assignment(text)
        read_config(parse(train, "", arguments)["config"], training=True)
    except UserError as error:
        one_sentence(error)


lines = st.one_of(
    st.binary(max_size=30),
    st.builds(
        lambda name, gap, label, end: name + gap + label + end,
        st.binary(max_size=12),
        st.sampled_from([b" ", b"  ", b"\t", b""]),
        st.one_of(st.integers(-2, 10**10), st.just(10**500)).map(lambda number: str(number).encode()),
        st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b" \n"]),
    ),
)


@fuzzed
@given(st.lists(lines, max_size=8).map(b"".join), st.lists(lines, max_size=8).map(b"".join))
def test_list_files(train, test):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "train.txt").write_bytes(train)
        (root / "test.txt").write_bytes(test + b"a.png 0\n")
        try:
            images = ImageList.read(root / "train.txt", root)
            assert len(images) == len(images.names()) and all(map(len, images.paths.tolist()))
            loader = ListDataLoader(folder, str(root / "train.txt"), str(root / "test.txt"), 8, num_workers=0)
            assert sum(loader.cls_num_list) == len(images) and len(loader.fingerprint()) == 2
            next(iter(loader))  # none of these images is there
        except UserError as error:
            one_sentence(error)
        except StopIteration:
            pass


names = st.binary(min_size=1, max_size=20).filter(
    lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..")
)
image_names = st.builds(lambda name, suffix: name + suffix.encode(), names, st.sampled_from(sorted(image_suffixes())))


@fuzzed
@given(st.dictionaries(names, st.lists(image_names | names, max_size=4), max_size=4), st.integers(-1, 3))
def test_folders(classes, test_per_class):
    folder = os.fsencode(tempfile.mkdtemp())
    try:
        for name, files in classes.items():
            os.mkdir(os.path.join(folder, name))
            for file in files:
                open(os.path.join(folder, name, file), "wb").close()
        out = Path(os.fsdecode(folder) + ".lists")
        from_folder(Path(os.fsdecode(folder)), out, test_per_class=test_per_class)
        listed = [path for s in ("train", "test") for path in ImageList.read(out / f"{s}.txt", "").paths.tolist()]
        images = {
            name + b"/" + file
            for name, files in classes.items()
            for file in files
            if not any(is_leftover(os.fsdecode(part)) for part in (name, file))
            and Path(os.fsdecode(file)).suffix.lower() in image_suffixes()
        }
        assert sorted(listed) == sorted(images)
        event("listed")
    except UserError as error:
        one_sentence(error)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(os.fsdecode(folder) + ".lists", ignore_errors=True)


tensors = st.sampled_from(
    [torch.zeros(2, 2), torch.tensor(1.0), torch.tensor(float("nan")), torch.zeros(0), torch.eye(3).to_sparse()]
)
plain_values = st.recursive(
    st.none() | numbers | st.text(max_size=10) | st.binary(max_size=5) | tensors,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict:
    """A whole checkpoint of a tiny network."""
    folder = tmp_path_factory.mktemp("fuzz")
    trainer = Scripted(folder, [1.0])
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9)
    trainer.optimizer.param_groups[0]["initial_lr"] = 0.1
    trainer.train()
    return {"path": folder / "last.pth", "content": load_checkpoint(folder / "last.pth")}


def read_and_resume(path: Path) -> None:
    """Inspect a checkpoint and go on from it."""
    try:
        describe(path)
        content = load_checkpoint(path)
        trainer = Scripted(path.parent / "run", [1.0, 2.0, 3.0])
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9)
        trainer.optimizer.param_groups[0]["initial_lr"] = 0.1
        trainer.resume(content, path)
        trainer.train()
        event("resumed")
    except UserError as error:
        one_sentence(error)


def entries_in(content: object, start: tuple = ()) -> list[tuple]:
    found = []
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            found += [(*start, key), *entries_in(content[key], (*start, key))]
    return found


@fuzzed
@given(st.data())
def test_entries_of_checkpoints(checkpoint, data):
    content = copy.deepcopy(checkpoint["content"])
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(entries_in(content)))
        target = content
        for key in parents:
            target = target[key]
        if data.draw(st.booleans()) and isinstance(target, dict):
            del target[last]
        else:
            target[last] = data.draw(plain_values)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "a.pth", content)
        read_and_resume(Path(folder) / "a.pth")


def damage(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes changed, or a part left out, repeated, turned round or put elsewhere."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed) - 1))
        part = slice(start, start + data.draw(st.integers(1, 100)))
        kind = data.draw(st.sampled_from(["change", "change", "leave out", "repeat", "turn", "move"]))
        if kind == "change":
            changed[start] = data.draw(st.integers(0, 255))
        elif kind == "leave out" and part.stop < len(changed):
            del changed[part]
        elif kind == "repeat":
            changed[part] = changed[part] * 2
        elif kind == "turn":
            changed[part] = changed[part][::-1]
        elif kind == "move":
            place = data.draw(st.integers(0, len(changed)))
            changed[place:place] = changed[part]
    return bytes(changed)


@fuzzed
@given(st.data(), st.sampled_from(["archive", "pickle in it"]))
def test_damaged_checkpoints(checkpoint, data, where):
    """The whole file; its pickle alone, with the right checksum."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        if where == "archive":
            path.write_bytes(damage(data, checkpoint["path"].read_bytes()))
        else:
            with zipfile.ZipFile(checkpoint["path"]) as source, zipfile.ZipFile(path, "w") as target:
                for name in source.namelist():
                    part = source.read(name)
                    target.writestr(name, damage(data, part) if name.endswith("data.pkl") else part)
        read_and_resume(path)


steps = st.one_of(
    st.sampled_from(sorted(pickletools.code2op)).map(lambda code: code.encode("latin1")),
    st.binary(max_size=3),
    st.sampled_from(
        [
            b"X\3\0\0\0abc",
            b"K\1",
            b"ccollections\nOrderedDict\n)R",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nFloatStorage\n",
            b"cos\nsystem\n",
            b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ",
            b"K\0K\4\x85K\1\x85\x89)",
            b"\x8a\4\xff\xff\xff\x7f",
        ]
    ),
)


@fuzzed
@given(st.lists(steps, max_size=20).map(b"".join))
def test_pickles(body):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        archive(path, b"\x80\2}X\5\0\0\0model" + body + b"s.")
        try:
            describe(path)
        except UserError as error:
            one_sentence(error)
