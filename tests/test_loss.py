import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_json

from model.loss import CrossEntropyLoss, DiverseExpertLoss, class_prior, expert_log_priors, inverse_prior

VALUES = golden_json("losses.json")
COUNTS = VALUES["cls_num_list"]


@pytest.fixture(scope="module")
def batch():
    arrays = np.load(GOLDEN / "losses_inputs.npz")
    logits = torch.from_numpy(arrays["logits"])
    return {"logits": logits, "output": logits.mean(dim=1)}, torch.from_numpy(arrays["target"])


@pytest.mark.parametrize("tau", [0.5, 1, 2])
def test_diverse_expert_loss_is_the_references(batch, tau):
    expected = VALUES["values"][f"DiverseExpertLoss(tau={tau})"]
    assert DiverseExpertLoss(COUNTS, tau=tau)(*batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reweight", [False, True])
def test_cross_entropy_is_the_references(batch, reweight):
    expected = VALUES["values"]["CrossEntropyLoss" + ("(reweight_CE=True)" if reweight else "")]
    assert CrossEntropyLoss(COUNTS, reweight_CE=reweight)(*batch).item() == pytest.approx(expected, rel=1e-6)


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


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 6])
def test_any_number_of_experts(experts):
    prior = class_prior(COUNTS)
    carried = expert_log_priors(prior, inverse_prior(prior), experts, tau=2)
    slope = carried[:, 0] - carried[:, -1]  # towards the largest class, falling from the first expert to the last
    assert carried.shape == (experts, 10) and bool((slope.diff() < 0).all())
    logits, target = torch.randn(6, experts, 10, requires_grad=True), torch.arange(6)
    DiverseExpertLoss(COUNTS)({"logits": logits, "output": logits.mean(1)}, target).backward()
    assert bool((logits.grad.abs().sum(dim=(0, 2)) > 0).all())


def test_one_expert_is_the_softmax_baseline(batch):
    logits = batch[0]["logits"][:, :1]
    loss = DiverseExpertLoss(COUNTS)({"logits": logits, "output": logits[:, 0]}, batch[1])
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 0], batch[1]))


def test_without_expert_logits_it_is_cross_entropy(batch):
    output, target = batch
    loss = DiverseExpertLoss(COUNTS)({"output": output["output"]}, target)
    torch.testing.assert_close(loss, F.cross_entropy(output["output"], target))


def test_priors_follow_the_module():
    assert {"prior", "inverse_prior"} <= {name for name, _ in DiverseExpertLoss(COUNTS).named_buffers()}
    assert "class_weights" in dict(CrossEntropyLoss(COUNTS, reweight_CE=True).named_buffers())
