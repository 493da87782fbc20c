"""Section `trainer` of a config."""

from dataclasses import dataclass


@dataclass
class TrainerOptions:
    """How a run trains, and what it keeps.

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
        compile: run the network through torch.compile; on one GPU with CUDA graphs, which take more of its memory.
        mixup_alpha: train on mixtures of two images and of their losses, lambda ~ Beta(alpha, alpha) a batch
            (Zhang et al., ICLR 2018, arXiv 1710.09412); 0 for none.
        ema_decay: part that stays, in each step, of an exponential moving average of the weights, which is validated
            ("val_ema_...") and saved beside the last ones; 0 for none, 0.999 is usual.
        sync_batchnorm: with several processes, on GPUs, normalize by the statistics of the whole batch, not of each
            one's shard.
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
    ema_decay: float = 0.0
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
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1 (0.999 is usual), not {self.ema_decay}")
        if self.on_nan not in ("stop", "skip") or self.nan_limit < 0:
            raise ValueError('on_nan must be "stop" or "skip", and nan_limit at least 0')
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f'precision must be "auto", "fp32", "bf16" or "fp16", not "{self.precision}"')
        if self.early_stop < 0 or (self.early_stop and self.monitor == "off"):
            raise ValueError("early_stop must be at least 0, and 0 where nothing is monitored")
        mode, _, key = self.monitor.partition(" ")
        if self.monitor != "off" and (mode not in ("max", "min") or not key):
            raise ValueError(f'monitor must be "off", "max KEY" or "min KEY", not "{self.monitor}"')
