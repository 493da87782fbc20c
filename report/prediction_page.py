"""report.html of a prediction: the estimated class mix, how sure the network is, and pictures of both ends."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evaluation.outcomes import Thumbnails
from evaluation.results import Predictions
from model.metric import predicted
from report.figures import confidence_chart, mix_chart
from report.html_page import THUMBNAIL, Picture, checkpoint_settings, render

SHOWN_CLASSES = 15
GALLERY = 12  # pictures of each kind
UNSURE = 50  # percent


def prediction_page(
    predictions: Predictions, training_images: Sequence[int], record: Mapping[str, Any], thumbnails: Thumbnails
) -> bytes:
    """The page of a prediction.

    Args:
        predictions: of `predict`.
        training_images: per class, [C].
        record: the content of weights.json, for the settings.
        thumbnails: shows the images.
    """
    names = predictions.class_names
    label, confidence = predicted(predictions.log_probabilities)
    count, classes = len(label), len(names)
    counts = predictions.counts()
    expected, predicted_images = counts.expected.numpy(), counts.predicted.tolist()
    prior = predictions.learning.get("prior")
    mix = torch.tensor(prior, dtype=torch.float64) if prior else counts.expected / counts.expected.sum()
    training = torch.tensor(training_images, dtype=torch.float64) / sum(training_images)
    order = np.argsort(-expected, kind="stable")
    largest = max(float(values[order[:SHOWN_CLASSES]].max()) for values in (mix, training))
    bars = [
        {
            "name": names[c],
            "width": f"{100 * mix[c] / largest:.1f}",
            "training": f"{100 * training[c] / largest:.1f}",
            "text": f"{100 * mix[c]:.1f} %",
            "images": f"{predicted_images[c]:,}",
            "title": f"{names[c]}: {100 * mix[c]:.2f} % estimated, {predicted_images[c]} images predicted, "
            f"{100 * training[c]:.2f} % of the training images",
        }
        for c in order[:SHOWN_CLASSES].tolist()
    ]
    label, confidence_values = label.numpy(), confidence.numpy()
    unsure = 100 * float((100 * confidence_values < UNSURE).mean())
    median = 100 * float(np.median(confidence_values))
    sure = np.argsort(-confidence_values, kind="stable")
    _, first = np.unique(label[sure], return_index=True)
    surest = sure[np.sort(first)][:GALLERY]
    if record["aggregator"]["type"] == "GivenPriorAggregator":
        means = "the test prior that was given"
    else:
        means = "the test prior that was estimated" if prior else "the mean of the predicted probabilities"
    note = predictions.learning.get("note")
    return render(
        "prediction.html",
        title=f"Prediction of {count} images",
        kind="Prediction",
        verdict=verdict(count, [(names[c], float(expected[c])) for c in order[:3]], unsure),
        lead=f"The class mix is {means}.",
        remark=note,
        bars=bars,
        classes=classes,
        mix=mix_chart(
            "Estimated class mix over that of training", names, training, mix, "training share", "share here"
        ),
        confidence=confidence_chart(confidence),
        confidence_note=f"Median {median:.1f} %; {unsure:.1f} % of the images are below {UNSURE} %.",
        surest=gallery(predictions, surest, thumbnails),
        least=gallery(predictions, sure[::-1][:GALLERY], thumbnails),
        settings=settings_of(record),
        config=json.dumps(record["aggregator"], indent=2),
    )


def verdict(count: int, largest: Sequence[tuple[str, float]], unsure: float) -> str:
    """What was found, in one sentence; `largest` has the classes with the most expected images, and how many."""
    named = [f"{name} (about {expected:.0f})" for name, expected in largest if expected >= 0.5] or [largest[0][0]]
    listed = f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else named[0]
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"{images}, mostly {listed}; {unsure:.1f} % are predicted with less than {UNSURE} % confidence."


def gallery(predictions: Predictions, places: np.ndarray, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Pictures of some images with their two most probable classes."""
    found = thumbnails(places.tolist(), THUMBNAIL)
    shown = []
    for place, image in zip(places.tolist(), found, strict=True):
        if image is not None:
            best = predictions.log_probabilities[place].exp().topk(2)
            texts = [
                f"{predictions.class_names[c]}: {100 * p:.0f} %"
                for p, c in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            name = predictions.names[place]
            shown.append({"picture": Picture.of(image, f"{name}; {', '.join(texts)}"), "texts": texts, "name": name})
    return shown


def settings_of(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the images were predicted, name by name."""
    rows = [
        ("images", f"{record['images']:,} in {record['folder']}"),
        ("aggregator", record["aggregator"]["type"]),
        *checkpoint_settings(record["checkpoint"]),
    ]
    if record.get("weights"):
        rows.append(("expert weights", ", ".join("–" if w is None else f"{w:.2f}" for w in record["weights"])))
    if record.get("averaged_views"):
        rows.append(("averaged views", f"image, mirror image where allowed, random crops: {record['averaged_views']}"))
    return rows
