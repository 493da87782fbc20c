"""reproduce.py on the digits: its scripts called in this process, and stopped or killed in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, call_script

from comparison import run as comparison
from comparison.plan import Run, config_path, method_config, plan_runs, quick_changes, write_own_configs
from comparison.tables import accuracy_table, mean_and_deviation
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import Interrupted, UserError
from utils.lock import locked
from utils.parse_config import read_json

SET = [
    "arch;args;layer2_output_dim=16",
    "arch;args;layer3_output_dim=16",
    "data_loader;args;batch_size=128",
    'data_loader;args;distributions=["forward10", "uniform", "backward10"]',
    "aggregator;args;epochs=1",
    "averaged_views=0",
    "trainer;tensorboard=false",
]
OPTIONS = ["--epochs", "2", "--jobs", "1", "-d", "cpu", *(word for text in SET for word in ("--set", text))]


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)


def called(command, log, environment, stop) -> int:
    """In place of comparison.run.call: the script in this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = call_script(command[1].removesuffix(".py"), *command[2:])
    torch.set_num_threads(threads)
    with open(log, "a") as file:
        file.write(done.stdout + done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison of three methods, one of whose folders holds something else."""
    output = tmp_path_factory.mktemp("reproduce")
    other = output / "Digits_LT_RIDE" / "seed1"
    other.mkdir(parents=True)
    save_checkpoint(other / "model_best.pth", {"model": {"a": torch.zeros(1)}, "epoch": 7, "config": {"name": "x"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "call", called)
        patch.chdir(ROOT)
        assert comparison.main("", ["--data", "digits", *OPTIONS, "-o", str(output)]) == 1
    assert [path.name for path in other.iterdir()] == ["model_best.pth"]
    return output


def planned(output: Path, *changes: str) -> Run:
    configs = {("digits", "tade"): config_path("digits", "tade")}
    return plan_runs(configs, [1], output, epochs=2, assignments=[*SET, *changes], device="cpu")[0]


def test_report_table_and_plots(finished):
    report = (finished / "report.md").read_text()
    for expected in (
        "| method | seeds | forward10 | uniform | backward10 |",
        "TADE, test-time training",
        "## digits, best epoch",
        "| digits | Softmax | 0.",
        "Missing, because they failed: digits ride seed 1.",
        "python train.py -c configs/config_digits_tade.json --seed 1 --save_dir",
        "python test_train_cifar.py -c configs/test_time_digits_tade.json",
    ):
        assert expected in report, expected
    frame = pd.read_csv(finished / "results.csv")
    rows = ["Softmax", "Softmax, estimated prior"]
    rows += ["TADE, equal weights", "TADE, test-time training", "TADE, estimated prior"]
    last = frame[frame["checkpoint"] == "last epoch"]
    assert list(last["row"].unique()) == rows and len(last) == len(rows) * 3  # distributions
    best = frame[frame["checkpoint"] == "best epoch"]
    assert list(best["row"].unique()) == [row for row in rows if "prior" not in row]
    learned = frame[frame["row"] == "TADE, test-time training"]
    assert learned[["w1", "w2", "w3"]].sum(axis=1).tolist() == pytest.approx([1] * 6)
    page = (finished / "report.html").read_text()
    for expected in ("in the mean over 3", "TADE, equal weights", "SHA-256"):
        assert expected in page, expected


def test_what_is_done_is_not_done_again(finished, monkeypatch, capfd):
    monkeypatch.setattr(comparison, "call", None)
    report = finished / "report.md"
    before = report.read_text()
    again = ["--data", "digits", *OPTIONS, "-o", str(finished), "--methods", "softmax", "tade"]
    assert comparison.main("", again) == 0
    assert "digits tade seed 1: done" in capfd.readouterr().out
    before, now = (text.split("## digits, last epoch")[1].split("## Cost")[0] for text in (before, report.read_text()))
    assert now == before


def test_only_what_other_results_checkpoints_and_options_need_is_done_again(finished, tmp_path):
    last = finished / "Digits_LT_TADE" / "seed1" / "last.pth"

    def left(*changes: str) -> list[str]:
        return [title for title, _ in comparison.commands_left(planned(finished, *changes))]

    assert left() == []
    learned = ["test_train of last.pth", "test_train of model_best.pth"]
    assert left("aggregator;args;epochs=2") == learned
    message = r"holds a run with other options \(optimizer;args;lr 0.05, now 0.01\): choose another --output"
    with pytest.raises(UserError, match=message):
        left("optimizer;args;lr=0.01")
    assert left("trainer;verbosity=2") == []  # the default
    results = last.parent / "results" / "last" / "test_all" / "results.json"
    results.rename(tmp_path / "results.json")
    assert left() == ["test_all of last.pth"]
    (tmp_path / "results.json").rename(results)
    state, content = load_checkpoint(last), last.read_bytes()
    save_checkpoint(last, {**state, "epoch": 1})
    tests = [f"{job} of last.pth" for job in ("test_all", "test_train", "test_prior")]
    assert left() == ["training goes on after epoch 1; 2 in all", *tests]
    early = {**state["config"], "trainer": {**state["config"]["trainer"], "early_stop": 3}}
    save_checkpoint(last, {**state, "config": early, "epoch": 1, "checks_since_best": 3})
    assert left("trainer;early_stop=3") == tests  # it has stopped by itself
    last.unlink()  # killed in its first epoch
    ((_, resuming),) = comparison.commands_left(planned(finished))
    assert resuming[-2:] == ["-r", str(last.parent / "model_best.pth")]
    last.write_bytes(content)


# --- processes ---


def scripts(folder: Path, monkeypatch, train: str) -> Run:
    """A run whose train.py is another script."""
    (folder / "train.py").write_text(train)
    monkeypatch.setattr(comparison, "ROOT", folder)
    return planned(folder / "out")


def test_a_signal_is_passed_on_and_waited_for(tmp_path, monkeypatch, capfd):
    run = scripts(
        tmp_path,
        monkeypatch,
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved') or 143))\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "while True: time.sleep(0.1)",
    )

    def tell() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(Interrupted, match="Stopped. Start again with the same options to go on.") as caught:
        comparison.finish_all([run, planned(tmp_path / "waiting")], 1)
    assert caught.value.status == 128 + signal.SIGUSR1 and run.log.read_text() == "saved\n"
    assert not (tmp_path / "waiting").exists() and "stopped" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "print('first'); raise RuntimeError('CUDA out of memory')",
            "^RuntimeError: CUDA out of memory See .*1.log",
        ),
        ("import os; os.kill(os.getpid(), 9)", r"^killed \(out of memory\? .*--jobs\), after: nothing was printed See"),
    ],
)
def test_a_run_that_fails_is_named_with_the_last_line_of_its_log(script, message, tmp_path, monkeypatch):
    run = scripts(tmp_path, monkeypatch, script)
    ((failed, error),) = comparison.finish_all([run], 1).items()
    assert failed is run
    with pytest.raises(UserError, match=message):
        raise error


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
def test_killed_it_takes_its_scripts_along_and_ends_with_the_same_table(finished, tmp_path, monkeypatch):
    options = ["--data", "digits", *OPTIONS, "--methods", "softmax", "-o", str(tmp_path / "out")]
    killed = subprocess.Popen(
        [sys.executable, "reproduce.py", *options],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]),  # one thread
    )
    while not list((tmp_path / "out").rglob("last.pth")):
        assert killed.poll() is None
        time.sleep(0.02)
    threads = Path(f"/proc/{killed.pid}/task").iterdir()
    children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    killed.kill()
    killed.wait()
    while any(map(runs, children)):
        time.sleep(0.05)
    monkeypatch.setattr(comparison, "call", called)
    assert comparison.main("", options) == 0
    expected, found = (pd.read_csv(folder / "results.csv") for folder in (finished, tmp_path / "out"))
    expected = expected[expected["method"] == "softmax"].dropna(axis=1, how="all")
    pd.testing.assert_frame_equal(found, expected[list(found)])


def runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- plans ---


@pytest.mark.parametrize(("own", "experts"), [("custom_example", 3), ("digits_tade", 3), ("cifar100_ir100_softmax", 1)])
def test_methods_on_the_data_of_ones_own_config(own, experts, tmp_path):
    path = ROOT / "configs" / f"config_{own}.json"
    files = write_own_configs(path, ["softmax", "ride", "tade"], tmp_path / "out")
    configs, base = {method: read_json(file) for (_, method), file in files.items()}, read_json(path)
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
    planned = plan_runs(files, [1], tmp_path / "out")
    assert len({run.folder for run in planned}) == 3 and [len(run.tests) for run in planned] == [2, 2, 3]
    assert str(files[own, "ride"]) in planned[1].train


def test_stages_that_start_from_weights_keep_their_width():
    own = {**read_json(ROOT / "configs" / "config_custom_example.json"), "weights": "torchvision"}
    own["arch"] = {"type": "ResNet18Model", "args": {"num_classes": 101, "num_experts": 4}}
    own["loss"] = {"type": "CrossEntropyLoss", "args": {}}
    arguments = method_config(own, "tade")["arch"]["args"]
    assert arguments["reduce_dimension"] is False and arguments["num_experts"] == 4 and arguments["use_norm"]


def test_quick_takes_distributions_that_the_data_set_has():
    config = read_config(read_json(ROOT / "configs" / "config_iNaturalist_resnet50_tade.json"))
    assert 'data_loader;args;distributions=["forward3", "uniform", "backward3"]' in quick_changes(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "softmaks"], 'Unknown method for cifar100_ir100 "softmaks": did you mean "softmax"'),
        (["--data", "digit"], 'Unknown data set "digit": did you mean "digits"'),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--set", "optimizer;args;learning_rate=1"], 'argument of SGD in config section "optimizer" "learning_rate"'),
        (["--set", "aggregator;args;epoch=1"], 'of StabilityAggregator in config section "aggregator" "epoch"'),
        (["--set", "trainer;precision=bf32"], "precision must be"),
        (["--seeds", "1", "1"], "would both be"),
        (["--set", "seed=5"], "--set cannot change seed"),
        (["--data", "imagenet_lt_resnext50"], "ImageNet_LT_train.txt cannot be read"),
    ],
)
def test_bad_options_stop_before_anything_runs(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        comparison.main("", [*options, "-o", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*/*"))


def test_one_command_at_a_time_on_ones_own_config(tmp_path):
    own = tmp_path / "config_mine.json"
    own.write_text(json.dumps(read_json(ROOT / "configs" / "config_digits_softmax.json")))
    with locked(tmp_path, "choose another --output"), pytest.raises(UserError, match="Process .* is at work in"):
        comparison.main("", ["-c", str(own), "-o", str(tmp_path)])
    assert (tmp_path / "config_mine_tade.json").exists()
    with pytest.raises(SystemExit):
        comparison.main("", ["-c", "any.json", "--data", "digits"])


def test_mean_and_deviation_over_seeds():
    assert mean_and_deviation(pd.Series([40.0, 42.0])) == "41.0 ± 1.4"
    assert mean_and_deviation(pd.Series([40.04])) == "40.0" and mean_and_deviation(pd.Series([None, None])) == "-"
    columns = ["row", "distribution", "top1", "seed"]
    records = [("b", "z", 1.0, 1), ("b", "a", 2.0, 1), ("a", "z", 3.0, 1), ("a", "a", 4.0, 1), ("b", "z", 3.0, 2)]
    table = accuracy_table(pd.DataFrame(records, columns=columns))
    assert list(table.index) == ["b", "a"] and list(table.columns) == ["seeds", "z", "a"]  # the order they came in
    assert list(table["seeds"]) == ["2", "1"]
    assert table.loc["b", "z"] == "2.0 ± 1.4" and table.loc["a", "a"] == "4.0"
