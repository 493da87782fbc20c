"""What an evaluation leaves in its folder: tables, plots, the page, results.json, TensorBoard's file."""

import json
from pathlib import Path
from typing import Any

from evaluation.results import Results
from report.charts import Chart
from report.evaluation_page import accuracy_charts, evaluation_page, learned_weight_charts
from report.tables import console_table, markdown_table
from utils import distributed
from utils.files import make_folder, write_together
from utils.logger import TensorBoardLog, get_logger


def save_results(results: Results, folder: Path, job: str) -> dict[str, Any]:
    """Write every file of an evaluation into a folder, in place of all that were there, and show the table.

    Of several processes the first one writes.

    Args:
        results: of the evaluation.
        folder: is created.
        job: that made them: "test", "test_all" or "test_train".

    Returns:
        The content of results.json.

    Raises:
        UserError: a file could not be written.
    """
    content, table = {"job": job, **results.to_json()}, markdown_table(results.table())
    checkpoint = results.checkpoint
    where = f"{checkpoint.path}, epoch {checkpoint.epoch} ({checkpoint.selected_by})"
    remark = f"{results.remark[0].upper()}{results.remark[1:]}." if results.remark else ""

    def plot(charts: list[Chart], title: str) -> bytes | None:
        """A plot whose title has the remark below it; None, which removes an earlier file, where there is no chart."""
        return charts[0].file(f"{title}\n{remark}".strip()) if charts else None

    def write() -> list[Path]:
        heading = (
            f"{results.protocol}\n\nCheckpoint {where}, SHA-256 {checkpoint.sha256}, seed {results.seed}. "
            "Accuracy in percent.\n\n" + (f"**{remark}**\n\n" if remark else "")
        )
        files = {
            "report.html": evaluation_page(results, job),
            "results.csv": results.full_table().to_csv().encode(),
            "results.md": (heading + table).encode(),
            "accuracy.svg": plot(accuracy_charts(results), "Accuracy over the test class distributions"),
            "weights.svg": plot(learned_weight_charts(results), "How the experts are weighted"),
            # Written last: where it is, everything is.
            "results.json": (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(),
        }
        make_folder(folder)
        write_together(folder, files)
        return [folder / name for name, data in files.items() if data is not None]

    written = distributed.by_first_process(write)
    get_logger().info(
        f"\n{results.protocol}\n{where}\n\n{console_table(results.table())}\n\n"
        f"Written: {', '.join(str(file) for file in written)}"
    )
    board = TensorBoardLog(folder)
    board.text(job, f"{results.protocol}\n\n{table}")
    for name, result in results.distributions.items():
        board.scalars({f"top1 {job}/{name}": result.top1}, checkpoint.epoch or 0)
        for step, weights in enumerate((result.learning or {}).get("weights_after_pass", [])):
            board.scalars({f"{job}_weights_{name}/expert{e + 1}": w for e, w in enumerate(weights)}, step)
    board.close()
    return content
