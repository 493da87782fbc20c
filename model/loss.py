"""Losses that a config may name in `loss.type`: pure functions of tensors, and thin modules around them.

Every loss is built as `Loss(cls_num_list=[n_0, ...], **loss.args)` and called as `criterion(output, target)` with the
network's output dict and target [B]; it returns a scalar, the mean over the batch. It also says which class prior the
logits of a network trained with it carry (`log_priors`), which is what adaptation to another test prior starts from.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tade.priors import EPSILON, class_prior, expert_log_priors, inverse_prior

__all__ = ["BalancedSoftmaxLoss", "CrossEntropyLoss", "DiverseExpertLoss", "FocalLoss", "LDAMLoss", "RIDELoss"]


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
    losses = [F.cross_entropy(logits[:, e] + adjustments[e], target) for e in range(logits.shape[1])]
    return functools.reduce(torch.add, losses)


def class_balanced_weights(cls_num_list: Sequence[int], beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), scaled to mean 1: [C] (Cui et al., CVPR 2019, arXiv 1901.05555, equation 2)."""
    counts = torch.as_tensor(cls_num_list, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (weights / weights.mean()).float()


def ldam_margins(cls_num_list: Sequence[int], max_m: float = 0.5) -> Tensor:
    """n_c^(-1/4), scaled so that the rarest class has max_m: [C] (LDAM, Cao et al., NeurIPS 2019, arXiv 1906.07413)."""
    margins = torch.as_tensor(cls_num_list, dtype=torch.float64) ** -0.25
    return (margins * (max_m / margins.max())).float()


def ldam_loss(logits: Tensor, target: Tensor, margins: Tensor, class_weights: Tensor | None) -> Tensor:
    """Cross entropy of logits [B, C] whose true class is lowered by its margin (in logits, so s * m_c) -> scalar."""
    return F.cross_entropy(logits - F.one_hot(target, logits.shape[1]) * margins, target, class_weights)


def focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Mean of (1 - p_y)^gamma * -log p_y. [B, C], [B] -> scalar (Lin et al., ICCV 2017, arXiv 1708.02002, eq. 4)."""
    loss = F.cross_entropy(logits, target, reduction="none")
    return ((1 - torch.exp(-loss)) ** gamma * loss).mean()


def expert_diversity(logits: Tensor, mean_logits: Tensor, temperature: Tensor) -> Tensor:
    """Sum over the experts of T_mean^2 * KL(softmax(mean / T) || softmax(v_e / T)), mean over the batch.

    RIDE, arXiv 2010.01809; as in its release, each expert is held against the mean of all, through which no gradient
    passes.

    Args:
        logits: [B, E, C].
        mean_logits: [B, C].
        temperature: T, one for each class, [C].
    """
    mean = F.softmax(mean_logits.detach() / temperature, dim=1)
    divergences = [
        F.kl_div(F.log_softmax(expert / temperature, dim=1), mean, reduction="batchmean") for expert in logits.unbind(1)
    ]
    return temperature.mean() ** 2 * functools.reduce(torch.add, divergences)


def log_reweighted_prior(prior: Tensor, class_weights: Tensor | None) -> Tensor:
    """Log of the prior that training sees where class c counts w_c times: log(pi_c w_c / sum over c of pi_c w_c), [C].

    Args:
        prior: training prior pi, [C].
        class_weights: w, [C]; None for equal ones, which leave log pi.
    """
    if class_weights is not None:
        prior = prior * class_weights
        prior = prior / prior.sum()
    return torch.log(prior + EPSILON)


class Loss(nn.Module, ABC):
    """What every loss has: the training prior pi as the buffer `prior` [C], and two methods.

    Args:
        cls_num_list: training images per class, [C].
    """

    prior: Tensor

    def __init__(self, cls_num_list: Sequence[int]):
        super().__init__()
        self.register_buffer("prior", class_prior(cls_num_list))

    @abstractmethod
    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["output"] [B, C], output["logits"] [B, E, C], target [B] -> scalar."""

    @abstractmethod
    def log_priors(self, num_experts: int) -> Tensor:
        """The log prior that the logits of every expert carry after training with this loss, up to a constant.

        Training softmax(v) by cross entropy makes v an estimate of log p(y|x) = log p(x|y) + log pi_y + constant: v
        carries log pi. A loss with a schedule answers for the epoch set last: call `set_epoch` with the last epoch of
        training before.

        Args:
            num_experts: E.

        Returns:
            [E, C].
        """

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 1. Only losses with a schedule need to know."""


class CrossEntropyLoss(Loss):
    """Cross entropy of the mean logits ("Softmax" baseline).

    Args:
        cls_num_list: training images per class.
        reweight_CE: weight the classes by `class_balanced_weights`.
    """

    class_weights: Tensor | None

    def __init__(self, cls_num_list: Sequence[int], reweight_CE: bool = False):  # noqa: N803 the reference's name
        super().__init__(cls_num_list)
        self.register_buffer("class_weights", class_balanced_weights(cls_num_list) if reweight_CE else None)

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["output"] [B, C], target [B] -> scalar."""
        return F.cross_entropy(output["output"], target, self.class_weights)

    def log_priors(self, num_experts: int) -> Tensor:
        """log pi for every expert; with class weights w the normalized log(pi w). [E, C].

        The mean of the experts is trained, so each of them carries what their mean does, if they share it equally.
        """
        return log_reweighted_prior(self.prior, self.class_weights).repeat(num_experts, 1)


class DiverseExpertLoss(Loss):
    """The method's own loss: each expert learns under a class prior of its own (see `diverse_expert_loss`).

    Args:
        cls_num_list: training images per class.
        tau: exponent of the backward expert's prior; 2 on CIFAR and ImageNet-LT, 1 on Places-LT and iNaturalist.
    """

    inverse_prior: Tensor

    def __init__(self, cls_num_list: Sequence[int], tau: float = 2.0):
        super().__init__(cls_num_list)
        self.tau = tau
        self.register_buffer("inverse_prior", inverse_prior(self.prior))

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["logits"] [B, E, C], target [B] -> scalar."""
        return diverse_expert_loss(output["logits"], target, self.prior, self.inverse_prior, self.tau)

    def log_priors(self, num_experts: int) -> Tensor:
        """From log pi over 0 to tau * log pi_inv, evenly spaced (see tade.priors.expert_log_priors). [E, C]."""
        return expert_log_priors(self.prior, self.inverse_prior, num_experts, self.tau)


class BalancedSoftmaxLoss(Loss):
    """Cross entropy of the mean logits plus the log prior (Ren et al., NeurIPS 2020, arXiv 2007.10740, equation 3).

    Args:
        cls_num_list: training images per class.
    """

    log_prior: Tensor

    def __init__(self, cls_num_list: Sequence[int]):
        super().__init__(cls_num_list)
        self.register_buffer("log_prior", torch.log(self.prior + EPSILON))

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["output"] [B, C], target [B] -> scalar."""
        return F.cross_entropy(output["output"] + self.log_prior, target)

    def log_priors(self, num_experts: int) -> Tensor:
        """Zeros: the logits plus log pi estimate log p(y|x), which leaves the logits with a uniform prior. [E, C]."""
        return torch.zeros_like(self.prior).repeat(num_experts, 1)


class FocalLoss(Loss):
    """Focal loss of the mean logits (see `focal_loss`).

    Args:
        cls_num_list: training images per class.
        gamma: how much less well-classified images count; 0 is cross entropy.
    """

    def __init__(self, cls_num_list: Sequence[int], gamma: float = 1.0):
        super().__init__(cls_num_list)
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, not {gamma}")
        self.gamma = gamma

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["output"] [B, C], target [B] -> scalar."""
        return focal_loss(output["output"], target, self.gamma)

    def log_priors(self, num_experts: int) -> Tensor:
        """log pi for every expert, as for cross entropy; what gamma does to the logits is not counted. [E, C]."""
        return log_reweighted_prior(self.prior, None).repeat(num_experts, 1)


class LDAMLoss(Loss):
    """Cross entropy of the mean logits with class-dependent margins (see `ldam_margins`).

    Late in training the classes are weighted by `class_balanced_weights` (DRW, arXiv 1906.07413).

    Args:
        cls_num_list: training images per class.
        max_m: the rarest class's margin, in cosines.
        s: scale of the logits (30 in the cosine classifier).
        reweight_epoch: whole epochs before the weights are used, counted like the steps of the schedule; -1 never.
    """

    margins: Tensor
    balanced_weights: Tensor

    def __init__(self, cls_num_list: Sequence[int], max_m: float = 0.5, s: float = 30.0, reweight_epoch: int = -1):
        super().__init__(cls_num_list)
        self.reweight_epoch = reweight_epoch
        self.reweighting = False
        self.register_buffer("balanced_weights", class_balanced_weights(cls_num_list))
        self.register_buffer("margins", s * ldam_margins(cls_num_list, max_m))

    def set_epoch(self, epoch: int) -> None:
        self.reweighting = 0 <= self.reweight_epoch < epoch

    @property
    def class_weights(self) -> Tensor | None:
        """Weights of the classes in this epoch, [C]; None for equal ones."""
        return self.balanced_weights if self.reweighting else None

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["output"] [B, C], target [B] -> scalar."""
        return ldam_loss(output["output"], target, self.margins, self.class_weights)

    def log_priors(self, num_experts: int) -> Tensor:
        """The normalized log(pi_c w_c) for every expert, with the class weights w of the epoch set last. [E, C].

        The margins are not counted.
        """
        return log_reweighted_prior(self.prior, self.class_weights).repeat(num_experts, 1)


class RIDELoss(LDAMLoss):
    """RIDE's loss (arXiv 2010.01809): every expert has an LDAM loss of its own, and experts are kept apart.

    Sum over the experts of the LDAM loss, plus additional_diversity_factor times `expert_diversity`; a negative factor
    rewards experts that differ from their mean. From `reweight_epoch` on the classes are weighted, and rare classes
    have lower temperatures in the diversity term: T_c = base_diversity_temperature * w_c with
    w_c = (C * pi_c * reweight_factor + 1 - reweight_factor) / max over c.

    Args:
        cls_num_list: training images per class.
        base_diversity_temperature: temperature of the diversity term.
        reweight: weight classes at all.
        base_loss_factor: factor of the LDAM losses.
        additional_diversity_factor: factor of the diversity term.
        reweight_factor: how much the class frequencies move the temperatures, 0 to 1.
        options: see LDAMLoss.
    """

    early_temperature: Tensor
    late_temperature: Tensor

    def __init__(
        self,
        cls_num_list: Sequence[int],
        base_diversity_temperature: float = 1.0,
        reweight: bool = True,
        base_loss_factor: float = 1.0,
        additional_diversity_factor: float = -0.2,
        reweight_factor: float = 0.05,
        **options: Any,
    ):
        super().__init__(cls_num_list, **options)
        if not reweight:
            self.reweight_epoch = -1
        self.base_loss_factor = base_loss_factor
        self.diversity_factor = additional_diversity_factor
        frequency = self.prior * len(cls_num_list)  # 1 for a class of mean size
        spread = frequency * reweight_factor + 1 - reweight_factor  # C * pi_c * factor + 1 - factor
        temperature = torch.full_like(spread, base_diversity_temperature)
        if base_diversity_temperature <= 0 or bool((spread <= 0).any()):
            raise ValueError(
                f"base_diversity_temperature {base_diversity_temperature} and reweight_factor "
                f"{reweight_factor} must leave all temperatures positive"
            )
        self.register_buffer("early_temperature", temperature)
        self.register_buffer("late_temperature", temperature * spread / spread.max())

    def forward(self, output: dict[str, Tensor], target: Tensor) -> Tensor:
        """output["logits"] [B, E, C], target [B] -> scalar."""
        logits = output["logits"]
        losses = [ldam_loss(expert, target, self.margins, self.class_weights) for expert in logits.unbind(1)]
        temperature = self.late_temperature if self.reweighting else self.early_temperature
        diversity = expert_diversity(logits, output["output"], temperature)
        return self.base_loss_factor * functools.reduce(torch.add, losses) + self.diversity_factor * diversity
