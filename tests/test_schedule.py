"""Learning rates by epoch, and schedules that move with the epochs or do not fit them."""

import pytest
import torch
from conftest import ROOT

from trainer.registry import read_config
from trainer.schedule import CustomLR, WarmupCosineLR, custom_lr_factor, odd_schedule
from utils.parse_config import read_json


def test_factors_of_the_published_recipe_for_200_epochs():
    expected = [0.2, 0.4, 0.6, 0.8] + [1.0] * 156 + [0.1] * 20 + [0.01] * 20
    assert [custom_lr_factor(k, 160, 180, 5, 0.1) for k in range(200)] == pytest.approx(expected)
    assert [custom_lr_factor(k, 1, 2, 0, 0.5) for k in range(3)] == [1, 0.5, 0.25]  # no warm-up
    assert [custom_lr_factor(k, 1, 3, 4, 0.1) for k in range(4)] == pytest.approx([0.25, 0.05, 0.075, 0.01])


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, epochs: int) -> list[float]:
    found = []
    for _ in range(epochs):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_schedulers_apply_their_factors():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    steps = rates(CustomLR(torch.optim.SGD(parameters, lr=0.1), step1=160, step2=180), 200)
    assert steps == pytest.approx([0.1 * custom_lr_factor(k, 160, 180) for k in range(200)])
    wave = rates(WarmupCosineLR(torch.optim.SGD(parameters, lr=1.0), T_max=200, warmup_epoch=5), 200)
    assert [wave[k] for k in (0, 4, 100)] == pytest.approx([0.2, 0.999, 0.5], abs=1e-3) and 0 < wave[199] < 1e-4
    assert rates(WarmupCosineLR(torch.optim.SGD(parameters, lr=1.0), T_max=10, warmup_epoch=0), 1) == [1.0]


def config(name: str) -> dict:
    return read_json(ROOT / "configs" / f"config_{name}.json")


def test_the_schedule_of_a_new_run_moves_with_its_epochs(capsys):
    asked = {**config("cifar100_ir100_ride"), "trainer;epochs": 20}
    moved = read_config(asked, training=True)
    assert moved["trainer"]["epochs"] == 20 and moved["loss"]["args"]["reweight_epoch"] == 16
    assert moved["lr_scheduler"]["args"] == {"step1": 16, "step2": 18, "warmup_epoch": 5, "gamma": 0.01}
    kept = read_config({**asked, "lr_scheduler;args;step1": 4, "lr_scheduler;args;step2": 160}, training=True)
    assert kept["lr_scheduler"]["args"] == {"step1": 4, "step2": 160, "warmup_epoch": 2, "gamma": 0.01}
    wave = {"type": "WarmupCosineLR", "args": {"T_max": 200, "warmup_epoch": 5}}
    moved = read_config({**asked, "lr_scheduler": wave, "trainer;epochs": 4}, training=True)
    assert moved["lr_scheduler"]["args"] == {"T_max": 4, "warmup_epoch": 2}
    capsys.readouterr()
    cosine = read_config({**config("custom_example"), "trainer;epochs": 6}, training=True)
    assert cosine["lr_scheduler"]["args"]["T_max"] == 6
    assert "The schedule moves with the epochs, which were 30: lr_scheduler;args;T_max 6." in capsys.readouterr().out


def test_the_schedule_of_other_runs_stays():
    assert read_config(config("digits_tade"), training=True).config == config("digits_tade")
    longer = {"config": config("digits_tade"), "format": 1}
    resumed = read_config({"trainer;epochs": 60}, longer, training=True)  # its steps may lie behind it
    assert resumed["trainer"]["epochs"] == 60 and resumed["lr_scheduler"]["args"]["step1"] == 24


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("CosineAnnealingLR", {"T_max": 30}, "rises again"),
        ("CosineAnnealingLR", {"T_max": 200}, "still high"),
        ("WarmupCosineLR", {"T_max": 100}, None),
        ("CustomLR", {"step1": 80, "step2": 160}, "never falls in epoch 160"),
        ("CustomLR", {"step1": 80, "step2": 90}, None),
        ("MultiStepLR", {"milestones": [50, 100]}, "never falls in epoch 100"),
        ("StepLR", {"step_size": 30}, None),
    ],
)
def test_a_schedule_that_does_not_fit_its_epochs_is_named(kind, arguments, words):
    said = odd_schedule({"trainer": {"epochs": 100}, "lr_scheduler": {"type": kind, "args": arguments}})
    assert said is None if words is None else words in said


def test_published_schedules_fit_their_epochs():
    paths = sorted((ROOT / "configs").glob("config_*.json"))
    assert paths and [path.name for path in paths if odd_schedule(read_json(path))] == []
