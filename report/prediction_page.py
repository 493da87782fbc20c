"""report.html of a prediction: the estimated class mix, how sure the network is, and pictures of both ends."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.outcomes import Thumbnails
from evaluation.results import Predictions
from model.metric import predicted
from report.charts import Series, histogram, share_chart
from report.html_page import THUMBNAIL, Picture, render

SHOWN_CLASSES = 15
GALLERY = 12  # pictures of each kind
BINS = 20
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
    label, confidence = (values.numpy() for values in predicted(predictions.log_probabilities))
    count, classes = len(label), len(names)
    predicted_images = np.bincount(label, minlength=classes)
    prior = predictions.learning.get("prior")
    mix = np.array(prior) if prior else predictions.log_probabilities.double().exp().mean(dim=0).numpy()
    training = np.array(training_images) / sum(training_images)
    order = np.argsort(-mix, kind="stable")
    largest = max(mix[order[0]], training[order[:SHOWN_CLASSES]].max())
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
        for c in order[:SHOWN_CLASSES]
    ]
    by_training = np.argsort(-np.array(training_images), kind="stable")
    chart = share_chart(
        "Estimated class mix and that of training",
        [
            Series("training images", (100 * training[by_training]).tolist(), "equal"),
            Series("these images, estimated", (100 * mix[by_training]).tolist(), "main"),
        ],
        [names[c] for c in by_training],
        "class, by falling number of training images",
    )
    counts = np.histogram(100 * confidence, bins=BINS, range=(0, 100))[0].tolist()
    unsure = 100 * float((100 * confidence < UNSURE).mean())
    sure = np.argsort(-confidence, kind="stable")
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
        verdict=verdict(count, [(names[c], 100 * float(mix[c])) for c in order[:3]], unsure),
        lead=f"The class mix is {means}.",
        remark=note,
        bars=bars,
        classes=classes,
        mix=chart,
        confidence=histogram("Confidence of the predictions", counts, "confidence (%)", "images", "main"),
        confidence_note=f"Median {100 * float(np.median(confidence)):.1f} %; {unsure:.1f} % of the images are below "
        f"{UNSURE} %.",
        surest=gallery(predictions, surest, thumbnails),
        least=gallery(predictions, sure[::-1][:GALLERY], thumbnails),
        settings=settings_of(record),
        config=json.dumps(record["aggregator"], indent=2),
    )


def verdict(count: int, largest: Sequence[tuple[str, float]], unsure: float) -> str:
    """What was found, in one sentence; `largest` has the most frequent classes and their shares in percent."""
    named = [f"{name} ({share:.1f} %)" for name, share in largest]
    listed = f"{', '.join(named[:-1])} and {named[-1]}"
    images = "1 image" if count == 1 else f"{count:,} images"
    return (
        f"{images}, estimated to be mostly {listed}; {unsure:.1f} % are predicted with less than {UNSURE} % confidence."
    )


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
    checkpoint = record["checkpoint"]
    rows = [
        ("images", f"{record['images']:,} in {record['folder']}"),
        ("aggregator", record["aggregator"]["type"]),
        ("checkpoint", f"{checkpoint['path']}, epoch {checkpoint['epoch']} ({checkpoint['selected_by']})"),
        ("SHA-256", checkpoint["sha256"]),
    ]
    rows += [(f"training {part}", f"digest {value}") for part, value in (checkpoint.get("fingerprint") or {}).items()]
    if record.get("weights"):
        rows.append(("expert weights", ", ".join("–" if w is None else f"{w:.2f}" for w in record["weights"])))
    if record.get("averaged_views"):
        rows.append(("averaged views", f"image, mirror image where allowed, random crops: {record['averaged_views']}"))
    return rows
