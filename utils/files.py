"""Files that are written whole or not at all, and the folders for them."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.errors import UserError

#: Seconds after which a half-written file belongs to no living process.
LEFT_BEHIND = 3600


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


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace a file by new content, or leave it as it was.

    Raises:
        UserError: the write failed, with the system's reason.
    """
    write_together(path.parent, {path.name: data})


def write_together(folder: Path, contents: Mapping[str, bytes | memoryview | None]) -> None:
    """Replace several files of a folder, so that whoever finds the last of them finds all of the same time.

    All are written aside first, under random names; then the last of the old ones is removed, and the new ones take
    their places in order.

    Args:
        folder: exists.
        contents: name -> content; None removes the file.

    Raises:
        UserError: a write failed, with the system's reason.
    """
    remove_leftovers(folder, contents)
    *_, last = contents
    target = folder / last
    asides: dict[str, Path] = {}
    try:
        for name, data in contents.items():
            if data is not None:
                aside = folder / f".{name}.{secrets.token_hex(8)}.tmp"
                target = folder / name
                with open(aside, "xb") as file:  # never through a link that is there already
                    asides[name] = aside
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        if len(contents) > 1:
            (folder / last).unlink(missing_ok=True)
        for name in contents:
            target = folder / name
            if name in asides:
                os.replace(asides[name], target)
            else:
                target.unlink(missing_ok=True)
    except OSError as error:
        kept = f"the earlier {target.name} there is untouched" if target.exists() else "nothing was written"
        needed = sum(len(data) for data in contents.values() if data is not None)
        raise UserError(
            f"Could not save {target} ({error.strerror or error}; {needed / 1e6:.1f} MB were needed): "
            f"{kept}; make room or choose another folder."
        ) from error
    finally:
        for aside in asides.values():
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what a process that was killed while writing one of these files left beside it, an hour ago or more."""
    own = "|".join(map(re.escape, names))
    for entry in os.scandir(folder) if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if re.fullmatch(rf"\.({own})\.[0-9a-f]{{16}}\.tmp", entry.name):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_BEHIND:
                    os.unlink(entry)
