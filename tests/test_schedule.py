import pytest
import torch

from trainer.schedule import CustomLR, custom_lr_factor


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
