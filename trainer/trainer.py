"""Supervised training of a multi-expert network."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import BaseDataLoader
from base.base_trainer import BaseTrainer, StopRequested, TrainerOptions
from model.fused_norm import fuse_batch_norm
from model.inference import inference_copy
from model.logits import expert_logits
from model.metric import accuracy, shot_group_accuracy, shot_groups
from trainer.devices import parallel
from trainer.precision import AUTOCAST
from utils import distributed
from utils.bad_images import FILE_NAME, BadImage, bad_images_sentence, write_list
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


def compiled(network: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The network through torch.compile; in bf16 on a CPU batch norm alone, with sum and ReLU (model/fused_norm.py).

    On one GPU with CUDA graphs, which start a small network's hundreds of kernels at once, where Python takes longer to
    start them than they take to run. They hold memory of their own for each shape of a batch, and the network's outputs
    are overwritten by its next call. Not with several processes, which exchange gradients in the backward pass.
    """
    if device.type == "cpu" and precision == "bf16" and fuse_batch_norm(network):
        return network
    graphs = device.type == "cuda" and distributed.world_size() == 1
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if graphs else None)  # type: ignore[return-value]


def thumbnails(images: Tensor) -> Tensor:
    """Small pictures of the first images of a batch: [B, 3, H, W] -> [16 at most, 3, 64 at most, .] in 0..1."""
    shown = images[:16].float()
    if shown.shape[-1] > 64:
        shown = nn.functional.interpolate(shown, scale_factor=64 / shown.shape[-1], mode="area")
    return (shown - shown.amin()) / (shown.amax() - shown.amin())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


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


@dataclass
class EpochProgress:
    """How far an epoch of training is, in one process.

    Args:
        epoch: the epoch.
        sums: of loss, correct predictions and images, so far, [3], on the device.
        mixup: generator of partners and shares.
        step: batches done.
        seconds: spent on them, in all sittings.
        skipped: steps that were skipped because of a loss or gradient that is not finite.
        first_bad: first step whose loss was not finite, 0 for none, on the device.
    """

    epoch: int
    sums: Tensor
    mixup: torch.Generator
    first_bad: Tensor
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0


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
        self.epoch_progress: EpochProgress | None = None
        self.bad_images: dict[tuple[str, int], BadImage] = {}
        self.device = next(model.parameters()).device
        if options.compile and len(gpus) > 1:
            raise UserError(
                "torch.compile does not work with several GPUs in one process: use torchrun, or leave --compile out."
            )
        network = compiled(model, self.device, options.precision) if options.compile else model
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
        self, images: Tensor, target: Tensor, generator: torch.Generator | None = None, weight: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One update on a batch [B, 3, H, W], [B]; returns the loss and the network's output, both detached.

        The output is valid until the next step (see `compiled`). The loss is NaN where `on_nan` has it that the update
        is left out.

        Args:
            images, target: the batch; with several processes this one's shard of it.
            generator: needed for mixup alone.
            weight: this shard's size over the mean size of all shards, which gradients are averaged over.
        """
        skip = self.options.on_nan == "skip"
        buffers = [buffer.clone() for buffer in self.model.buffers()] if skip else []
        self.optimizer.zero_grad(set_to_none=True)  # before the forward pass: CUDA graphs write over old gradients
        if self.options.mixup_alpha:
            images, partner, share = mixup(images, self.options.mixup_alpha, generator)
            output = self.network(images)
            loss = share * self.criterion(output, target) + (1 - share) * self.criterion(output, target[partner])
        else:
            output = self.network(images)
            loss = self.criterion(output, target)
        self.scaler.scale(loss if weight == 1 else loss * weight).backward()
        if skip and self._is_bad(loss):
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # batch norm has seen the activations
            loss = loss * torch.nan
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach(), {name: tensor.detach() for name, tensor in output.items()}

    def _is_bad(self, loss: Tensor) -> bool:
        """Whether loss or gradients of any process are not finite. (fp16 scales the loss by such gradients.)"""
        values = [loss.detach()]
        if not self.scaler.is_enabled():
            values += [p.grad for p in self.model.parameters() if p.grad is not None]
        good = bool(all_finite(values))
        return any(bad for (bad,) in distributed.numbers_of_all(not good))

    def train_epoch(self, epoch: int) -> dict:
        self.network.train()
        for module in self.frozen:
            module.eval()
        if hasattr(self.criterion, "set_epoch"):
            self.criterion.set_epoch(epoch)
        if self.epoch_progress is None or self.epoch_progress.epoch != epoch:
            self.epoch_progress = self._start_of(epoch)
        done = self.epoch_progress
        self.loader.set_epoch(epoch, done.step)
        start = time.perf_counter() - done.seconds
        bar = progress(self.loader, f"epoch {epoch}/{self.options.epochs}", len(self.loader), initial=done.step)
        for images, target in bar:
            shard_sizes = self._shard_sizes(len(target))
            done.step += 1
            done.seconds = time.perf_counter() - start
            if min(shard_sizes) < 2:
                continue  # files that cannot be decoded were left out, and batch norm cannot train on one image
            if done.step == 1 and epoch == self.start_epoch:
                self.tensorboard.images("input/images", thumbnails(images), epoch)
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            target = target.to(self.device, non_blocking=True)
            weight = len(target) * len(shard_sizes) / sum(shard_sizes)
            loss, output = self.train_step(images, target, done.mixup, weight)
            if self.options.on_nan == "skip" and not bool(torch.isfinite(loss)):
                self._count_skipped()
                continue
            done.first_bad = torch.where((done.first_bad == 0) & ~torch.isfinite(loss), done.step, done.first_bad)
            done.sums += torch.stack(
                [
                    loss * len(target),
                    (output["output"].argmax(1) == target).sum(),
                    loss.new_full((), len(target)),  # no copy from the CPU, which would wait for the GPU
                ]
            )
            if done.step % self.options.log_step == 0:
                self._check_finite()
                bar.set_postfix(loss=f"{float(done.sums[0] / done.sums[2]):.3f}")
        done.seconds = time.perf_counter() - start
        self._check_finite(weights=True)
        self._shard_sizes(0)
        if self.loader.bad_training_images is not None:
            found = distributed.objects_of_all(self.loader.bad_training_images)
            distributed.by_first_process(lambda: self._list_bad_images(found, sum(self.loader.cls_num_list)))
        loss, correct, images = distributed.sum_over_processes(done.sums.clone()).tolist()
        if not images:
            raise UserError(f"No batch of epoch {epoch} could be trained on: see the warnings above.")
        values = {
            "loss": loss / images,
            "accuracy": 100 * correct / images,
            "images_per_second": images / done.seconds,
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

    def _shard_sizes(self, own: int) -> list[int]:
        """Images of this batch in every process; here all agree on what does not follow from the config alone.

        Raises:
            StopRequested: one of them was told to stop.
        """
        sizes, signals = zip(*distributed.numbers_of_all(own, self.stop.received), strict=True)
        if any(signals):
            self._check_finite(weights=True)
            raise StopRequested(max(signals))
        return list(sizes)

    def _count_skipped(self) -> None:
        done, limit = self.epoch_progress, self.options.nan_limit
        done.skipped += 1
        if done.skipped > limit:
            raise self._not_finite(done.step, f" for the {done.skipped}th time, and nan_limit is {limit}")
        if distributed.is_main():
            self.logger.warning(f"Epoch {done.epoch}, step {done.step}: loss or gradient is not finite, step left out.")

    def _check_finite(self, weights: bool = False) -> None:
        """See that all losses of the epoch so far are finite, and the weights if wanted.

        Raises:
            UserError: one is not; in every process.
        """
        step = int(self.epoch_progress.first_bad)
        if not step and weights and not all_finite(self.model.state_dict().values()):
            step = self.epoch_progress.step
        bad = [step for (step,) in distributed.numbers_of_all(step) if step]
        if bad:
            raise self._not_finite(min(bad))

    def _not_finite(self, step: int, again: str = "") -> UserError:
        done, rate = self.epoch_progress, self.optimizer.param_groups[0]["lr"]
        advice = "lower the learning rate (--lr)"
        if self.options.precision == "fp16":
            advice += ", use bf16 instead of fp16"
        if self.options.on_nan == "stop":
            advice += ', leave such steps out (trainer;on_nan: "skip")'
        error = UserError(
            f"The loss is no longer finite in epoch {done.epoch}, step {step} of {len(self.loader)}, at learning rate "
            f"{rate:.3g}{again}: {advice}, or look for the cause. {self._how_to_go_on()}"
        )
        error.shared = True
        return error

    def _start_of(self, epoch: int) -> EpochProgress:
        return EpochProgress(
            epoch,
            torch.zeros(3, device=self.device),
            epoch_generator(self.loader.seed, epoch, MIXUP),
            torch.tensor(0, device=self.device),
        )

    def progress(self) -> dict:
        done = self.epoch_progress
        own = {"sums": done.sums.cpu(), "mixup": done.mixup.get_state(), "skipped": done.skipped}
        return {"step": done.step, "steps": len(self.loader), "seconds": done.seconds, "own": own}

    def restore_progress(self, epoch: int, progress: dict, own: dict) -> None:
        if progress["steps"] != len(self.loader):
            raise UserError(
                f"The run was stopped in an epoch of {progress['steps']} steps, which has {len(self.loader)} now: keep "
                "data, batch_size and number of processes until it is whole, or go on from a checkpoint-epoch*.pth."
            )
        done = self._start_of(epoch)
        processes = progress["processes"]
        if len(processes) == distributed.world_size():
            done.sums += own["sums"].to(self.device)
        elif distributed.is_main():
            done.sums += torch.stack([each["sums"] for each in processes]).sum(dim=0).to(self.device)
        done.mixup.set_state(own["mixup"])
        done.step, done.seconds, done.skipped = progress["step"], progress["seconds"], own["skipped"]
        self.epoch_progress = done

    def validate(self, epoch: int) -> dict:
        batches = self.loader.split_validation()
        self.validation_source = f"on the {batches.source}"
        network = inference_copy(self.model, self.loader.image_size)
        network.register_forward_pre_hook(self._stop_validating)
        logits = expert_logits(network, batches, self.device, "validation")
        targets = batches.targets
        if batches.bad:
            self._list_bad_images([batches.bad], len(targets))
            good = np.setdiff1d(np.arange(len(targets)), list(batches.bad))
            logits, targets = logits[good], targets[good]
            if not len(good):
                raise UserError(f"No image of the {batches.source} can be decoded: see {self.run_dir / FILE_NAME}.")
        scores = logits.mean(dim=1)
        values: dict = {"val_loss": float(nn.functional.cross_entropy(scores, targets))}
        values |= self.measure(scores, targets)
        values |= {
            f"val_expert{e + 1}": 100 * float((logits[:, e].argmax(1) == targets).float().mean())
            for e in range(logits.shape[1])
        }
        self.tensorboard.scalars({f"validation/{name.removeprefix('val_')}": v for name, v in values.items()}, epoch)
        return values

    def _list_bad_images(self, found: Iterable[Mapping[int, BadImage]], total: int) -> None:
        """List the images that were left out so far in the run folder, and name the new ones; in the first process."""
        every = {(bad.source, bad.index): bad for own in found for bad in own.values()}
        new = [every[key] for key in sorted(every.keys() - self.bad_images.keys())]
        if new:
            self.bad_images |= every
            path = write_list(self.run_dir / FILE_NAME, self.bad_images.values())
            self.logger.warning(bad_images_sentence(new, total, listed_in=path))

    def _stop_validating(self, *_) -> None:
        """Validation changes nothing: a stop need not wait for its end."""
        if self.stop.received:
            raise StopRequested(self.stop.received)
