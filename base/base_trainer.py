"""The frame of a training run: epochs, monitoring, checkpoints, resuming. What an epoch does is for subclasses."""

import signal
import time
import warnings
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from base import run_state
from base.base_data_loader import BaseDataLoader
from utils import distributed
from utils.checkpoint import load_weights, position, save_checkpoint, whole_epochs
from utils.errors import Interrupted, UserError
from utils.logger import TensorBoardLog, duration, file_log, get_logger
from utils.signals import signal_status


class BaseTrainer(ABC):
    """Trains for `options.epochs` epochs and keeps checkpoints in `run_dir`.

    Args:
        model: the network, without any wrapper, on its device.
        loader: prepared for this process.
        optimizer, scheduler: the scheduler is stepped once an epoch.
        options: section `trainer` of the config (trainer/options.py).
        run_dir: folder of this run; exists.
        extra_state: plain values every checkpoint carries: config, class counts, class map, seed.
    """

    #: Where the monitored values come from, for the record.
    validation_source = ""

    def __init__(
        self,
        model: nn.Module,
        loader: BaseDataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler,
        options,
        run_dir: Path,
        extra_state: dict,
    ):
        self.model = model
        self.loader = loader
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.options = options
        self.run_dir = run_dir
        self.extra_state = extra_state
        self.device = next(model.parameters()).device
        self.logger = get_logger(verbosity=options.verbosity)
        mode, _, self.monitored = options.monitor.partition(" ")
        self.sign = -1 if mode == "min" else 1
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.checks_since_best = 0
        self.stop = run_state.Stop(self.how_to_resume)
        self.saved = ""  # when the last state was, see `position`
        self.start_epoch = 1
        self.session_start = time.perf_counter()
        self.earlier_seconds = 0.0
        self.progress = self._fresh_progress(1)

    def _fresh_progress(self, epoch: int) -> run_state.EpochProgress:
        return run_state.EpochProgress.start(epoch, self.loader.seed, self.device)

    @abstractmethod
    def train_epoch(self, epoch: int) -> dict:
        """Train the steps of an epoch that are not done in `self.progress`; returns the values to log.

        Raises:
            StopRequested: `self.stop` has received a signal.
        """

    @abstractmethod
    def validate(self, epoch: int) -> dict:
        """Values of the validation images to log, their names starting with `val_`; the first process calls this.

        Raises:
            StopRequested: see `train_epoch`; nothing has changed then.
        """

    def train(self) -> dict:
        """Run the remaining epochs.

        Returns:
            The values of the last epoch, with "run_dir", "last" and "best" (paths or None), "best_epoch".

        Raises:
            Interrupted: a signal (utils.signals) stopped the run; last.pth holds all up to the last step.
            UserError: the loss is no longer finite, or a checkpoint could not be saved.
            LostProcess: another process of the run has ended.
        """
        values = {}
        self.session_start = time.perf_counter()
        with ExitStack() as stack:
            if distributed.is_main():
                stack.enter_context(file_log(self.logger, self.run_dir / "log.txt"))
            self.tensorboard = TensorBoardLog(self.run_dir, self.options.tensorboard)
            stack.callback(self.tensorboard.close)
            stack.enter_context(distributed.lost_process_named(self.how_to_resume))
            stack.enter_context(self.stop)
            for epoch in range(self.start_epoch, self.options.epochs + 1):
                try:
                    values = self._run_epoch(epoch)
                except run_state.StopRequested:
                    self._end_inside_epoch()
                if self.options.early_stop and self.checks_since_best >= self.options.early_stop:
                    self.logger.info(
                        f"{self.monitored} has not improved for {self.checks_since_best} "
                        f"validations: stopping after epoch {epoch}."
                    )
                    break
        best = self.run_dir / "model_best.pth"
        return {
            **values,
            "run_dir": str(self.run_dir),
            "last": str(self.run_dir / "last.pth"),
            "best": str(best) if self.best_epoch and best.exists() else None,
            "best_epoch": self.best_epoch,
        }

    def _run_epoch(self, epoch: int) -> dict:
        values = {"epoch": epoch, **self.train_epoch(epoch)}
        improved = False
        if epoch % self.options.valid_period == 0 or epoch == self.options.epochs:
            values |= distributed.by_first_process(lambda: self.validate(epoch))
            improved = self._improved(values, epoch)
        with warnings.catch_warnings():  # stopped after its last step, an epoch has none left for the resumed run
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
            self.scheduler.step()
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None]
        if left := self.options.epochs - epoch:
            pace = (time.perf_counter() - self.session_start) / (epoch + 1 - self.start_epoch)
            shown.append(f"left {duration(pace * left)}")
        self.logger.info("  ".join(shown))
        self._save(self.state(epoch), improved)
        self.progress = self._fresh_progress(epoch + 1)
        return values

    def _end_inside_epoch(self) -> NoReturn:
        """Save the state inside an epoch in the place of the last whole epoch's, and end the run.

        Raises:
            Interrupted: always, or what saving raises.
        """
        number = self.stop.agreed()
        if self.progress.step:
            self._save(self.state(self.progress.epoch, inside=True))
        distributed.barrier()  # none leaves while another still needs it
        name = signal.Signals(number).name
        error = Interrupted(f"Stopped by {name}. {self.how_to_resume()}", signal_status(number))
        error.shared = True
        raise error from None

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

    def _save(self, state: dict, improved: bool = False) -> None:
        """Write a state, after an epoch or inside one, into the files that it belongs to; the first process does."""
        epoch = state["epoch"]
        files = {}
        if "mid_epoch" not in state and epoch % self.options.save_period == 0:
            files[f"checkpoint-epoch{epoch}.pth"] = "kept every save_period epochs"
        if improved:
            files["model_best.pth"] = f"best so far: {self.options.monitor} {self.validation_source}"
        # Written last: if killed earlier, resuming redoes this epoch.
        files["last.pth"] = f"stopped in epoch {position(state)}" if "mid_epoch" in state else "the last so far"

        def save() -> None:
            try:
                for name, selected_by in files.items():
                    save_checkpoint(self.run_dir / name, {**state, "selected_by": selected_by})
            except UserError as error:
                raise UserError(f"{error} {self.how_to_resume()}") from error

        self.saved = self.saved or position(state)
        distributed.by_first_process(save)
        self.saved = position(state)

    def state(self, epoch: int, inside: bool = False) -> dict:
        """Everything a run needs to go on after `epoch`, or inside it: tensors and plain containers only."""
        if inside:
            where: dict = {"mid_epoch": self.progress.state(len(self.loader))}
        else:
            every = distributed.objects_of_all(run_state.random_state())
            where = {"random": every[0]} | ({"random_of_processes": every} if len(every) > 1 else {})
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": epoch,
            **where,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "checks_since_best": self.checks_since_best,
            "seconds": self.earlier_seconds + time.perf_counter() - self.session_start,
            **self.extra_state,
        }

    def resume(self, checkpoint: dict, path: Path) -> None:
        """Continue from a checkpoint of this project.

        Raises:
            UserError: it holds weights alone, another network, another kind of optimizer or other parameter groups, or
                has all its epochs.
        """
        run_state.check_resumable(checkpoint, path, self.optimizer)
        if whole_epochs(checkpoint) >= self.options.epochs:
            raise UserError(f"This run has its {self.options.epochs} epochs already: ask for more with --epochs.")
        load_weights(self.model, checkpoint["model"], path)
        try:
            self.restore(checkpoint, path)
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
        self.logger.info(f"Going on from {path}, after epoch {position(checkpoint)}.")

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Restore what a checkpoint has beside the weights; errors are put in words by `resume`."""
        run_state.restore_optimizer(self.optimizer, self.scheduler, checkpoint)
        self.start_epoch = whole_epochs(checkpoint) + 1
        self.progress = self._fresh_progress(self.start_epoch)
        if checkpoint.get("mid_epoch"):
            self.progress.restore(checkpoint["mid_epoch"], len(self.loader))
        else:
            every = checkpoint.get("random_of_processes") or [checkpoint["random"]]
            run_state.restore_random_state(run_state.part_of_process(every))
        self.saved = position(checkpoint)
        self.earlier_seconds = checkpoint.get("seconds") or 0.0
        if (self.run_dir / "model_best.pth").exists():  # a run in a folder of its own has no best one yet
            self.best, self.best_epoch = checkpoint["best"], checkpoint["best_epoch"]
            self.checks_since_best = checkpoint.get("checks_since_best") or 0

    def how_to_resume(self) -> str:
        """What is saved so far, and the command that continues."""
        saved = list(self.run_dir.glob("*.pth"))  # without last.pth, the first epoch's others may be there
        if not saved:
            return "Nothing was saved yet: start again."
        newest = max(saved, key=lambda path: (path.name == "last.pth", path.stat().st_mtime))
        return f"{newest} holds everything up to epoch {self.saved}; go on with: python train.py -r {newest}"
