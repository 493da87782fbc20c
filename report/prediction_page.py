"""report.html of a prediction: the expected class mix, how sure the network is, and pictures of both ends."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.outcomes import Thumbnails
from evaluation.results import Predictions
from model.metric import predicted
from report.charts import Axis, Chart
from report.figures import class_groups, mix_chart
from report.html_page import THUMBNAIL, checkpoint_settings, picture, render
from report.verdict import UNSURE, prediction_verdict

SHOWN_CLASSES = 15
GALLERY = 12  # pictures of each kind
BINS = 20


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
    count, kind = len(label), record["aggregator"]["type"]
    table = predictions.class_mix().assign(training=np.array(training_images) / sum(training_images))
    frequent = table.sort_values("expected_count", ascending=False, kind="stable").head(SHOWN_CLASSES)
    largest = max(frequent["expected_count"].max(), count * frequent["training"].max())
    means = "the mean of the predicted probabilities"
    if predictions.learning.get("prior"):
        means = f"the test prior that was {'given' if kind == 'GivenPriorAggregator' else 'estimated'}"
    unsure = 100 * float((100 * confidence < UNSURE).mean())
    sure = np.argsort(-confidence, kind="stable")
    _, first = np.unique(label[sure], return_index=True)
    settings = [
        ("images", f"{record['images']:,} in {record['folder']}"),
        ("aggregator", kind),
        *checkpoint_settings(record["checkpoint"]),
    ]
    if record.get("weights"):
        settings.append(("expert weights", ", ".join("–" if w is None else f"{w:.2f}" for w in record["weights"])))
    if views := record.get("averaged_views"):
        settings.append(("averaged views", f"image, mirror image where allowed, random crops: {views}"))
    shares, training = table["estimated_share"].to_numpy(), table["training"].to_numpy()
    groups = class_groups({"names": names, "training_images": training_images}, 1)
    return render(
        "prediction.html",
        title=f"Prediction of {count} images",
        kind="Prediction",
        verdict=prediction_verdict(count, list(zip(frequent["class"], frequent["expected_count"])), unsure),
        remark=predictions.learning.get("note"),
        frequent=frequent.rename(columns={"class": "name"}).to_dict("records"),
        count=count,
        largest=largest,
        classes=len(names),
        mix=mix_chart(shares, training, ("estimated", "training"), groups),
        mix_note=f"The estimated shares are {means}. On the line a class has its share of the training images.",
        confidence=confidence_chart(confidence),
        confidence_note=f"Median {100 * float(np.median(confidence)):.1f} %; {unsure:.1f} % of the images are below "
        f"{UNSURE} %.",
        surest=gallery(predictions, sure[np.sort(first)][:GALLERY], thumbnails),
        least=gallery(predictions, sure[::-1][:GALLERY], thumbnails),
        settings=settings,
        config=json.dumps(record["aggregator"], indent=2),
    )


def confidence_chart(confidence: np.ndarray) -> Chart:
    """How many images have which confidence; [N] in 0..1."""
    counts = np.histogram(100 * confidence, bins=BINS, range=(0, 100))[0]
    y = Axis(0, max(5, 1.05 * counts.max()), "images")
    chart = Chart("Confidence of the predictions", Axis(0, 100, "confidence (%)"), y)
    room = 100 / BINS
    for k, images in enumerate(counts):
        if images:
            title = f"{room * k:.0f} to {room * (k + 1):.0f} %: {images} images"
            chart.bar(room * k, room * (k + 1), images, title)
    return chart


def gallery(predictions: Predictions, places: np.ndarray, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """Pictures of some images with their two most probable classes."""
    shown = []
    for place, image in zip(places.tolist(), thumbnails(places.tolist(), THUMBNAIL), strict=True):
        if image is not None:
            best = predictions.log_probabilities[place].exp().topk(2)
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            texts = [f"{predictions.class_names[c]}: {100 * p:.0f} %" for c, p in found]
            name = predictions.names[place]
            shown.append({"picture": picture(image, f"{name}; {', '.join(texts)}"), "texts": texts, "name": name})
    return shown
