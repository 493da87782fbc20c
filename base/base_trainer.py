"""The frame of a training run: epochs, monitoring, checkpoints, resuming. What an epoch does is for subclasses."""

import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from utils import distributed
from utils.checkpoint import load_weights, save_checkpoint
from utils.errors import Interrupted, UserError
from utils.logger import TensorBoardLog, file_log, get_logger


@dataclass
class TrainerOptions:
    """Section `trainer` of a config.

    Args:
        epochs: epochs in all.
        save_dir: folder of all runs; a run gets save_dir/NAME/RUN_ID.
        save_period: keep a checkpoint-epochN.pth every so many epochs; last.pth is written after every epoch anyway.
        monitor: "max KEY" or "min KEY" to keep model_best.pth by, KEY one of the logged values, e.g.
            "max val_accuracy"; "off" for none.
        early_stop: stop after so many validations without an improvement of the monitored value; 0 never.
        valid_period: validate every so many epochs, and after the last.
        log_step: batches between two readings of the running loss.
        precision: "fp32", "bf16" or "fp16" (mixed precision: parameters, classifiers and the loss stay in float32), or
            "auto": bf16 where the processor is made for it, else fp32 (trainer/precision.py).
        compile: run the network through torch.compile.
        mixup_alpha: train on mixtures of two images and of their losses, lambda ~ Beta(alpha, alpha) a batch
            (Zhang et al., ICLR 2018, arXiv 1710.09412); 0 for none.
        tensorboard: write TensorBoard logs into the run folder.
        verbosity: 0 warnings, 1 one line an epoch, 2 everything.
        type: the trainer, by its name in trainer/trainer.py.
    """

    epochs: int
    save_dir: str = "saved"
    save_period: int = 50
    monitor: str = "max val_accuracy"
    early_stop: int = 0
    valid_period: int = 1
    log_step: int = 50
    precision: str = "fp32"
    compile: bool = False
    mixup_alpha: float = 0.0
    tensorboard: bool = True
    verbosity: int = 2
    type: str = "Trainer"

    def __post_init__(self):
        for name in ("epochs", "save_period", "valid_period", "log_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must be at least 0, not {self.mixup_alpha}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f'precision must be "auto", "fp32", "bf16" or "fp16", not "{self.precision}"')
        if self.early_stop < 0 or (self.early_stop and self.monitor == "off"):
            raise ValueError("early_stop must be at least 0, and 0 where nothing is monitored")
        mode, _, key = self.monitor.partition(" ")
        if self.monitor != "off" and (mode not in ("max", "min") or not key):
            raise ValueError(f'monitor must be "off", "max KEY" or "min KEY", not "{self.monitor}"')


class BaseTrainer(ABC):
    """Trains for `options.epochs` epochs and keeps checkpoints in `run_dir`.

    Args:
        model: the network, without any wrapper, on its device.
        optimizer, scheduler: the scheduler is stepped once an epoch.
        options: section `trainer` of the config, its precision chosen (not "auto").
        run_dir: folder of this run; exists.
        extra_state: plain values every checkpoint carries: config, class counts, class map, seed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler,
        options: TrainerOptions,
        run_dir: Path,
        extra_state: dict,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.options = options
        self.run_dir = run_dir
        self.extra_state = extra_state
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=options.precision == "fp16")
        self.logger = get_logger(verbosity=options.verbosity)
        mode, _, self.monitored = options.monitor.partition(" ")
        self.sign = -1 if mode == "min" else 1
        self.start_epoch = 1
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.checks_since_best = 0
        self.seconds = 0.0  # spent on the epochs so far, in all sittings

    @abstractmethod
    def monitorable(self) -> list[str]:
        """The names that `trainer;monitor` may have."""

    @abstractmethod
    def train_epoch(self, epoch: int) -> dict:
        """Train one epoch; returns the values to log. Epochs count from 1."""

    @abstractmethod
    def validate(self, epoch: int) -> dict:
        """Values of the validation images to log, their names starting with `val_`."""

    def train(self) -> dict:
        """Run the remaining epochs.

        Returns:
            The values of the last epoch, with "run_dir", "last" and "best" (paths or None), "best_epoch".

        Raises:
            Interrupted: Ctrl-C; the last whole epoch's checkpoint is kept.
            UserError: the loss is no longer finite, or a checkpoint could not be saved.
        """
        values = {}
        self.tensorboard = TensorBoardLog(self.run_dir, self.options.tensorboard)
        with file_log(self.logger, self.run_dir / "log.txt") if distributed.is_main() else nullcontext():
            try:
                for epoch in range(self.start_epoch, self.options.epochs + 1):
                    values = self._one_epoch(epoch)
                    if self.options.early_stop and self.checks_since_best >= self.options.early_stop:
                        self.logger.info(
                            f"{self.monitored} has not improved for {self.checks_since_best} "
                            f"validations: stopping after epoch {epoch}."
                        )
                        break
            except KeyboardInterrupt:
                raise Interrupted(f"Stopped. {self._how_to_go_on()}") from None
            finally:
                self.tensorboard.close()
        best = self.run_dir / "model_best.pth"
        return {
            **values,
            "run_dir": str(self.run_dir),
            "last": str(self.run_dir / "last.pth"),
            "best": str(best) if self.best_epoch and best.exists() else None,
            "best_epoch": self.best_epoch,
        }

    def _one_epoch(self, epoch: int) -> dict:
        start = time.perf_counter()
        values = {"epoch": epoch, **self.train_epoch(epoch)}
        validated = epoch % self.options.valid_period == 0 or epoch == self.options.epochs
        if validated:
            # One process validates for all: they must agree on when to stop.
            values |= distributed.from_first_process(self.validate(epoch) if distributed.is_main() else None)
        self.scheduler.step()
        self.logger.info(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None
            )
        )
        improved = self._improved(values, epoch) if validated else False
        self.seconds += time.perf_counter() - start
        if distributed.is_main():
            try:
                self._save(epoch, improved)
            except UserError as error:
                raise UserError(f"{error} {self._how_to_go_on()}") from error
        return values

    def _improved(self, values: dict, epoch: int) -> bool:
        if self.options.monitor == "off":
            return False
        value = values[self.monitored]
        if value is None:
            raise UserError(
                f'trainer;monitor names "{self.monitored}", and no validation image belongs to that group: '
                f"choose one of {', '.join(k for k, v in values.items() if isinstance(v, float))}."
            )
        self.checks_since_best += 1
        if self.best is not None and self.sign * value <= self.sign * self.best:
            return False
        self.best = value
        self.best_epoch = epoch
        self.checks_since_best = 0
        return True

    def _save(self, epoch: int, improved: bool) -> None:
        state = self.state(epoch)
        if epoch % self.options.save_period == 0:
            save_checkpoint(
                self.run_dir / f"checkpoint-epoch{epoch}.pth", {**state, "selected_by": "kept every save_period epochs"}
            )
        if improved:
            save_checkpoint(
                self.run_dir / "model_best.pth",
                {**state, "selected_by": f"best so far: {self.options.monitor} {self.validation_source}"},
            )
        # Written last: if killed earlier, resuming redoes this epoch.
        save_checkpoint(self.run_dir / "last.pth", {**state, "selected_by": "the last so far"})

    #: Where the monitored values come from, for the record.
    validation_source = ""

    def state(self, epoch: int) -> dict:
        """Everything a run needs to go on after `epoch`: tensors and plain containers only."""
        random_states: dict[str, object] = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random_states["cuda"] = torch.cuda.get_rng_state_all()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states,
            "epoch": epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "checks_since_best": self.checks_since_best,
            "seconds": self.seconds,
            "precision": self.options.precision,
            **self.extra_state,
        }

    def resume(self, checkpoint: dict, path: Path) -> None:
        """Take up where a checkpoint of this project left off.

        Raises:
            UserError: it holds weights alone, another network, another kind of optimizer or other parameter groups, or
                has all its epochs.
        """
        needed = ("optimizer", "scheduler", "scaler", "random", "epoch")
        if {*needed, "best", "best_epoch"} - checkpoint.keys() or any(checkpoint[key] is None for key in needed):
            raise UserError(
                f"{path} holds weights alone, so that training cannot go on from it: "
                "give a last.pth or checkpoint-epoch*.pth."
            )
        kinds = [
            section.get("type") if isinstance(section := (config or {}).get("optimizer"), dict) else None
            for config in (checkpoint.get("config"), self.extra_state.get("config"))
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{path} was trained with {kinds[0]} and cannot go on with {kinds[1]}: keep the optimizer's type."
            )
        if checkpoint["epoch"] >= self.options.epochs:
            raise UserError(f"This run has its {self.options.epochs} epochs already: ask for more with --epochs.")
        load_weights(self.model, checkpoint["model"], path)
        try:
            self._resume_optimizer(checkpoint["optimizer"], checkpoint["scheduler"])
            if checkpoint["scaler"]:  # empty where the run had another precision
                self.scaler.load_state_dict(checkpoint["scaler"])
            torch.set_rng_state(checkpoint["random"]["torch"])
            if torch.cuda.is_available() and len(checkpoint["random"].get("cuda", [])) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(checkpoint["random"]["cuda"])
        except ValueError as error:
            raise UserError(
                f"{path} was trained with other parameter groups ({error}): keep freeze and optimizer;share_lr as they "
                'were, or start anew from its weights ("weights" in the config).'
            ) from error
        except (TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(
                f"{path} is damaged: what it holds beside the weights does not fit ({type(error).__name__}: {error}); "
                'give another checkpoint, or start anew from its weights ("weights" in the config).'
            ) from error
        self.start_epoch = checkpoint["epoch"] + 1
        self.seconds = checkpoint.get("seconds") or 0.0
        if (self.run_dir / "model_best.pth").exists():  # a run in a folder of its own has no best one yet
            self.best, self.best_epoch = checkpoint["best"], checkpoint["best_epoch"]
            self.checks_since_best = checkpoint.get("checks_since_best") or 0
        self.logger.info(f"Going on from {path}, after epoch {checkpoint['epoch']}.")

    def _resume_optimizer(self, optimizer_state: dict, scheduler_state: dict) -> None:
        """Momenta and position in the schedule come from the checkpoint, hyper-parameters from the config, so that
        overriding them on resume has the effect it says. Unchanged ones give exactly the rates of an unbroken run."""
        hyper_parameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer_state)
        for parameter, entries in self.optimizer.state.items():
            for name, entry in entries.items():
                if isinstance(entry, torch.Tensor):
                    fits = not entry.dim() or entry.shape == parameter.shape
                else:
                    fits = isinstance(entry, (int, float, type(None)))
                if not fits:
                    raise TypeError(f"{name} is not of the shape of its parameter, {list(parameter.shape)}")
        self.scheduler.last_epoch = scheduler_state["last_epoch"]
        rates = []
        for group, configured in zip(self.optimizer.param_groups, hyper_parameters, strict=True):
            change = configured["initial_lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
            rates.append(group["lr"] * change)
            group.update(configured, lr=rates[-1])
        if isinstance(self.scheduler, LambdaLR):  # in closed form, so that moved steps count too
            rates = [
                base * factor(self.scheduler.last_epoch)
                for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self.scheduler._last_lr = rates

    def _how_to_go_on(self) -> str:
        last = self.run_dir / "last.pth"
        if not last.exists():  # the first epoch's other checkpoints may be there
            saved = sorted(self.run_dir.glob("*.pth"), key=lambda path: path.stat().st_mtime)
            if not saved:
                return "No epoch was saved yet: start again."
            last = saved[-1]
        return f"{last} holds everything up to the last whole epoch; go on with: python train.py -r {last}"
