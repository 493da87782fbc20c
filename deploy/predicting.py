"""Predictions of a folder of images as files: once, or of the images that appear in it."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_loader.image_lists import thumbnail
from deploy.prediction_files import FORMATS, paths_in
from deploy.watch import Inbox, watch
from evaluation.aggregators import aggregator_section
from evaluation.loaded_run import LoadedRun
from evaluation.prediction import PredictionStream
from evaluation.results import ClassCounts, Predictions
from report.prediction_page import prediction_page
from utils.bad_images import FILE_NAME, write_list
from utils.files import make_folder, write_atomically, write_together
from utils.logger import get_logger
from utils.signals import StopSignals


@dataclass(frozen=True)
class PredictionWriter:
    """Writes predictions into a folder.

    Args:
        run: that predicts.
        images: folder of the images.
        folder: for the files.
        file_format: of the tables, see deploy.prediction_files.FORMATS.
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
        record = self.record(predictions, len(table)) | certainty(predictions)
        write_list(self.folder / FILE_NAME, predictions.bad_images)

        def thumbnails(places: Sequence[int], size: int) -> list[Image.Image | None]:
            return [thumbnail(Path(self.images, predictions.names[place]), size) for place in places]

        written = {
            f"predictions.{self.file_format}": FORMATS[self.file_format](table),
            "report.html": prediction_page(predictions, self.run.cls_num_list, record, thumbnails),
            **self.summary_files(predictions, record, counts),
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

    def watch(self, stream: PredictionStream, batch_size: int, seconds: float) -> dict[str, Any]:
        """Predict the images that appear in the folder, until a signal asks to stop.

        Writes predictions/000001.csv, ... in the folder of results, one a batch, and after each batch class_mix.csv and
        weights.json of all images so far, and the state. Images that have predictions there are not predicted again.

        Args:
            stream, batch_size, seconds: see deploy.watch.watch.

        Returns:
            The content of weights.json; of a run without an image an empty one.
        """
        tables = self.folder / "predictions"
        make_folder(tables)
        inbox = Inbox(self.images, paths_in(tables))
        number = max((int(path.stem) for path in tables.glob("*.*") if path.stem.isdigit()), default=0)
        stop = threading.Event()
        kept: dict[str, Any] = {}

        def keep(predictions: Predictions) -> None:
            nonlocal number
            number += 1
            table, file = predictions.table(self.top_k), tables / f"{number:06}.{self.file_format}"
            write_atomically(file, FORMATS[self.file_format](table))
            record = self.record(predictions, stream.images)
            record |= {"batches": stream.batches, "last_batch": {"images": len(table), **certainty(predictions)}}
            write_together(self.folder, self.summary_files(predictions, record, stream.counts))
            kept.update(record)
            get_logger().info(f"{len(table)} images: {file}, {stream.images} so far.")

        get_logger().info(
            f"Watching {self.images}: {len(inbox.done)} images there have predictions already, and {stream.images} "
            "were learned from. Ctrl-C or SIGTERM ends it."
        )
        with StopSignals(lambda _: stop.set()):
            watch(stream, inbox, keep, batch_size, seconds, stop)
        get_logger().info(f"Stopped after {stream.images} images; everything is written: {self.folder}")
        return kept

    def record(self, predictions: Predictions, images: int) -> dict[str, Any]:
        """The content of weights.json: what predicted, and what was learned from how many images."""
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

    def summary_files(self, predictions: Predictions, record: dict, counts: ClassCounts) -> dict[str, bytes]:
        """What stands beside a table of predictions: the class mix, and last the record, by name."""
        return {
            f"class_mix.{self.file_format}": FORMATS[self.file_format](predictions.class_mix(counts), 6),
            "weights.json": (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
        }


def certainty(predictions: Predictions) -> dict[str, float | int]:
    """Mean probability of the predicted classes, and how many images the experts weighted equally call otherwise."""
    assert predictions.equal_weights
    probability, label = predictions.log_probabilities.max(dim=1)
    changed = int((label != predictions.equal_weights[0]).sum())
    return {"mean_confidence": float(probability.exp().mean()), "changed": changed}
