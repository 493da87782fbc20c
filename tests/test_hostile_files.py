"""Damaged files, and files made to exhaust whoever reads them: refused, in bounded memory."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

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
    weights = {
        "conv.weight": torch.randn(4, 3),
        "bn.running_var": torch.rand(3),
        "bn.num_batches_tracked": torch.ones(()),
    }
    return {
        "model": weights,
        "epoch": 3,
        "config": {"name": "x", "trainer": {"epochs": 5}},
        "cls_num_list": [5, 4],
        "best": 0.5,
        "seconds": 1.5,
    }


def same(first: dict, second: dict) -> bool:
    tensors = first["model"].keys() == second["model"].keys() and all(
        torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items()
    )
    return tensors and all(first[key] == second[key] for key in first if key != "model")


def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, capsys):
    """Names, sizes, pickle, weights, checksums: a part of the bytes, or with FUZZ_CASES=10000 each in three ways."""
    save_checkpoint(tmp_path / "a.pth", content())
    data, expected = (tmp_path / "a.pth").read_bytes(), load_checkpoint(tmp_path / "a.pth")
    refused, flips = 0, list(itertools.product(range(len(data)), (1, 0x40, 0xFF)))[:: 1 if SLOW else 13]
    for place, bits in flips:
        (tmp_path / "b.pth").write_bytes(data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])
        try:
            assert same(expected, load_checkpoint(tmp_path / "b.pth")), place
        except UserError:
            refused += 1
    with capsys.disabled():
        print(f"\n{len(flips)} damaged files: {refused} refused, {len(flips) - refused} unchanged in content")
    assert refused > len(flips) / 4  # the rest is padding and dates


def test_the_flipped_bit_of_a_weight_is_named_as_a_checksum(tmp_path):
    save_checkpoint(tmp_path / "a.pth", content())
    data = bytearray((tmp_path / "a.pth").read_bytes())
    place = data.index(content()["model"]["conv.weight"].numpy().tobytes())
    data[place + 3] ^= 0x40  # of the exponent: the weight becomes some 1e38 times as large
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(UserError, match="checksum of .*/data/0 in it is wrong"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv.weight", "bn.running_var"])
def test_weights_and_buffers_that_are_no_numbers_are_refused(tmp_path, name, value):
    state = content()
    state["model"][name].flatten()[-1] = value
    save_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match=f"{name} is infinite or not a number; give an earlier checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    state["model"][name] = state["model"][name].to(torch.bfloat16)
    save_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match="infinite or not a number"):
        load_checkpoint(tmp_path / "a.pth")


def test_integers_and_empty_tensors_are_always_finite(tmp_path):
    state = {**content()["model"], "n": torch.tensor([2**62]), "none": torch.zeros(0), "mask": torch.ones(2).bool()}
    save_checkpoint(tmp_path / "a.pth", {"model": state})
    assert load_checkpoint(tmp_path / "a.pth")["model"].keys() == state.keys()


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_come_back_as_torch_reads_them(tmp_path, legacy):
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
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    ours, _ = read_torch_file(tmp_path / "a.pth")
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
        assert ours[name].stride() == tensor.stride(), name
    assert ours["part"].untyped_storage().data_ptr() == ours["whole"].untyped_storage().data_ptr()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_of_other_kinds_are_not_weights(tmp_path):
    kinds = {
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.zeros(3, device="meta"),
    }
    for name, tensor in kinds.items():
        torch.save({"model": {"w": tensor}}, tmp_path / "a.pth")
        with pytest.raises(UserError, match="a.pth (holds no network weights|is truncated or not a checkpoint)"):
            load_checkpoint(tmp_path / "a.pth")
            pytest.fail(name)


@pytest.mark.parametrize("make", [torch.empty, lambda *n: torch.zeros(n), lambda *n: torch.ones(list(n))])
def test_a_network_may_be_a_million_elements_larger_than_twice_its_weights(make):
    state = {"a": torch.zeros(250, 1000), "b": torch.zeros(250_000)}
    with SizeLimit(state):
        make(1000, 1000)
        make(999, 1000)
        with pytest.raises(UserError, match="much larger than its weights"):
            make(11, 100)
    with SizeLimit({}), pytest.raises(UserError, match="much larger"):
        make(1001, 1000)


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
    paths = []
    for number, write in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"{number}.pth")
        write(paths[-1])
    for number, arguments in enumerate(({"num_experts": 200_000}, {"layer3_output_dim": 10**6})):
        paths.append(tmp_path / f"network{number}.pth")
        network_bomb(paths[-1], arguments)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL.format(root=str(ROOT)), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    sentences = [json.loads(line) for line in done.stdout.splitlines()]
    for name, sentence in zip([*BOMBS, "experts", "width"], sentences, strict=True):
        assert sentence and len(sentence) < 500 and "MemoryError" not in sentence, (name, sentence)
