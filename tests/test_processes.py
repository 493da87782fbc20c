"""Several processes, as torchrun starts them: one network, one result, one end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_on_disk import folder  # noqa: F401 (a fixture)
from torch import nn

from commands.jobs import run_predict_folder, run_test_all, run_test_train
from model.model import ResNet32Model
from trainer import train
from trainer.build import synchronize_batch_norm
from trainer.trainer import Trainer
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.parse_config import read_json

VIEWS = {"averaged_views": 1}
ADAPTING = {**read_json(ROOT / "configs" / "test_time_digits_tade.json"), "aggregator;args;epochs": 2}


def torchrun(*arguments, **options) -> subprocess.Popen:
    """torchrun with two processes, in a session of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        + [str(argument) for argument in arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        **options,
    )


def frozen_norms(config: dict) -> list[str]:
    """Names of the batch norms of a config's network: frozen, they normalize by their running statistics."""
    network = ResNet32Model(**config["arch"]["args"])
    return [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def double_precision():
    """Train in float64: in float32 rounding grows tenfold with every step, and hides what else may differ."""
    step, validate = Trainer.train_step, Trainer.validate
    Trainer.train_step = lambda self, images, *rest: step(self, images.double(), *rest)
    Trainer.validate = lambda self, epoch: {"val_accuracy": 0.0}
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        Trainer.train_step, Trainer.validate = step, validate


# --- everything that one start of two processes can show ---

TWO_PROCESSES = """
import json, os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from test_processes import ADAPTING, VIEWS, double_precision, frozen_norms
from trainer import train
from commands.jobs import run_predict_folder, run_test, run_test_all, run_test_train
from trainer.trainer import Trainer
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

tmp = Path(sys.argv[1])
digits, lists = (json.loads((tmp / name).read_text()) for name in ("digits.json", "lists.json"))
found = {}


def equal_everywhere(tensor):
    every = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(every, tensor)
    return torch.equal(*every)


kept, original, step = [], Trainer.train_epoch, Trainer.train_step


def train_epoch(self, epoch):
    values = original(self, epoch)
    kept.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
    return values


Trainer.train_epoch = train_epoch
results = train(digits, device="cpu", run_id="two")
found["one network"] = all(map(equal_everywhere, kept))
found["one result"] = len(set(distributed.objects_of_all((results["run_dir"], results["loss"])))) == 1
straight = load_checkpoint(results["last"])["model"]
distributed.barrier()

steps = []
def stopped_in_one(self, *arguments):
    steps.append(1)
    if len(steps) == 6 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # one process alone gets it
    return step(self, *arguments)

Trainer.train_step = stopped_in_one
try:
    train(digits, device="cpu", run_id="stopped")
except UserError as error:
    found["stopped"] = [error.status, error.shared, str(error)]
Trainer.train_step = step
state = load_checkpoint(tmp / "Digits_LT_TADE" / "stopped" / "last.pth")
found["position"] = [state["epoch"], state["mid_epoch"]["step"], len(state["mid_epoch"]["processes"])]
resumed = train(None, resume=tmp / "Digits_LT_TADE" / "stopped" / "last.pth", device="cpu")
state = load_checkpoint(resumed["last"])["model"]
found["resumed"] = all(torch.equal(tensor, state[name]) for name, tensor in straight.items())
found["same loss"] = resumed["loss"] == results["loss"]

with double_precision():
    digits["trainer"]["epochs"] = 1
    digits["freeze"] = frozen_norms(digits)
    found["frozen"] = train(digits, device="cpu", run_id="frozen")["loss"]

for name in ("broken", "even"):
    lists["data_loader"]["args"]["train_list"] = str(tmp / f"{name}.txt")
    found[name] = train(lists, device="cpu", run_id=name)["loss"]
try:
    train({**lists, "data_loader;args;batch_size": 3}, device="cpu")
except UserError as error:
    found["refused"] = str(error)
try:
    train(digits, device="cpu", run_id="frozen")
except UserError as error:
    found["used"] = str(error)

last = Path(results["last"])
for name, job, config in (("all", run_test_all, VIEWS), ("train", run_test_train, ADAPTING)):
    run = job(config=config, checkpoint=last, device="cpu", output=tmp / "two" / name)
    found[name] = distributed.objects_of_all(run["distributions"])[1]  # the second process knows, the first one writes
pictures = tmp / "Lists" / "even" / "last.pth"
run_predict_folder(pictures, Path(sys.argv[2]), ADAPTING, "cpu", tmp / "two" / "p")
whole = run_test(pictures, device="cpu", output=tmp / "two" / "broken")["distributions"]["uniform"]["images"]
found["whole"] = distributed.objects_of_all(whole)
if distributed.is_main():
    (tmp / "found.json").write_text(json.dumps(found))
distributed.barrier()
distributed.stop()
sys.stdout.flush()
os._exit(0)  # all is checked; tearing down the gloo threads of an interpreter has aborted once in a while
"""


@pytest.fixture
def small_config(digits_config) -> dict:
    """Two epochs of four steps; the last batch has 21 images, so that shards differ."""
    digits_config["arch"]["args"]["num_experts"] = 2
    digits_config["data_loader"]["args"] |= {"batch_size": 128, "distributions": ["forward10", "backward10"]}
    digits_config["trainer"] |= {"mixup_alpha": 0.0, "save_period": 50}
    digits_config["optimizer"]["args"]["lr"] = 0.01
    return digits_config


def list_config(folder: Path, tmp_path: Path) -> dict:  # noqa: F811
    """Two lists of 22 images in batches of 4: in one of them a file is broken, so that a shard has one image."""
    lines = (folder / "train.txt").read_text().splitlines()
    (folder / "broken.png").write_bytes(b"")
    (tmp_path / "broken.txt").write_text("\n".join(["broken.png 0", *lines]) + "\n")
    test = (folder / "test.txt").read_text()
    (tmp_path / "test.txt").write_text(test + "broken.png 0\n")
    (tmp_path / "even.txt").write_text("\n".join(lines) + "\n")
    data = {
        "data_dir": str(folder),
        "train_list": str(tmp_path / "even.txt"),
        "test_list": str(tmp_path / "test.txt"),
        "batch_size": 4,
        "image_size": 32,
        "num_workers": 0,
        "distributions": ["uniform"],
        "on_bad_image": "skip",
    }
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    config["arch"]["args"] |= {"num_classes": 3, "num_experts": 2}
    config["trainer"] |= {"epochs": 1, "save_dir": str(tmp_path), "tensorboard": False}
    return {**config, "name": "Lists", "data_loader": {"type": "ListDataLoader", "args": data}}


def test_two_processes(small_config, tmp_path, folder):  # noqa: F811
    (tmp_path / "digits.json").write_text(json.dumps(small_config))
    (tmp_path / "lists.json").write_text(json.dumps(list_config(folder, tmp_path)))
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    process = torchrun(tmp_path / "two.py", tmp_path, folder)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["one network"] and found["one result"]
    state = load_checkpoint(tmp_path / "Digits_LT_TADE" / "two" / "last.pth")
    assert state["epoch"] == 2 and not any(name.startswith("module.") for name in state["model"])

    # A signal to one of them stops both after the same step, and they go on bit for bit.
    status, shared, message = found["stopped"]
    assert status == 128 + signal.SIGTERM and shared and "everything up to epoch 2, step 2 of 4" in message
    assert found["position"] == [2, 2, 2] and found["resumed"] and found["same loss"]

    # Without batch statistics, which each takes of its own images, they compute what one process computes.
    small_config["trainer"]["epochs"] = 1
    small_config["freeze"] = frozen_norms(small_config)
    with double_precision():
        one = train(small_config, device="cpu", run_id="one")["loss"]
    assert found["frozen"] == pytest.approx(one, rel=1e-6)

    # Lists: a shard that has lost an image leaves the batch out in both; too small ones are refused at the start.
    assert found["broken"] > 0 and found["even"] > 0 and "broken.png is an empty file" in out
    assert found["refused"].startswith("batch_size is 3 for all of 2 processes")
    assert "holds a run already" in found["used"]

    # They share the images of an evaluation, and one writes what one process would have written.
    for name, job, config in (
        ("all", run_test_all, VIEWS),
        ("train", run_test_train, ADAPTING),
    ):
        last = tmp_path / "Digits_LT_TADE" / "two" / "last.pth"
        alone = job(config=config, checkpoint=last, device="cpu", output=tmp_path / "alone" / name)["distributions"]
        written = json.loads((tmp_path / "two" / name / "results.json").read_text())["distributions"]
        assert written == found[name] == json.loads(json.dumps(alone))
    last, images = tmp_path / "Lists" / "even" / "last.pth", folder
    run_predict_folder(config=ADAPTING, checkpoint=last, device="cpu", output=tmp_path / "p", images=images)
    assert (tmp_path / "p" / "predictions.csv").read_text() == (tmp_path / "two" / "p" / "predictions.csv").read_text()

    # An image that cannot be decoded is left out by both, whoever of them has met it.
    assert found["whole"] == [12, 12]
    for job in ("p", "broken"):
        listed = (tmp_path / "two" / job / "bad_images.csv").read_text().splitlines()
        assert len(listed) == 2 and listed[1].startswith("broken.png,is an empty file,")


# --- ends ---


def processes_of(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def wait_for(condition, seconds: float) -> float:
    """Seconds until a condition holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it does not end"
        time.sleep(0.1)
    return time.monotonic() - start


def start_training(config: dict, tmp_path: Path) -> tuple[subprocess.Popen, list[int]]:
    """train.py in two processes, as soon as the first epoch is over."""
    config["trainer"] |= {"epochs": 1000, "save_period": 1000}
    config["data_loader"]["args"]["batch_size"] = 32
    (tmp_path / "digits.json").write_text(json.dumps(config))
    launcher = torchrun("train.py", "-c", tmp_path / "digits.json", "--run_id", "ends", "-d", "cpu")
    last = tmp_path / config["name"] / "ends" / "last.pth"
    wait_for(lambda: last.exists() or launcher.poll() is not None, 200)
    assert launcher.poll() is None, launcher.communicate()[1]
    return launcher, processes_of(launcher.pid)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_where_one_process_dies_the_others_say_so_and_end(small_config, tmp_path):
    launcher, (first, second) = start_training(small_config, tmp_path)
    os.kill(second, signal.SIGKILL)
    assert wait_for(lambda: not is_alive(first), 60) < 30
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    sentence = "Another process of this run has ended, see what it said."
    assert errors.count(sentence) == 1 and "go on with: python train.py -r" in errors


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_launcher_ends_its_processes_which_save_their_state(small_config, tmp_path, number):
    """Killed it cannot end them: they notice it themselves."""
    launcher, processes = start_training(small_config, tmp_path)
    os.kill(launcher.pid, number)
    assert wait_for(lambda: not any(map(is_alive, processes)), 60) < 30
    _, errors = launcher.communicate(timeout=60)
    signal_name = "SIGTERM" if number == signal.SIGKILL else number.name
    assert errors.count(f"Stopped by {signal_name}.") == 1 and "step" in errors
    state = load_checkpoint(tmp_path / small_config["name"] / "ends" / "last.pth")
    assert "mid_epoch" in state or state["selected_by"] == "the last so far"


# --- batch norm ---


def test_synchronized_batch_norm_is_torchs_and_needs_gpus():
    network = ResNet32Model(10, num_experts=2)
    before = network.state_dict()
    synchronize_batch_norm(network, torch.device("cuda"))
    after = network.state_dict()
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())
    assert any(type(module) is nn.SyncBatchNorm for module in network.modules())
    assert list(before) == list(after) and all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    with pytest.raises(UserError, match="sync_batchnorm needs GPUs"):
        synchronize_batch_norm(network, torch.device("cpu"))
