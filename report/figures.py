"""Figures that several pages and files have: expert weights, accuracy per class, the class mix."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from report.charts import COLORS, PANEL, WIDE, Axis, Chart, Series, line_charts, scatter_chart

MOST_DOTS = 4000  # on a page; with more classes, dots are means of classes
CLASS_BINS = 40

ClassGroup = tuple[str, np.ndarray]
"""What a dot stands for, in words, and the indices of its classes."""


def weight_charts(names: Sequence[str], weights: np.ndarray, label: str = "Expert weights") -> list[Chart]:
    """Expert weights, [D, E] in 0..1, over D distributions."""
    series = [Series(f"expert {e + 1}", COLORS[e % len(COLORS)], (100 * w).tolist()) for e, w in enumerate(weights.T)]
    return line_charts(f"{label} over the test class distributions", names, series, "weight (%)")


def class_groups(classes: Mapping[str, Sequence], charts: int) -> list[ClassGroup]:
    """The classes, one a dot; with more than MOST_DOTS of them on a page, those with about as many training images.

    Args:
        classes: "names" and "training_images", [C] each.
        charts: how many such charts the page has.
    """
    counts = np.asarray(classes["training_images"])
    if len(counts) * charts <= MOST_DOTS:
        each = enumerate(zip(classes["names"], counts, strict=True))
        return [(f"{name}, {count} training images", np.array([c])) for c, (name, count) in each]
    edges = np.geomspace(max(counts.min(), 1), counts.max() + 1, CLASS_BINS + 1)
    bins = np.digitize(counts, edges)
    groups = [np.flatnonzero(bins == number) for number in np.unique(bins)]
    texts = [f"{len(g)} classes of {counts[g].min()} to {counts[g].max()} training images" for g in groups]
    return list(zip(texts, groups, strict=True))


def class_series(
    label: str, color: str, groups: Sequence[ClassGroup], x: np.ndarray, y: np.ndarray, text: str
) -> Series:
    """A dot for each group of classes, at the means of x and y [C] over its classes; those with y NaN do not count.

    Args:
        text: what stands after the group where the pointer rests, with {x} and {y}.
    """
    known = [(what, group[~np.isnan(y[group])]) for what, group in groups]
    means = [(what, float(x[group].mean()), float(y[group].mean())) for what, group in known if len(group)]
    titles = [f"{what}: {text.format(x=at, y=value)}" for what, at, value in means]
    return Series(label, color, [m[2] for m in means], x=[m[1] for m in means], titles=titles)


def class_chart(
    accuracies: Mapping[str, np.ndarray],
    colors: Mapping[str, str],
    classes: Mapping[str, Sequence],
    charts: int,
    size: tuple[int, int] = PANEL,
) -> Chart:
    """Accuracy of each class over its training images.

    Args:
        accuracies: label -> in percent, [C], NaN for a class without a test image.
        colors: label -> its color.
        classes, charts: see `class_groups`.
    """
    counts, groups = np.asarray(classes["training_images"]), class_groups(classes, charts)
    series = [
        class_series(label, colors[label], groups, np.maximum(counts, 1), y, f"accuracy {{y:.1f}} % ({label})")
        for label, y in accuracies.items()
    ]
    x, y = Axis.around(counts, "training images"), Axis(0, 100, "accuracy (%)")
    return scatter_chart("Accuracy of each class over its training images", series, x, y, size=size)


def mix_chart(found: np.ndarray, known: np.ndarray, labels: tuple[str, str], groups: Sequence[ClassGroup]) -> Chart:
    """Estimated shares of the classes over known ones, [C] each in 0..1, on logarithmic axes with the same ends.

    Args:
        labels: of the estimated and of the known shares.
    """
    text = f"{labels[0]} {{y:.2f}} %, {labels[1]} {{x:.2f}} %"
    dots = class_series("class", "main", groups, 100 * known, 100 * found, text)
    y, x = (Axis.around([*dots.x, *dots.y], f"{label} share (%)") for label in labels)
    return scatter_chart(f"{labels[0]} over {labels[1]} share of each class", [dots], x, y, diagonal=True)


def counts_chart(classes: pd.DataFrame) -> Chart:
    """Images of each class, the largest first, in the colors of the shot groups.

    Args:
        classes: "class" (the name), "images" and "group", a row a class.
    """
    falling = classes.sort_values("images", ascending=False, kind="stable").reset_index(drop=True)
    series = []
    for (group, part), color in zip(falling.groupby("group", sort=False), COLORS):
        titles = [f"{row['class']}: {row.images} images ({group})" for _, row in part.iterrows()]
        places, images = (part.index + 1).tolist(), part["images"].clip(lower=0.6).tolist()
        series.append(Series(f"{group} ({len(part)} classes)", color, images, x=places, titles=titles))
    x = Axis(0, len(falling) + 1, "classes, the largest first")
    y = Axis(0.5, 1.3 * falling["images"].max(), "images", log=True)  # a class of one image can be seen
    return scatter_chart("Images of each class", series, x, y, size=WIDE)
