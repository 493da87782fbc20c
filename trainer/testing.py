"""The jobs of the test scripts: evaluate a checkpoint, with equal weights or with weights learned at test time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from data_loader.image_lists import list_folder
from data_loader.on_disk import ListDataLoader
from model.inference import inference_copy
from trainer.aggregator import Aggregator
from trainer.devices import choose_device, device_name, parallel
from trainer.evaluator import DistributionScorer, expert_logits, score_equal_weights
from trainer.setup import build_loader, build_model
from trainer.test_time_training import fit_aggregators
from utils.checkpoint import load_checkpoint, load_weights, sha256, write_atomically
from utils.errors import UserError
from utils.logger import TensorBoardLog, get_logger
from utils.parse_config import ConfigParser
from utils.report import console_table, figures, make_folder, results_table, write_results
from utils.seed import seed_everything

BALANCED = ("uniform",)
EQUAL_WEIGHTS = (
    "Experts weighted equally (mean of their logits). One pass of the network over the un-augmented test "
    "images; every distribution is a selection of them."
)


@dataclass
class Subject:
    """A checkpoint's network, ready to be tested on its data."""

    network: nn.Module
    num_experts: int
    loader: BaseDataLoader
    device: torch.device
    checkpoint: dict

    def scorer(self) -> DistributionScorer:
        batches = self.loader.test_batches()
        logits = expert_logits(self.network, batches, self.device, "test images")
        return DistributionScorer(logits, batches.targets, self.loader.cls_num_list)


def open_subject(config: ConfigParser) -> Subject:
    """Load the network and the data that a config and its checkpoint name.

    Raises:
        UserError: the checkpoint does not fit the architecture, or was trained on other class counts than the config's
            data has.
    """
    seed_everything(config.get("seed", 1))
    device, gpus = choose_device(config.device, config.get("n_gpu", 1))
    checkpoint = load_checkpoint(config.resume)
    loader = build_loader(config, device)
    trained_on = checkpoint.get("cls_num_list")
    if trained_on and list(trained_on) != list(loader.cls_num_list):
        raise UserError(
            f"{config.resume} was trained on {sum(trained_on)} images in {len(trained_on)} classes, and "
            f"the config's data has {sum(loader.cls_num_list)} in {loader.num_classes}: use the test "
            "config of the same data set and imbalance ratio."
        )
    model = build_model(config, loader.num_classes, device)
    load_weights(model, checkpoint["model"], config.resume)
    return Subject(
        parallel(inference_copy(model, loader.image_size), device, gpus),
        model.num_experts,
        loader,
        device,
        {
            "path": str(config.resume),
            "sha256": sha256(config.resume),
            "epoch": checkpoint.get("epoch"),
            "selected_by": checkpoint.get("selected_by", "unknown"),
        },
    )


def evaluate(config: ConfigParser, job: str, names: Sequence[str] | None = None) -> dict:
    """Evaluate with equal weights.

    Args:
        config: with a checkpoint in `resume`.
        job: names the folder of the results.
        names: distributions to evaluate; all of the data loader's by default.

    Returns:
        The content of results.json.
    """
    subject = open_subject(config)
    folder = results_folder(config, job)
    distributions = subject.loader.test_distributions() if names != BALANCED else None
    scorer = subject.scorer()
    if distributions is None:
        distributions = {"uniform": np.arange(len(scorer.targets))}
    scores = score_equal_weights(scorer, distributions, names or distributions)
    return _finish(config, job, folder, subject, EQUAL_WEIGHTS, scores)


def train_at_test_time(config: ConfigParser, job: str) -> dict:
    """Learn the expert weights of every test distribution from its unlabelled images, then evaluate with them.

    Args:
        config: with a checkpoint in `resume`, an `aggregator` and an `optimizer` for its weights.
        job: names the folder of the results.

    Returns:
        The content of results.json.
    """
    settings = config["aggregator"]
    subject = open_subject(config)
    make_aggregator = aggregator_factory(config, subject.num_experts)
    folder = results_folder(config, job)
    scorer, distributions = subject.scorer(), subject.loader.test_distributions()
    aggregators = fit_aggregators(
        subject.network, subject.loader, distributions, make_aggregator, config.get("seed", 1), subject.device
    )
    scores = {}
    for name, entry in score_equal_weights(scorer, distributions, distributions).items():
        aggregator = aggregators[name]
        scores[name] = {
            **scorer.score(distributions[name], aggregator.predict),
            "weights": aggregator.weights.tolist(),
            "equal_weights_top1": entry["top1"],
            "learning": aggregator.report(),
        }
    protocol = (
        f"Test-time training ({settings['type']}): weights learned on each distribution's own unlabelled test "
        "images, random views shared between distributions; predictions on un-augmented images."
    )
    return _finish(config, job, folder, subject, protocol, scores)


def aggregator_factory(config: ConfigParser, num_experts: int) -> Callable[[], Aggregator]:
    """What makes the config's aggregator; a refused value stops here, before any image is looked at.

    Raises:
        UserError: there is only one expert, or an argument is refused.
    """
    if num_experts < 2:
        raise UserError(
            "Test-time training weighs experts against each other and this network has one: use a "
            "checkpoint with num_experts of at least 2."
        )

    def make() -> Aggregator:
        return config.build(
            "aggregator",
            num_experts=num_experts,
            make_optimizer=lambda parameters: config.build("optimizer", parameters),
        )

    make()
    return make


def predict_folder(config: ConfigParser, folder: Path) -> dict:
    """Learn the expert weights on a folder of unlabelled images, then predict each of them.

    Writes predictions.csv (path, class, probability) and weights.json beside the checkpoint or to `config.output`.

    Args:
        config: as for `train_at_test_time`, with a data loader that reads list files.
        folder: images at any depth.

    Returns:
        The content of weights.json: "weights" [E], "images", "folder", "checkpoint", "aggregator", "learning".
    """
    settings = config["aggregator"]
    subject = open_subject(config)
    if not isinstance(subject.loader, ListDataLoader):
        raise UserError(
            f"{config['data_loader']['type']} reads no image files: predicting a folder needs a checkpoint "
            "that was trained through ListDataLoader or a published list data set."
        )
    make_aggregator = aggregator_factory(config, subject.num_experts)
    images = list_folder(folder)
    output = results_folder(config, "predict")
    subject.loader.replace_test_images(images)
    logits = expert_logits(subject.network, subject.loader.test_batches(), subject.device, "images")
    rows = {"folder": np.arange(len(images))}
    aggregator = fit_aggregators(
        subject.network, subject.loader, rows, make_aggregator, config.get("seed", 1), subject.device
    )["folder"]
    probability, label = torch.softmax(aggregator.predict(logits), dim=1).max(dim=1)
    table = pd.DataFrame(
        {
            "path": images.names(),
            "class": [subject.loader.class_names[c] for c in label.tolist()],
            "probability": probability.numpy(),
        }
    )
    results = {
        "weights": aggregator.weights.tolist(),
        "images": len(images),
        "folder": str(folder),
        "checkpoint": subject.checkpoint,
        "aggregator": settings,
        "learning": aggregator.report(),
    }
    write_atomically(output / "predictions.csv", table.to_csv(index=False, float_format="%.4f").encode())
    write_atomically(output / "weights.json", (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    weights = ", ".join(f"{w:.2f}" for w in results["weights"])
    get_logger().info(
        f"{len(images)} images, expert weights {weights}. Most frequent classes:\n"
        f"{table['class'].value_counts().head(5).to_string(header=False)}\n"
        f"Written: {output / 'predictions.csv'}, {output / 'weights.json'}"
    )
    return results


def results_folder(config: ConfigParser, job: str) -> Path:
    """Folder of a job's results: `--output`, or results/CHECKPOINT/JOB beside the checkpoint.

    It is created once config and checkpoint are known to be right, and before anything is computed that could be lost.
    """
    checkpoint = Path(config.resume)
    folder = config.output or checkpoint.parent / "results" / checkpoint.stem / job
    make_folder(folder)
    return folder


def _finish(config: ConfigParser, job: str, folder: Path, subject: Subject, protocol: str, scores: dict) -> dict:
    """Write and show the results."""
    logger = get_logger()
    results = {
        "checkpoint": subject.checkpoint,
        "protocol": protocol,
        "seed": config.get("seed", 1),
        "torch": torch.__version__,
        "device": device_name(subject.device),
        "config": config.config,
        "distributions": scores,
    }
    files = write_results(folder, results)
    logger.info(
        f"\n{protocol}\n{config.resume}, epoch {subject.checkpoint['epoch']} "
        f"({subject.checkpoint['selected_by']})\n\n{console_table(results)}\n\n"
        f"Written: {', '.join(str(f) for f in files)}"
    )
    board = TensorBoardLog(folder)
    for row, (name, entry) in enumerate(scores.items()):
        board.scalars({f"{job}/top1": entry["top1"]}, row)
        for step, weights in enumerate(entry.get("learning", {}).get("weights_after_pass", [])):
            board.scalars({f"{job}_weights_{name}/expert{e + 1}": w for e, w in enumerate(weights)}, step)
    for name, figure in figures(results_table(results)).items():
        board.figure(f"{job}/{name}", figure)
    board.close()
    return results
