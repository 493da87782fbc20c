"""report.html of a comparison: which method is ahead, by how much, and whether beyond chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evaluation.results import Results
from model.metric import NORMAL_QUANTILE
from report.charts import COLORS, NARROW, WIDE, Chart, Series, line_charts
from report.figures import class_chart, weight_charts
from report.html_page import render
from report.tables import weight_columns
from report.verdict import comparison_verdict, one

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
        groups = dict(iter(of_data.groupby("checkpoint", sort=False)))
        first = next(iter(groups))
        own = [e for e in evaluated if e.data == data and e.checkpoint == first]
        top1 = top1_cells(groups[first])
        verdicts.append(comparison_verdict(top1["mean"].unstack(sort=False), leading(top1)))
        sections.append(
            {
                "data": data,
                "blocks": [{"title": name, **block(group)} for name, group in groups.items()],
                "accuracy": top1_charts(groups[first]),
                "per_class": class_charts(own),
                "weights": row_weight_charts(groups[first]),
                "published": text_table(published[data], "method") if data in published else None,
            }
        )
    used = {}  # rows that share a network share its file
    for e in evaluated:
        name = f"{e.data}, {e.row.partition(',')[0]}, seed {e.seed}, {e.checkpoint}"
        used.setdefault(e.results.checkpoint.sha256, name)
    several = len(sections) > 1
    return render(
        "comparison.html",
        title="Comparison of methods",
        kind=f"Comparison · {', '.join(section['data'] for section in sections)}",
        verdict=" ".join(f"{s['data']}: {v}" if several else v for s, v in zip(sections, verdicts, strict=True)),
        sections=sections,
        cost=text_table(cost.set_index("data"), "data"),
        note=note,
        settings=[("command", command), ("commit", commit)],
        commands="\n".join(commands),
        config="\n".join(f"{sha256}  {name}" for sha256, name in used.items()),
        config_title="SHA-256 of the checkpoints",
    )


def text_table(table: pd.DataFrame, index: str) -> dict[str, Any]:
    """A table of text with its heading."""
    rows = [[str(cell) for cell in row] for row in table.itertuples()]
    return {"head": [index, *map(str, table.columns)], "rows": rows}


def top1_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Top-1 of every row on every distribution, over seeds; frame has one data set and checkpoint.

    Returns:
        Indexed by row and distribution: "mean", "deviation" (over seeds, n - 1; 0 for one seed), "seeds", "low" and
        "high" (the interval of a single seed), "variance" of the mean in points squared: from images and from seeds.
    """
    by = frame.groupby(["row", "distribution"], sort=False)
    cells = by["top1"].agg(mean="mean", deviation="std", seeds="count").fillna({"deviation": 0.0})
    cells["low"], cells["high"] = by["top1 low"].first(), by["top1 high"].first()
    share = cells["mean"] / 100
    cells["variance"] = 10_000 * share * (1 - share) / by["images"].first() + cells["deviation"] ** 2 / cells["seeds"]
    return cells


def leading(cells: pd.DataFrame) -> pd.DataFrame:
    """Whether no other row is above this one beyond chance: boolean, a row a row, a column a distribution.

    The test images count as if each row had its own, which makes differences look less sure than they are.
    """
    mean, variance = (cells[name].unstack(sort=False) for name in ("mean", "variance"))
    beaten = [
        (mean - mean.loc[row] > NORMAL_QUANTILE * (variance + variance.loc[row]) ** 0.5).any() for row in mean.index
    ]
    return ~pd.DataFrame(beaten, index=mean.index)


def block(frame: pd.DataFrame) -> dict[str, Any]:
    """The tables of a data set and checkpoint, as text."""
    cells = top1_cells(frame)
    first, means = leading(cells), cells["mean"].unstack(sort=False)
    rows = []
    for row in means.index:
        of_row, texts = cells.loc[row], []
        for name in means.columns:
            cell = of_row.loc[name]
            small = f"± {cell.deviation:.1f}" if cell.seeds > 1 else f"{cell.low:.1f} to {cell.high:.1f}"
            texts.append({"text": one(cell["mean"]), "small": small, "first": first.loc[row, name]})
        seeds, mean = int(of_row["seeds"].max()), one(means.loc[row].mean())
        rows.append({"name": row, "cells": texts, "mean": mean, "seeds": seeds})
    balanced = frame[frame["distribution"] == "uniform"].groupby("row", sort=False)[list(BALANCED)].mean()
    further = None if balanced.empty else text_table(balanced.rename(columns=BALANCED).map(one), "method")
    return {"names": list(means.columns), "rows": rows, "balanced": further}


def colors(rows: Sequence[str]) -> dict[str, str]:
    """A color for each row."""
    choice = ("main", *COLORS)
    return {row: choice[number % len(choice)] for number, row in enumerate(rows)}


def top1_charts(frame: pd.DataFrame) -> list[Chart]:
    """Accuracy over several distributions, a line a row; a band is one standard deviation over seeds."""
    cells = top1_cells(frame)
    mean, deviation = (cells[name].unstack(sort=False) for name in ("mean", "deviation"))
    if mean.shape[1] < 2:
        return []
    series = []
    for row, color in colors(mean.index).items():
        band = {"low": (mean - deviation).loc[row].tolist(), "high": (mean + deviation).loc[row].tolist()}
        series.append(Series(row, color, mean.loc[row].tolist(), **(band if deviation.loc[row].any() else {})))
    label = "Top-1 accuracy over the test class distributions"
    return line_charts(label, list(mean.columns), series, "top-1 accuracy (%)")


def class_charts(evaluated: Sequence[Evaluated]) -> list[Chart]:
    """Accuracy of each class on the balanced test set, mean over seeds: for a screen and for a telephone."""
    found: dict[str, list] = {}
    for each in evaluated:
        if entry := each.results.distributions.get("uniform"):
            found.setdefault(each.row, []).append(np.array(entry.metrics["per_class_accuracy"], dtype=float))
    if not found:
        return []
    means, classes = {row: np.mean(values, axis=0) for row, values in found.items()}, evaluated[0].results.classes
    return [class_chart(means, colors(list(found)), classes, 2 * len(found), size) for size in (WIDE, NARROW)]


def row_weight_charts(frame: pd.DataFrame) -> dict[str, list[Chart]]:
    """Expert weights over several distributions, mean over seeds, of each row that learned some."""
    charts = {}
    for row, group in frame.groupby("row", sort=False):
        means = group.groupby("distribution", sort=False)[weight_columns(frame)].mean().dropna(axis=1)
        if means.shape[1] > 1 and means.nunique().gt(1).any():
            charts[row] = weight_charts(list(means.index), means.to_numpy(), f"Expert weights of {row}")
    return charts
