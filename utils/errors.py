"""Errors that are the caller's to mend, each one sentence that says what to do."""

import importlib
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


def printable(text: str, keep: str = "") -> str:
    """Text that a terminal shows as it is: control characters, line ends and half characters become escapes.

    >>> printable("a\\x1b[2J\\nb")
    'a\\\\x1b[2J\\\\nb'

    Args:
        text: from a file, say.
        keep: characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """Bad input: a file, a config value or an option. Scripts print the message, one line, and exit with `status`."""

    status = 2
    #: Raised by all processes of a run alike: the first one reports it.
    shared = False

    def __init__(self, message: str):
        super().__init__(printable(message))


class Interrupted(UserError):
    """A run was stopped, by Ctrl-C or another signal; the message says how to go on.

    Args:
        message: one sentence.
        status: to exit with, see utils.signals.signal_status.
    """

    def __init__(self, message: str, status: int = 130):
        super().__init__(message)
        self.status = status


class LostProcess(UserError):
    """Another process of the run has ended, so that this one cannot go on."""

    status = 1


def shown(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, not more than `most` of them.

    >>> shown(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def unknown(what: str, name: object, valid: Iterable[str]) -> UserError:
    """Error for a name that is not among the valid ones; names the choices and the nearest of them.

    Args:
        what: what the name stands for, e.g. 'key in "trainer"'.
        name: the name given.
        valid: the names that would have been right.
    """
    valid = sorted(valid)
    nearest = get_close_matches(str(name)[:200], valid, n=1, cutoff=0.5)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    return UserError(f'Unknown {what} "{str(name)[:200]}": {hint}Valid: {shown(valid, 60) or "none"}.')


def nearest_path(path: Path) -> str:
    """ "did you mean PATH? " for a mistyped path, with the most similar name that there is; else nothing."""
    there = path
    while not os.path.exists(there) and there != there.parent:
        missing, there = there, there.parent
    if there == path:
        return ""
    try:
        names = {entry.name.casefold(): entry.name for entry in there.iterdir()}
    except OSError:
        return ""
    nearest = get_close_matches(missing.name.casefold(), names, n=1)
    return f"did you mean {there / names[nearest[0]] / path.relative_to(missing)}? " if nearest else ""


def need(package: str, what: str, extra: str, otherwise: str) -> None:
    """Raise UserError if a package of an extra of pyproject.toml is not installed, before anything is computed."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f'{what} needs the package {package}, which is not installed: pip install ".[{extra}]" in the checkout, '
            f"or {otherwise}."
        ) from error
