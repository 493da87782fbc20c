"""The record of an evaluation: one class for each level of results.json, and what is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from utils import distributed
from utils.bad_images import BadImage
from utils.logger import TensorBoardLog, get_logger
from utils.report import console_table, figures, write_reports

Value = float | None | list[float | None]


@dataclass
class CheckpointRecord:
    """Which checkpoint was evaluated.

    Args:
        path: as it was given.
        sha256: of the file.
        epoch: that it was saved after or in, or None.
        selected_by: why it was kept ("the last so far", "stopped in epoch 3, step 12 of 40", ...).
        fingerprint: of the training images (BaseDataLoader.fingerprint), or None where it carries none.
    """

    path: str
    sha256: str
    epoch: int | None
    selected_by: str
    fingerprint: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class DistributionResult:
    """Results on one test distribution; accuracies in percent, None where a group has no image.

    Args:
        images: number of images.
        metrics: name -> value: "top1", "many", "medium", "few", and what else the config lists.
        experts_top1: of each expert alone, [E].
        weights: the experts' weights, [E]; None where the method has none.
        equal_weights_top1: of the experts weighted equally, where adaptation is compared with that.
        learning: what the aggregator reports of how it learned.
    """

    images: int
    metrics: dict[str, Value]
    experts_top1: list[float]
    weights: list[float] | None = None
    equal_weights_top1: float | None = None
    learning: dict[str, Any] | None = None

    #: Keys in JSON beside those of the metrics.
    OWN = ("images", "experts_top1", "weights", "equal_weights_top1", "learning")

    @property
    def top1(self) -> float | None:
        value = self.metrics["top1"]
        return value if isinstance(value, float | int) else None

    def to_json(self) -> dict[str, Any]:
        content = {"images": self.images, **self.metrics, "experts_top1": self.experts_top1}
        optional = {key: getattr(self, key) for key in ("weights", "equal_weights_top1", "learning")}
        return content | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DistributionResult":
        own = {key: content[key] for key in cls.OWN if key in content}
        return cls(**own, metrics={key: value for key, value in content.items() if key not in cls.OWN})

    def row(self) -> dict[str, float | None]:
        """One line of the table: numbers by column; lists such as accuracy by class are left out."""
        row: dict[str, float | None] = {"images": self.images, "top1": self.top1}
        if self.equal_weights_top1 is not None:
            row["equal weights"] = self.equal_weights_top1
        row |= {key: value for key, value in self.metrics.items() if not isinstance(value, list)}
        row |= {f"expert {e + 1}": value for e, value in enumerate(self.experts_top1)}
        return row | {f"w{e + 1}": value for e, value in enumerate(self.weights or [])}


@dataclass
class Results:
    """Results of one checkpoint on some test distributions: the content of results.json.

    Args:
        checkpoint: what was evaluated.
        protocol: how, in words.
        seed: of whatever was random.
        torch: version.
        device: e.g. "cpu (2 threads)".
        config: in force.
        distributions: by name, in the order of the tables.
        remark: what sets these figures apart from others of the kind, for titles; None where nothing does.
        calibration: of the aggregator, `CalibrationRecord.to_json`; None where it has none.
    """

    checkpoint: CheckpointRecord
    protocol: str
    seed: int
    torch: str
    device: str
    config: dict[str, Any]
    distributions: dict[str, DistributionResult] = field(default_factory=dict)
    remark: str | None = None
    calibration: dict[str, Any] | None = None

    #: Keys that are left out of JSON where they are None.
    OPTIONAL = ("remark", "calibration")

    def to_json(self) -> dict[str, Any]:
        """Plain containers, as they stand in results.json."""
        return {
            **{key: value for key, value in vars(self).items() if value is not None or key not in self.OPTIONAL},
            "checkpoint": self.checkpoint.to_json(),
            "distributions": {name: result.to_json() for name, result in self.distributions.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Results":
        """The inverse of `to_json`; also takes the content of results.json, which says its job as well."""
        content = {key: value for key, value in content.items() if key != "job"}
        distributions = {name: DistributionResult.from_json(d) for name, d in content["distributions"].items()}
        checkpoint = CheckpointRecord(**content["checkpoint"])
        return cls(**{**content, "checkpoint": checkpoint, "distributions": distributions})

    def table(self) -> pd.DataFrame:
        """One row a distribution, one column a number."""
        table = pd.DataFrame.from_dict({name: r.row() for name, r in self.distributions.items()}, orient="index")
        table.index.name = "distribution"
        return table


@dataclass
class Predictions:
    """Predicted classes of unlabeled images.

    Args:
        names: of the images: paths, or numbers where they have none, [N].
        log_probabilities: log p(y|x), [N, C].
        class_names: [C].
        learning: what the aggregator reports, with its "weights" where it has some; empty for equal weights.
        checkpoint: what predicted.
        calibration: of the aggregator, `CalibrationRecord.to_json`; None where it has none.
        bad_images: that were left out because they cannot be decoded; names and predictions are of the others.
    """

    names: list[str]
    log_probabilities: Tensor
    class_names: list[str]
    learning: dict[str, Any]
    checkpoint: CheckpointRecord
    calibration: dict[str, Any] | None = None
    bad_images: Sequence[BadImage] = ()

    def table(self) -> pd.DataFrame:
        """One row an image: path, class, probability."""
        probability, label = self.log_probabilities.exp().max(dim=1)
        classes = [self.class_names[c] for c in label.tolist()]
        return pd.DataFrame({"path": self.names, "class": classes, "probability": probability.numpy()})


def save_results(results: Results, folder: Path, job: str) -> dict[str, Any]:
    """Write every report of utils/report.py and TensorBoard's file into a folder, and show the table.

    Of several processes the first one writes.

    Returns:
        The content of results.json.
    """
    content, table = {"job": job, **results.to_json()}, results.table()
    files = distributed.by_first_process(lambda: write_reports(folder, content, table))
    checkpoint = results.checkpoint
    get_logger().info(
        f"\n{results.protocol}\n{checkpoint.path}, epoch {checkpoint.epoch} ({checkpoint.selected_by})\n\n"
        f"{console_table(table)}\n\nWritten: {', '.join(str(file) for file in files)}"
    )
    board = TensorBoardLog(folder)
    for number, (name, result) in enumerate(results.distributions.items()):
        board.scalars({f"{job}/top1": result.top1}, number)
        for step, weights in enumerate((result.learning or {}).get("weights_after_pass", [])):
            board.scalars({f"{job}_weights_{name}/expert{e + 1}": w for e, w in enumerate(weights)}, step)
    for name, figure in figures(table, results.remark).items():
        board.figure(f"{job}/{name}", figure)
    board.close()
    return content
