"""The record of an evaluation: one class for each level of results.json, and what is made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evaluation.outcomes import Outcomes, Thumbnails
from utils.bad_images import BadImage

Value = float | None | list[float | None]


#: Columns that stand in results.csv and not on the console, unless a config names the metric.
DETAILS = ("balanced_accuracy", "macro_f1", "expected_calibration_error", "difference") + tuple(
    f"{name} {end}" for name in ("top1", "difference") for end in ("low", "high")
)


def short_table(table: pd.DataFrame, config: Mapping) -> pd.DataFrame:
    """A table without the columns of DETAILS that the config's `metrics` do not name."""
    hidden = set(DETAILS) - set(config.get("metrics") or [])
    return table[[column for column in table if column not in hidden]]


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
        metrics: name -> value: "top1", "many", "medium", "few", those of DETAILS, and what else the config lists.
        experts_top1: of each expert alone, [E].
        weights: the experts' weights, [E]; None where the method has none.
        equal_weights_top1: of the experts weighted equally, where adaptation is compared with that.
        learning: what the aggregator reports of how it learned.
        difference_to_equal_weights: {"points", "interval"} of `paired_difference`, where adaptation is compared.
        outcomes, equal_outcomes: image by image, of the same two; not part of JSON.
    """

    images: int
    metrics: dict[str, Value]
    experts_top1: list[float]
    weights: list[float] | None = None
    equal_weights_top1: float | None = None
    learning: dict[str, Any] | None = None
    difference_to_equal_weights: dict[str, Any] | None = None
    outcomes: Outcomes | None = field(default=None, repr=False, compare=False)
    equal_outcomes: Outcomes | None = field(default=None, repr=False, compare=False)

    #: Keys in JSON that are there where they have something to say.
    OPTIONAL = ("weights", "equal_weights_top1", "difference_to_equal_weights", "learning")
    #: Keys in JSON beside those of the metrics.
    OWN = ("images", "experts_top1", *OPTIONAL)

    @property
    def top1(self) -> float | None:
        value = self.metrics["top1"]
        return value if isinstance(value, float | int) else None

    def to_json(self) -> dict[str, Any]:
        content = {"images": self.images, **self.metrics, "experts_top1": self.experts_top1}
        optional = {key: getattr(self, key) for key in self.OPTIONAL}
        return content | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DistributionResult":
        own = {key: content[key] for key in cls.OWN if key in content}
        return cls(**own, metrics={key: value for key, value in content.items() if key not in cls.OWN})

    def row(self) -> dict[str, float | None]:
        """One line of the full table: numbers by column; lists such as accuracy by class are left out."""
        row: dict[str, float | None] = {"images": self.images, "top1": self.top1}
        if self.equal_weights_top1 is not None:
            row["equal weights"] = self.equal_weights_top1
        row |= {key: value for key, value in self.metrics.items() if not isinstance(value, list)}
        intervals = {
            "top1": self.metrics.get("top1_interval"),
            "difference": (self.difference_to_equal_weights or {}).get("interval"),
        }
        if self.difference_to_equal_weights:
            row["difference"] = self.difference_to_equal_weights["points"]
        for name, interval in intervals.items():
            if isinstance(interval, list):
                row |= {f"{name} low": interval[0], f"{name} high": interval[1]}
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
        classes: {"names": [C], "training_images": [C]}; None where a file has none.
        thumbnails: shows test images; not part of JSON.
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
    classes: dict[str, list] | None = None
    thumbnails: Thumbnails | None = field(default=None, repr=False, compare=False)

    #: Keys that are left out of JSON where they are None.
    OPTIONAL = ("remark", "calibration", "classes")

    def to_json(self) -> dict[str, Any]:
        """Plain containers, as they stand in results.json."""
        kept = {key: value for key, value in vars(self).items() if key != "thumbnails"}
        return {
            **{key: value for key, value in kept.items() if value is not None or key not in self.OPTIONAL},
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
        """One row a distribution, one column a number: those that the console shows."""
        return short_table(self.full_table(), self.config)

    def full_table(self) -> pd.DataFrame:
        """One row a distribution, one column a number: all of results.csv."""
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
        learning: what the aggregator reports.
        checkpoint: that predicted.
        equal_weights: class and probability by the experts weighted equally, [N] each.
        cls_num_list: training images per class, [C].
        calibration: of the aggregator, `CalibrationRecord.to_json`; None where it has none.
        bad_images: that were left out because they cannot be decoded; names and predictions are of the others.
    """

    names: list[str]
    log_probabilities: Tensor
    class_names: list[str]
    learning: dict[str, Any]
    checkpoint: CheckpointRecord
    equal_weights: tuple[Tensor, Tensor]
    cls_num_list: list[int]
    calibration: dict[str, Any] | None = None
    bad_images: Sequence[BadImage] = ()

    def table(self, top_k: int = 5) -> pd.DataFrame:
        """One row an image: path, class, probability, margin (over the second class), the class and the probability by
        equal weights, then the next likely classes with theirs: class_2, probability_2, ... up to `top_k`."""
        shown = min(top_k, len(self.class_names))
        probabilities, labels = self.log_probabilities.exp().topk(max(2, shown), dim=1)
        names = np.array(self.class_names, dtype=object)
        first = probabilities[:, 0]
        columns: dict[str, Any] = {
            "path": _texts(self.names),
            "class": _texts(names[labels[:, 0]]),
            "probability": first.numpy(),
            "margin": (first - probabilities[:, 1]).numpy(),
            "equal_weights_class": _texts(names[self.equal_weights[0]]),
            "equal_weights_probability": self.equal_weights[1].numpy(),
        }
        for k in range(1, shown):
            columns[f"class_{k + 1}"] = _texts(names[labels[:, k]])
            columns[f"probability_{k + 1}"] = probabilities[:, k].numpy()
        return pd.DataFrame(columns)

    def counts(self) -> "ClassCounts":
        """Images of each class, expected and predicted."""
        classes = len(self.class_names)
        return ClassCounts(
            self.log_probabilities.double().exp().sum(dim=0),
            torch.bincount(self.log_probabilities.argmax(dim=1), minlength=classes),
            torch.bincount(self.equal_weights[0], minlength=classes),
        )

    def class_mix(self, counts: "ClassCounts | None" = None) -> pd.DataFrame:
        """One row a class: its training images, estimated share, expected, predicted and equally weighted count.

        Args:
            counts: of these and earlier batches, for a stream.
        """
        counts = counts or self.counts()
        share = self.learning.get("prior") or (counts.expected / counts.expected.sum()).tolist()
        return pd.DataFrame(
            {
                "class": _texts(self.class_names),
                "training_images": self.cls_num_list,
                "estimated_share": share,
                "expected_count": counts.expected.tolist(),
                "predicted_count": counts.predicted.tolist(),
                "equal_weights_count": counts.equal_weights.tolist(),
            }
        )


def _texts(values: Sequence[str] | np.ndarray) -> pd.Series:
    """A column of Python's strings: pandas's own have no place for names that are no UTF-8."""
    return pd.Series(list(values), dtype=object)


@dataclass
class ClassCounts:
    """Images of each class among predicted ones.

    Args:
        expected: sum of the probabilities, [C] float64.
        predicted: by the largest probability, [C].
        equal_weights: by the experts weighted equally, [C].
    """

    expected: Tensor
    predicted: Tensor
    equal_weights: Tensor

    @classmethod
    def none(cls, classes: int) -> "ClassCounts":
        """Of no image."""
        whole = torch.zeros(classes, dtype=torch.int64)
        return cls(torch.zeros(classes, dtype=torch.float64), whole, whole.clone())

    def __add__(self, other: "ClassCounts") -> "ClassCounts":
        return ClassCounts(**{name: own + vars(other)[name] for name, own in vars(self).items()})
