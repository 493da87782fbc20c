"""Reports of a table of results: CSV, Markdown, plots, a console table; they render whatever columns there are.

A report is a function (content of results.json, table) -> bytes of a file, or None; REPORTS lists them by file name.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from evaluation.results import short_table
from utils.files import make_folder, write_together


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text: accuracies with one decimal, weights with two, a dash for none."""

    def cell(column: str, value: float | None) -> str:
        if pd.isna(value):
            return "-"
        decimals = 0 if column == "images" else 2 if column in weight_columns(table) else 1
        return f"{value:.{decimals}f}"

    return pd.DataFrame({column: [cell(column, v) for v in table[column]] for column in table}, index=table.index)


def weight_columns(table: pd.DataFrame) -> list[str]:
    """The columns of expert weights: w1, w2, ..."""
    return [column for column in table if re.fullmatch(r"w\d+", column)]


def markdown_lines(text: pd.DataFrame, index: str) -> str:
    """A table of text in Markdown; `index` heads its first column."""
    text = text.rename_axis(index, axis=0).reset_index()
    lines = [list(text.columns), ["---"] + ["---:"] * (len(text.columns) - 1), *text.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown_table(table: pd.DataFrame) -> str:
    return markdown_lines(format_table(table), "distribution")


def console_table(table: pd.DataFrame) -> str:
    return format_table(table).to_string()


def csv_report(content: Mapping, table: pd.DataFrame) -> bytes:
    return table.to_csv().encode()


def markdown_report(content: Mapping, table: pd.DataFrame) -> bytes:
    """The table under what it was made of."""
    checkpoint = content["checkpoint"]
    heading = (
        f"{content['protocol']}\n\nCheckpoint {checkpoint['path']}, epoch {checkpoint['epoch']} "
        f"({checkpoint['selected_by']}), SHA-256 {checkpoint['sha256']}, seed {content['seed']}. "
        "Accuracy in percent.\n\n"
    )
    if remark := content.get("remark"):
        heading += f"**{remark[0].upper()}{remark[1:]}.**\n\n"
    return (heading + markdown_table(short_table(table, content["config"]))).encode()


def json_report(content: Mapping, table: pd.DataFrame) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def figure_report(name: str) -> Callable[[Mapping, pd.DataFrame], bytes | None]:
    """The report that is one of `figures`."""

    def report(content: Mapping, table: pd.DataFrame) -> bytes | None:
        figure = figures(table, content.get("remark")).get(name)
        return png(figure) if figure else None

    return report


#: File name -> report. results.json comes last: where it is, everything is.
REPORTS: dict[str, Callable[[Mapping, pd.DataFrame], bytes | None]] = {
    "results.csv": csv_report,
    "results.md": markdown_report,
    "accuracy.png": figure_report("accuracy"),
    "weights.png": figure_report("weights"),
    "results.json": json_report,
}


def write_reports(
    folder: Path, content: Mapping, table: pd.DataFrame, pages: Mapping[str, bytes] | None = None
) -> list[Path]:
    """Write every report into a folder, in place of all that were there: plots, too, that there are no more.

    Args:
        folder: is created.
        content: of results.json.
        table: one row a distribution, one column a number.
        pages: further files that are made of more than these two.

    Returns:
        The files: the further ones, then those of REPORTS in their order; plots only where there are several
        distributions.

    Raises:
        UserError: a file could not be written.
    """
    make_folder(folder)
    contents = dict(pages or {}) | {name: report(content, table) for name, report in REPORTS.items()}
    write_together(folder, contents)
    return [folder / name for name, data in contents.items() if data is not None]


def png(figure) -> bytes:
    """A Matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def figures(table: pd.DataFrame, remark: str | None = None) -> dict:
    """Matplotlib figures of a table with several distributions: "accuracy", and "weights" where there are some.

    The remark stands below their titles.
    """
    below = f"\n({remark})" if remark else ""
    if len(table) < 2:
        return {}
    weights = table[weight_columns(table)]
    plots = {"accuracy": accuracy_figure(table, f"Accuracy over the test class distributions{below}")}
    title = f"How the experts are weighted{below}"
    return plots | ({"weights": weights_figure(weights, title)} if len(weights.columns) else {})


def accuracy_figure(table: pd.DataFrame, title: str):
    """Top-1 over the distributions, beside the experts alone and, where compared with, equal weights."""
    from matplotlib.figure import Figure

    names = list(table.index)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, column in enumerate(c for c in table if re.fullmatch(r"expert \d+", c)):
        axes.plot(names, table[column], color=f"C{number}", linestyle=":", marker=".", label=column)
    label = "equal weights"
    if "equal weights" in table:
        axes.plot(names, table["equal weights"], color="gray", marker="o", label="equal weights")
        label = "learned weights" if weight_columns(table) else "adapted"
    axes.plot(names, table["top1"], color="black", marker="o", linewidth=2, label=label)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.tick_params(axis="x", rotation=30)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def weights_figure(weights: pd.DataFrame, title: str):
    """Stacked bars of expert weights: a row a distribution, a column an expert."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    bars = figure.subplots()
    below = pd.Series(0.0, index=weights.index)
    for number, column in enumerate(weights):
        bars.bar(list(weights.index), weights[column], bottom=below, color=f"C{number}", label=f"expert {number + 1}")
        below = below + weights[column]
    bars.set_ylim(0, 1)
    bars.set_ylabel("expert weights")
    bars.set_title(title)
    bars.legend(loc="upper left", bbox_to_anchor=(1, 1))
    bars.tick_params(axis="x", rotation=30)
    bars.spines[["top", "right"]].set_visible(False)
    return figure
