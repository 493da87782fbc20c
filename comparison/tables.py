"""Methods side by side: mean and standard deviation over seeds, as tables and plots."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from evaluation.results import Results
from model.metric import shot_groups
from report.charts import Chart
from report.comparison_page import Evaluated, comparison_page, row_weight_charts, top1_charts
from report.tables import markdown_lines
from utils.files import write_atomically

NAMES = {"softmax": "Softmax", "ride": "RIDE", "tade": "TADE"}
GROUPS = tuple(shot_groups([1]))  # many, medium, few
PUBLISHED = Path(__file__).resolve().parents[1] / "benchmarks" / "published.json"


def display_name(method: str) -> str:
    return NAMES.get(method, method)


def row_label(method: str, way: str) -> str:
    """What a row of the tables is called.

    Args:
        method: as in the names of configs.
        way: how it predicts, where that must be said: "equal weights", "test-time training", "estimated prior".
    """
    return f"{display_name(method)}, {way}" if way else display_name(method)


def records(results: Results, *, data: str, row: str, method: str, seed: int, checkpoint: str) -> list[dict]:
    """One record for each distribution of an evaluation.

    Args:
        results: of the evaluation.
        data, method, seed, checkpoint: where it comes from.
        row: see `row_label`.
    """
    common = {
        "data": data,
        "row": row,
        "method": method,
        "seed": seed,
        "checkpoint": checkpoint,
        "epoch": results.checkpoint.epoch,
    }
    table = results.full_table()
    left_out = ("equal weights", "difference", "expert ")
    table = table[[column for column in table if not column.startswith(left_out)]]
    return [{**common, "distribution": name, **row} for name, row in table.to_dict(orient="index").items()]


def mean_and_deviation(values: pd.Series) -> str:
    """ "49.8", or "49.8 ± 0.2" (standard deviation over seeds, n - 1) for several; "-" for none."""
    values = values.dropna()
    if values.empty:
        return "-"
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def accuracy_table(frame: pd.DataFrame, value: str = "top1") -> pd.DataFrame:
    """Rows of the published tables, one column a distribution, as text.

    Args:
        frame: records of one data set and checkpoint.
        value: "top1", "many", "medium" or "few".
    """
    rows, columns = frame["row"].unique(), frame["distribution"].unique()
    table = frame.groupby(["row", "distribution"], sort=False)[value].agg(mean_and_deviation).unstack()
    table = table.reindex(index=rows, columns=columns).fillna("-")
    table.insert(0, "seeds", frame.groupby("row")["seed"].nunique().astype(str))
    return table


def cost_table(runs: Sequence[Mapping], totals: Mapping[tuple[str, str], pd.Series]) -> pd.DataFrame:
    """Cost of each data set and method, as text.

    Args:
        runs: of each run "data", "method", "epochs", "seconds" of training (or None), "device", "torch".
        totals: (data, method) -> row "total" of model.cost.count_macs.
    """
    frame = pd.DataFrame(runs)
    rows = {}
    for (data, method), group in frame.groupby(["data", "method"], sort=False):
        seconds = group["seconds"].dropna()
        rows[data, method] = {
            "data": data,
            "method": display_name(method),
            "parameters (M)": f"{totals[data, method]['parameters'] / 1e6:.2f}",
            "MACs (G)": f"{totals[data, method]['MACs'] / 1e9:.4f}",
            "seeds": str(len(group)),
            "epochs": ", ".join(map(str, sorted(set(group["epochs"])))),
            "training (min)": f"{seconds.mean() / 60:.1f}" if len(seconds) else "-",
            "device": ", ".join(sorted(set(group["device"]))),
            "torch": ", ".join(sorted(set(group["torch"]))),
        }
    return pd.DataFrame(rows.values())


def charts_of(frame: pd.DataFrame) -> dict[str, Chart]:
    """Charts of one data set's last epochs: "accuracy", and "METHOD_weights" where weights were learned."""
    methods = dict(zip(frame["row"], frame["method"], strict=True))
    charts = {"accuracy": top1_charts(frame)}
    charts |= {f"{methods[row]}_weights": found for row, found in row_weight_charts(frame).items()}
    return {name: found[0] for name, found in charts.items() if found}


def published_table(data: str) -> pd.DataFrame | None:
    """The published figures of a data set, as text."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["top1"].get(data)
    if not published:
        return None
    table = pd.DataFrame.from_dict(published, orient="index")
    return table.map(lambda value: "-" if pd.isna(value) else f"{value:.1f}")


def commit() -> str:
    """The commit of the code, "-dirty" if changed since; "unknown" outside a git checkout."""
    git = ["git", "-C", str(PUBLISHED.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_comparison(
    output: Path,
    rows: Sequence[Mapping],
    evaluated: Sequence[Evaluated],
    cost: pd.DataFrame,
    command: str,
    note: str,
    commands: Sequence[str],
) -> str:
    """Write results.csv (every number), report.md, report.html and the plots.

    Args:
        output: folder.
        rows: `records` of all runs.
        evaluated: the results that they are of.
        cost: `cost_table`.
        command: what was typed, for the record.
        note: what else to know, e.g. which runs are missing.
        commands: the same by hand, for one seed.

    Returns:
        The report.
    """
    frame = pd.DataFrame(rows)
    parts, published_tables = [], {}
    for data, of_data in frame.groupby("data", sort=False):
        for checkpoint, group in of_data.groupby("checkpoint", sort=False):
            parts += [
                f"## {data}, {checkpoint}",
                "Top-1 in percent; mean ± standard deviation over the seeds. Where the prior is estimated, logits are "
                "the mean over averaged views, unless those are switched off.",
                markdown_lines(accuracy_table(group), "method"),
            ]
            if "uniform" in set(group["distribution"]):
                balanced = group[group["distribution"] == "uniform"]
                shots = pd.concat([accuracy_table(balanced, g)["uniform"].rename(f"{g}-shot") for g in GROUPS], axis=1)
                parts += ["On the balanced test set:", markdown_lines(shots, "method")]
        if (published := published_table(data)) is not None:
            published_tables[data] = published
            parts += [
                f"## {data}, published",
                "Full schedule, as in the paper (TADE with test-time training).",
                markdown_lines(published, "method"),
            ]
        for name, chart in charts_of(of_data[of_data["checkpoint"] == "last epoch"]).items():
            write_atomically(output / f"{data}_{name}.svg", chart.file(f"{data}: {chart.svg.attrib['aria-label']}"))
            parts.append(f"![{name}]({data}_{name}.svg)")
    by_hand, version = "\n".join(commands), commit()
    page = comparison_page(frame, evaluated, cost, published_tables, command, version, note, commands)
    parts = [
        f"# Comparison\n\n`{command}`, commit {version}",
        *parts,
        "## Cost",
        note,
        markdown_lines(cost.set_index("data"), "data"),
        f"## By hand\n\nOne seed of each row; every run's log is beside its folder.\n\n```bash\n{by_hand}\n```",
    ]
    report = "\n\n".join(part.rstrip() for part in parts) + "\n"
    write_atomically(output / "results.csv", frame.to_csv(index=False).encode())
    write_atomically(output / "report.md", report.encode())
    write_atomically(output / "report.html", page)
    return f"{report}\nWritten: {output / 'report.html'}, {output / 'report.md'}, {output / 'results.csv'} and plots"
