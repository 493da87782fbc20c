"""Image files that cannot be decoded: why, and where that is listed."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from utils.errors import UserError
from utils.files import write_together

#: Of the list of bad images, in a folder of results or of a run.
FILE_NAME = "bad_images.csv"
NAMED = 10  # images in a message


@dataclass(frozen=True)
class BadImage:
    """An image that was left out.

    Args:
        index: its place in its list.
        name: its path as the list has it.
        reason: why it cannot be used.
        source: the list, or the folder that was listed.
    """

    index: int
    name: str
    reason: str
    source: str


def reason_of(path: Path, error: Exception) -> str:
    """Why an image file cannot be decoded, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if os.path.isdir(path):
        return "is a folder"
    with suppress(OSError):
        if not path.stat().st_size:
            return "is an empty file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if "cannot identify image file" in str(error):
        return "is no image that Pillow knows"
    return f"cannot be decoded ({str(error) or type(error).__name__})"


def bad_images_sentence(
    bad: Sequence[BadImage], total: int, verdict: str = "are left out", listed_in: Path | None = None
) -> str:
    """How many images are bad, the first of them with their reasons, and where all are listed."""
    named = "; ".join(f"{image.name} {image.reason}" for image in bad[:NAMED])
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    where = f" Listed in {listed_in}." if listed_in else ""
    return f"{len(bad)} of {total} images {verdict}: {named}{more}.{where}"


def none_decoded(bad: Sequence[BadImage]) -> UserError:
    """The error where no image of a list, with at least one, can be used."""
    return UserError(
        f"None of the {len(bad)} images of {bad[0].source} can be decoded ({bad[0].name} {bad[0].reason}): mend "
        "them, or give others."
    )


def write_list(path: Path, bad: Collection[BadImage]) -> Path | None:
    """Write the skipped images as CSV: path, reason, list; without any, an older file is removed.

    Returns:
        The file, if there is one now.

    Raises:
        UserError: it cannot be written.
    """
    rows = pd.DataFrame([(image.name, image.reason, image.source) for image in bad], columns=["path", "reason", "list"])
    write_together(path.parent, {path.name: os.fsencode(rows.to_csv(index=False)) if bad else None})
    return path if bad else None
