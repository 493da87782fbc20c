"""Damaged files, and files made to exhaust whoever reads them: refused, in bounded memory."""

import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SLOW
from hostile import BOMBS, network_bomb

from trainer.build import SizeLimit
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.torch_file import read_torch_file


def content() -> dict:
    torch.manual_seed(0)
    weights = {"conv.weight": torch.randn(4, 3), "bn.running_var": torch.rand(3), "bn.tracked": torch.ones(())}
    config = {"name": "x", "trainer": {"epochs": 5}}
    return {"model": weights, "epoch": 3, "config": config, "cls_num_list": [5, 4], "best": 0.5, "seconds": 1.5}


def same(first: dict, second: dict) -> bool:
    tensors = first["model"].keys() == second["model"].keys() and all(
        torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items()
    )
    return tensors and all(first[key] == second[key] for key in first if key != "model")


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, capsys):
    """Names, sizes, pickle, weights, checksums: a part of the bytes, or with FUZZ_CASES=10000 each in three ways."""
    save_checkpoint(tmp_path / "a.pth", content())
    data, expected = (tmp_path / "a.pth").read_bytes(), load_checkpoint(tmp_path / "a.pth")
    weight = data.index(content()["model"]["conv.weight"].numpy().tobytes())
    refused, flips = 0, list(itertools.product(range(len(data)), (1, 0x40, 0xFF)))[:: 1 if SLOW else 13]
    for place, bits in flips:
        (tmp_path / "b.pth").write_bytes(data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])
        try:
            assert same(expected, load_checkpoint(tmp_path / "b.pth")), place
        except UserError as error:
            assert not weight <= place < weight + 48 or "checksum in it is wrong" in str(error)
            refused += 1
    with capsys.disabled():
        print(f"\n{len(flips)} damaged files: {refused} refused, {len(flips) - refused} unchanged in content")
    assert refused > len(flips) / 4  # the rest is padding and dates


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_and_buffers_that_are_no_numbers_are_refused(tmp_path, value):
    for name, dtype in (("conv.weight", torch.float32), ("bn.running_var", torch.bfloat16)):
        state = content()["model"] | {"n": torch.tensor([2**62]), "none": torch.zeros(0), "mask": torch.ones(2).bool()}
        save_checkpoint(tmp_path / "a.pth", {"model": state})
        assert load_checkpoint(tmp_path / "a.pth")["model"].keys() == state.keys()  # integers and no values are finite
        state[name].flatten()[-1] = value
        save_checkpoint(tmp_path / "a.pth", {"model": state | {name: state[name].to(dtype)}})
        with pytest.raises(UserError, match=f"{name} is infinite or not a number; give an earlier checkpoint"):
            load_checkpoint(tmp_path / "a.pth")


def test_what_torch_saves_comes_back(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "transposed": base.reshape(4, 6).t(),
        "part": base[5:11],
        "whole": base,
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.half, torch.bfloat16, torch.int8, torch.bool)},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(3),
    }
    others = {"numpy": [np.int64(4), np.float64(0.25)], "same": [base, base], "bytes": b"a\xff", 3: {(1, "x")}}
    torch.save({**tensors, **others}, tmp_path / "a.pth")
    ours, foreign = read_torch_file(tmp_path / "a.pth")
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
        assert ours[name].stride() == tensor.stride() and not ours[name].requires_grad, name
    assert ours["part"].untyped_storage().data_ptr() == ours["whole"].untyped_storage().data_ptr()
    assert ours["numpy"] == [4, 0.25] and type(ours["numpy"][0]) is int
    assert ours["bytes"] == b"a\xff" and ours[3] == {(1, "x")} and "numpy.dtype" in foreign


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.zeros(3, device="meta"),
    ],
)
def test_tensors_of_other_kinds_are_not_weights(tmp_path, make):
    torch.save({"model": {"w": make()}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="sparse, quantized or otherwise not of plain numbers"):
        load_checkpoint(tmp_path / "a.pth")


def test_an_archive_that_two_readers_understand_differently_is_refused(tmp_path):
    """torch finds parts whatever the case of their names: here it would read another pickle than the checked one."""
    save_checkpoint(tmp_path / "a.pth", content())
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
        archive.writestr(archive.namelist()[0].replace("data.pkl", "DATA.PKL"), b"\x80\x02}.")
    with pytest.raises(UserError, match="its parts are named twice"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("make", [torch.empty, lambda *n: torch.zeros(n), lambda *n: torch.ones(list(n))])
def test_a_network_may_be_a_million_elements_larger_than_twice_its_weights(make):
    state = {"a": torch.zeros(250, 1000), "b": torch.zeros(250_000)}
    with SizeLimit(state):
        make(1000, 1000)
        make(999, 1000)
        with pytest.raises(UserError, match="much larger than its weights"):
            make(11, 100)


READ_ALL = """
import json, resource, sys
sys.path[:0] = [{root!r}]
import torch
from evaluation import load_run
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 500_000_000, -1))
for path in sys.argv[1:]:
    try:
        (load_run if "network" in path else load_checkpoint)(path)
        print(json.dumps(None))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_bombs_are_refused_in_500_mb(tmp_path):
    """Under a limit on memory: one that is asked for more ends in MemoryError, not in a sentence."""
    paths = [tmp_path / f"{number}.pth" for number in range(len(BOMBS))]
    for path, write in zip(paths, BOMBS.values(), strict=True):
        write(path)
    for number, arguments in enumerate(({"num_experts": 200_000}, {"layer3_output_dim": 10**6})):
        paths.append(tmp_path / f"network{number}.pth")
        network_bomb(paths[-1], arguments)
    command = [sys.executable, "-c", READ_ALL.format(root=str(ROOT)), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences = [json.loads(line) for line in done.stdout.splitlines()]
    for name, sentence in zip([*BOMBS, "experts", "width"], sentences, strict=True):
        assert sentence and len(sentence) < 500 and "MemoryError" not in sentence, (name, sentence)
