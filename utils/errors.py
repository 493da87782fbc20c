"""Errors that are the caller's to mend, each one sentence that says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input: a file, a config value or an option. Scripts print the message and exit with `status`."""

    status = 2


class Interrupted(UserError):
    """The user stopped a run; the message says how to go on."""

    status = 130


SHOWN = 60  # valid names in a message


def unknown(what: str, name: object, valid: Iterable[str]) -> UserError:
    """Error for a name that is not among the valid ones; names the choices and the nearest of them.

    Args:
        what: what the name stands for, e.g. 'key in "trainer"'.
        name: the name given.
        valid: the names that would have been right.
    """
    valid = sorted(valid)
    nearest = get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    rest = f" and {len(valid) - SHOWN} more" if len(valid) > SHOWN else ""
    return UserError(f'Unknown {what} "{name}": {hint}Valid: {", ".join(valid[:SHOWN]) or "none"}{rest}.')
