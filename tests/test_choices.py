"""Choices that the results would hardly show: each test fails if one of them is made otherwise."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script, start_small_run
from torch import nn

import base.base_trainer
from base.base_trainer import BaseTrainer
from commands.command_line import parse
from data_loader.data_loaders import ImbalanceDigitsDataLoader
from evaluation import load_run, predict
from evaluation.adaptation import fit_all
from evaluation.results import Predictions
from tade import Aggregator
from trainer import train, trainer
from trainer.devices import device_name
from trainer.options import TrainerOptions
from trainer.schedule import CustomLR
from utils import seed
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.seed import epoch_generator

# --- the frame of a training run, on values that are made up ---


class Scripted(BaseTrainer):
    """Trains nothing; its validations give the values of a list."""

    def __init__(self, folder: Path, values: list[float], **options):
        options = {"monitor": "max val_accuracy", "tensorboard": False, "save_period": 100, **options}
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = CustomLR(optimizer, 100, 200)
        folder.mkdir(exist_ok=True)
        loader, config = ImbalanceDigitsDataLoader(8), {"optimizer": {"type": "SGD"}}
        options = TrainerOptions(len(values), **options)
        super().__init__(model, loader, optimizer, scheduler, options, folder, {"config": config})
        self.values, self.validated = values, []

    def train_epoch(self, epoch):
        self.optimizer.step()  # without a gradient
        return {"loss": 1.0}

    def validate(self, epoch):
        self.validated.append(epoch)
        return {"val_accuracy": self.values[epoch - 1]}


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("max val_accuracy", [1.0, 3.0, 2.0], 2),
        ("min val_accuracy", [2.0, 1.0, 3.0], 2),
        ("max val_accuracy", [1.0, 1.0, 1.0], 1),  # a tie is no improvement
        ("min val_accuracy", [1.0, 1.0], 1),
    ],
)
def test_the_best_epoch(tmp_path, monitor, values, best):
    trainer = Scripted(tmp_path, values, monitor=monitor)
    assert trainer.train()["best_epoch"] == best
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == best


@pytest.mark.parametrize(("patience", "last"), [(1, 3), (2, 4), (3, 5), (9, 7)])
def test_early_stopping_waits_for_exactly_so_many_validations(tmp_path, patience, last):
    assert Scripted(tmp_path, [1.0, 2.0, 2.0, 1.0, 0.0, 1.0, 1.0], early_stop=patience).train()["epoch"] == last


def test_every_so_many_epochs_and_the_last_are_validated(tmp_path):
    trainer = Scripted(tmp_path, [1.0] * 8, valid_period=3)
    trainer.train()
    assert trainer.validated == [3, 6, 8]


def test_the_last_checkpoint_is_written_last(tmp_path, monkeypatch):
    """Killed in between, the run goes on from the epoch before, and writes the others again."""
    written = []
    monkeypatch.setattr(base.base_trainer, "save_checkpoint", lambda path, state: written.append(path.name))
    Scripted(tmp_path, [1.0, 2.0], save_period=2).train()
    assert written == ["model_best.pth", "last.pth", "checkpoint-epoch2.pth", "model_best.pth", "last.pth"]


def test_the_best_value_the_patience_and_the_seconds_are_restored(tmp_path):
    first = Scripted(tmp_path, [5.0, 4.0])
    first.train()
    content = load_checkpoint(tmp_path / "last.pth")
    save_checkpoint(tmp_path / "last.pth", {**content, "seconds": 1000.0})
    content = load_checkpoint(tmp_path / "last.pth")
    again = Scripted(tmp_path, [5.0, 4.0, 4.5, 4.0, 4.0], early_stop=3)
    again.resume(content, tmp_path / "last.pth")
    assert (again.best, again.best_epoch, again.checks_since_best) == (5.0, 1, 1)
    results = again.train()
    assert results["best_epoch"] == 1 and results["epoch"] == 4  # the third validation without improvement
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == 1
    assert 1000 < load_checkpoint(tmp_path / "last.pth")["seconds"] < 1100


def test_a_changed_rate_counts_on_resume_with_a_cosine(tmp_path):
    def trainer(rate: float, epochs: int) -> Scripted:
        made = Scripted(tmp_path, [1.0] * epochs)
        made.optimizer = torch.optim.SGD(made.model.parameters(), lr=rate)
        made.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made.optimizer, T_max=10)
        return made

    trainer(0.1, 3).train()
    again = trainer(0.05, 4)
    again.resume(load_checkpoint(tmp_path / "last.pth"), tmp_path / "last.pth")
    expected = 0.05 * (1 + np.cos(np.pi * 3 / 10)) / 2
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    again.train()
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 + np.cos(np.pi * 4 / 10)) / 2)


# --- what train.py is told ---


def test_weights_precision_and_compile_reach_the_training(tmp_path, monkeypatch):
    run = start_small_run(tmp_path / "source")
    compiled = []
    monkeypatch.setattr(trainer, "compiled", lambda network, device: compiled.append(device.type) or network)
    config_file = tmp_path / "config.json"
    config = {**run["config"], "weights": run["last"], "trainer": {**run["config"]["trainer"], "epochs": 1}}
    config_file.write_text(json.dumps(config))
    arguments = ["-c", str(config_file), "--lr", "0", "--save_dir", str(tmp_path)]
    start = load_checkpoint(run["last"])["model"]["backbone.conv1.weight"]
    plain = script("train").main(**parse(train, "", [*arguments, "--run_id", "plain"]))
    assert torch.equal(load_checkpoint(plain["last"])["model"]["backbone.conv1.weight"], start) and not compiled
    other = script("train").main(
        **parse(train, "", [*arguments, "--run_id", "bf16", "--precision", "bf16", "--compile"])
    )
    assert compiled == ["cpu"] and other["loss"] != plain["loss"]
    assert other["loss"] == pytest.approx(plain["loss"], rel=0.1)


# --- streams of random numbers ---


def test_streams_epochs_and_seeds_draw_different_numbers():
    names = ("TRAINING", "VIEWS", "SHUFFLE", "MIXUP", "MILD_VIEWS", "CALIBRATION")
    streams = [getattr(seed, name) for name in names]
    drawn = {
        tuple(torch.randint(2**60, (2,), generator=epoch_generator(*key)).tolist())
        for key in itertools.product((0, 1, 2), (0, 1, 2), streams)
    }
    assert len(drawn) == 54


class Draws(Aggregator):
    """Draws from its generator in each of three passes."""

    needs = frozenset({"views"})
    drawn: list

    def reset(self):
        self.drawn = []

    def fit_pass(self, logits, views, generator):
        self.drawn.append(torch.randperm(50, generator=generator).tolist())
        return len(self.drawn) < 3

    def predict(self, logits):
        return logits.mean(dim=1)


def test_every_pass_is_shuffled_anew():
    aggregator = Draws(torch.zeros(2, 3), torch.zeros(3))
    asked = []

    def views_of(indices, number):
        asked.append(number)
        return torch.zeros(len(indices), 2, 3), torch.zeros(len(indices), 2, 3)

    fit_all({"a": aggregator}, torch.zeros(4, 2, 3), {"a": np.arange(4)}, views_of, seed=1)
    assert asked == [0, 1, 2] and len({tuple(order) for order in aggregator.drawn}) == 3


def test_the_device_on_record():
    assert device_name(torch.device("cpu")) == f"cpu ({torch.get_num_threads()} threads)"
    assert device_name(torch.device("mps")) == "mps"


# --- classes and their names ---


def test_predictions_name_the_most_probable_class(trained_digits):
    scores = torch.log_softmax(torch.tensor([[0.0, 1, 2], [5, 1, 1], [0, 9, 1]]), dim=1)
    table = Predictions(["a", "b", "c"], scores, ["x", "y", "z"], {}, None, scores.max(dim=1)[::-1], [1] * 3).table()
    assert table["class"].tolist() == ["z", "x", "y"] and table["probability"][1] == pytest.approx(0.9647, abs=1e-3)
    run = load_run(trained_digits)
    predicted = predict(run, run.loader.test.images).table()["class"].astype(int)
    assert (predicted.to_numpy() == run.test_logits.mean(dim=1).argmax(dim=1).numpy()).all()
    assert predicted.nunique() > 3
