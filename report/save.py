"""What an evaluation leaves in its folder: tables, plots, the page, results.json, TensorBoard's file."""

from pathlib import Path
from typing import Any

from evaluation.results import Results
from report.evaluation_page import evaluation_page
from report.tables import console_table, markdown_table, write_reports
from utils import distributed
from utils.logger import TensorBoardLog, get_logger


def save_results(results: Results, folder: Path, job: str) -> dict[str, Any]:
    """Write every report of report/tables.py and TensorBoard's file into a folder, and show the table.

    Of several processes the first one writes.

    Returns:
        The content of results.json.
    """
    content, table = {"job": job, **results.to_json()}, results.table()

    def write() -> list[Path]:
        outcomes = {name: (r.outcomes, r.equal_outcomes) for name, r in results.distributions.items() if r.outcomes}
        page = evaluation_page(content, outcomes, results.thumbnails)
        return write_reports(folder, content, results.full_table(), {"report.html": page})

    files = distributed.by_first_process(write)
    checkpoint = results.checkpoint
    get_logger().info(
        f"\n{results.protocol}\n{checkpoint.path}, epoch {checkpoint.epoch} ({checkpoint.selected_by})\n\n"
        f"{console_table(table)}\n\nWritten: {', '.join(str(file) for file in files)}"
    )
    board = TensorBoardLog(folder)
    board.text(job, f"{results.protocol}\n\n{markdown_table(table)}")
    for name, result in results.distributions.items():
        board.scalars({f"top1 {job}/{name}": result.top1}, checkpoint.epoch or 0)
        for step, weights in enumerate((result.learning or {}).get("weights_after_pass", [])):
            board.scalars({f"{job}_weights_{name}/expert{e + 1}": w for e, w in enumerate(weights)}, step)
    for file in files:
        if file.suffix == ".png":
            board.picture(f"{job}/{file.stem}", file)
    board.close()
    return content
