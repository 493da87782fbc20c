"""Supervised training of a multi-expert network."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import BaseDataLoader
from base.base_trainer import BaseTrainer, TrainerOptions
from model.inference import inference_copy
from model.metric import accuracy, shot_group_accuracy, shot_groups
from trainer.devices import parallel
from trainer.logits import expert_logits
from trainer.precision import AUTOCAST
from utils import distributed
from utils.errors import UserError, unknown
from utils.logger import progress
from utils.seed import MIXUP, epoch_generator

__all__ = ["Trainer"]


class MixedPrecision(nn.Module):
    """Runs a network under autocast and gives its output in float32; the loss is computed outside of autocast.

    Autocast's precision belongs to a thread, and DataParallel starts threads: it is set where the network runs.
    """

    def __init__(self, network: nn.Module, device_type: str, precision: str):
        super().__init__()
        self.network = network
        self.device_type = device_type
        self.dtype = AUTOCAST.get(precision)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            output = self.network(images)
        return {name: tensor.float() for name, tensor in output.items()}


def mixup(images: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Mix every image of a batch with another one (Zhang et al., ICLR 2018, arXiv 1710.09412, equation 1).

    One lambda ~ Beta(alpha, alpha) a batch. The larger share is an image's own, so that training accuracy keeps its
    meaning; over all pairs of a batch this is the same as not ordering the shares.

    Args:
        images: [B, 3, H, W].
        alpha: above 0; 0.4 for long-tailed CIFAR (BalPoE, arXiv 2305.14217).
        generator: of lambda and the partners, on the CPU.

    Returns:
        The mixtures [B, 3, H, W], in the memory format of the images; the indices of their partners in the batch, [B];
        the share of their own image, in 0.5..1.
    """
    own = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator))).beta(alpha, alpha)
    share = max(own, 1 - own)
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    return torch.lerp(images[partner], images, share), partner, share


class Trainer(BaseTrainer):
    """One criterion, one network, one data loader.

    Args:
        model: on its device.
        criterion: called as criterion(output dict, target) -> scalar; its `set_epoch(n)`, if any, is called first.
        metrics: name -> function of (scores [N, C], targets [N], cls_num_list [C]), see model/metric.py.
        loader: prepared for this process.
        optimizer, scheduler, options, run_dir, extra_state: see BaseTrainer.
        gpus: GPU numbers for DataParallel; fewer than two means none.
        frozen: modules whose parameters are not trained: their batch statistics stay as they are, too.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        metrics: Mapping[str, Callable],
        loader: BaseDataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler,
        options: TrainerOptions,
        run_dir: Path,
        extra_state: dict,
        gpus: Sequence[int] = (),
        frozen: Sequence[nn.Module] = (),
    ):
        super().__init__(model, optimizer, scheduler, options, run_dir, extra_state)
        self.criterion = criterion
        self.metrics = {"accuracy": accuracy, "shot_group_accuracy": shot_group_accuracy, **metrics}
        self.loader = loader
        self.frozen = frozen
        self.device = next(model.parameters()).device
        if options.compile and len(gpus) > 1:
            raise UserError(
                "torch.compile does not work with several GPUs in one process: use torchrun, or leave --compile out."
            )
        network = torch.compile(model, dynamic=False) if options.compile else model
        self.network = parallel(MixedPrecision(network, self.device.type, options.precision), self.device, gpus)
        if self.monitored and self.monitored not in self.monitorable():
            raise unknown("value in trainer;monitor", self.monitored, self.monitorable())

    def monitorable(self) -> list[str]:
        groups = [classes for classes in shot_groups(self.loader.cls_num_list).values() if classes.any()]
        one_each = torch.stack([classes.int().argmax() for classes in groups])  # a class of every group there is
        measured = self.measure(torch.zeros(len(groups), self.loader.num_classes), one_each)
        experts = [f"val_expert{e + 1}" for e in range(self.model.num_experts)]
        return ["loss", "accuracy", "val_loss", *(k for k, v in measured.items() if v is not None), *experts]

    def measure(self, scores: Tensor, targets: Tensor) -> dict[str, float | None]:
        """The metrics of validation images that are single numbers: scores [N, C], targets [N] -> "val_NAME": value.

        Lists, such as accuracy by class, are for the results of an evaluation alone.
        """
        values: dict[str, float | None] = {}
        for name, metric in self.metrics.items():
            value = metric(scores, targets, self.loader.cls_num_list)
            columns = value if isinstance(value, dict) else {name: value}
            values |= {f"val_{key}": v for key, v in columns.items() if not isinstance(v, list)}
        return values

    def train_step(
        self, images: Tensor, target: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One update on a batch [B, 3, H, W], [B]; returns the loss and the network's output, both detached.

        The generator is needed for mixup alone.
        """
        if self.options.mixup_alpha:
            images, partner, share = mixup(images, self.options.mixup_alpha, generator)
            output = self.network(images)
            loss = share * self.criterion(output, target) + (1 - share) * self.criterion(output, target[partner])
        else:
            output = self.network(images)
            loss = self.criterion(output, target)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), {name: tensor.detach() for name, tensor in output.items()}

    def train_epoch(self, epoch: int) -> dict:
        self.network.train()
        for module in self.frozen:
            module.eval()
        if hasattr(self.criterion, "set_epoch"):
            self.criterion.set_epoch(epoch)
        self.loader.set_epoch(epoch)
        sums = torch.zeros(3, device=self.device)  # loss, correct, images
        generator = epoch_generator(self.loader.seed, epoch, MIXUP)
        start = time.perf_counter()
        bar = progress(self.loader, f"epoch {epoch}/{self.options.epochs}", total=len(self.loader))
        for step, (images, target) in enumerate(bar):
            if step == 0 and epoch == self.start_epoch:
                shown = images[:32].float()
                self.tensorboard.images("input/images", (shown - shown.amin()) / (shown.amax() - shown.amin()), epoch)
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            target = target.to(self.device, non_blocking=True)
            loss, output = self.train_step(images, target, generator)
            sums += torch.stack(
                [
                    loss * len(target),
                    (output["output"].argmax(1) == target).sum(),
                    torch.tensor(float(len(target)), device=self.device),
                ]
            )
            if (step + 1) % self.options.log_step == 0:
                self._check_finite(sums[0] / sums[2], epoch)
                bar.set_postfix(loss=f"{float(sums[0] / sums[2]):.3f}")
        loss, correct, images = distributed.sum_over_processes(sums).tolist()
        self._check_finite(torch.tensor(loss), epoch)
        values = {
            "loss": loss / images,
            "accuracy": 100 * correct / images,
            "images_per_second": images / (time.perf_counter() - start),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.tensorboard.scalars(
            {
                "train/loss": values["loss"],
                "train/accuracy": values["accuracy"],
                "train/images_per_second": values["images_per_second"],
                "train/learning_rate": values["lr"],
            },
            epoch,
        )
        return values

    def _check_finite(self, loss: Tensor, epoch: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise UserError(
                f"The loss is no longer finite in epoch {epoch}: lower the learning rate (--lr)"
                f"{' or use bf16 instead of fp16' if self.options.precision == 'fp16' else ''}, "
                "and start again."
            )

    def validate(self, epoch: int) -> dict:
        batches = self.loader.split_validation()
        self.validation_source = f"on the {batches.source}"
        network = inference_copy(self.model, self.loader.image_size)
        logits = expert_logits(network, batches, self.device, "validation")
        scores = logits.mean(dim=1)
        targets = batches.targets
        values: dict = {"val_loss": float(nn.functional.cross_entropy(scores, targets))}
        values |= self.measure(scores, targets)
        values |= {
            f"val_expert{e + 1}": 100 * float((logits[:, e].argmax(1) == targets).float().mean())
            for e in range(logits.shape[1])
        }
        self.tensorboard.scalars({f"validation/{name.removeprefix('val_')}": v for name, v in values.items()}, epoch)
        return values
