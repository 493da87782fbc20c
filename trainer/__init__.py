"""Training, evaluation and adaptation of networks. From Python: train, load_run, evaluate, adapt, predict."""

from trainer.adaptation import adapt
from trainer.evaluation import evaluate
from trainer.loaded_run import LoadedRun, load_run
from trainer.prediction import predict
from trainer.training import train

__all__ = ["LoadedRun", "adapt", "evaluate", "load_run", "predict", "train"]
