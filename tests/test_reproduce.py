"""reproduce.py as a user runs it, stopped and not; on the digits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT

from comparison import run as comparison
from comparison.plan import (
    Run,
    method_config,
    own_name,
    plan_runs,
    quick_changes,
    scaled_schedule,
    write_own_configs,
)
from comparison.tables import accuracy_table, mean_and_deviation
from trainer.registry import make_config
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.lock import locked
from utils.parse_config import read_json

OPTIONS = [
    "--data",
    "digits",
    "--epochs",
    "2",
    "--jobs",
    "1",
    "-d",
    "cpu",
    "--set",
    "data_loader;args;batch_size=128",
    "--set",
    'data_loader;args;distributions=["forward10", "uniform", "backward10"]',
    "--set",
    "aggregator;args;epochs=1",
    "--set",
    "averaged_views=0",
    "--set",
    "trainer;tensorboard=false",
]


@pytest.fixture(autouse=True)
def environment():
    """A comparison in this process sets threads and memory for its workers: not for the tests to come."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def start(output: Path, *given: str, console: int = subprocess.PIPE) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "reproduce.py", *OPTIONS, "-o", str(output), *given],
        cwd=ROOT,
        text=True,
        stdout=console,
        stderr=subprocess.STDOUT,
    )


def run(output: Path, *given: str) -> str:
    process = start(output, *given)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("reproduce")
    return output, run(output, "--methods", "softmax", "tade")


def test_report_table_and_plots(finished):
    output, text = finished
    report = (output / "report.md").read_text()
    assert report in text
    for expected in (
        "| method | seeds | forward10 | uniform | backward10 |",
        "TADE, test-time training",
        "## digits, best epoch",
        "| digits | Softmax | 0.46 |",
        "python test_train_cifar.py -c configs/test_time_digits_tade.json",
    ):
        assert expected in report, expected
    frame = pd.read_csv(output / "results.csv")
    rows = [
        "Softmax",
        "Softmax, estimated prior",
        "TADE, equal weights",
        "TADE, test-time training",
        "TADE, estimated prior",
    ]
    last = frame[frame["checkpoint"] == "last epoch"]
    assert list(last["row"].unique()) == rows and len(last) == len(rows) * 3  # distributions
    best = frame[frame["checkpoint"] == "best epoch"]
    assert list(best["row"].unique()) == [row for row in rows if "prior" not in row]
    learned = frame[frame["row"] == "TADE, test-time training"]
    assert learned[["w1", "w2", "w3"]].sum(axis=1).tolist() == pytest.approx([1] * 6)
    page = (output / "report.html").read_text()
    for expected in (
        "in the mean over 3",
        "TADE, equal weights",
        'class="wide per-class"',
        "Expert weights, TADE",
        "SHA-256",
    ):
        assert expected in page, expected
    for name in ("accuracy", "groups", "tade_weights"):
        assert (output / f"digits_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(finished, monkeypatch, capfd):
    output, first = finished
    monkeypatch.chdir(ROOT)
    checkpoint = output / "Digits_LT_TADE" / "seed1" / "last.pth"
    before = checkpoint.stat().st_mtime_ns
    assert comparison.main("", [*OPTIONS, "-o", str(output), "--methods", "softmax", "tade"]) == 0
    text = capfd.readouterr().out
    assert checkpoint.stat().st_mtime_ns == before
    assert "training" not in text.split("# Comparison")[0] and "test_all of" not in text
    assert text.split("## digits, last epoch")[1] == first.split("## digits, last epoch")[1]


def planned(output: Path, *assignments: str) -> Run:
    """The TADE run of `finished`, in this process."""
    given = [value for flag, value in zip(OPTIONS, OPTIONS[1:], strict=False) if flag == "--set"]
    return plan_runs(["digits"], ["tade"], [1], output, epochs=2, assignments=[*given, *assignments], device="cpu")[0]


def test_a_finished_run_is_left_alone_and_other_options_do_not_mix_with_it(finished, monkeypatch):
    output, _ = finished
    monkeypatch.chdir(ROOT)
    results = output / "Digits_LT_TADE" / "seed1" / "results" / "last" / "test_train" / "results.json"
    before = results.stat().st_mtime_ns
    threads = torch.get_num_threads()
    comparison.finish(planned(output), threads)
    assert results.stat().st_mtime_ns == before
    message = r"holds a run with other options \(optimizer;args;lr 0.05, now 0.01\): choose another --output"
    with pytest.raises(UserError, match=message):
        comparison.finish(planned(output, "optimizer;args;lr=0.01"), threads)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
def test_killed_at_any_moment_it_ends_with_the_same_table(finished, tmp_path):
    """SIGKILL when a stage has begun, in each stage once; nothing of it is left running; the figures are the same."""
    stop_when(tmp_path, lambda text: "training, 2 epochs" in text)
    stop_when(tmp_path, lambda text: (tmp_path / "Digits_LT_TADE" / "seed1" / "last.pth").exists())
    for moment in ("training goes on", "test_all of last", "test_train of last"):
        stop_when(tmp_path, lambda text, moment=moment: moment in text)
    run(tmp_path, "--methods", "tade")
    expected, found = (pd.read_csv(folder / "results.csv") for folder in (finished[0], tmp_path))
    expected = expected[expected["method"] == "tade"].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected)


def stop_when(output: Path, reached: Callable[[str], bool]) -> None:
    """Start, SIGKILL once `reached` holds of what it has printed, and see that its worker ends as well."""
    console = output.with_name(output.name + ".txt")
    with open(console, "w") as file:
        process = start(output, "--methods", "tade", console=file.fileno())
    deadline = time.monotonic() + 120
    while not reached(console.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, console.read_text()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(runs(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("own", "experts"), [("custom_example", 3), ("digits_tade", 3), ("cifar100_ir100_softmax", 1)])
def test_methods_on_the_data_of_ones_own_config(own, experts, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / f"config_{own}.json"
    files = write_own_configs(path, ["softmax", "ride", "tade"], tmp_path / "out")
    configs, base = {method: read_json(file) for method, file in files.items()}, read_json(path)
    assert [c["loss"]["type"] for c in configs.values()] == ["CrossEntropyLoss", "RIDELoss", "DiverseExpertLoss"]
    assert [c["arch"]["args"]["num_experts"] for c in configs.values()] == [1, 3, 3]
    assert [c["arch"]["args"]["use_norm"] for c in configs.values()] == [False, True, True]
    late = configs["ride"]["loss"]["args"]["reweight_epoch"] / base["trainer"]["epochs"]
    assert late == pytest.approx(0.8, abs=0.01)
    for config in configs.values():
        for section in ("data_loader", "optimizer", "lr_scheduler", "trainer"):
            assert config[section] == base[section]
    kept = "softmax" if experts == 1 else "tade"
    assert {k: v for k, v in configs[kept].items() if k != "name"} == {k: v for k, v in base.items() if k != "name"}
    runs = plan_runs([own_name(path)], list(files), [1], tmp_path / "out", configs=files)
    assert len({run.folder for run in runs}) == 3 and [len(run.testing) for run in runs] == [2, 2, 3]
    assert str(files["ride"]) in runs[1].commands[0]


def test_stages_that_start_from_weights_keep_their_width(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = {**read_json(ROOT / "configs" / "config_custom_example.json"), "weights": "torchvision"}
    own["arch"] = {"type": "ResNet18Model", "args": {"num_classes": 101, "num_experts": 4}}
    own["loss"] = {"type": "CrossEntropyLoss", "args": {}}
    arguments = method_config(own, "tade")["arch"]["args"]
    assert arguments["reduce_dimension"] is False and arguments["num_experts"] == 4 and arguments["use_norm"]


def test_one_command_compares_on_ones_own_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    own = read_json(ROOT / "configs" / "config_digits_softmax.json")
    own["trainer"]["epochs"] = 1
    own["lr_scheduler"]["args"] |= {"step1": 1, "step2": 1, "warmup_epoch": 0}
    (tmp_path / "config_mine.json").write_text(json.dumps(own))
    given = ["-c", str(tmp_path / "config_mine.json"), "--methods", "softmax", "-o", str(tmp_path / "out")]
    assert comparison.main("", [*OPTIONS[4:], *given]) == 0
    assert "| Softmax, estimated prior | 1 |" in capfd.readouterr().out and (tmp_path / "out" / "report.html").exists()
    with pytest.raises(SystemExit):
        comparison.main("", ["-c", "any.json", "--data", "digits"])


def test_a_shortened_schedule_keeps_its_shape():
    config = make_config(read_json(ROOT / "configs" / "config_cifar100_ir100_ride.json"))
    assert scaled_schedule(config, 20) == [
        "trainer;epochs=20",
        "lr_scheduler;args;step1=16",
        "lr_scheduler;args;step2=18",
        "lr_scheduler;args;warmup_epoch=5",
        "loss;args;reweight_epoch=16",
    ]
    config = read_json(ROOT / "configs" / "config_imagenet_lt_resnext50_tade.json")
    assert scaled_schedule(make_config(config), 90) == ["trainer;epochs=90", "lr_scheduler;args;T_max=90"]
    config["lr_scheduler"] = {"type": "MultiStepLR", "args": {"milestones": [60, 120]}}
    assert scaled_schedule(make_config(config), 90)[1] == "lr_scheduler;args;milestones=[30, 60]"


def test_quick_takes_distributions_that_the_data_set_has():
    config = make_config(read_json(ROOT / "configs" / "config_iNaturalist_resnet50_tade.json"))
    assert quick_changes(config)[0] == 'data_loader;args;distributions=["forward3", "uniform", "backward3"]'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "softmaks"], 'Unknown method for cifar100_ir100 "softmaks": did you mean "softmax"'),
        (["--data", "digit"], 'Unknown data set "digit": did you mean "digits"'),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--set", "optimizer;args;learning_rate=1"], 'argument of SGD in config section "optimizer" "learning_rate"'),
        (
            ["--set", "aggregator;args;epoch=1"],
            'argument of StabilityAggregator in config section "aggregator" "epoch"',
        ),
        (["--methods", "softmax", "--set", "aggregatorzz=1"], 'key in the config "aggregatorzz"'),
        (["--set", "trainer;precision=bf32"], "precision must be"),
        (["--seeds", "1", "1"], "would both be"),
        (["--set", "seed=5"], "--set cannot change seed"),
        (["--set", "name=x"], "--set cannot change name"),
        (["--data", "imagenet_lt_resnext50"], "ImageNet_LT_train.txt cannot be read"),
    ],
)
def test_bad_options_stop_before_anything_runs(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        comparison.main("", [*options, "-o", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*/*"))


def test_two_runs_side_by_side_one_of_which_fails(tmp_path):
    """A run whose folder holds something else is left as it is and named; the other one is finished."""
    other = tmp_path / "Digits_LT_TADE" / "seed1"
    other.mkdir(parents=True)
    save_checkpoint(other / "model_best.pth", {"model": {"a": torch.zeros(1)}, "epoch": 7})
    process = start(tmp_path, "--methods", "softmax", "tade", "--jobs", "2")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "2 at a time" in text
    assert "has model_best.pth but no last.pth" in text and "1 of 2 runs failed" in text
    assert "Missing, because they failed: digits tade seed 1" in (tmp_path / "report.md").read_text()
    assert [path.name for path in other.iterdir()] == ["model_best.pth"]
    assert set(pd.read_csv(tmp_path / "results.csv")["method"]) == {"softmax"}


def test_an_unexpected_error_is_one_sentence_and_its_traceback_is_in_the_log(tmp_path, monkeypatch):
    runs = plan_runs(["digits"], ["softmax"], [1], tmp_path)

    def broken(config, **options):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(comparison, "train", broken)
    with pytest.raises(UserError, match=r"RuntimeError: CUDA out of memory; see .*seed1\.log"):
        comparison.finish(runs[0], torch.get_num_threads())
    assert "Traceback" in runs[0].log.read_text()


def test_a_folder_belongs_to_one_comparison_at_a_time(tmp_path):
    with locked(tmp_path, "choose another --output"), pytest.raises(UserError, match="Process .* is at work in"):
        comparison.main("", ["--data", "digits", "--methods", "softmax", "-o", str(tmp_path)])


def test_mean_and_deviation_over_seeds():
    assert mean_and_deviation(pd.Series([40.0, 42.0])) == "41.0 ± 1.4"
    assert mean_and_deviation(pd.Series([40.04])) == "40.0" and mean_and_deviation(pd.Series([None, None])) == "-"
    frame = pd.DataFrame(
        [
            {"row": row, "distribution": d, "top1": value, "seed": seed}
            for row, d, value, seed in (
                ("b", "z", 1.0, 1),
                ("b", "a", 2.0, 1),
                ("a", "z", 3.0, 1),
                ("a", "a", 4.0, 1),
                ("b", "z", 3.0, 2),
            )
        ]
    )
    table = accuracy_table(frame)
    assert list(table.index) == ["b", "a"] and list(table.columns) == ["seeds", "z", "a"]  # the order they came in
    assert list(table["seeds"]) == ["2", "1"]
    assert table.loc["b", "z"] == "2.0 ± 1.4" and table.loc["a", "a"] == "4.0"


def test_a_run_of_before_counts_with_the_keys_it_has():
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    config["trainer"] |= {"epochs": 2, "add_extra_info": True}
    del config["trainer"]["precision"]  # not said in configs of before
    checkpoint = {"config": config, "epoch": 2, "checks_since_best": 0}
    assert comparison.is_trained(checkpoint) and not comparison.is_trained({**checkpoint, "epoch": 1})
    before = comparison.complete(comparison.trained_config(checkpoint))
    trainer_section = {k: v for k, v in config["trainer"].items() if k != "add_extra_info"}

    def difference(precision: str) -> str | None:
        now = make_config({**config, "trainer": {**trainer_section, "precision": precision}})
        return comparison.first_difference(before, comparison.complete(now))

    assert difference("fp32") is None
    assert difference("bf16") == 'trainer;precision "fp32", now "bf16"'
