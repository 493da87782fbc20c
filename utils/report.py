"""Results as JSON, CSV, Markdown, pictures and a console table."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from utils.checkpoint import write_atomically
from utils.errors import UserError


def results_table(results: Mapping) -> pd.DataFrame:
    """One row a distribution: images, top-1, shot groups, equal weights (if compared with), experts, weights.

    Args:
        results: as written to results.json, see the README.
    """
    rows = {}
    for name, entry in results["distributions"].items():
        row = {"images": entry["images"], "top1": entry["top1"]}
        if "equal_weights_top1" in entry:
            row["equal weights"] = entry["equal_weights_top1"]
        row |= {group: entry[group] for group in ("many", "medium", "few")}
        row |= {f"expert {e + 1}": value for e, value in enumerate(entry["experts_top1"])}
        row |= {f"w{e + 1}": value for e, value in enumerate(entry["weights"])}
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "distribution"
    return table


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text: accuracies with one decimal, weights with two, a dash for none."""

    def cell(column: str, value: object) -> str:
        if pd.isna(value):
            return "-"
        return f"{value:.0f}" if column == "images" else f"{value:.{2 if column.startswith('w') else 1}f}"

    return pd.DataFrame({column: [cell(column, v) for v in table[column]] for column in table}, index=table.index)


def markdown_lines(text: pd.DataFrame, index: str) -> str:
    """A table of text in Markdown; `index` heads its first column."""
    text = text.rename_axis(index, axis=0).reset_index()
    lines = [list(text.columns), ["---"] + ["---:"] * (len(text.columns) - 1), *text.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown_table(table: pd.DataFrame) -> str:
    return markdown_lines(format_table(table), "distribution")


def console_table(results: Mapping) -> str:
    return format_table(results_table(results)).to_string()


def make_folder(folder: Path) -> None:
    """Create a folder for results, before there are any to lose.

    Raises:
        UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} for results cannot be created ({error.strerror}): choose another with --output."
        ) from error


def write_results(folder: Path, results: Mapping) -> list[Path]:
    """Write results.csv, results.md, accuracy.png and weights.png where there is what to plot, and results.json.

    results.json comes last: where it is, everything is.

    Returns:
        The files, in that order.

    Raises:
        UserError: a file could not be written.
    """
    make_folder(folder)
    table = results_table(results)
    checkpoint = results["checkpoint"]
    heading = (
        f"{results['protocol']}\n\nCheckpoint {checkpoint['path']}, epoch {checkpoint['epoch']} "
        f"({checkpoint['selected_by']}), SHA-256 {checkpoint['sha256']}, seed {results['seed']}. "
        "Accuracy in percent.\n\n"
    )
    contents = {"results.csv": table.to_csv().encode(), "results.md": (heading + markdown_table(table)).encode()}
    contents |= {f"{name}.png": png(figure) for name, figure in figures(table).items()}
    contents["results.json"] = (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def png(figure) -> bytes:
    """A Matplotlib figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def figures(table: pd.DataFrame) -> dict:
    """Matplotlib figures of a results table with several distributions: "accuracy", "weights"."""
    if len(table) < 2:
        return {}
    from matplotlib.figure import Figure

    names, experts = list(table.index), [c for c in table if c.startswith("expert ")]
    accuracy = Figure(figsize=(9, 4.5), layout="constrained")
    axes = accuracy.subplots()
    for number, column in enumerate(experts):
        axes.plot(names, table[column], color=f"C{number}", linestyle=":", marker=".", label=column)
    if "equal weights" in table:
        axes.plot(names, table["equal weights"], color="gray", marker="o", label="equal weights")
    label = "learned weights" if "equal weights" in table else "equal weights"
    axes.plot(names, table["top1"], color="black", marker="o", linewidth=2, label=label)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title("Accuracy over the test class distributions")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    axes.tick_params(axis="x", rotation=30)
    axes.spines[["top", "right"]].set_visible(False)
    weights = table[[column for column in table if column.startswith("w")]]
    return {"accuracy": accuracy, "weights": weights_figure(weights, "How the experts are weighed")}


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
