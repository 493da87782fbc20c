"""The calibration of a checkpoint: three numbers with where they come from, kept beside it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evaluation.results import CheckpointRecord
from tade import Calibration
from utils.files import write_atomically
from utils.logger import get_logger


@dataclass(frozen=True)
class CalibrationRecord:
    """A calibration and what it was fitted on; the last four are None or empty for numbers that were just given.

    Args:
        calibration: the numbers.
        source: which images, in words.
        images: how many.
        classes_without_image: names of the classes that none of them shows.
        averaged_views: random crops of the averaged views; 0 for un-augmented images.
        checkpoint_sha256: of the network.
    """

    calibration: Calibration
    source: str
    images: int | None = None
    classes_without_image: tuple[str, ...] = ()
    averaged_views: int | None = None
    checkpoint_sha256: str | None = None

    def sentence(self) -> str:
        """The numbers with their standard errors, and the source."""
        errors = [f" (standard error {error:.3f})" for error in self.calibration.standard_errors or ()] or [""] * 3
        values = zip(("a", "b1", "b2"), self.calibration.numbers, errors, strict=True)
        numbers = ", ".join(f"{name} {value:.3f}{error}" for name, value, error in values)
        return f"Calibrated by {numbers}, from {self.source}."

    def to_json(self) -> dict[str, Any]:
        """The content of the file beside a checkpoint: the numbers and the rest at one level."""
        content = asdict(self)
        return {**content.pop("calibration"), **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CalibrationRecord":
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: a key is missing or unknown, or the numbers are no calibration.
        """
        rest = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        numbers = {field.name: rest.pop(field.name) for field in fields(Calibration)}
        return cls(Calibration(**numbers), **rest)


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
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
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
