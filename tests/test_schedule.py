import pytest
import torch
from conftest import ROOT

from trainer.schedule import CustomLR, custom_lr_factor, odd_schedule
from trainer.training import training_config
from utils.parse_config import read_json


def test_factors_of_the_published_recipe_for_200_epochs():
    expected = [0.2, 0.4, 0.6, 0.8] + [1.0] * 156 + [0.1] * 20 + [0.01] * 20
    assert [custom_lr_factor(k, 160, 180, 5, 0.1) for k in range(200)] == pytest.approx(expected)


def test_no_warm_up_and_warm_up_over_a_step():
    assert [custom_lr_factor(k, 1, 2, 0, 0.5) for k in range(3)] == [1, 0.5, 0.25]
    assert [custom_lr_factor(k, 1, 3, 4, 0.1) for k in range(4)] == pytest.approx([0.25, 0.05, 0.075, 0.01])


def test_scheduler_applies_the_factor():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = CustomLR(optimizer, step1=160, step2=180)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * custom_lr_factor(k, 160, 180) for k in range(200)])


def config(name: str) -> dict:
    return read_json(ROOT / "configs" / f"config_{name}.json")


def test_the_schedule_of_a_new_run_moves_with_its_epochs():
    asked = {**config("cifar100_ir100_ride"), "trainer;epochs": 20}
    moved = training_config(asked)
    assert moved["trainer"]["epochs"] == 20 and moved["loss"]["args"]["reweight_epoch"] == 16
    assert moved["lr_scheduler"]["args"] == {"step1": 16, "step2": 18, "warmup_epoch": 5, "gamma": 0.01}
    assert training_config({**config("custom_example"), "trainer;epochs": 6})["lr_scheduler"]["args"]["T_max"] == 6
    kept = training_config({**asked, "lr_scheduler;args;step1": 4, "lr_scheduler;args;step2": 160})
    assert kept["lr_scheduler"]["args"] == {"step1": 4, "step2": 160, "warmup_epoch": 2, "gamma": 0.01}
    assert training_config(config("digits_tade")).config == config("digits_tade")
    longer = {"config": config("digits_tade"), "format": 1}
    resumed = training_config({"trainer;epochs": 60}, longer)  # its steps may lie behind it
    assert resumed["trainer"]["epochs"] == 60 and resumed["lr_scheduler"]["args"]["step1"] == 24


def test_a_moved_schedule_is_said(capsys):
    training_config({**config("custom_example"), "trainer;epochs": 6})
    assert "The schedule moves with the epochs, which were 30: lr_scheduler;args;T_max 6." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("CosineAnnealingLR", {"T_max": 30}, "rises again"),
        ("CosineAnnealingLR", {"T_max": 200}, "still high"),
        ("CosineAnnealingLR", {"T_max": 100}, None),
        ("CustomLR", {"step1": 80, "step2": 160}, "never falls in epoch 160"),
        ("CustomLR", {"step1": 80, "step2": 90}, None),
        ("MultiStepLR", {"milestones": [50, 100]}, "never falls in epoch 100"),
        ("StepLR", {"step_size": 30}, None),
    ],
)
def test_a_schedule_that_does_not_fit_its_epochs_is_named(kind, arguments, words):
    said = odd_schedule({"trainer": {"epochs": 100}, "lr_scheduler": {"type": kind, "args": arguments}})
    assert said is None if words is None else words in said


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("config_*.json")), ids=lambda path: path.stem)
def test_published_schedules_fit_their_epochs(path):
    assert odd_schedule(read_json(path)) is None
