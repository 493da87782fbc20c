"""What an evaluation leaves in its folder: tables, charts, the page, results.json, TensorBoard's file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.results import Results
from report.evaluation_page import compared, evaluation_page, learned_weight_charts, method_name
from report.figures import accuracy_charts, adapted_series
from report.html_page import svg_file
from report.tables import console_table, markdown_table
from utils import distributed
from utils.files import make_folder, write_together
from utils.logger import TensorBoardLog, get_logger


def save_results(results: Results, folder: Path, job: str) -> dict[str, Any]:
    """Write the files of an evaluation into a folder, and show the table. Of several processes the first one writes.

    Files that an earlier evaluation left there and this one does not have are removed.

    Returns:
        The content of results.json.

    Raises:
        UserError: a file cannot be written.
    """
    content = {"job": job, **results.to_json()}
    files = distributed.by_first_process(lambda: write_files(results, content, folder))
    checkpoint = results.checkpoint
    get_logger().info(
        f"\n{results.protocol}\n{checkpoint.path}, epoch {checkpoint.epoch} ({checkpoint.selected_by})\n\n"
        f"{console_table(results.table())}\n\nWritten: {', '.join(str(file) for file in files)}"
    )
    board = TensorBoardLog(folder)
    board.text(job, f"{results.protocol}\n\n{markdown_table(results.table())}")
    for name, result in results.distributions.items():
        board.scalars({f"top1 {job}/{name}": result.top1}, checkpoint.epoch or 0)
        for step, weights in enumerate((result.learning or {}).get("weights_after_pass", [])):
            board.scalars({f"{job}_weights_{name}/expert{e + 1}": w for e, w in enumerate(weights)}, step)
    board.close()
    return content


def write_files(results: Results, content: Mapping[str, Any], folder: Path) -> list[Path]:
    """report.html, results.csv, results.md, results.json, and charts where there are several distributions.

    Returns:
        The files; results.json is written last: where it is, everything is.
    """
    outcomes = {name: (r.outcomes, r.equal_outcomes) for name, r in results.distributions.items() if r.outcomes}
    entries = content["distributions"]
    method = method_name(content) if compared(entries) else "Equal weights"
    charts = {
        "accuracy.svg": accuracy_charts(list(entries), adapted_series(entries, method)),
        "weights.svg": learned_weight_charts(entries),
    }
    remark = f" ({results.remark})" if results.remark else ""
    for chart in (drawn[0] for drawn in charts.values() if drawn):
        chart.label += remark
    files = {
        "report.html": evaluation_page(content, outcomes, results.thumbnails),
        "results.csv": results.full_table().to_csv().encode(),
        "results.md": markdown(results).encode(),
        **{name: svg_file(drawn[0]) if drawn else None for name, drawn in charts.items()},
        "results.json": (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(),
    }
    make_folder(folder)
    write_together(folder, files)
    return [folder / name for name, data in files.items() if data is not None]


def markdown(results: Results) -> str:
    """The table under what it was made of."""
    checkpoint = results.checkpoint
    heading = (
        f"{results.protocol}\n\nCheckpoint {checkpoint.path}, epoch {checkpoint.epoch} "
        f"({checkpoint.selected_by}), SHA-256 {checkpoint.sha256}, seed {results.seed}. Accuracy in percent.\n\n"
    )
    if results.remark:
        heading += f"**{results.remark[0].upper()}{results.remark[1:]}.**\n\n"
    return heading + markdown_table(results.table())
