"""Signals, locks, losses that are no numbers, logs that cannot be written: a run in one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_on_disk import COUNTS, folder, make  # noqa: F401 (a fixture)

from commands.convert_checkpoint import describe
from commands.jobs import run_test
from data_loader.on_disk import ListDataLoader
from evaluation import load_run
from trainer import train
from trainer.trainer import Trainer
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import Interrupted, UserError
from utils.lock import locked
from utils.signals import STOPPING, StopSignals


@pytest.fixture
def small_config(digits_config) -> dict:
    """Two epochs of four steps."""
    digits_config["arch"]["args"]["num_experts"] = 1
    digits_config["data_loader"]["args"]["batch_size"] = 128
    digits_config["trainer"] |= {"save_period": 50, "verbosity": 0, "mixup_alpha": 0.4}
    return digits_config


def run_dir(config: dict, run_id: str) -> Path:
    return Path(config["trainer"]["save_dir"]) / config["name"] / run_id


def send_in(monkeypatch, place: str, when: int, number: int = signal.SIGTERM) -> None:
    """Let a method of Trainer be hit by a signal in its call number `when`."""
    original, calls = getattr(Trainer, place), []

    def hit(self, *arguments):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, place, hit)


# --- signals ---


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A cache of the run that nothing stops."""
    return {}


@pytest.mark.parametrize(
    ("place", "when", "number", "position"),
    [
        ("train_step", 7, signal.SIGUSR1, (2, 3)),
        ("train_step", 8, signal.SIGHUP, (2, 4)),  # in the last step: validation is left to the resumed run
        ("validate", 1, signal.SIGINT, (1, 4)),
        ("_improved", 1, signal.SIGTERM, (1, None)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(small_config, monkeypatch, straight, place, when, number, position):
    if not straight:
        straight["values"] = train(small_config, run_id="straight")
        straight["state"] = load_checkpoint(straight["values"]["last"])
    send_in(monkeypatch, place, when, number)
    with pytest.raises(Interrupted, match=f"Stopped by {number.name}. .*go on with: python train.py -r") as caught:
        train(small_config, run_id="stopped")
    assert caught.value.status == 128 + number
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    last = run_dir(small_config, "stopped") / "last.pth"
    stopped = load_checkpoint(last)
    assert stopped["epoch"] == position[0] and (stopped.get("mid_epoch") or {"step": None})["step"] == position[1]
    resumed = train(small_config, resume=last)
    state = load_checkpoint(last)
    for name, tensor in straight["state"]["model"].items():
        assert torch.equal(tensor, state["model"][name]), name
    assert torch.equal(straight["state"]["random"]["torch"], state["random"]["torch"])
    measured = {k for k, v in straight["values"].items() if isinstance(v, float)} - {"images_per_second"}
    assert {k: straight["values"][k] for k in measured} == {k: resumed[k] for k in measured}
    assert state["best"] == straight["state"]["best"] and "mid_epoch" not in state


def test_a_checkpoint_from_within_an_epoch_is_named_everywhere(small_config, monkeypatch, tmp_path):
    send_in(monkeypatch, "train_step", 6)
    with pytest.raises(Interrupted, match=r"last\.pth holds everything up to epoch 2, step 2 of 4"):
        train(small_config, run_id="stopped")
    monkeypatch.undo()
    last = run_dir(small_config, "stopped") / "last.pth"
    assert "2, step 2 of 4" in describe(last) and "can be resumed" in describe(last)
    content = run_test(config={}, checkpoint=last, output=tmp_path / "out")
    assert content["checkpoint"]["selected_by"] == "stopped in epoch 2, step 2 of 4"
    assert load_run(last).checkpoint.epoch == 2
    state = load_checkpoint(last)
    assert "random" not in state  # versions without states in an epoch ask for it, and refuse to go on
    with pytest.raises(UserError, match="stopped in an epoch of 4 steps, which has 7 now: keep data, batch_size"):
        train({"data_loader;args;batch_size": 64}, resume=last)
    best = run_dir(small_config, "stopped") / "model_best.pth"  # epoch 1: the folder has gone further
    assert train({"trainer;epochs": 2}, resume=best)["run_dir"] != str(last.parent)
    for broken in ({"step": "2"}, {"processes": []}, {"processes": [3]}):
        save_checkpoint(tmp_path / "broken.pth", {**state, "mid_epoch": {**state["mid_epoch"], **broken}})
        with pytest.raises(UserError, match="not a checkpoint"):
            load_checkpoint(tmp_path / "broken.pth")


def test_ignored_interrupts_count_and_nohup_stays():
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell script leaves it for what it starts with "&"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # at once: the same request, passed on by a launcher
            assert stop.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_signal_ends_at_once():
    script = (
        "import os, time; from utils import signals; signals.SAME_REQUEST = 0\n"
        "with signals.StopSignals() as stop:\n"
        "    os.kill(os.getpid(), 15); time.sleep(0.01); assert stop.received == 15; os.kill(os.getpid(), 15)\n"
        "    time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stderr.startswith("Ended at once by a second signal") and not done.stdout


# --- one writer ---


def test_one_run_one_writer(small_config):
    small_config["trainer"]["epochs"] = 1
    first = train(small_config, run_id="mine")
    before = Path(first["last"]).read_bytes()
    with locked(Path(first["run_dir"]), "wait"):
        with pytest.raises(UserError, match=rf"Process {os.getpid()} on .* is at work in .*give another --run_id"):
            train({"trainer;epochs": 2}, resume=first["last"])
        assert Path(first["last"]).read_bytes() == before
    out = Path(first["run_dir"]) / "out"
    out.mkdir()
    with locked(out, "wait"), pytest.raises(UserError, match="is at work in .*out: wait for it, or choose another"):
        run_test(config={}, checkpoint=Path(first["last"]), output=out)
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_the_lock_of_a_killed_process_does_not_hold(tmp_path):
    script = f"""
import os, pathlib, signal, time
from utils.lock import locked
with locked(pathlib.Path({str(tmp_path)!r}), "wait"):
    if os.fork() == 0:
        time.sleep(3)  # a worker process that outlives the killed one for a while
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50)
    assert killed.returncode == -signal.SIGKILL
    with locked(tmp_path, "wait"):
        assert f"Process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_run_killed_in_its_first_epoch_can_be_started_again(small_config):
    killed = run_dir(small_config, "killed")
    killed.mkdir(parents=True)
    for name in ("config.json", "log.txt", ".lock"):
        (killed / name).write_text("")
    small_config["trainer"]["epochs"] = 1
    assert train(small_config, run_id="killed")["run_dir"] == str(killed)
    for present, named in (("last.pth", "last.pth"), ("checkpoint-epoch1.pth", "model_best.pth")):
        if not (killed / present).exists():
            (killed / "last.pth").rename(killed / present)
        with pytest.raises(UserError, match=f"holds a run already: go on with -r .*{named}, or give another"):
            train(small_config, run_id="killed")
    foreign = run_dir(small_config, "photos")
    foreign.mkdir()
    (foreign / "1.jpg").write_text("")
    with pytest.raises(UserError, match="holds a run already"):
        train(small_config, run_id="photos")


# --- losses that are no numbers ---


def spoil(monkeypatch, steps: set[int]) -> list:
    """Let the images of some steps, counted from 1 over all epochs, be NaN; the list grows by one entry a step."""
    original, calls = Trainer.train_step, []

    def train_step(self, images, *arguments):
        calls.append(1)
        return original(self, images * torch.nan if len(calls) in steps else images, *arguments)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return calls


def test_nan_stops_within_an_epoch_and_names_step_rate_and_last_good_checkpoint(small_config, monkeypatch):
    small_config["trainer"]["log_step"] = 3
    steps = spoil(monkeypatch, {6})
    message = r"in epoch 2, step 2 of 4, at learning rate 0\.0\d+: .*on_nan.*last\.pth holds everything up to epoch 1;"
    with pytest.raises(UserError, match=message):
        train(small_config, run_id="nan")
    last = load_checkpoint(run_dir(small_config, "nan") / "last.pth")
    assert len(steps) == 7 and last["epoch"] == 1 and all(v.isfinite().all() for v in last["model"].values())


def test_weights_that_the_last_step_ruined_are_not_saved(small_config, monkeypatch):
    original = Trainer.train_step

    def train_step(self, *arguments):
        result = original(self, *arguments)
        if self.progress.step == 4:
            next(self.model.parameters()).data.fill_(torch.inf)
        return result

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(UserError, match="no longer finite in epoch 1, step 4 of 4.* Nothing was saved yet"):
        train(small_config, run_id="nan")


def test_steps_that_are_no_numbers_are_skipped_up_to_a_bound(small_config, monkeypatch, capsys):
    small_config["trainer"]["epochs"] = 1
    plain = train(small_config, run_id="plain")
    small_config["trainer"] |= {"on_nan": "skip", "nan_limit": 2}
    careful = train(small_config, run_id="careful")
    assert careful["loss"] == plain["loss"] and careful["val_loss"] == plain["val_loss"]
    steps = spoil(monkeypatch, {2, 3})
    values = train(small_config, run_id="skipped")
    assert "step 2: loss or gradient is not finite" in capsys.readouterr().out
    last = load_checkpoint(values["last"])["model"]
    assert all(v.isfinite().all() for v in last.values()) and values["loss"] > 0
    assert last["backbone.bn1.num_batches_tracked"] == 2  # the statistics of batch norm are put back
    steps.clear()
    small_config["trainer"]["nan_limit"] = 1
    with pytest.raises(UserError, match="epoch 1, step 3 of 4, .* for the 2th time, and nan_limit is 1"):
        train(small_config, run_id="bound")


# --- one sentence ---


def test_a_log_that_cannot_be_written_costs_the_log_alone(small_config, capsys):
    target = run_dir(small_config, "log")
    target.mkdir(parents=True)
    (target / "log.txt").symlink_to("/dev/full")
    small_config["trainer"] |= {"epochs": 1, "verbosity": 1}
    assert train(small_config, run_id="log")["epoch"] == 1
    shown = capsys.readouterr()
    assert shown.out.count("can no longer be written") == 1 and "Traceback" not in shown.err
    (target.parent / "log2" / "log.txt").mkdir(parents=True)
    with pytest.raises(UserError, match="The log .*log.txt cannot be written"):
        train(small_config, run_id="log2")


def test_a_killed_worker_is_one_sentence_and_signals_to_workers_are_not_theirs(folder):  # noqa: F811
    loader = make(folder, num_workers=1, batch_size=4)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._training._iterator._workers
    for number in STOPPING:
        os.kill(worker.pid, number)
    assert len(list(batches)) == len(loader) - 1 and worker.is_alive()
    batches = iter(loader)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="A worker process that decodes images was killed"):
        list(batches)


def test_batches_that_no_process_can_train_on_are_refused(folder):  # noqa: F811
    assert isinstance(make(folder, batch_size=2), ListDataLoader)
    for options, processes, message in (
        ({"batch_size": 1}, 1, "batch_size is 1, and every process needs two images of a batch: make it at least 2"),
        ({"batch_size": 3}, 2, "batch_size is 3 for all of 2 processes"),
        ({"batch_size": 64}, 16, f"There are {sum(COUNTS)} training images, and a batch has 32 at least"),
    ):
        loader = make(folder, **options)
        loader.prepare(torch.device("cpu"), 1, 0, processes)
        with pytest.raises(UserError, match=message):
            loader.check_shards()
