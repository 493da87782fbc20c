"""Which files of a folder are images: by their endings, without what file managers leave behind."""

import functools
import os
from collections import Counter
from dataclasses import dataclass, field
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


@dataclass
class FolderContent:
    """The files of a folder, at any depth.

    Args:
        images: paths relative to it, sorted.
        others: ending (in lower case, "" for none) -> number of files that are no images by it.
    """

    images: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def scan_folder(folder: Path, depth: int | None = None) -> FolderContent:
    """The image files and the other files under a folder; leftovers count as neither. No folder has none.

    Args:
        folder: where to look.
        depth: 1 for the folder alone, 2 with the folders in it, ...; None for all.

    Raises:
        UserError: a folder under it cannot be entered.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(
                f"The folder {error.filename} cannot be read ({error.strerror}): mend its permissions, or take it out."
            ) from error

    found: list[Path] = []
    content = FolderContent()
    for here, folders, names in os.walk(folder, onerror=refuse):
        deep = depth is not None and len(Path(here).relative_to(folder).parts) >= depth - 1
        folders[:] = [] if deep else [name for name in folders if not is_leftover(name)]
        for name in names:
            suffix = Path(name).suffix.lower()
            if is_leftover(name):
                continue
            if suffix in image_suffixes():
                found.append(Path(here, name))
            else:
                content.others[suffix] += 1
    content.images = sorted(path.relative_to(folder).as_posix() for path in found)
    return content


def image_files(folder: Path) -> list[str]:
    """The image files under a folder, see `scan_folder`."""
    return scan_folder(folder).images


def others_text(others: Counter[str]) -> str:
    """Endings with their counts, the most frequent first: "12 .heic, 1 without an ending"."""
    return ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in others.most_common(10))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without leftovers.

    Raises:
        UserError: it is missing, or cannot be entered.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give the one that holds a folder for each class.")
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not is_leftover(path.name))
    except OSError as error:
        raise UserError(
            f"The folder {error.filename} cannot be read ({error.strerror}): mend its permissions, or take it out."
        ) from error
