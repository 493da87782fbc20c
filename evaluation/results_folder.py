"""Where the results of an evaluation live, and who may write there."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from utils import distributed
from utils.errors import UserError
from utils.files import make_folder
from utils.lock import locked
from utils.logger import file_log, get_logger


@contextmanager
def results_folder(checkpoint: Path, job: str, output: Path | None = None) -> Iterator[Path]:
    """Folder of a job's results: `output`, or results/CHECKPOINT/JOB beside the checkpoint. Created and
    locked; messages go to its log.txt as well.

    Entered once config and checkpoint are known to be right, and before anything is computed that could be lost. All
    processes enter it, and the first one writes there.

    Raises:
        UserError: it cannot be created, holds results of another job, or another evaluation is at work in it.
    """
    folder = output or results_dir(checkpoint, job)
    with ExitStack() as stack:

        def open_folder() -> None:
            make_folder(folder)
            other = job_of(folder)
            if other not in (None, job):
                raise UserError(f"{folder} holds results of {other}: give another --output for those of {job}.")
            stack.enter_context(locked(folder, "choose another --output"))
            stack.enter_context(file_log(get_logger(), folder / "log.txt"))

        distributed.by_first_process(open_folder)
        yield folder


def job_of(folder: Path) -> str | None:
    """The job whose results a folder holds; None where there are none, or of an earlier version."""
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    job = content.get("job") if isinstance(content, dict) else None
    return job if isinstance(job, str) else None


def results_dir(checkpoint: Path, job: str) -> Path:
    return checkpoint.parent / "results" / checkpoint.stem / job
