"""The charts of results, for pages and for files."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from report.charts import (
    SMALL,
    WIDE,
    Chart,
    Point,
    Scale,
    Series,
    bin_chart,
    line_chart,
    scatter_chart,
    wide_and_narrow,
)

MOST_DOTS = 4000  # on a page; with more classes, dots are means of classes
CLASS_BINS = 40
ASIDE = 3.0  # pixels between dots of the same class in several rows


def accuracy_charts(names: Sequence[str], series: Sequence[Series], size: tuple[int, int] = WIDE) -> list[Chart]:
    """Accuracy over the test distributions, for wide and narrow screens; none of a single distribution."""
    label = "Top-1 accuracy over the test class distributions"
    if len(names) < 2:
        return []
    return wide_and_narrow(lambda size: line_chart(label, names, series, "top-1 accuracy (%)", size), size[1])


def adapted_series(entries: Mapping[str, Mapping], method: str) -> list[Series]:
    """Top-1 of an evaluation beside single experts and, where compared with, equal weights.

    Args:
        entries: of results.json, by distribution.
        method: what the line of the results is called.
    """
    values = list(entries.values())
    experts = len(values[0]["experts_top1"])
    series = [
        Series(f"expert {e + 1} alone", [entry["experts_top1"][e] for entry in values], f"c{e % 7 + 1}", "thin dashed")
        for e in range(experts if experts > 1 else 0)
    ]
    if any(entry.get("difference_to_equal_weights") for entry in values):
        series.append(Series("equal weights", [entry.get("equal_weights_top1") for entry in values], "equal"))
    titles = [f"{name}, {method.lower()}: {e['top1']:.1f} % of {e['images']} images" for name, e in entries.items()]
    result = Series(method.lower(), [entry["top1"] for entry in values], "main", titles=titles)
    intervals = [entry.get("top1_interval") for entry in values]
    if all(intervals):
        result.low, result.high = zip(*intervals, strict=True)
    return [*series, result]


def weight_charts(label: str, names: Sequence[str], weights: Sequence[Sequence[float]]) -> list[Chart]:
    """Expert weights over the distributions, [distributions][E], for wide and narrow screens; none of a single one."""
    if len(names) < 2:
        return []
    columns = zip(*weights, strict=True)
    series = [Series(f"expert {e + 1}", [100 * w for w in c], f"c{e % 7 + 1}") for e, c in enumerate(columns)]
    return wide_and_narrow(lambda size: line_chart(label, names, series, "weight (%)", size), 250)


def class_chart(
    rows: Sequence[tuple[str, str, Sequence[float | None]]],
    names: Sequence[str],
    counts: Sequence[int],
    dots: bool,
    size: tuple[int, int] = SMALL,
) -> Chart:
    """Accuracy of each class over its training images; without `dots` of classes with about as many.

    Args:
        rows: (label, color, accuracy of each class in percent or None).
        names, counts: of the classes, and of their training images, [C].
    """
    points: list[Point] = []
    for number, (label, color, values) in enumerate(rows):
        known = [
            (name, max(count, 1), value)
            for name, count, value in zip(names, counts, values, strict=True)
            if value is not None and math.isfinite(value)
        ]
        aside = ASIDE * (number - (len(rows) - 1) / 2)
        if dots:
            texts = [f"{name}: {n} training images, accuracy {value:.1f} %" for name, n, value in known]
            means = [(n, value, text) for (_, n, value), text in zip(known, texts, strict=True)]
        else:
            means = class_means(known)
        points += [Point(x, y, color, f"{text} ({label})", aside) for x, y, text in means]
    x = [p.x for p in points] or [1.0]
    scale = Scale(min(x) * 0.85, max(x) * 1.15, log=True)
    legend = [(color, "", label) for label, color, _ in rows] if len(rows) > 1 else []
    label = "Accuracy of each class over its training images"
    return scatter_chart(label, points, "training images", "accuracy (%)", scale, Scale(0, 100), legend, size)


def class_means(classes: Sequence[tuple[str, int, float]]) -> list[tuple[float, float, str]]:
    """Means of classes with about as many training images: (images, accuracy, text) each, of (name, images, accuracy)
    of each class."""
    if not classes:
        return []
    counts, accuracies = (np.array(column) for column in list(zip(*classes, strict=True))[1:])
    edges = np.geomspace(counts.min(), counts.max() + 1, CLASS_BINS + 1)
    bins = np.searchsorted(edges, counts, side="right")
    means = []
    for number in np.unique(bins):
        n, accuracy = counts[bins == number], float(accuracies[bins == number].mean())
        text = f"{len(n)} classes of {n.min()} to {n.max()} images, mean {accuracy:.1f} %"
        means.append((float(n.mean()), accuracy, text))
    return means


def mix_chart(label: str, names: Sequence[str], x: Tensor, y: Tensor, x_label: str, y_label: str) -> Chart:
    """Shares of classes, one over another: a dot a class, on the line where both are equal. Shares [C] in 0..1."""
    points = [
        Point(100 * a, 100 * b, "main", f"{name}: {100 * a:.2f} % {x_label}, {100 * b:.2f} % {y_label}")
        for name, a, b in zip(names, x.tolist(), y.tolist(), strict=True)
    ]
    top = 108 * max(float(x.max()), float(y.max()), 1e-9)
    scales = Scale(0, top), Scale(0, top)
    return scatter_chart(label, points, f"{x_label} (%)", f"{y_label} (%)", *scales, diagonal=True)


def reliability_chart(bins: Tensor) -> Chart:
    """Accuracy over confidence, and how many images have it, from `model.metric.reliability`, [bins, 3]."""
    count = max(float(bins[:, 0].sum()), 1)
    found = [(int(n), 100 * c / max(n, 1), 100 * hits / max(n, 1)) for n, c, hits in bins.tolist()]
    titles = [f"{n} images: confidence {c:.1f} %, accuracy {a:.1f} %" if n else "" for n, c, a in found]
    rows = [
        ("main", "accuracy", [a for _, _, a in found]),
        ("equal", "share of the images", [100 * n / count for n, _, _ in found]),
    ]
    return bin_chart("Accuracy over confidence", rows, titles, "confidence (%)", "%", diagonal=True)


def confidence_chart(confidence: Tensor, bins: int = 20) -> Chart:
    """How many images are predicted with which confidence, [N] in 0..1."""
    counts = np.histogram(100 * confidence.numpy(), bins=bins, range=(0, 100))[0].tolist()
    room = 100 / bins
    titles = [f"{room * k:.0f} to {room * (k + 1):.0f} %: {n} images" if n else "" for k, n in enumerate(counts)]
    label, top = "Confidence of the predictions", max(max(counts), 1) * 1.05
    return bin_chart(label, [("main", "", counts)], titles, "confidence (%)", "images", top)


def counts_chart(title: str, counts: Sequence[int], names: Sequence[str], groups: Sequence[str]) -> Chart:
    """Images of each class, the largest first, colored by shot group.

    Args:
        title: of the list that is counted.
        counts, names, groups: of the classes in this order, [C].
    """
    colors = {group: f"c{number + 1}" for number, group in enumerate(dict.fromkeys(groups))}
    points = [
        Point(rank + 1, max(n, 0.6), colors[group], f"{name}: {n} images ({group})")
        for rank, (n, name, group) in enumerate(zip(counts, names, groups, strict=True))
    ]
    legend = [(color, "", f"{group} ({list(groups).count(group)} classes)") for group, color in colors.items()]
    scales = Scale(0, len(counts) + 1), Scale(0.5, 1.3 * max([*counts, 1]), log=True)
    label = f"Images a class: {title}"
    return scatter_chart(label, points, "classes, the largest first", "images", *scales, legend, (WIDE[0], 400))


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Share of each class among labels [N] -> [C] float64."""
    return torch.bincount(labels, minlength=classes).double() / max(len(labels), 1)
