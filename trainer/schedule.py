"""Learning-rate schedules that a config may name in `lr_scheduler.type`."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, StepLR

__all__ = ["CustomLR", "CosineAnnealingLR", "MultiStepLR", "StepLR"]


def custom_lr_factor(epoch: int, step1: int, step2: int, warmup_epoch: int = 5, gamma: float = 0.1) -> float:
    """Factor on the base learning rate in epoch `epoch`, counted from 0: linear warm-up, then two steps down.

    Args:
        step1, step2: epochs from which the factor is gamma and gamma^2.
        warmup_epoch: epochs over which the factor rises linearly to 1; 0 for none.
        gamma: factor of each step.
    """
    factor = gamma**2 if epoch >= step2 else gamma if epoch >= step1 else 1.0
    return factor * (1 + epoch) / warmup_epoch if epoch < warmup_epoch else factor


class CustomLR(LambdaLR):
    """`custom_lr_factor` as a torch scheduler, stepped once an epoch."""

    def __init__(self, optimizer: Optimizer, step1: int, step2: int, warmup_epoch: int = 5, gamma: float = 0.1):
        super().__init__(optimizer, lambda epoch: custom_lr_factor(epoch, step1, step2, warmup_epoch, gamma))
