"""Every benchmark runs, at a size that takes a second: what it prints is complete, how fast it was is not looked at."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_on_disk import folder  # noqa: F401 (a fixture)

from benchmarks import (
    common,
    expert_priors,
    expert_weights,
    file_checks,
    full_size_check,
    image_pipeline_speed,
    memory,
    test_time_speed,
    train_step,
)
from data_loader.data_loaders import ImbalanceDigitsDataLoader
from model.model import ResNet10Model
from utils.parse_config import read_json

TINY = {f"layer{stage}_output_dim": 16 for stage in (2, 3)}


@pytest.fixture(autouse=True)
def threads_stay():
    """Some benchmarks set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, arguments) -> what it printed."""

    def started(module, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return started


def test_expert_priors(run, digits_run):
    printed = run(expert_priors, digits_run["last"], "--tilt", 0, 9)
    titles = ("as they are", "freed of priors", "tilted by 0", "tilted by 9")
    rows = re.findall(rf"(\w+) +({'|'.join(titles)}) +experts ([\d. ]+)   mean ([\d.]+)", printed)
    names = ("forward50", "forward10", "uniform", "backward10", "backward50")
    assert [row[:2] for row in rows] == [(name, title) for name in names for title in titles]
    assert all(len(row[2].split()) == 3 for row in rows)
    means = {row[:2]: float(row[3]) for row in rows}
    assert means["uniform", "as they are"] == pytest.approx(digits_run["val_accuracy"], abs=0.051)
    assert all(means[name, "tilted by 0"] == means[name, "as they are"] for name in names)
    assert means["forward50", "tilted by 9"] > means["uniform", "tilted by 9"] > means["backward50", "tilted by 9"]


def test_expert_weights(run, digits_run):
    printed = run(expert_weights, digits_run["last"], "--weights", 1, 0, 0, "--steps", 4)
    found = re.findall(
        r"^ *(\w+) +(equal|given|most [\w() ]+?) +((?:[\d.]+ ){2}[\d.]+) +([\d.]+) +([\d.]+)$", printed, re.M
    )
    rows = {row[:2]: row[2:] for row in found}
    assert len(found) == len(rows) == 5 * 4
    bound, stable = rows["uniform", "most accurate (bound)"], rows["uniform", "most stable"]
    assert rows["uniform", "equal"][0] == "0.33 0.33 0.33" and rows["uniform", "given"][0] == "1.00 0.00 0.00"
    assert float(rows["uniform", "equal"][1]) == pytest.approx(digits_run["val_accuracy"], abs=0.051)
    assert float(rows["uniform", "given"][1]) == pytest.approx(digits_run["val_expert1"], abs=0.051)
    assert float(bound[1]) >= float(stable[1]) and float(stable[2]) >= float(bound[2])
    assert float(stable[2]) >= float(rows["uniform", "given"][2])  # a point of the grid


def test_file_checks(run, monkeypatch):
    monkeypatch.setattr(file_checks, "ROUNDS", 1)
    monkeypatch.setattr(file_checks, "IMAGES", {"train": 1200, "val": 300})
    monkeypatch.setattr(file_checks, "ResNet50Model", partial(ResNet10Model, layer4_output_dim=16, **TINY))
    printed = run(file_checks)
    assert "Lists of 1,200 and 300 images, compared" in printed and len(re.findall(r" [\d.]+ s$", printed, re.M)) == 3


def test_full_size_check(run, folder, monkeypatch):  # noqa: F811
    name = "config_places_lt_resnet152_tade.json"
    config = read_json(ROOT / "configs" / name)
    config["arch"] = {"type": "ResNet10Model", "args": {"num_classes": 365, "num_experts": 2, **TINY}}
    monkeypatch.setattr(full_size_check, "read_json", lambda path: config)
    monkeypatch.setattr(full_size_check, "DATA_SETS", {name: full_size_check.DATA_SETS[name]})
    printed = run(full_size_check, folder / "train.txt", folder, "--images", 8, "--image_size", 32)
    assert re.match(r"Places_LT: 62500 training images, .* logits \[8, 2, 365\] in", printed)


def test_image_pipeline_speed(run, folder):  # noqa: F811
    printed = run(image_pipeline_speed, folder / "train.txt", folder, "--images", 3, "--repeats", 1)
    assert len(re.findall(r"[\d.]+ images/s", printed)) == 3
    assert float(re.search(r"largest difference of a normalized value: (.*)", printed)[1]) < 0.1


def test_memory(run, tmp_path, monkeypatch):
    """With threads in place of its processes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(memory, "get_logger", lambda verbosity: None)
    patched = ImbalanceDigitsDataLoader  # put back afterwards
    monkeypatch.setattr(patched, "__iter__", patched.__iter__)
    run(memory, "--configs", "digits_softmax", "--steps", 1, "--output", tmp_path / "memory.json")
    (row,) = json.loads((tmp_path / "memory.json").read_text())["peaks_gib"]
    assert row["config"] == "digits_softmax" and 0.1 < row["train"] <= row["evaluate"] < 20  # of one process


def test_test_time_speed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(common.RandomCIFAR100, "per_class", 1)
    parts = {"forward2": np.arange(8), "uniform": np.arange(12)}
    monkeypatch.setattr(common.RandomCIFAR100, "test_distributions", lambda self: parts)
    monkeypatch.setattr(test_time_speed, "ResNet32Model", partial(test_time_speed.ResNet32Model, **TINY))
    output = tmp_path / "speed.json"
    printed = run(test_time_speed, "--images", 100, "--repeats", 1, "-d", "cpu", "--output", output)
    content = json.loads(output.read_text())
    assert set(content["results"]) == {"evaluation", "test-time training"} and content["distributions"] == 2
    assert printed.count("times faster") == 2 and content["command"].startswith("python ")


def test_train_step(run, tmp_path, monkeypatch):
    """With threads in place of its processes."""
    monkeypatch.setattr(
        train_step,
        "ProcessPoolExecutor",
        lambda workers, context, start, own: ThreadPoolExecutor(workers, "", start, own),
    )
    config = read_json(train_step.CONFIG)
    config["arch"]["args"] |= {"num_experts": 2, **TINY}
    config["data_loader"]["args"] |= {"batch_size": 8, "imb_factor": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(train_step, "CONFIG", tmp_path / "config.json")
    monkeypatch.setattr(train_step, "MATRIX", {"cpu": 32})
    monkeypatch.setattr(train_step, "automatic_precision", lambda device: ("fp32", "so that all is quick"))
    monkeypatch.setattr(common.RandomCIFAR100, "per_class", 5)
    monkeypatch.setattr(common.RandomCIFAR100, "largest_class", 5)
    output = tmp_path / "steps.json"
    options = [*"--rounds 1 --threads 1 --no_compile --profile --epoch".split(), "--data_dir", tmp_path]
    options += ["--output", output]
    printed = run(train_step, *options)
    content = json.loads(output.read_text())
    names = [row["name"] for row in content["steps"]]
    assert names == ["plain", "fp32"] and content["images"] == "random" and content["rounds"] == 1
    assert content["steps"][0]["clock"]["ratio"] == 1 and len(content["profile"]["1"]) == 12
    assert printed.count("times plain") == 4
    assert printed.count("whole epoch, fp32, 1 thread(s): ") == 1
    assert content["epoch_images_per_second"]["1"]["fp32"]["clock"] > 0
