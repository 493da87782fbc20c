"""Losses that a config may name in `loss.type`: pure functions of tensors, and thin modules around them.

Every loss is built as `Loss(cls_num_list=[n_0, ...], **loss.args)` and called as `criterion(output, target)` with the
network's output dict and target [B]; it returns a scalar, the mean over the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CrossEntropyLoss", "DiverseExpertLoss"]

EPSILON = 1e-9


def class_prior(cls_num_list: Sequence[int]) -> Tensor:
    """pi_c = n_c / sum n: [C], float32."""
    counts = torch.as_tensor(cls_num_list, dtype=torch.float64)
    return (counts / counts.sum()).float()


def inverse_prior(prior: Tensor) -> Tensor:
    """The prior with its ranks reversed: the class of ascending rank r gets the value of rank C-1-r. [C] -> [C].

    This is the "inverse" distribution of the method's backward expert; it is not 1/pi. Ties keep their class order
    (the reference leaves the order of ties to an unstable sort, so its figures depend on the machine in the 4th digit).
    """
    values, order = torch.sort(prior, stable=True)
    inverse = torch.empty_like(prior)
    inverse[order] = values.flip(0)
    return inverse


def expert_log_priors(prior: Tensor, inverse: Tensor, num_experts: int, tau: float) -> Tensor:
    """The log prior that each expert's logits carry once trained (up to a constant): [E, C].

    Positions are spaced evenly from 1 (forward) over 0 (uniform) to -1 (backward). An expert at position t carries
    pi^t for t >= 0 and pi_inv^(tau * |t|) for t < 0. With three experts these are the paper's pi, uniform and
    pi_inv^tau (TADE, arXiv 2107.09249, equations 2 to 4; the paper calls tau lambda). One expert is the forward one.
    """
    log_prior, log_inverse = torch.log(prior + EPSILON), torch.log(inverse + EPSILON)
    positions = torch.linspace(1, -1, num_experts, dtype=torch.float64).tolist()  # t of every expert
    return torch.stack([t * log_prior if t >= 0 else -t * tau * log_inverse for t in positions])


def diverse_expert_loss(logits: Tensor, target: Tensor, prior: Tensor, inverse: Tensor, tau: float) -> Tensor:
    """Sum over the experts of CE(v_e + log pi - log carried_e, y).

    Training softmax(v_e + a_e) makes v_e + a_e estimate log p(y|x) under the training prior pi, so that
    a_e = log pi - log carried_e leaves v_e with the prior "carried_e".

    Args:
        logits: [B, E, C].
        target: [B].
        prior: training prior pi, [C].
        inverse: `inverse_prior(prior)`, [C].
        tau: exponent of the backward expert's prior.
    """
    adjustments = torch.log(prior + EPSILON) - expert_log_priors(prior, inverse, logits.shape[1], tau)  # a_e
    return sum(F.cross_entropy(logits[:, e] + adjustments[e], target) for e in range(logits.shape[1]))


def class_balanced_weights(cls_num_list: Sequence[int], beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), scaled to mean 1: [C] (Cui et al., CVPR 2019, arXiv 1901.05555, equation 2)."""
    counts = torch.as_tensor(cls_num_list, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (weights / weights.mean()).float()


class CrossEntropyLoss(nn.Module):
    """Cross entropy of the mean logits ("Softmax" baseline).

    Args:
        cls_num_list: training images per class.
        reweight_CE: weigh the classes by `class_balanced_weights`.
    """

    def __init__(self, cls_num_list: Sequence[int], reweight_CE: bool = False):  # noqa: N803 the reference's name
        super().__init__()
        self.register_buffer("class_weights", class_balanced_weights(cls_num_list) if reweight_CE else None)

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["output"] [B, C], target [B] -> scalar."""
        return F.cross_entropy(output["output"], target, self.class_weights)


class DiverseExpertLoss(nn.Module):
    """The method's own loss: each expert learns under a class prior of its own (see `diverse_expert_loss`).

    Args:
        cls_num_list: training images per class.
        tau: exponent of the backward expert's prior; 2 on CIFAR and ImageNet-LT, 1 on Places-LT and iNaturalist.
    """

    def __init__(self, cls_num_list: Sequence[int], tau: float = 2.0):
        super().__init__()
        self.tau = tau
        self.register_buffer("prior", class_prior(cls_num_list))
        self.register_buffer("inverse_prior", inverse_prior(self.prior))

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["logits"] [B, E, C], target [B] -> scalar. Without per-expert logits: cross entropy of the mean."""
        if "logits" not in output:
            return F.cross_entropy(output["output"], target)
        return diverse_expert_loss(output["logits"], target, self.prior, self.inverse_prior, self.tau)
