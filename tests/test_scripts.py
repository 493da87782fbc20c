"""The scripts as users run them: their results, and their one sentence when something is wrong."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, call_script, run_script, script

from commands.command_line import parse
from commands.command_line import run_script as run_as_script
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS
from trainer import train
from utils.checkpoint import load_checkpoint, save_checkpoint, sha256
from utils.errors import UserError
from utils.parse_config import read_json

DIGITS = "configs/config_digits_tade.json"
TEST_TIME = ROOT / "configs" / "test_time_digits_tade.json"
MEASURES = {"top1_interval", "balanced_accuracy", "macro_f1", "expected_calibration_error", "per_class_accuracy"}
ENTRY = {"images", "top1", "many", "medium", "few", "experts_top1", "weights"} | MEASURES


def run_job(name: str, checkpoint, config=(), **options) -> dict:
    """The main function of a script, as its command line would call it."""
    return script(name).main(config=dict(config), checkpoint=Path(checkpoint), **options)


def test_balanced_evaluation(digits_run):
    results = run_job("test", digits_run["last"])
    entry = results["distributions"]["uniform"]
    assert list(results["distributions"]) == ["uniform"] and set(entry) == ENTRY and entry["images"] == 500
    assert entry["top1"] == pytest.approx(digits_run["val_accuracy"])
    assert entry["experts_top1"] == pytest.approx([digits_run[f"val_expert{e}"] for e in (1, 2, 3)])
    assert entry["few"] == pytest.approx(digits_run["val_few"])


def test_all_distributions_and_their_files(digits_run, tmp_path):
    results = run_job("test_all_cifar", digits_run["last"], output=tmp_path)
    assert list(results["distributions"]) == list(CIFAR_DISTRIBUTIONS)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert written["checkpoint"]["sha256"] == sha256(digits_run["last"]) and written["checkpoint"]["epoch"] == 6
    assert written["seed"] == 1 and "equally" in written["protocol"]
    for entry in written["distributions"].values():
        assert set(entry) == ENTRY and entry["weights"] == pytest.approx([1 / 3] * 3)
    table = pd.read_csv(tmp_path / "results.csv", index_col="distribution")
    assert table["top1"].to_dict() == pytest.approx({k: v["top1"] for k, v in written["distributions"].items()})
    markdown = (tmp_path / "results.md").read_text()
    assert all(f"| {name} |" in markdown for name in (*CIFAR_DISTRIBUTIONS, "distribution"))
    assert written["checkpoint"]["sha256"] in markdown
    assert "<title>uniform, equal weights: " in (tmp_path / "accuracy.svg").read_text()


def test_test_time_training(digits_run):
    results = run_job("test_train_cifar", digits_run["last"], {**read_json(TEST_TIME), "aggregator;args;epochs": 3})
    folder = Path(digits_run["run_dir"]) / "results" / "last" / "test_train"
    assert json.loads((folder / "results.json").read_text())["distributions"].keys() == set(CIFAR_DISTRIBUTIONS)
    equal = run_job("test_all_cifar", digits_run["last"])["distributions"]
    for name, entry in results["distributions"].items():
        assert sum(entry["weights"]) == pytest.approx(1) and entry["equal_weights_top1"] == equal[name]["top1"]
        assert entry["learning"]["weights_after_pass"][0] == pytest.approx([1 / 3] * 3)
        assert entry["learning"]["note"] or entry["weights"] == entry["learning"]["weights_after_pass"][-1]
        assert entry["experts_top1"] == equal[name]["experts_top1"]
    assert len({tuple(e["weights"]) for e in results["distributions"].values()}) > 3


def test_streaming_is_a_mode(digits_run, tmp_path):
    short = {**read_json(TEST_TIME), "aggregator;args;epochs": 2}
    whole = run_job("test_train_cifar", digits_run["last"], short, output=tmp_path / "whole")
    one = run_job("test_train_cifar", digits_run["last"], read_json(TEST_TIME), output=tmp_path, stream=True)
    assert "stream of the test images in batches of 64" in one["protocol"]
    assert all(len(e["learning"]["weights_after_pass"]) == 2 for e in one["distributions"].values())
    assert one["distributions"]["forward50"]["weights"] != whole["distributions"]["forward50"]["weights"]
    other = run_job(
        "test_train_cifar", digits_run["last"], read_json(TEST_TIME), output=tmp_path, stream=True, stream_batch=16
    )
    assert other["distributions"]["uniform"]["weights"] != one["distributions"]["uniform"]["weights"]


def test_averaged_views_by_a_flag(digits_run, tmp_path):
    last = digits_run["last"]
    done = call_script("test_all_cifar", "-r", last, "--averaged_views", 2, "-o", tmp_path)
    assert done.returncode == 0 and "each of 3 averaged views" in done.stdout, done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert "each of 3 averaged views" in written["protocol"] and written["config"]["averaged_views"] == 2
    plain = run_job("test_all_cifar", last, output=tmp_path / "plain")
    assert written["distributions"]["uniform"]["experts_top1"] != plain["distributions"]["uniform"]["experts_top1"]
    learning = {**read_json(TEST_TIME), "averaged_views": 2, "aggregator;args;epochs": 1}
    learned = run_job("test_train_cifar", last, learning, output=tmp_path / "t")
    for name, entry in learned["distributions"].items():
        assert entry["equal_weights_top1"] == pytest.approx(written["distributions"][name]["top1"], abs=0.5)
    with pytest.raises(SystemExit):
        parse(train, "", ["-c", "any.json", "--averaged_views", "2"])


def test_averaged_views_of_a_training_config_count_in_testing(digits_config, tmp_path):
    digits_config["trainer"]["epochs"] = 1
    last = train({**digits_config, "averaged_views": 1})["last"]
    assert "each of 2 averaged views" in run_job("test", last, output=tmp_path / "on")["protocol"]
    off = run_job("test", last, {"averaged_views": 0}, output=tmp_path / "off")
    assert "un-augmented" in off["protocol"]


def test_one_expert_has_nothing_to_weight(digits_config, tmp_path):
    digits_config["arch"]["args"]["num_experts"] = 1
    digits_config["trainer"]["epochs"] = 1
    last = train(digits_config)["last"]
    assert run_job("test_all_cifar", last)["distributions"]["uniform"]["weights"] == [1]
    with pytest.raises(UserError, match="this network has one: use a network with num_experts of at least 2"):
        run_job("test_train_cifar", last, read_json(TEST_TIME), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_refused_leaves_no_folder(digits_run, tmp_path):
    with pytest.raises(UserError, match="batches have at least one image"):
        stream = {"stream": True, "stream_batch": 0}
        run_job("test_train_cifar", digits_run["last"], read_json(TEST_TIME), output=tmp_path / "out", **stream)
    with pytest.raises(UserError, match="There is no image file under"):
        run_job("predict_folder", digits_run["last"], output=tmp_path / "out", images=tmp_path)
    assert not (tmp_path / "out").exists()


def test_another_imbalance_ratio_is_refused(digits_run):
    loader = {"type": "ImbalanceDigitsDataLoader", "args": {"batch_size": 32, "imb_factor": 0.1}}
    with pytest.raises(UserError, match="was trained on 405 images in 10 classes, and the config's data has 486"):
        run_job("test", digits_run["last"], {"data_loader": loader})


def test_metrics_of_the_config_stand_in_the_results(digits_run, tmp_path):
    names = ["top5_accuracy", "expected_calibration_error", "per_class_accuracy"]
    entry = run_job("test", digits_run["last"], {"metrics": names}, output=tmp_path)["distributions"]["uniform"]
    assert set(entry) == ENTRY | set(names) and len(entry["per_class_accuracy"]) == 10
    assert sum(entry["per_class_accuracy"]) / 10 == pytest.approx(entry["top1"])  # 50 images a class
    assert "top5_accuracy" in (tmp_path / "results.md").read_text()


def test_command_lines(digits_run, tmp_path):
    """All the way through a process: train with overrides, go on, evaluate."""
    flags = ("--epochs", 1, "--save_dir", tmp_path, "--run_id", "one", "--num_experts", 2)
    done = run_script("train", "-c", DIGITS, *flags)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "Digits_LT_TADE" / "one" / "last.pth"
    done = run_script("train", "-r", last, "--epochs", 2)
    assert done.returncode == 0 and "Going on from" in done.stdout and load_checkpoint(last)["epoch"] == 2
    done = run_script("test_all_cifar", "-r", last, "-o", tmp_path / "out")
    assert done.returncode == 0 and "backward50" in done.stdout and (tmp_path / "out" / "results.md").exists()
    assert not done.stderr.strip()


NEW, STEPS = f"-c {DIGITS}", '{"type":"StepLR","args":{"step_size":0}}'


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", "-c configs/absent.json", "There is no config file configs/absent.json"),
        ("train", f"{NEW} --bs 0", "batch_size must be at least 1, not 0."),
        (
            "train",
            f"{NEW} --set loss;type=DiverseLoss",
            'Unknown type in config section "loss" "DiverseLoss": did you mean "DiverseExpertLoss"?',
        ),
        ("train", f"{NEW} -d gpu", 'Unknown device "gpu"'),
        ("train", f"{NEW} -d meta", 'Device "meta" is not supported'),
        ("train", f"{NEW} --seed -1", "seed must be at least 0"),
        ("train", f"{NEW} --set optimizer;args;lr=NaN", "must be of type float"),
        (
            "train",
            f"{NEW} --set 'trainer;monitor=max val_acc'",
            'Unknown value in trainer;monitor "val_acc": did you mean "val_accuracy"?',
        ),
        ("train", f"{NEW} --set 'lr_scheduler={STEPS}'", 'Config section "lr_scheduler" (StepLR)'),
        ("train", "-r absent.pth", "There is no checkpoint absent.pth"),
        ("test", "-r CKPT -o README.md", "The folder README.md for results cannot be created"),
        ("test", "-r README.md", "README.md is truncated or not a checkpoint"),
        (
            "test_all_cifar",
            """-r CKPT --set 'data_loader;args;distributions=["sideways3"]'""",
            'unknown test distribution "sideways3"',
        ),
        ("test", "-r CKPT --averaged_views -1", "averaged_views must be at least 0, not -1."),
        ("test", "-r CKPT --set arch;args;num_experts=4", "does not fit the architecture of the config"),
        ("test", "-r CKPT --set arch;args;num_classes=12", "num_classes is 12 and the data has 10 classes"),
        (
            "test_train_cifar",
            f"-c {TEST_TIME} -r CKPT --set aggregator;args;epochs=0",
            "epochs and batch_size must be at least 1",
        ),
    ],
)
def test_bad_input_gets_one_sentence_and_a_status(digits_run, name, arguments, message):
    done = call_script(name, *(digits_run["last"] if a == "CKPT" else a for a in shlex.split(arguments)))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "said"), [(BrokenPipeError, 141, ""), (KeyboardInterrupt, 130, "Stopped.\n")]
)
def test_a_closed_pipe_and_ctrl_c_end_a_script_with_their_status(monkeypatch, capfd, raised, status, said):
    def main(checkpoint, config=None):
        raise raised

    monkeypatch.setattr(sys, "argv", ["test.py", "-r", "any.pth"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(os, "dup2", lambda *descriptors: None)  # pytest needs it to give the output back
        run_as_script(main, "")
    assert stopped.value.code == status and capfd.readouterr() == ("", said)


def test_a_foreign_config_that_is_not_understood_gives_way_to_ones_own(digits_run, tmp_path):
    ours = load_checkpoint(digits_run["last"])
    foreign = {"state_dict": ours["model"], "epoch": 9, "config": {**ours["config"], "visualization": {}}}
    torch.save(foreign, tmp_path / "foreign.pth")
    done = call_script("test", "-c", DIGITS, "-r", tmp_path / "foreign.pth")
    assert done.returncode == 0, done.stderr


def test_weights_alone_evaluate_with_a_config_and_cannot_be_resumed(digits_run, tmp_path):
    weights = load_checkpoint(digits_run["last"])["model"]
    torch.save(weights, tmp_path / "weights.pth")
    done = call_script("test", "-r", tmp_path / "weights.pth")
    assert done.returncode == 2 and "carries no config" in done.stderr
    assert call_script("test", "-c", DIGITS, "-r", tmp_path / "weights.pth").returncode == 0
    save_checkpoint(tmp_path / "bare.pth", {"model": weights})
    done = call_script("train", "-c", DIGITS, "-r", tmp_path / "bare.pth", "--save_dir", tmp_path)
    assert done.returncode == 2 and "weights alone" in done.stderr


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "checkpoints" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists())
PACKAGES += "|configs|benchmarks|tests|examples|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_file_and_link_on_a_page_exists(page):
    text = page.read_text()
    if page.name == "CONTRIBUTING.md":  # its recipes make files of their own
        text = text.partition("## Add")[0]
    for module, file in re.findall(r"python (?:-m ([\w.]+)|([\w./]+\.py))", text):
        path = Path(module.replace(".", "/") + ".py") if module else Path(file)
        assert (ROOT / path).exists() or module in ("venv", "pytest"), path
    for path in re.findall(rf"(?<![\w/.])(?:{PACKAGES})/[\w./*]+", text):
        if not path.startswith("model/pretrained_model_places") and "DATA" not in path:  # for the user to fill in
            assert list(ROOT.glob(path.rstrip("."))), path
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for page_name, anchor in re.findall(r"\]\(([^)#\s]*)#([\w-]+)\)", text):
        target = (page.parent / page_name) if page_name else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, anchor
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)


def test_the_readme_is_short_and_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1600 and "make demo" in readme and "make test" in readme
    assert all(f"(docs/{page.name})" in readme for page in (ROOT / "docs").glob("*.md"))
