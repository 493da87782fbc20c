"""Supervised training of a multi-expert network."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import BaseDataLoader, EvaluationBatches
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer
from base.run_state import StopRequested
from model.inference import inference_copy
from model.logits import expert_logits
from model.metric import accuracy, shot_group_accuracy, shot_groups
from trainer.devices import compiled, parallel
from trainer.ema import WeightAverage
from trainer.mixup import mixup
from trainer.options import TrainerOptions
from trainer.precision import MixedPrecision
from trainer.update import Update
from utils import distributed
from utils.bad_images import FILE_NAME, BadImage, bad_images_sentence, write_list
from utils.errors import UserError, unknown
from utils.logger import progress

__all__ = ["Trainer"]


class Trainer(BaseTrainer):
    """One criterion, one network, one data loader.

    Args:
        model: on its device.
        criterion: called as criterion(output dict, target) -> scalar; its `set_epoch(n)`, if any, is called first.
        metrics: name -> function of (scores [N, C], targets [N], cls_num_list [C]), see model/metric.py.
        loader: prepared for this process.
        optimizer, scheduler, run_dir, extra_state: see BaseTrainer.
        options: its precision chosen (not "auto").
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
        super().__init__(model, loader, optimizer, scheduler, options, run_dir, extra_state)
        self.criterion = criterion
        self.metrics = {"accuracy": accuracy, "shot_group_accuracy": shot_group_accuracy, **metrics}
        self.frozen = frozen
        self.ema = WeightAverage(model, optimizer, options.ema_decay) if options.ema_decay else None
        self.bad_images: dict[tuple[str, int], BadImage] = {}
        if options.compile and len(gpus) > 1:
            raise UserError(
                "torch.compile does not work with several GPUs in one process: use torchrun, or leave --compile out."
            )
        network = compiled(model, self.device) if options.compile else model
        self.network = parallel(MixedPrecision(network, self.device.type, options.precision), self.device, gpus)
        self.update = Update(self, self.network)
        if self.monitored and self.monitored not in self.monitorable():
            raise unknown("value in trainer;monitor", self.monitored, self.monitorable())

    def monitorable(self) -> list[str]:
        """The names that `trainer;monitor` may have."""
        groups = [classes for classes in shot_groups(self.loader.cls_num_list).values() if classes.any()]
        one_each = torch.stack([classes.int().argmax() for classes in groups])  # a class of every group there is
        logits = torch.zeros(len(groups), self.model.num_experts, self.loader.num_classes)
        prefixes = ("val_", "val_ema_") if self.ema else ("val_",)
        measured = {k: v for prefix in prefixes for k, v in self.measure(logits, one_each, prefix).items()}
        return ["loss", "accuracy", *(k for k, v in measured.items() if v is not None)]

    def train_step(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One update on a batch [B, 3, H, W], [B]; returns the loss and the network's output, both detached.

        The output is valid until the next step (see `compiled`).
        """
        self.optimizer.zero_grad(set_to_none=True)  # before the forward pass: CUDA graphs write over old gradients
        images, labels = mixup(images, target, self.options.mixup_alpha, self.progress.generator)
        output = self.network(images)
        loss = sum(share * self.criterion(output, label) for share, label in labels)
        self.update(loss)
        return loss.detach(), {name: tensor.detach() for name, tensor in output.items()}

    def train_epoch(self, epoch: int) -> dict:
        self.network.train()
        for module in self.frozen:
            module.eval()
        if hasattr(self.criterion, "set_epoch"):
            self.criterion.set_epoch(epoch)
        for images, target in self._batches(epoch):
            loss, output = self.train_step(images, target)
            if not self.update.skipped:
                correct = (output["output"].argmax(1) == target).sum()
                count = loss.new_full((), len(target))  # no copy from the CPU, which would wait for the GPU
                self.progress.sums += torch.stack([loss * len(target), correct, count])
        if self.loader.bad_training_images is not None:
            found = distributed.objects_of_all(self.loader.bad_training_images)
            distributed.by_first_process(lambda: self._list_bad_images(found, sum(self.loader.cls_num_list)))
        loss_sum, correct, images = distributed.sum_over_processes(self.progress.sums.clone()).tolist()
        if not images:
            raise UserError(f"No batch of epoch {epoch} could be trained on: see the warnings above.")
        values = {
            "loss": loss_sum / images,
            "accuracy": 100 * correct / images,
            "images_per_second": images / self.progress.seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        shown = {"learning_rate" if name == "lr" else name: value for name, value in values.items()}
        self.tensorboard.scalars({f"train/{name}": value for name, value in shown.items()}, epoch)
        return values

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch that are not done yet, on the device; `self.progress` goes along.

        Raises:
            StopRequested: a process was told to stop.
            UserError: losses or weights are not finite.
        """
        done = self.progress
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
                shown = images[:16].float()
                shown = (shown - shown.amin()) / (shown.amax() - shown.amin())
                self.tensorboard.images("input/images", shown, epoch)
            self.update.shard_weight = len(target) * len(shard_sizes) / sum(shard_sizes)
            images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            yield images, target.to(self.device, non_blocking=True)
            if done.step % self.options.log_step == 0:
                self.update.check()
                bar.set_postfix(loss=f"{float(done.sums[0] / done.sums[2]):.3f}", refresh=False)
        done.seconds = time.perf_counter() - start
        self.update.check(weights=True)
        self._shard_sizes(0)

    def _shard_sizes(self, own: int) -> list[int]:
        """Images of this batch in every process; here all agree on what does not follow from the config alone.

        Raises:
            StopRequested: one of them was told to stop.
        """
        sizes, signals = zip(*distributed.numbers_of_all(own, self.stop.received), strict=True)
        if any(signals):
            self.update.check(weights=True)
            raise StopRequested("A signal asked the run to stop.")
        return list(sizes)

    def validate(self, epoch: int) -> dict:
        batches = self.loader.split_validation()
        self.validation_source = f"on the {batches.source}"
        values = self._validated(self.model, batches, "val_")
        if self.ema:
            values |= self._validated(self.ema.module, batches, "val_ema_")
        self.tensorboard.scalars({f"validation/{name.removeprefix('val_')}": v for name, v in values.items()}, epoch)
        return values

    def _validated(self, model: BaseModel, batches: EvaluationBatches, prefix: str) -> dict[str, float | None]:
        """What a network does on the validation images, see `measure`."""
        network = inference_copy(model, self.loader.image_size)
        network.register_forward_pre_hook(self._stop_validating)
        logits = expert_logits(network, [batches], self.device, "validation")
        targets = batches.targets
        if batches.bad:
            self._list_bad_images([batches.bad], len(targets))
            good = np.setdiff1d(np.arange(len(targets)), list(batches.bad))
            logits, targets = logits[good], targets[good]
            if not len(good):
                raise UserError(f"No image of the {batches.source} can be decoded: see {self.run_dir / FILE_NAME}.")
        return self.measure(logits, targets, prefix)

    def _stop_validating(self, *_) -> None:
        """Validation changes nothing: a stop need not wait for its end."""
        if self.stop.received:
            raise StopRequested("A signal asked the run to stop.")

    def measure(self, logits: Tensor, targets: Tensor, prefix: str) -> dict[str, float | None]:
        """What is logged of validation images: expert logits [N, E, C], targets [N] -> prefix + name: a single number.

        Lists, such as accuracy by class, are for the results of an evaluation alone.
        """
        scores = logits.mean(dim=1)
        values: dict[str, float | None] = {f"{prefix}loss": float(nn.functional.cross_entropy(scores, targets))}
        for name, metric in self.metrics.items():
            value = metric(scores, targets, self.loader.cls_num_list)
            columns = value if isinstance(value, dict) else {name: value}
            values |= {f"{prefix}{key}": v for key, v in columns.items() if not isinstance(v, list)}
        for expert, right in enumerate((logits.argmax(dim=2) == targets[:, None]).float().mean(dim=0), 1):
            values[f"{prefix}expert{expert}"] = 100 * float(right)
        return values

    def state(self, epoch: int, inside: bool = False) -> dict:
        own = {"scaler": self.update.scaler.state_dict(), "precision": self.options.precision}
        average = {"ema": self.ema.module.state_dict()} if self.ema else {}
        return {**super().state(epoch, inside), **own, **average}

    def restore(self, checkpoint: dict, path: Path) -> None:
        super().restore(checkpoint, path)
        if checkpoint.get("scaler"):  # empty where the run had another precision
            self.update.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            self.ema.restore(checkpoint, path)

    def _list_bad_images(self, found: Iterable[Mapping[int, BadImage]], total: int) -> None:
        """List the images that were left out so far in the run folder, and name the new ones; in the first process."""
        every = {(bad.source, bad.index): bad for own in found for bad in own.values()}
        new = [every[key] for key in sorted(every.keys() - self.bad_images.keys())]
        if new:
            self.bad_images |= every
            path = write_list(self.run_dir / FILE_NAME, self.bad_images.values())
            self.logger.warning(bad_images_sentence(new, total, listed_in=path))
