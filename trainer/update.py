"""The update of the weights by a loss, and what few trainings need of it: fp16, unequal shards, losses not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from base.base_trainer import BaseTrainer
from utils import distributed
from utils.errors import UserError


class Update:
    """The backward pass and the step of the optimizer.

    A loss that is not finite stops the run, or with `"on_nan": "skip"` the step is skipped.

    Args:
        trainer: whose model and optimizer it is.
        network: the model as it runs in training; calling it begins a step.
    """

    #: Size of this process's shard of the batch over the mean size of all shards: gradients are averaged over these.
    shard_weight = 1.0
    #: Whether the last step was skipped.
    skipped = False

    def __init__(self, trainer: BaseTrainer, network: nn.Module):
        self.trainer = trainer
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.options.precision == "fp16")
        self.losses: dict[int, Tensor] = {}  # step -> its loss, since the last `check`
        self.skips = trainer.options.on_nan == "skip"
        if self.skips:
            network.register_forward_pre_hook(self._remember_buffers)

    def __call__(self, loss: Tensor) -> None:
        """Update the weights by a loss."""
        self.scaler.scale(loss * self.shard_weight).backward()
        self.skipped = self.skips and self._is_bad(loss)
        if self.skipped:
            self._skip()
            return
        self.losses[self.trainer.progress.step] = loss.detach()
        self.scaler.step(self.trainer.optimizer)
        self.scaler.update()

    def check(self, weights: bool = False) -> None:
        """Check that all losses of the epoch so far are finite, and the weights if wanted.

        Raises:
            UserError: one is not; in every process.
        """
        finite = torch.stack([*self.losses.values()]).isfinite().tolist() if self.losses else []
        bad = [step for step, good in zip(self.losses, finite, strict=True) if not good]
        self.losses = {}
        if not bad and weights and not all_finite(self.trainer.model.state_dict().values()):
            bad = [self.trainer.progress.step]
        steps = [step for (step,) in distributed.numbers_of_all(bad[0] if bad else 0) if step]
        if steps:
            raise self._not_finite(min(steps))

    def _remember_buffers(self, *_) -> None:
        self.buffers = [buffer.clone() for buffer in self.trainer.model.buffers()]

    def _is_bad(self, loss: Tensor) -> bool:
        """Whether loss or gradients of any process are not finite. (fp16 scales the loss by such gradients.)"""
        values = [loss]
        if not self.scaler.is_enabled():
            values += [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        return any(bad for (bad,) in distributed.numbers_of_all(not all_finite(values)))

    def _skip(self) -> None:
        for buffer, before in zip(self.trainer.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)  # batch norm has seen the activations
        progress, limit = self.trainer.progress, self.trainer.options.nan_limit
        progress.skipped += 1
        if progress.skipped > limit:
            raise self._not_finite(progress.step, f" for the {progress.skipped}th time, and nan_limit is {limit}")
        if distributed.is_main():
            self.trainer.logger.warning(
                f"Epoch {progress.epoch}, step {progress.step}: loss or gradient is not finite, step left out."
            )

    def _not_finite(self, step: int, again: str = "") -> UserError:
        trainer = self.trainer
        advice = "lower the learning rate (--lr)"
        if self.scaler.is_enabled():
            advice += ", use bf16 instead of fp16"
        if not self.skips:
            advice += ', leave such steps out (trainer;on_nan: "skip")'
        error = UserError(
            f"The loss is no longer finite in epoch {trainer.progress.epoch}, step {step} of {len(trainer.loader)}, at "
            f"learning rate {trainer.optimizer.param_groups[0]['lr']:.3g}{again}: {advice}, or look for the cause. "
            f"{trainer.how_to_resume()}"
        )
        error.shared = True
        return error


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())
