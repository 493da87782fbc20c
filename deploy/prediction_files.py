"""What a prediction leaves in its folder: tables in three formats, the page, and the record of what was learned."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from data_loader.image_lists import thumbnail
from evaluation.aggregators import aggregator_section
from evaluation.loaded_run import LoadedRun
from evaluation.prediction import PredictionStream
from evaluation.results import ClassCounts, Predictions
from report.prediction_page import prediction_page
from utils.bad_images import FILE_NAME, write_list
from utils.errors import UserError, need
from utils.files import make_folder, write_atomically, write_together
from utils.logger import get_logger

#: Names that are no UTF-8 stay as they are in CSV, and are escaped in the others.
FORMATS = ("csv", "parquet", "jsonl")


def check_format(kind: str) -> None:
    """See that tables can be written in a format, before there are any.

    Raises:
        UserError: there is no such format, or its library is missing.
    """
    if kind not in FORMATS:
        raise UserError(f'Unknown format "{kind}": valid are {", ".join(FORMATS)}.')
    if kind == "parquet":  # which pandas writes by it
        need("pyarrow", "Parquet", "parquet", "use --format csv or jsonl")


def table_file(table: pd.DataFrame, kind: str, decimals: int = 4) -> bytes:
    """A table as the content of a file.

    Args:
        kind: of FORMATS.
        decimals: in CSV; the others have all.
    """
    if kind == "csv":
        return os.fsencode(table.to_csv(index=False, float_format=f"%.{decimals}f"))
    if kind == "jsonl":
        rows = table.to_dict(orient="records")
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    texts = {name: table[name].map(readable) for name in table if table[name].dtype == object}
    return bytes(table.assign(**texts).to_parquet(index=False))


def readable(name: str) -> str:
    """A path as UTF-8 text: bytes of it that are none become escapes.

    >>> readable("caf\\udce9.png")
    'caf\\\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def paths_in(folder: Path) -> set[str]:
    """The `readable` paths of the images whose predictions are in a folder's tables.

    Raises:
        UserError: a table cannot be read.
    """
    found: set[str] = set()
    for path in sorted(folder.glob("[!.]*.*")):
        kind = path.suffix.removeprefix(".")
        if kind not in FORMATS:
            continue
        check_format(kind)
        try:
            if kind == "csv":
                options = {"encoding_errors": "surrogateescape", "keep_default_na": False}
                names = pd.read_csv(path, usecols=["path"], dtype=object, **options)["path"]
            elif kind == "jsonl":
                names = [json.loads(line)["path"] for line in path.read_bytes().splitlines()]
            else:
                names = pd.read_parquet(path, columns=["path"])["path"]
            found |= set(map(readable, names))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no table of predictions that can be read: take it out of the folder, or choose another "
                "--output."
            ) from error
    return found


@dataclass(frozen=True)
class PredictionWriter:
    """Writes predictions into a folder.

    Args:
        run: that predicts.
        images: folder of the images.
        folder: for the files.
        file_format: of the tables, of FORMATS.
        top_k: likeliest classes of every image.
    """

    run: LoadedRun
    images: Path
    folder: Path
    file_format: str = "csv"
    top_k: int = 5

    def save(self, predictions: Predictions) -> dict[str, Any]:
        """Write predictions.csv, class_mix.csv (or the format chosen), report.html, weights.json and any
        bad_images.csv, and say what was predicted most.

        Returns:
            The content of weights.json.
        """
        table, counts = predictions.table(self.top_k), predictions.counts()
        record = self._record(predictions, len(table)) | certainty(predictions)
        write_list(self.folder / FILE_NAME, predictions.bad_images)

        def thumbnails(places: Sequence[int], size: int) -> list[Image.Image | None]:
            return [thumbnail(Path(self.images, predictions.names[place]), size) for place in places]

        written = {
            f"predictions.{self.file_format}": table_file(table, self.file_format),
            "report.html": prediction_page(predictions, self.run.cls_num_list, record, thumbnails),
            **self._summary(predictions, record, counts),
        }
        others = {f"{stem}.{ending}": None for stem in ("predictions", "class_mix") for ending in FORMATS}
        write_together(self.folder, {**others, **written})
        weights = ", ".join("nan" if w is None else f"{w:.2f}" for w in record["weights"] or [])
        mix = predictions.class_mix(counts).sort_values("expected_count", ascending=False, kind="stable").head(5)
        shown = mix[["class", "expected_count", "predicted_count"]].to_string(index=False, float_format="%.1f")
        get_logger().info(
            f"{len(table)} images"
            + (f", expert weights {weights}" if weights else "")
            + f", mean confidence {record['mean_confidence']:.2f}; {record['changed']} of them are predicted otherwise "
            f"than by equal weights. Most frequent classes:\n{shown}\n"
            f"Written: {', '.join(str(self.folder / file) for file in written)}"
        )
        return record

    @property
    def tables(self) -> Path:
        """Folder of the tables of a stream."""
        return self.folder / "predictions"

    def save_batch(self, predictions: Predictions, stream: PredictionStream) -> dict[str, Any]:
        """Write a table of a stream's last batch, then class_mix.csv and weights.json of all images so far.

        Returns:
            The content of weights.json.
        """
        make_folder(self.tables)
        number = 1 + max((int(path.stem) for path in self.tables.glob("*.*") if path.stem.isdigit()), default=0)
        table, file = predictions.table(self.top_k), self.tables / f"{number:06}.{self.file_format}"
        write_atomically(file, table_file(table, self.file_format))
        record = self._record(predictions, stream.images)
        record |= {"batches": stream.batches, "last_batch": {"images": len(table), **certainty(predictions)}}
        write_together(self.folder, self._summary(predictions, record, stream.counts))
        get_logger().info(f"{len(table)} images: {file}, {stream.images} so far.")
        return record

    def _record(self, predictions: Predictions, images: int) -> dict[str, Any]:
        """What predicted, and what was learned from how many images."""
        learning = dict(predictions.learning)
        return {
            "weights": learning.pop("weights", None),
            "images": images,
            **({"bad_images": len(predictions.bad_images)} if predictions.bad_images else {}),
            "folder": str(self.images),
            "checkpoint": self.run.checkpoint.to_json(),
            "aggregator": aggregator_section(self.run.config),
            "learning": learning,
            **({"calibration": predictions.calibration} if predictions.calibration else {}),
            **({"averaged_views": self.run.averaged_views} if self.run.mild_views else {}),
        }

    def _summary(self, predictions: Predictions, record: dict, counts: ClassCounts) -> dict[str, bytes]:
        """What stands beside a table of predictions: the class mix, and last the record, by name."""
        return {
            f"class_mix.{self.file_format}": table_file(predictions.class_mix(counts), self.file_format, 6),
            "weights.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
        }


def certainty(predictions: Predictions) -> dict[str, float | int]:
    """Mean probability of the predicted classes, and how many images the experts weighted equally call otherwise."""
    probability, label = predictions.log_probabilities.max(dim=1)
    changed = int((label != predictions.equal_weights[0]).sum())
    return {"mean_confidence": float(probability.exp().mean()), "changed": changed}
