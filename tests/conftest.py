"""What the tests share: golden figures, the inputs they belong to, a tiny run on the digits, and the real CIFAR-100."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import train
from utils.parse_config import read_json

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
#: Cases of each fuzz test; `make test-slow` sets 10,000.
CASES = int(os.environ.get("FUZZ_CASES", "500"))
SLOW = CASES >= 1000
#: Files that take longest: they come first where several run at a time, so that none is left alone at the end.
LONGEST = [f"test_{name}" for name in "reproduce demo trainer processes scripts on_disk evaluation fuzz".split()]
SHARED = ROOT.parent / "shared"  # figures and data of the developers, absent on a user's machine


def pytest_collection_modifyitems(items) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def golden_random(name: str) -> np.random.RandomState:
    """The generator that the reference's inputs of this name came from."""
    return np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)


def golden_json(name: str):
    return json.loads((GOLDEN / name).read_text())


def golden_weights(state: dict) -> dict:
    """The weights that the reference's figures were computed with, for the entries of a state dict."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros_like(tensor)
            continue
        shape = tuple(tensor.shape)
        x = golden_random(name).standard_normal(shape)
        if name.endswith("running_mean"):
            x = 0.1 * x
        elif name.endswith("running_var"):
            x = 1 + 0.1 * np.abs(x)
        elif len(shape) == 1:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        else:
            x = x * (0.7 * np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else np.sqrt(1 / shape[-1]))
        weights[name] = torch.from_numpy(x.astype(np.float32))
    return weights


def script(name: str):
    """A script at the top of the project as a module (`import test` would find the standard library's)."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A script in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def call_script(name: str, *arguments) -> subprocess.CompletedProcess:
    """A script as the shell starts it, but in this process: importing torch anew takes seconds."""
    out, errors, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    status = 0
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            runpy.run_path(f"{name}.py", run_name="__main__")
    except SystemExit as stopped:
        status = stopped.code
        if isinstance(status, str):  # what the interpreter does with it
            errors.write(status + "\n")
            status = 1
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(name, status or 0, out.getvalue(), errors.getvalue())


@pytest.fixture
def digits_config(tmp_path) -> dict:
    """Two epochs of a narrow network on the digits, in a few seconds; runs go to tmp_path."""
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    config["arch"]["args"] |= {"layer2_output_dim": 16, "layer3_output_dim": 16}
    config["trainer"] |= {"epochs": 2, "save_dir": str(tmp_path), "save_period": 1, "tensorboard": False}
    config["data_loader"]["args"] |= {"batch_size": 64, "distributions": ["forward10", "uniform", "backward10"]}
    return config


def start_small_run(folder: Path, **trainer) -> dict:
    """Train a tiny network for one epoch: {"last": path, "config": the config, now with two epochs}."""
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    config["arch"]["args"] |= {"num_experts": 2, "layer2_output_dim": 16, "layer3_output_dim": 16}
    config["trainer"] |= {"epochs": 1, "save_dir": str(folder), "tensorboard": False, **trainer}
    config["data_loader"]["args"] |= {"batch_size": 128, "distributions": ["uniform"]}
    last = train(config, run_id="one")["last"]
    config["trainer"]["epochs"] = 2
    return {"last": last, "config": config}


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory) -> str:
    """Path of a fully trained network's checkpoint: that of `make demo`, 16 channels wide.

    A copy, as results are written beside a checkpoint. Tests of what a network has learned use it: the accuracy of a
    network trained here would differ between processors.
    """
    return str(shutil.copy(GOLDEN / "digits_tade.pth", tmp_path_factory.mktemp("trained") / "last.pth"))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> dict:
    """Results of a short training on the digits, shared by the tests that need a checkpoint."""
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    config["trainer"] |= {"epochs": 6, "save_dir": str(tmp_path_factory.mktemp("runs")), "save_period": 3}
    return train(config)


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory) -> Path:
    """Folder with the official CIFAR-100 files; skips where there are none."""
    if (ROOT / "data" / "CIFAR100" / "cifar-100-python" / "train").exists():
        return ROOT / "data" / "CIFAR100"
    unpack = SHARED / "tools" / "unpack_cifar100.py"
    if not unpack.exists():
        pytest.skip("the CIFAR-100 files are not in data/CIFAR100")
    folder = tmp_path_factory.mktemp("CIFAR100")
    subprocess.run([sys.executable, str(unpack), str(folder)], check=True, capture_output=True)
    return folder
