"""Learning-rate schedules that a config may name in `lr_scheduler.type`."""

import math
from collections.abc import Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, StepLR

__all__ = ["CustomLR", "WarmupCosineLR", "CosineAnnealingLR", "MultiStepLR", "StepLR"]

WARMUP = 5  # epochs, the published schedule's


def custom_lr_factor(epoch: int, step1: int, step2: int, warmup_epoch: int = WARMUP, gamma: float = 0.1) -> float:
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

    def __init__(self, optimizer: Optimizer, step1: int, step2: int, warmup_epoch: int = WARMUP, gamma: float = 0.1):
        super().__init__(optimizer, lambda epoch: custom_lr_factor(epoch, step1, step2, warmup_epoch, gamma))


class WarmupCosineLR(LambdaLR):
    """Linear warm-up, and half a cosine wave down to 0; stepped once an epoch.

    Args:
        T_max: epochs in all.
        warmup_epoch: epochs over which a factor on the wave rises linearly to 1; 0 for none.
    """

    def __init__(self, optimizer: Optimizer, T_max: int, warmup_epoch: int = WARMUP):  # noqa: N803 torch's name
        def factor(epoch: int) -> float:
            wave = (1 + math.cos(math.pi * epoch / T_max)) / 2
            return wave * (1 + epoch) / warmup_epoch if epoch < warmup_epoch else wave

        super().__init__(optimizer, factor)


def moved_schedule(config: Mapping, epochs: int, kept: Mapping = {}) -> dict[str, object]:
    """What changes in a training config when its schedule takes another number of epochs: {path: value}.

    Steps and re-weighting move in proportion, to epoch 1 at least; warm-up is at most half of the first step.

    Args:
        config: sections, with the epochs that its schedule was made for in "trainer".
        epochs: in all, from now on.
        kept: values by path that stay what they are.
    """
    whole = config["trainer"]["epochs"]

    def scaled(epoch: int) -> int:
        return max(1, round(epoch * epochs / whole))

    changes: dict[str, object] = {"trainer;epochs": epochs}
    arguments = config["lr_scheduler"].get("args", {}) if epochs != whole else {}
    for key in ("step1", "step2", "T_max", "step_size"):
        if key in arguments:
            changes[f"lr_scheduler;args;{key}"] = scaled(arguments[key])
    if "milestones" in arguments:
        changes["lr_scheduler;args;milestones"] = [scaled(epoch) for epoch in arguments["milestones"]]
    if "step1" in arguments:
        step1 = kept.get("lr_scheduler;args;step1", changes["lr_scheduler;args;step1"])
        warmup = arguments.get("warmup_epoch", WARMUP)
        changes["lr_scheduler;args;warmup_epoch"] = min(warmup, step1 // 2)
    elif "warmup_epoch" in arguments:
        changes["lr_scheduler;args;warmup_epoch"] = min(arguments["warmup_epoch"], epochs // 2)
    if epochs != whole and config["loss"].get("args", {}).get("reweight_epoch", -1) > 0:
        changes["loss;args;reweight_epoch"] = scaled(config["loss"]["args"]["reweight_epoch"])
    return {path: value for path, value in changes.items() if path not in kept}


def odd_schedule(config: Mapping) -> str | None:
    """What is odd about a learning-rate schedule and its epochs, as a sentence; None where nothing is."""
    epochs, section = config["trainer"]["epochs"], config["lr_scheduler"]
    arguments = section.get("args", {})
    if section["type"] in ("CosineAnnealingLR", "WarmupCosineLR") and arguments["T_max"] != epochs:
        after = "rises again after that" if arguments["T_max"] < epochs else "is still high at the end"
        return (
            f"lr_scheduler;args;T_max is {arguments['T_max']} and trainer;epochs {epochs}: the learning rate {after}."
        )
    steps = arguments.get("milestones", [arguments[key] for key in ("step1", "step2") if key in arguments])
    if late := [step for step in steps if step >= epochs]:
        return f"The learning rate never falls in epoch {late[0]}, since trainer;epochs is {epochs}."
    return None
