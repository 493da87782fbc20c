import ast
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_json

import model.loss
from data_loader.data_loaders import ImbalanceDigitsDataLoader
from evaluation.loaded_run import carried_log_priors
from model.loss import (
    BalancedSoftmaxLoss,
    CrossEntropyLoss,
    DiverseExpertLoss,
    FocalLoss,
    LDAMLoss,
    Loss,
    RIDELoss,
    class_balanced_weights,
    class_prior,
    expert_diversity,
    expert_log_priors,
    inverse_prior,
    ldam_margins,
)
from trainer.registry import read_config

VALUES = golden_json("losses.json")
COUNTS = VALUES["cls_num_list"]


@pytest.fixture(scope="module")
def batch():
    arrays = np.load(GOLDEN / "losses_inputs.npz")
    logits = torch.from_numpy(arrays["logits"])
    return {"logits": logits, "output": logits.mean(dim=1)}, torch.from_numpy(arrays["target"])


@pytest.mark.parametrize("name", sorted(VALUES["values"].keys() - {"DiverseExpertLoss.inverse_prior"}))
def test_losses_are_the_references(batch, name):
    """NAME, NAME(argument=value), NAME({"argument": value}) epoch N"""
    kind, arguments, epoch = re.fullmatch(r"(\w+)(?:\((.*)\))?(?: epoch (\d+))?", name).groups()
    given = ast.literal_eval(arguments) if (arguments or "").startswith("{") else eval(f"dict({arguments or ''})")
    loss = getattr(model.loss, kind)(COUNTS, **given)
    loss.set_epoch(int(epoch or 1))
    assert loss(*batch).item() == pytest.approx(VALUES["values"][name], rel=1e-6)


def test_focal_loss_without_focus_is_cross_entropy(batch):
    torch.testing.assert_close(FocalLoss(COUNTS, gamma=0)(*batch), CrossEntropyLoss(COUNTS)(*batch))
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        FocalLoss(COUNTS, gamma=-0.5)


def test_balanced_softmax_carries_the_prior(batch):
    output, target = batch
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    scores = output["output"].exp() * prior
    expected = -torch.log(scores[range(16), target] / scores.sum(dim=1)).mean()
    torch.testing.assert_close(BalancedSoftmaxLoss(COUNTS)(output, target), expected)


@pytest.mark.parametrize("loss", [LDAMLoss, RIDELoss])
def test_reweighting_begins_where_the_schedule_steps(batch, loss):
    """Steps are counted in whole epochs: with 160, epoch 161 (counted from 1) is the first."""
    criterion, values = loss(COUNTS, reweight_epoch=160), {}
    for epoch in (1, 160, 161, 200, 5):  # going back undoes it
        criterion.set_epoch(epoch)
        values[epoch] = criterion(*batch).item()
    assert values[1] == values[160] == values[5] != values[161] == values[200]
    never = loss(COUNTS)
    never.set_epoch(10**6)
    assert never(*batch).item() == values[1]


def test_margins_and_weights_favour_rare_classes():
    margins, weights = ldam_margins(COUNTS), class_balanced_weights(COUNTS)
    assert float(margins.max()) == float(margins[-1]) == 0.5
    assert bool((margins.diff() >= 0).all()) and bool((weights.diff() >= 0).all())
    assert float(weights.mean()) == pytest.approx(1)


def test_diversity_passes_no_gradient_through_the_mean():
    logits = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mean = logits.mean(dim=1)
    mean.retain_grad()
    expert_diversity(logits, mean, torch.ones(10)).backward()
    assert mean.grad is None and bool((logits.grad != 0).any())
    same = torch.randn(4, 1, 10).expand(4, 3, 10)
    assert float(expert_diversity(same, same.mean(dim=1), torch.ones(10))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [getattr(model.loss, name) for name in model.loss.__all__])
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 6])
def test_every_loss_trains_every_expert(loss, experts):
    logits, target = torch.randn(6, experts, 10, requires_grad=True), torch.arange(6)
    loss(COUNTS)({"logits": logits, "output": logits.mean(1)}, target).backward()
    assert bool((logits.grad.abs().sum(dim=(0, 2)) > 0).all())


def test_inverse_prior_is_the_references():
    inverse = inverse_prior(class_prior(COUNTS))
    np.testing.assert_allclose(inverse, VALUES["values"]["DiverseExpertLoss.inverse_prior"], rtol=1e-6)


def test_ties_keep_their_class_order():
    prior = class_prior([5] * 40 + [9] * 40)
    expected = torch.cat([torch.full((40,), float(prior[-1])), torch.full((40,), float(prior[0]))])
    torch.testing.assert_close(inverse_prior(prior), expected)
    counts = [3, 7, 7, 20]  # ascending ranks: class 0, 1, 2, 3 get the values of 3, 2, 1, 0
    torch.testing.assert_close(inverse_prior(class_prior(counts)) * 37, torch.tensor([20.0, 7, 7, 3]))


def test_three_experts_carry_pi_uniform_and_inverse_pi():
    prior = class_prior(COUNTS)
    forward, uniform, backward = expert_log_priors(prior, inverse_prior(prior), 3, tau=2)
    torch.testing.assert_close(forward, prior.log(), atol=1e-5, rtol=0)
    torch.testing.assert_close(uniform, torch.zeros(10))
    torch.testing.assert_close(backward, 2 * inverse_prior(prior).log(), atol=1e-5, rtol=0)


def test_one_expert_is_the_softmax_baseline(batch):
    logits = batch[0]["logits"][:, :1]
    loss = DiverseExpertLoss(COUNTS)({"logits": logits, "output": logits[:, 0]}, batch[1])
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0], batch[1]))


# --- The prior that the logits carry ----------------------------------------------------------------------------

PRIOR = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)


def reweighted(beta: float = 0.9999) -> torch.Tensor:
    """log(pi w), normalized, from the definition of the weights, [C]."""
    weighted = [p * (1 - beta) / (1 - beta**n) for p, n in zip(PRIOR.tolist(), COUNTS, strict=True)]
    return torch.tensor([w / sum(weighted) for w in weighted], dtype=torch.float64).log()


def check_carried(loss: Loss, expected: torch.Tensor) -> None:
    for experts in (1, 3):
        carried = loss.log_priors(experts)
        assert carried.shape == (experts, len(COUNTS)) and carried.dtype == torch.float32
        torch.testing.assert_close(carried.double(), expected.expand(experts, -1).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (CrossEntropyLoss(COUNTS), PRIOR.log()),
        (CrossEntropyLoss(COUNTS, reweight_CE=True), reweighted()),
        (FocalLoss(COUNTS, gamma=2), PRIOR.log()),
        (BalancedSoftmaxLoss(COUNTS), torch.zeros(len(COUNTS))),
    ],
)
def test_what_the_logits_carry(loss, expected):
    check_carried(loss, expected)


def test_every_loss_must_say_what_its_logits_carry():
    with pytest.raises(TypeError, match="abstract"):
        Loss(COUNTS)


@pytest.mark.parametrize("experts", [1, 2, 3, 6])
@pytest.mark.parametrize("tau", [1, 2])
def test_the_methods_own_loss_carries_what_its_experts_are_trained_under(experts, tau):
    prior = class_prior(COUNTS)
    expected = expert_log_priors(prior, inverse_prior(prior), experts, tau)
    assert torch.equal(DiverseExpertLoss(COUNTS, tau=tau).log_priors(experts), expected)


@pytest.mark.parametrize("loss", [LDAMLoss, RIDELoss])
def test_a_schedule_answers_for_the_epoch_set_last(loss):
    criterion = loss(COUNTS, reweight_epoch=160)
    check_carried(criterion, PRIOR.log())
    criterion.set_epoch(200)
    check_carried(criterion, reweighted())
    assert float(reweighted().exp().sum()) == pytest.approx(1)
    criterion.set_epoch(160)
    check_carried(criterion, PRIOR.log())
    never = RIDELoss(COUNTS, reweight=False, reweight_epoch=160) if loss is RIDELoss else LDAMLoss(COUNTS)
    never.set_epoch(200)
    check_carried(never, PRIOR.log())


def test_a_class_without_an_image_has_a_finite_log_prior():
    assert bool(torch.isfinite(CrossEntropyLoss([5, 0, 3]).log_priors(2)).all())


def test_training_leaves_the_logits_with_the_prior_that_the_loss_says():
    """Logits that see no image, trained on long-tailed labels alone, end at the carried prior."""
    counts = [60, 30, 10]
    target = torch.arange(3).repeat_interleave(torch.tensor(counts))
    for loss, experts in (
        (CrossEntropyLoss(counts), 1),
        (CrossEntropyLoss(counts, reweight_CE=True), 1),
        (BalancedSoftmaxLoss(counts), 1),
        (DiverseExpertLoss(counts, tau=2), 3),
    ):
        v = torch.zeros(experts, 3, requires_grad=True)
        optimizer = torch.optim.LBFGS([v], max_iter=100, line_search_fn="strong_wolfe")

        def closure(loss=loss, v=v, optimizer=optimizer):
            optimizer.zero_grad()
            logits = v.expand(len(target), -1, -1)
            value = loss({"logits": logits, "output": logits.mean(dim=1)}, target)
            value.backward()
            return value

        optimizer.step(closure)
        expected = torch.log_softmax(loss.log_priors(experts), dim=1)
        torch.testing.assert_close(torch.log_softmax(v.detach(), dim=1), expected, atol=2e-3, rtol=0)


def test_what_a_checkpoint_carries_depends_on_its_loss_its_sampling_and_its_epoch():
    plain, balanced = (ImbalanceDigitsDataLoader(32, imb_factor=0.05, balanced=b) for b in (False, True))
    log_prior = class_prior(plain.cls_num_list).log()

    def carried(loss: dict | None, epoch: int | None, loader, experts: int = 1) -> torch.Tensor:
        config = read_config({"loss": loss} if loss else {})
        return carried_log_priors(config, epoch, loader, experts).log_softmax(dim=1)

    entropy = {"type": "CrossEntropyLoss", "args": {}}
    uniform = torch.full((1, 10), 0.1).log()
    torch.testing.assert_close(carried(entropy, 3, plain), log_prior[None], atol=1e-5, rtol=0)
    torch.testing.assert_close(carried(entropy, 3, balanced), uniform, atol=1e-5, rtol=0)
    torch.testing.assert_close(carried(None, 3, plain), log_prior[None], atol=1e-5, rtol=0)
    own = DiverseExpertLoss(plain.cls_num_list).log_priors(3).log_softmax(dim=1)
    torch.testing.assert_close(carried(None, 3, plain, 3), own)
    weighted = {"type": "LDAMLoss", "args": {"reweight_epoch": 5}}
    assert not torch.equal(carried(weighted, 2, plain), carried(weighted, 9, plain))
    assert torch.equal(carried(weighted, None, plain), carried(weighted, 9, plain))  # trained to its end
