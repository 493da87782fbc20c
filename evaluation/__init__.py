"""What a trained network is asked. From Python: load_run, evaluate, adapt, predict, predict_stream; with_prior for a
known test prior, adapt_oracle for the bound."""

from evaluation.adaptation import adapt
from evaluation.evaluation import evaluate
from evaluation.given_prior import adapt_oracle, with_prior
from evaluation.loaded_run import LoadedRun, load_run
from evaluation.prediction import PredictionStream, predict, predict_stream

__all__ = [
    "LoadedRun",
    "PredictionStream",
    "adapt",
    "adapt_oracle",
    "evaluate",
    "load_run",
    "predict",
    "predict_stream",
    "with_prior",
]
