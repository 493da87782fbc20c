"""Training, evaluation and adaptation of networks. From Python: train, load_run, evaluate, adapt, predict,
predict_stream; with_prior for a known test prior, adapt_oracle for the bound."""

from trainer.adaptation import adapt
from trainer.evaluation import evaluate
from trainer.given_prior import with_prior
from trainer.loaded_run import LoadedRun, load_run
from trainer.oracle import adapt_oracle
from trainer.prediction import PredictionStream, predict, predict_stream
from trainer.training import train

__all__ = [
    "LoadedRun",
    "PredictionStream",
    "adapt",
    "adapt_oracle",
    "evaluate",
    "load_run",
    "predict",
    "predict_stream",
    "train",
    "with_prior",
]
