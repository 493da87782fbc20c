"""Class priors, and the log prior that each expert's logits carry."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-9  # inside every logarithm of a prior, as in the reference


def class_prior(cls_num_list: Sequence[int]) -> Tensor:
    """pi_c = n_c / sum n.

    Args:
        cls_num_list: training images per class, n_c, [C].

    Returns:
        [C], float32, summing to 1.
    """
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
    """The log prior that each expert's logits carry once trained with the method's own loss (up to a constant).

    Positions are spaced evenly from 1 (forward) over 0 (uniform) to -1 (backward). An expert at position t carries
    pi^t for t >= 0 and pi_inv^(tau * |t|) for t < 0. With three experts these are the paper's pi, uniform and
    pi_inv^tau (TADE, arXiv 2107.09249, equations 2 to 4; the paper calls tau lambda). One expert is the forward one.

    Args:
        prior: training prior pi, [C].
        inverse: `inverse_prior(prior)`, [C].
        num_experts: E.
        tau: exponent of the backward expert's prior.

    Returns:
        [E, C].
    """
    log_prior = torch.log(prior + EPSILON)
    log_inverse = torch.log(inverse + EPSILON)
    positions = torch.linspace(1, -1, num_experts, dtype=torch.float64).tolist()  # t of every expert
    return torch.stack([t * log_prior if t >= 0 else -t * tau * log_inverse for t in positions])
