"""Folders for what is written."""

from pathlib import Path

from utils.errors import UserError


def make_folder(folder: Path) -> None:
    """Create a folder for results, before there are any to lose.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} for results cannot be created ({error.strerror}): choose another with --output."
        ) from error
