"""The checkpoints that are published with the code, as benchmarks/checkpoints/README.md describes them."""

import re

import pytest
from conftest import ROOT

from evaluation.evaluation import evaluate_test_set
from evaluation.loaded_run import load_run
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, load_weights, sha256

FOLDER = ROOT / "benchmarks" / "checkpoints"
#: | `file` | network | figures ... | `SHA-256` |
ROWS = re.findall(r"^\| `([\w.]+\.pth)` .*`([0-9a-f]{64})` \|$", (FOLDER / "README.md").read_text(), re.M)


def test_every_file_is_described():
    assert sorted(name for name, _ in ROWS) == sorted(path.name for path in FOLDER.glob("*.pth")) and ROWS


@pytest.mark.parametrize(("name", "digest"), ROWS)
def test_a_checkpoint_is_whole_small_and_loads(name, digest):
    path = FOLDER / name
    assert sha256(path) == digest and path.stat().st_size <= 4e6
    content = load_checkpoint(path)
    network = read_config({"arch": content["config"]["arch"]}).build("arch")
    load_weights(network, content["model"], path)
    assert "optimizer" not in content and sum(content["cls_num_list"]) == 10847
    assert all(not tensor.is_floating_point() or tensor.abs().max() < 1e4 for tensor in content["model"].values())


def test_a_checkpoint_gives_its_accuracy(cifar_dir):
    """The balanced test set of the real CIFAR-100, with the smallest network."""
    name = "cifar100_ir100_softmax_200_epochs_seed1.pth"
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    run = load_run(FOLDER / name, overrides={"data_loader;args;data_dir": str(cifar_dir)})
    assert evaluate_test_set(run).distributions["uniform"].top1 == pytest.approx(float(row.split("|")[4]), abs=0.06)
