"""The frame of a training run: epochs, monitoring, checkpoints, resuming. What an epoch does is for subclasses."""

import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from utils import distributed
from utils.checkpoint import load_weights, position, save_checkpoint, whole_epochs
from utils.errors import Interrupted, UserError
from utils.logger import TensorBoardLog, duration, file_log, get_logger
from utils.signals import StopSignals, end_at_once, signal_status


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
        compile: run the network through torch.compile; in bf16 on a CPU batch norm, residual sum and ReLU alone
            (model/fused_norm.py); on one GPU with CUDA graphs, which take more of its memory.
        mixup_alpha: train on mixtures of two images and of their losses, lambda ~ Beta(alpha, alpha) a batch
            (Zhang et al., ICLR 2018, arXiv 1710.09412); 0 for none.
        sync_batchnorm: with several processes, normalize by the statistics of the whole batch, not of each one's shard.
        on_nan: at a loss or gradient that is not finite, "stop", or "skip" the step.
        nan_limit: with "skip", steps of an epoch that may be skipped; one more stops the run.
        tensorboard: write TensorBoard logs into the run folder.
        verbosity: 0 warnings, 1 one line an epoch, 2 details in log.txt as well.
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
    sync_batchnorm: bool = False
    on_nan: str = "stop"
    nan_limit: int = 10
    tensorboard: bool = True
    verbosity: int = 2
    type: str = "Trainer"

    def __post_init__(self):
        for name in ("epochs", "save_period", "valid_period", "log_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must be at least 0, not {self.mixup_alpha}")
        if self.on_nan not in ("stop", "skip") or self.nan_limit < 0:
            raise ValueError('on_nan must be "stop" or "skip", and nan_limit at least 0')
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f'precision must be "auto", "fp32", "bf16" or "fp16", not "{self.precision}"')
        if self.early_stop < 0 or (self.early_stop and self.monitor == "off"):
            raise ValueError("early_stop must be at least 0, and 0 where nothing is monitored")
        mode, _, key = self.monitor.partition(" ")
        if self.monitor != "off" and (mode not in ("max", "min") or not key):
            raise ValueError(f'monitor must be "off", "max KEY" or "min KEY", not "{self.monitor}"')


class StopRequested(Exception):
    """A signal asked the run to stop: raised between two steps, in every process at the same one.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        self.number = number


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
        self._sitting = time.perf_counter()  # since when `seconds` does not count yet
        self._pace: tuple[float, int] | None = None  # when this sitting began, and after which epoch
        self._patience: threading.Timer | None = None
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.checks_since_best = 0
        self.seconds = 0.0  # spent on the epochs so far, in all sittings
        self.stop = StopSignals(self._limit_patience)
        self.saved = "the last whole epoch"

    @abstractmethod
    def monitorable(self) -> list[str]:
        """The names that `trainer;monitor` may have."""

    @abstractmethod
    def train_epoch(self, epoch: int) -> dict:
        """Train one epoch; returns the values to log. Epochs count from 1.

        Raises:
            StopRequested: `self.stop` has received a signal. Called again, it goes on with the next step.
        """

    @abstractmethod
    def progress(self) -> dict:
        """How far the epoch is: "step" batches done of "steps", "seconds", and this process's "own" part of the rest.

        Tensors and plain containers only.
        """

    @abstractmethod
    def restore_progress(self, epoch: int, progress: dict, own: dict) -> None:
        """Let the next call of `train_epoch` go on where a run was stopped in an epoch.

        Args:
            epoch: the epoch.
            progress: of the first process, see `progress`.
            own: the part of this process.

        Raises:
            UserError: the epoch has other batches now.
        """

    @abstractmethod
    def validate(self, epoch: int) -> dict:
        """Values of the validation images to log, their names starting with `val_`.

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
        with ExitStack() as stack:
            if distributed.is_main():
                stack.enter_context(file_log(self.logger, self.run_dir / "log.txt"))
            self.tensorboard = TensorBoardLog(self.run_dir, self.options.tensorboard)
            stack.callback(self.tensorboard.close)
            stack.enter_context(distributed.lost_process_named(self._how_to_go_on))
            stack.enter_context(self.stop)
            try:
                for epoch in range(self.start_epoch, self.options.epochs + 1):
                    try:
                        values = self._one_epoch(epoch)
                    except StopRequested as request:
                        self._stop_in(epoch, request.number)
                    if self.options.early_stop and self.checks_since_best >= self.options.early_stop:
                        self.logger.info(
                            f"{self.monitored} has not improved for {self.checks_since_best} "
                            f"validations: stopping after epoch {epoch}."
                        )
                        break
            except KeyboardInterrupt:
                raise Interrupted(f"Stopped. {self._how_to_go_on()}") from None
        best = self.run_dir / "model_best.pth"
        return {
            **values,
            "run_dir": str(self.run_dir),
            "last": str(self.run_dir / "last.pth"),
            "best": str(best) if self.best_epoch and best.exists() else None,
            "best_epoch": self.best_epoch,
        }

    def _one_epoch(self, epoch: int) -> dict:
        self._sitting = time.perf_counter()
        values = {"epoch": epoch, **self.train_epoch(epoch)}
        validated = epoch % self.options.valid_period == 0 or epoch == self.options.epochs
        if validated:
            values |= self._validated(epoch)
        with warnings.catch_warnings():  # stopped after its last step, an epoch has none left for the resumed run
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")
            self.scheduler.step()
        shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None]
        if epoch < self.options.epochs:
            shown.append(f"left {duration(self._seconds_left(epoch))}")
        self.logger.info("  ".join(shown))
        improved = self._improved(values, epoch) if validated else False
        self.seconds += time.perf_counter() - self._sitting
        self._sitting = time.perf_counter()
        state = self.state(epoch)
        if distributed.world_size() > 1:
            state["random_of_processes"] = distributed.objects_of_all(state["random"])
        self._save(state, improved)
        self.saved = "the last whole epoch"
        return values

    def _seconds_left(self, epoch: int) -> float:
        """Until the end of the run, at the pace of the epochs of this sitting."""
        now = time.perf_counter()
        if self._pace is None:
            self._pace = (self._sitting, epoch - 1)
        since, before = self._pace
        return (now - since) / (epoch - before) * (self.options.epochs - epoch)

    def _validated(self, epoch: int) -> dict:
        """One process validates for all: they must agree on when to stop."""

        def attempt() -> dict | int:
            try:
                return self.validate(epoch)
            except StopRequested as request:
                return request.number

        values = distributed.by_first_process(attempt)
        if isinstance(values, int):
            raise StopRequested(values)
        return values

    def _stop_in(self, epoch: int, number: int) -> NoReturn:
        """Save the state in an epoch, in the place of the last whole epoch's, and stop the run.

        Raises:
            Interrupted: always, or what saving raises.
        """
        if self._patience:
            self._patience.cancel()  # all have come to the end of their step
        progress = self.progress()
        if progress["step"]:
            state = self.state(epoch)
            # Without its usual entry "random", versions that know no state in an epoch refuse to go on from it.
            own = {**progress.pop("own"), "random": state.pop("random")}
            state["mid_epoch"] = {**progress, "processes": distributed.objects_of_all(own)}
            self._save({**state, "selected_by": f"stopped in epoch {position(state)}"})
            self.saved = f"epoch {position(state)}"
        distributed.barrier()  # none leaves while another still needs it
        name = signal.Signals(number).name
        error = Interrupted(f"Stopped by {name}. {self._how_to_go_on()}", signal_status(number))
        error.shared = True
        raise error from None

    def _limit_patience(self, number: int) -> None:
        """Told to stop, a process does not wait for ever for the others, which may be dead."""
        if distributed.world_size() > 1 and number != getattr(signal, "SIGUSR1", None):  # that one warns long before

            def give_up() -> None:
                end_at_once(f"Another process of this run did not finish its step. {self._how_to_go_on()}")

            self._patience = threading.Timer(distributed.PATIENCE, give_up)
            self._patience.daemon = True
            self._patience.start()

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
        """Write a state, after an epoch or in it, into the files that it belongs to; the first process does."""

        def save() -> None:
            epoch, mid_epoch = state["epoch"], "mid_epoch" in state
            try:
                if epoch % self.options.save_period == 0 and not mid_epoch:
                    self._write(f"checkpoint-epoch{epoch}.pth", state, "kept every save_period epochs")
                if improved:
                    chosen = f"best so far: {self.options.monitor} {self.validation_source}"
                    self._write("model_best.pth", state, chosen)
                # Written last: if killed earlier, resuming redoes this epoch.
                stopped = f"stopped in epoch {position(state)}"
                self._write("last.pth", state, stopped if mid_epoch else "the last so far")
            except UserError as error:
                raise UserError(f"{error} {self._how_to_go_on()}") from error

        distributed.by_first_process(save)

    def _write(self, name: str, state: dict, selected_by: str) -> None:
        save_checkpoint(self.run_dir / name, {**state, "selected_by": selected_by})

    #: Where the monitored values come from, for the record.
    validation_source = ""

    def state(self, epoch: int) -> dict:
        """Everything a run needs to go on after `epoch`: tensors and plain containers only."""
        random_states: dict[str, object] = {"torch": torch.get_rng_state()}  # of this process
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
            "seconds": self.seconds + time.perf_counter() - self._sitting,
            "precision": self.options.precision,
            **self.extra_state,
        }

    def resume(self, checkpoint: dict, path: Path) -> None:
        """Take up where a checkpoint of this project left off.

        Raises:
            UserError: it holds weights alone, another network, another kind of optimizer or other parameter groups, or
                has all its epochs.
        """
        progress = checkpoint.get("mid_epoch")
        needed = ("optimizer", "scheduler", "scaler", "epoch", *(() if progress else ("random",)))
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
        if whole_epochs(checkpoint) >= self.options.epochs:
            raise UserError(f"This run has its {self.options.epochs} epochs already: ask for more with --epochs.")
        load_weights(self.model, checkpoint["model"], path)
        try:
            self._resume_optimizer(checkpoint["optimizer"], checkpoint["scheduler"])
            if checkpoint["scaler"]:  # empty where the run had another precision
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.start_epoch = whole_epochs(checkpoint) + 1
            if progress:
                own = self._own(progress["processes"])
                self.restore_progress(self.start_epoch, progress, own)
                self._restore_random(own["random"])
                self.saved = f"epoch {position(checkpoint)}"
            else:
                alike = [checkpoint["random"]] * distributed.world_size()
                self._restore_random(self._own(checkpoint.get("random_of_processes") or alike))
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
        self.seconds = checkpoint.get("seconds") or 0.0
        if (self.run_dir / "model_best.pth").exists():  # a run in a folder of its own has no best one yet
            self.best, self.best_epoch = checkpoint["best"], checkpoint["best_epoch"]
            self.checks_since_best = checkpoint.get("checks_since_best") or 0
        self.logger.info(f"Going on from {path}, after epoch {position(checkpoint)}.")

    def _own(self, processes: list) -> Any:
        """What belongs to this process of what a run of possibly another number of processes has saved."""
        if len(processes) != distributed.world_size():
            self.logger.info(f"{len(processes)} process(es) before, {distributed.world_size()} now: rounding differs.")
        return processes[distributed.rank() % len(processes)]

    def _restore_random(self, states: dict) -> None:
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available() and len(states.get("cuda", [])) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states["cuda"])

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
                return "Nothing was saved yet: start again."
            last = saved[-1]
        return f"{last} holds everything up to {self.saved}; go on with: python train.py -r {last}"
