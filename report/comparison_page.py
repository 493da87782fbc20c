"""report.html of a comparison: which method is ahead, by how much, and whether beyond chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evaluation.results import Results
from model.metric import NORMAL_QUANTILE
from report.charts import Chart, Series, wide_and_narrow
from report.figures import MOST_DOTS, accuracy_charts, class_chart, weight_charts
from report.html_page import render
from report.tables import weight_columns

COLORS = ("main", "c1", "c2", "c3", "c4", "c5", "c6", "c7")
BALANCED = {
    "many": "many",
    "medium": "medium",
    "few": "few",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro-F1",
    "expected_calibration_error": "calibration error",
}


@dataclass(frozen=True)
class Evaluated:
    """Results and where they belong.

    Args:
        data, row, checkpoint, seed: as in the records of comparison/tables.py.
        results: of all distributions.
    """

    data: str
    row: str
    checkpoint: str
    seed: int
    results: Results


@dataclass(frozen=True)
class Cell:
    """Top-1 of one row on one distribution, over seeds.

    Args:
        mean, deviation: in percent; the deviation is over seeds (n - 1), 0 for one seed.
        seeds, images: how many.
        interval: [low, high] of a single seed, or None.
    """

    mean: float
    deviation: float
    seeds: int
    images: int
    interval: tuple[float, float] | None

    @property
    def variance(self) -> float:
        """Of the mean, in points squared: from the images, and from the seeds."""
        share = self.mean / 100
        return 10_000 * share * (1 - share) / self.images + self.deviation**2 / self.seeds

    def below(self, other: "Cell") -> bool:
        """Whether this is lower beyond chance.

        The test images count as if each row had its own, which makes differences look less sure than they are.
        """
        return other.mean - self.mean > NORMAL_QUANTILE * (self.variance + other.variance) ** 0.5


def comparison_page(
    frame: pd.DataFrame,
    evaluated: Sequence[Evaluated],
    cost: pd.DataFrame,
    published: Mapping[str, pd.DataFrame],
    command: str,
    commit: str,
    note: str,
    commands: Sequence[str],
) -> bytes:
    """The page of a comparison.

    Args:
        frame: records of all runs.
        evaluated: their results.
        cost: `cost_table`.
        published: published figures by data set, as text.
        command, commit, note, commands: see `write_comparison`.
    """
    sections, verdicts = [], []
    for data, of_data in frame.groupby("data", sort=False):
        blocks = []
        for checkpoint, group in of_data.groupby("checkpoint", sort=False):
            cells = cells_of(group)
            if not blocks:
                verdicts.append(verdict(cells))
            blocks.append({"title": checkpoint, **accuracy_rows(cells), "balanced": balanced_rows(group)})
        first = of_data[of_data["checkpoint"] == of_data["checkpoint"].iloc[0]]
        own = [e for e in evaluated if e.data == data and e.checkpoint == first["checkpoint"].iloc[0]]
        sections.append(
            {
                "data": data,
                "blocks": blocks,
                "accuracy": accuracy_charts(*accuracy_series(cells_of(first))),
                "per_class": class_charts(own),
                "weights": [{"row": row, "charts": charts} for row, charts in learned_weights(first).items()],
                "published": text_table(published[data], "method") if data in published else None,
            }
        )
    several = len(sections) > 1
    used = {}  # rows that share a network share its file
    for e in evaluated:
        used.setdefault(
            e.results.checkpoint.sha256, f"{e.data}, {e.row.partition(',')[0]}, seed {e.seed}, {e.checkpoint}"
        )
    return render(
        "comparison.html",
        title="Comparison of methods",
        kind=f"Comparison · {', '.join(section['data'] for section in sections)}",
        verdict=" ".join(f"{s['data']}: {v}" if several else v for s, v in zip(sections, verdicts, strict=True)),
        sections=sections,
        cost=text_table(cost.set_index("data"), "data"),
        note=note,
        settings=[
            ("command", command),
            ("commit", commit),
            (
                "beyond chance",
                "a difference of more than 1.96 standard errors, from the number of test images and the spread over "
                "seeds; the test images count as if every row had its own, so that some real differences are missed",
            ),
        ],
        commands="\n".join(commands),
        config="\n".join(f"{sha256}  {name}" for sha256, name in used.items()),
        config_title="SHA-256 of the checkpoints",
    )


def text_table(table: pd.DataFrame, index: str) -> dict[str, Any]:
    """A table of text with its heading."""
    return {
        "head": [index, *map(str, table.columns)],
        "rows": [[str(name), *map(str, row)] for name, row in zip(table.index, table.values.tolist(), strict=True)],
    }


def cells_of(frame: pd.DataFrame) -> dict[str, dict[str, Cell]]:
    """Row -> distribution -> its cell; frame has one data set and checkpoint."""
    cells: dict[str, dict[str, Cell]] = {row: {} for row in frame["row"].unique()}
    for (row, distribution), group in frame.groupby(["row", "distribution"], sort=False):
        values, interval = group["top1"], None
        if len(values) == 1 and "top1 low" in group and group["top1 low"].notna().all():
            interval = (float(group["top1 low"].iloc[0]), float(group["top1 high"].iloc[0]))
        deviation = float(values.std()) if len(values) > 1 else 0.0
        cells[row][distribution] = Cell(
            float(values.mean()), deviation, len(values), int(group["images"].iloc[0]), interval
        )
    return cells


def mean_of(cells: Mapping[str, Cell]) -> float:
    return float(np.mean([cell.mean for cell in cells.values()]))


def leaders(cells: Mapping[str, Mapping[str, Cell]], distribution: str) -> list[str]:
    """The rows that no other is above beyond chance, on one distribution."""
    there = {row: of[distribution] for row, of in cells.items() if distribution in of}
    return [row for row, cell in there.items() if not any(cell.below(other) for other in there.values())]


def verdict(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """What the comparison says, in one sentence."""
    names = list(dict.fromkeys(name for of in cells.values() for name in of))
    ranked = sorted(cells, key=lambda row: -mean_of(cells[row]))
    best = ranked[0]
    over = f"the mean over {len(names)} distributions" if len(names) > 1 else names[0]
    if len(ranked) == 1:
        return f"{best} has {mean_of(cells[best]):.1f} % in {over}."
    ahead = mean_of(cells[best]) - mean_of(cells[ranked[1]])
    lead = [name for name in names if leaders(cells, name) == [best]]
    beaten = [name for name in names if best not in leaders(cells, name)]
    if ahead < 0.05:
        text, who = f"{best} and {ranked[1]} are equal in {over}", "the first"
    else:
        text, who = f"{best} is {ahead:.1f} points ahead of {ranked[1]} in {over}", "it"
    if len(names) == 1:
        return f"{text}, {'beyond' if lead else 'not beyond'} chance."
    text += f"; beyond chance {who} leads on {f'{len(lead)} of them' if lead else 'none'}"
    if not beaten:
        return f"{text} and is behind on none."
    return f"{text} and is behind on {len(beaten)} ({', '.join(beaten[:3])}{', …' if len(beaten) > 3 else ''})."


def accuracy_rows(cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """The table of a data set and checkpoint, as text: columns and rows."""
    names = list(dict.fromkeys(name for of in cells.values() for name in of))
    first = {name: leaders(cells, name) for name in names}
    rows = []
    for row, of in cells.items():
        texts = []
        for name in names:
            cell, small = of.get(name), ""
            if cell is not None and cell.interval:
                small = f"{cell.interval[0]:.1f} to {cell.interval[1]:.1f}"
            elif cell is not None and cell.seeds > 1:
                small = f"± {cell.deviation:.1f}"
            texts.append({"text": f"{cell.mean:.1f}" if cell else "–", "small": small, "first": row in first[name]})
        seeds = max(cell.seeds for cell in of.values())
        rows.append({"name": row, "seeds": seeds, "mean": f"{mean_of(of):.1f}", "cells": texts})
    return {"names": names, "rows": rows}


def balanced_rows(frame: pd.DataFrame) -> dict[str, Any] | None:
    """Means over seeds of further figures on the balanced test set, as text."""
    balanced = frame[frame["distribution"] == "uniform"]
    columns = [column for column in BALANCED if column in balanced]
    if balanced.empty:
        return None
    means = balanced.groupby("row", sort=False)[columns].mean()
    text = means.rename(columns=BALANCED).map(lambda value: "–" if pd.isna(value) else f"{value:.1f}")
    return text_table(text, "method")


def colors(rows: Sequence[str]) -> dict[str, str]:
    return {row: COLORS[number % len(COLORS)] for number, row in enumerate(rows)}


def accuracy_series(cells: Mapping[str, Mapping[str, Cell]]) -> tuple[list[str], list[Series]]:
    """Distributions, and accuracy of each row over them; a band is one standard deviation over seeds."""
    names = list(dict.fromkeys(name for of in cells.values() for name in of))
    series = []
    for row, color in colors(list(cells)).items():
        found = [cells[row].get(name) for name in names]
        line = Series(row, [cell and cell.mean for cell in found], color)
        if any(cell and cell.seeds > 1 for cell in found):
            line.low = [cell and cell.mean - cell.deviation for cell in found]
            line.high = [cell and cell.mean + cell.deviation for cell in found]
        series.append(line)
    return names, series


def class_charts(evaluated: Sequence[Evaluated]) -> list[Chart]:
    """Accuracy of each class on the balanced test set over its training images, means over seeds, for wide and narrow
    screens; none without accuracies by class."""
    found: dict[str, list] = {}
    classes = None
    for each in evaluated:
        entry = each.results.distributions.get("uniform")
        values = entry and entry.metrics.get("per_class_accuracy")
        if isinstance(values, list) and each.results.classes:
            classes = each.results.classes
            found.setdefault(each.row, []).append(np.array(values, dtype=float))
    if classes is None:
        return []
    shades = colors(list(dict.fromkeys(each.row for each in evaluated)))
    names, counts = classes["names"], classes["training_images"]
    dots = len(names) * len(found) <= MOST_DOTS // 2  # there are two charts
    rows = [(row, shades[row], np.mean(values, axis=0).tolist()) for row, values in found.items()]
    return wide_and_narrow(lambda size: class_chart(rows, names, counts, dots, size))


def learned_weights(frame: pd.DataFrame) -> dict[str, list[Chart]]:
    """Charts of the expert weights of each row that learned some, means over seeds."""
    charts = {}
    for row, group in frame.groupby("row", sort=False):
        columns = weight_columns(group.dropna(axis=1, how="all"))
        means = group.groupby("distribution", sort=False)[columns].mean()
        if len(columns) > 1 and len(means) > 1 and means.nunique().gt(1).any():
            names = [str(name) for name in means.index]
            charts[str(row)] = weight_charts(f"Expert weights, {row}", names, means.values.tolist())
    return charts
