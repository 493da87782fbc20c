"""Which files of a folder are images: by their endings, without what file managers leave behind."""

import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from utils.errors import UserError

#: Formats that Pillow names and does not decode itself.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
#: What macOS and Windows put beside files, in lower case; hidden files and folders are left out by their dot.
LEFTOVERS = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The endings of every format that Pillow decodes, in lower case: ".jpg", ".png", ".ppm", ..."""
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in NOT_DECODED)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of that name is a file manager's, or hidden (".DS_Store", "._photo.jpg")."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """os.walk without leftovers; nothing where there is no such folder.

    Raises:
        UserError: a folder cannot be entered.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(
                f"The folder {error.filename} cannot be read ({error.strerror}): mend its permissions, or take it out."
            ) from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_leftover(name)]
        yield Path(here), folders, [name for name in files if not is_leftover(name)]


def scan_folder(folder: Path) -> tuple[list[str], Counter[str]]:
    """The image files under a folder, at any depth; and the endings of the other files, in lower case, with counts.

    Paths are relative to the folder, sorted.

    Raises:
        UserError: a folder under it cannot be entered.
    """
    images, others = [], Counter()
    for here, _, files in walk(folder):
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix in image_suffixes():
                images.append((here / name).relative_to(folder).as_posix())
            else:
                others[suffix] += 1
    return sorted(images), others


def others_text(others: Counter[str]) -> str:
    """Endings with their counts, the most frequent first: "12 .heic, 1 without an ending"."""
    return ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in others.most_common(10))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without leftovers.

    Raises:
        UserError: it is missing, or cannot be entered.
    """
    for _, folders, _ in walk(folder):
        return [folder / name for name in sorted(folders)]
    raise UserError(f"There is no folder {folder}: give the one that holds a folder for each class.")
