"""The calibration of a checkpoint: three numbers with where they come from, kept beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.results import CheckpointRecord
from tade import Calibration, fit_calibration, prior_free_logits
from utils.errors import UserError
from utils.files import write_atomically
from utils.logger import get_logger


@dataclass(frozen=True)
class CalibrationRecord:
    """A calibration and what it was fitted on; the last four are None or empty for numbers that were just given.

    Args:
        a, b1, b2, standard_errors: see tade.Calibration.
        source: which images, in words.
        images: how many.
        classes_without_image: names of the classes that none of them shows.
        averaged_views: random crops of the averaged views; 0 for un-augmented images.
        checkpoint_sha256: of the network.
    """

    a: float
    b1: float
    b2: float
    standard_errors: tuple[float, float, float] | None
    source: str
    images: int | None = None
    classes_without_image: tuple[str, ...] = ()
    averaged_views: int | None = None
    checkpoint_sha256: str | None = None

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.a, self.b1, self.b2, self.standard_errors)

    def sentence(self) -> str:
        """The numbers with their standard errors, and the source."""
        errors = [f" (standard error {error:.3f})" for error in self.standard_errors or ()] or [""] * 3
        values = zip(("a", "b1", "b2"), self.calibration.numbers, errors, strict=True)
        numbers = ", ".join(f"{name} {value:.3f}{error}" for name, value, error in values)
        return f"Calibrated by {numbers}, from {self.source}."

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "CalibrationRecord":
        """The inverse of `to_json`.

        Raises:
            TypeError, ValueError: a key is missing or unknown, or the numbers are no calibration.
        """
        errors = content.get("standard_errors")
        lists = {
            "standard_errors": None if errors is None else tuple(errors),
            "classes_without_image": tuple(content.get("classes_without_image", ())),
        }
        record = cls(**{**content, **lists})
        assert record.calibration
        return record


def fit_record(
    logits: Tensor,
    targets: Tensor,
    expert_log_priors: Tensor,
    log_prior: Tensor,
    class_names: Sequence[str],
    source: str,
    averaged_views: int,
    checkpoint_sha256: str,
) -> CalibrationRecord:
    """Fit a calibration on labeled images that were not trained on.

    The labeled images may have any class mix: the log of their own class shares is added to the scores in the fit, so
    that it does not leak into the numbers (`fit_calibration`). A class without a labeled image has a share of 0 and
    does not compete: none of the images could have been of it, whatever its scores, so a made-up share would count
    every image as evidence against it. Its scores are calibrated all the same, by the curve over training frequency
    that the other classes define.

    Args:
        logits, targets: of the labeled images, [N, E, C] and [N].
        expert_log_priors, log_prior: what is known of training, [E, C] and [C]; see tade.Aggregator.
        class_names: [C].
        source, averaged_views, checkpoint_sha256: see CalibrationRecord.

    Raises:
        UserError: nothing can be learned from these images.
    """
    try:
        fitted = fit_calibration(prior_free_logits(logits, expert_log_priors), targets, log_prior)
    except ValueError as error:
        raise UserError(f"The network cannot be calibrated on {source}: {error}.") from error
    counts = torch.bincount(targets, minlength=len(class_names)).tolist()
    return CalibrationRecord(
        *fitted.numbers,
        standard_errors=fitted.standard_errors,
        source=source,
        images=len(targets),
        classes_without_image=tuple(name for name, count in zip(class_names, counts, strict=True) if not count),
        averaged_views=averaged_views,
        checkpoint_sha256=checkpoint_sha256,
    )


def calibration_path(checkpoint: Path | str) -> Path:
    """The file beside a checkpoint: NAME.calibration.json."""
    return Path(checkpoint).with_suffix(".calibration.json")


def save_calibration(record: CalibrationRecord, path: Path) -> None:
    """Write a record, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, (json.dumps(record.to_json(), indent=2, allow_nan=False) + "\n").encode())


def stored_calibration(checkpoint: CheckpointRecord, averaged_views: int) -> CalibrationRecord | None:
    """The calibration beside a checkpoint, if it is of this very network and these averaged views.

    One that is not is named in a warning, with what to do.
    """
    path = calibration_path(checkpoint.path)
    if not path.is_file():
        return None
    try:
        record = CalibrationRecord.from_json(json.loads(path.read_bytes()))
    except (OSError, TypeError, ValueError, AttributeError):
        reason = "cannot be read as a calibration"
    else:
        if record.checkpoint_sha256 != checkpoint.sha256:
            reason = "is of another network than the checkpoint is now"
        elif record.averaged_views != averaged_views:
            reason = f"is for averaged_views {record.averaged_views} and not for {averaged_views}"
        else:
            return record
    get_logger().warning(
        f"{path} {reason} and is not used: make it anew with python -m commands.calibrate -r {checkpoint.path} "
        f"--averaged_views {averaged_views}, or remove it."
    )
    return None
