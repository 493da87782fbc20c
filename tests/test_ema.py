"""The moving average of the weights: what it is, that it is saved and resumed, and that it can be evaluated."""

import signal
from pathlib import Path

import pytest
import torch
from test_stopping import run_dir, send_in

from commands.convert_checkpoint import convert, describe
from evaluation import load_run
from trainer import train
from trainer.ema import WeightAverage
from utils.checkpoint import load_checkpoint
from utils.errors import Interrupted, UserError


def test_the_average_is_exponential_over_weights_and_batch_statistics():
    network = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(network.parameters())
    average = WeightAverage(network, optimizer, 0.9)
    with torch.no_grad():
        network.weight.fill_(2.0)
        network.running_mean.fill_(1.0)
    for expected in (0.1, 0.19):
        optimizer.step()  # without gradients
        assert average.module.weight.tolist() == pytest.approx([1 + expected] * 2)
        assert average.module.running_mean.tolist() == pytest.approx([expected] * 2)


@pytest.fixture
def averaging_config(digits_config) -> dict:
    """Two epochs of four steps, with an average that is far from the last weights."""
    digits_config["arch"]["args"]["num_experts"] = 1
    digits_config["data_loader"]["args"]["batch_size"] = 128
    digits_config["trainer"] |= {"mixup_alpha": 0.4, "ema_decay": 0.8}
    digits_config["trainer"]["monitor"] = "max val_ema_accuracy"
    return digits_config


def test_a_stopped_run_continues_its_average_bit_for_bit(averaging_config, monkeypatch):
    straight = train(averaging_config, run_id="straight")
    send_in(monkeypatch, "train_step", 7, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(averaging_config, run_id="stopped")
    monkeypatch.undo()
    last = run_dir(averaging_config, "stopped") / "last.pth"
    assert load_checkpoint(last)["mid_epoch"]["step"] == 3
    first = run_dir(averaging_config, "straight") / "checkpoint-epoch1.pth"
    for resumed in (train(averaging_config, resume=last), train(averaging_config, resume=first, run_id="again")):
        assert resumed["val_ema_loss"] == straight["val_ema_loss"] != straight["val_loss"]
        one, other = load_checkpoint(straight["last"]), load_checkpoint(resumed["last"])
        for part in ("model", "ema"):
            assert all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items()), part


def test_the_average_does_not_change_the_training_and_can_be_evaluated(averaging_config, tmp_path):
    averaging_config["trainer"]["epochs"] = 1
    averaged = load_checkpoint(last := Path(train(averaging_config, run_id="with")["last"]))
    averaging_config["trainer"] |= {"ema_decay": 0.0, "monitor": "off"}
    plain = load_checkpoint(other := Path(train(averaging_config, run_id="without")["last"]))
    assert all(torch.equal(tensor, averaged["model"][name]) for name, tensor in plain["model"].items())
    assert "ema" not in plain and "convert --ema" in describe(last) and "convert --ema" not in describe(other)
    convert(last, tmp_path / "ema.pth", ema=True)
    content = load_checkpoint(tmp_path / "ema.pth")
    assert all(torch.equal(tensor, averaged["ema"][name]) for name, tensor in content["model"].items())
    assert content["selected_by"] == "moving average of the weights, the last so far"
    assert load_run(tmp_path / "ema.pth").test_logits.isfinite().all()
    with pytest.raises(UserError, match="has no moving average"):
        convert(other, tmp_path / "none.pth", ema=True)


def test_an_average_can_begin_in_a_resumed_run_and_another_networks_is_refused(averaging_config):
    averaging_config["trainer"] |= {"epochs": 1, "ema_decay": 0.0, "monitor": "off"}
    last = train(averaging_config, run_id="one")["last"]
    averaging_config["trainer"] |= {"epochs": 2, "ema_decay": 0.9}
    assert "val_ema_accuracy" in train(averaging_config, resume=last)
    network = torch.nn.Linear(2, 2)
    average = WeightAverage(network, torch.optim.SGD(network.parameters()), 0.9)
    with pytest.raises(UserError, match="does not fit the architecture"):
        average.restore({"ema": {"weight": torch.zeros(2, 2)}}, last)
