"""What is saved of a run, after an epoch or inside one, and how it stops there and is resumed, bit for bit."""

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from utils import distributed
from utils.errors import UserError
from utils.logger import get_logger
from utils.seed import MIXUP, epoch_generator
from utils.signals import StopSignals, end_at_once


class StopRequested(UserError):
    """The run was told to stop; raised between two steps, in every process at the same one."""


class Stop(StopSignals):
    """The signals that ask a run to stop, see `StopSignals`. A process does not wait for ever for dead ones.

    Args:
        how_to_resume: gives the sentence that ends the message of a process that gave up waiting.
    """

    def __init__(self, how_to_resume: Callable[[], str]):
        super().__init__(self._limit_patience)
        self.how_to_resume = how_to_resume
        self.timer: threading.Timer | None = None

    def _limit_patience(self, number: int) -> None:
        if distributed.world_size() > 1 and number != getattr(signal, "SIGUSR1", None):  # that one warns long before
            message = f"Another process of this run did not finish its step. {self.how_to_resume()}"
            self.timer = threading.Timer(distributed.PATIENCE, end_at_once, [message])
            self.timer.daemon = True
            self.timer.start()

    def agreed(self) -> int:
        """The signal that one of the processes has received; they all have come to the end of their step."""
        if self.timer:
            self.timer.cancel()
        return max(number for (number,) in distributed.numbers_of_all(self.received))


@dataclass
class EpochProgress:
    """How far an epoch is, in this process.

    Args:
        epoch: counted from 1.
        sums: of loss, correct predictions and images so far, [3], on the training device.
        generator: of what is random in a step: mixup's partners and shares.
        step: batches done.
        seconds: spent on them, in all sessions.
        skipped: steps that were skipped because of a loss or gradient that is not finite.
    """

    epoch: int
    sums: Tensor
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0

    @classmethod
    def start(cls, epoch: int, seed: int, device: torch.device) -> "EpochProgress":
        return cls(epoch, torch.zeros(3, device=device), epoch_generator(seed, epoch, MIXUP))

    def state(self, steps: int) -> dict[str, Any]:
        """Entry `mid_epoch` of a checkpoint; every process calls this.

        Args:
            steps: batches of the whole epoch.
        """
        own = {
            "sums": self.sums.cpu(),
            "mixup": self.generator.get_state(),
            "skipped": self.skipped,
            "random": random_state(),
        }
        every = distributed.objects_of_all(own)
        return {"step": self.step, "steps": steps, "seconds": self.seconds, "processes": every}

    def restore(self, state: Mapping[str, Any], steps: int) -> None:
        """Continue a fresh epoch where a run was stopped in it.

        Raises:
            UserError: the epoch has other batches now.
        """
        if state["steps"] != steps:
            raise UserError(
                f"The run was stopped in an epoch of {state['steps']} steps, which has {steps} now: keep "
                "data, batch_size and number of processes until it is whole, or go on from a checkpoint-epoch*.pth."
            )
        processes = state["processes"]
        own = part_of_process(processes)
        if len(processes) == distributed.world_size():
            self.sums += own["sums"].to(self.sums.device)
        elif distributed.is_main():
            self.sums += torch.stack([each["sums"] for each in processes]).sum(dim=0).to(self.sums.device)
        self.generator.set_state(own["mixup"])
        self.step, self.seconds, self.skipped = state["step"], state["seconds"], own["skipped"]
        restore_random_state(own["random"])


def part_of_process(processes: list) -> Any:
    """This process's part of the saved state; the run may have had another number of processes."""
    count = distributed.world_size()
    if len(processes) != count:
        get_logger().info(f"{len(processes)} process(es) before, {count} now: rounding differs.")
    return processes[distributed.rank() % len(processes)]


def random_state() -> dict[str, Any]:
    """The random numbers to come in this process."""
    cuda = {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}
    return {"torch": torch.get_rng_state(), **cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def check_resumable(checkpoint: Mapping[str, Any], path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Check that training can go on from a checkpoint.

    Raises:
        UserError: it holds weights alone, or another kind of optimizer.
    """
    random = "mid_epoch" if checkpoint.get("mid_epoch") else "random"
    needed = ("optimizer", "scheduler", "epoch", random)
    if any(checkpoint.get(key) is None for key in needed) or {"best", "best_epoch"} - checkpoint.keys():
        raise UserError(
            f"{path} holds weights alone, so that training cannot go on from it: "
            "give a last.pth or checkpoint-epoch*.pth."
        )
    section = (checkpoint.get("config") or {}).get("optimizer")
    before, now = section.get("type") if isinstance(section, dict) else None, type(optimizer).__name__
    if before != now:
        raise UserError(f"{path} was trained with {before} and cannot go on with {now}: keep the optimizer's type.")


def restore_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, checkpoint: Mapping[str, Any]) -> None:
    """Momenta and the position in the schedule come from the checkpoint, hyper-parameters from the config.

    So overriding them on resume has the effect it says. Unchanged ones give exactly the rates of an unbroken run.

    Raises:
        ValueError: the checkpoint has other parameter groups.
        TypeError: its entries do not fit the parameters.
    """
    hyper_parameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, entries in optimizer.state.items():
        for name, entry in entries.items():
            known = isinstance(entry, (Tensor, int, float, type(None)))
            if not known or getattr(entry, "shape", ()) not in ((), parameter.shape):
                raise TypeError(f"{name} is not of the shape of its parameter, {list(parameter.shape)}")
    scheduler.last_epoch = checkpoint["scheduler"]["last_epoch"]
    for group, configured in zip(optimizer.param_groups, hyper_parameters, strict=True):
        change = configured["initial_lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
        group.update(configured, lr=group["lr"] * change)
    if isinstance(scheduler, LambdaLR):  # in closed form, so that moved steps count too
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
