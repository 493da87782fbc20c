"""Predictions as files: tables in three formats, and the record of what was learned."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from utils.errors import UserError


def _csv(table: pd.DataFrame, decimals: int = 4) -> bytes:
    return os.fsencode(table.to_csv(index=False, float_format=f"%.{decimals}f"))


def _json_lines(table: pd.DataFrame, decimals: int = 4) -> bytes:
    rows = table.to_dict(orient="records")
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def _parquet(table: pd.DataFrame, decimals: int = 4) -> bytes:
    buffer = io.BytesIO()
    texts = {name: table[name].map(readable) for name in table if table[name].dtype == object}
    table.assign(**texts).to_parquet(buffer, index=False)
    return buffer.getvalue()


def readable(name: str) -> str:
    """A path as UTF-8 text: bytes of it that are none become escapes.

    >>> readable("caf\\udce9.png")
    'caf\\\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, usecols=["path"], dtype=object, encoding_errors="surrogateescape", keep_default_na=False)


def _read_json_lines(path: Path) -> pd.DataFrame:
    return pd.DataFrame({"path": [json.loads(line)["path"] for line in path.read_bytes().splitlines()]}, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path, columns=["path"])


#: Ending of the file -> function of a table and the decimals in CSV, to bytes; the others have all decimals. Names that
#: are no UTF-8 stay as they are in CSV, and are escaped in the others.
FORMATS: dict[str, Callable[..., bytes]] = {"csv": _csv, "parquet": _parquet, "jsonl": _json_lines}
_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "jsonl": _read_json_lines,
}


def check_format(name: str) -> None:
    """See that tables can be written in a format, before there are any.

    Raises:
        UserError: there is no such format, or its library is missing.
    """
    if name not in FORMATS:
        raise UserError(f'Unknown format "{name}": valid are {", ".join(FORMATS)}.')
    if name == "parquet":
        try:
            import pyarrow  # noqa: F401 pandas writes Parquet by it
        except ImportError as error:
            raise UserError(
                'Parquet needs the package pyarrow, which is not installed: pip install ".[parquet]" in the checkout, '
                "or use --format csv or jsonl."
            ) from error


def paths_in(folder: Path) -> set[str]:
    """The `readable` paths of the images whose predictions are in a folder's tables.

    Raises:
        UserError: a table cannot be read.
    """
    found: set[str] = set()
    for path in sorted(folder.glob("*.*")):
        reader = _READERS.get(path.suffix.removeprefix("."))
        if not reader or path.name.startswith("."):
            continue
        check_format(path.suffix.removeprefix("."))
        try:
            found |= set(reader(path)["path"].map(readable))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no table of predictions that can be read: take it out of the folder, or choose another "
                "--output."
            ) from error
    return found
