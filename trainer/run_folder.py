"""Where a run and its results live, and who may write there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from utils import distributed
from utils.bad_images import FILE_NAME
from utils.checkpoint import load_checkpoint, whole_epochs, write_atomically
from utils.errors import UserError
from utils.files import make_folder
from utils.lock import NAME as LOCK
from utils.lock import locked
from utils.logger import file_log, get_logger
from utils.parse_config import ConfigParser


def choose_run_dir(
    config: ConfigParser, save_dir: Path, resume: Path | None, checkpoint: Mapping | None, run_id: str | None
) -> Path:
    """The folder of a training run; nothing is created yet. With several processes all get the first one's answer.

    A resumed run goes on in the folder of its checkpoint, unless it was told another name, save_dir or run_id, or the
    folder has gone further than the checkpoint: then it gets a folder of its own, and the old one keeps what it has.

    Args:
        config: of the run.
        save_dir: folder of all runs.
        resume: checkpoint to go on from.
        checkpoint: its content.
        run_id: name of the folder; None for date and time.
    """
    name = Path(config["name"])
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise UserError(f'"name" in the config is "{name}": give the name of a folder below save_dir.')
    new = save_dir / config["name"] / (run_id or datetime.now().strftime("%m%d_%H%M%S"))
    goes_on = False
    if checkpoint and resume and not run_id and (resume.parent / "config.json").exists():
        before = checkpoint.get("config") or {}
        last = resume.parent / "last.pth"
        further = last != resume and _progress_of(last) > _progress(checkpoint)
        section = before.get("trainer")
        save_dir = section.get("save_dir") if isinstance(section, Mapping) else None
        moved = (before.get("name"), save_dir) != (
            config["name"],
            config["trainer"].get("save_dir"),
        )
        goes_on = not further and not moved
    return distributed.from_first_process(resume.parent if goes_on else new)


def _progress(checkpoint: Mapping) -> tuple[int, int]:
    """How far a run was: whole epochs, steps of the next one."""
    return whole_epochs(checkpoint), (checkpoint.get("mid_epoch") or {"step": 0})["step"]


def _progress_of(last: Path) -> tuple[int, int]:
    """How far a last.pth has come; nothing where there is none, or a damaged one, which then is replaced."""
    if not last.exists():
        return 0, 0
    try:
        return _progress(load_checkpoint(last))
    except UserError as error:
        get_logger().warning(f"{error} It will be replaced.")
        return 0, 0


@contextmanager
def run_folder(config: ConfigParser, run_dir: Path, resume: Path | None) -> Iterator[None]:
    """The folder of a training run: created, with the config in it, and locked. For the first process alone.

    A run that was killed before it saved anything can be started again in its folder.

    Raises:
        UserError: the folder cannot be created, holds another run, or another process trains in it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The run folder {run_dir} cannot be created ({error.strerror}): choose another with --save_dir."
        ) from error
    with locked(run_dir, "give another --run_id"):
        if resume is None or run_dir != resume.parent:
            _check_unused(run_dir)
        write_atomically(run_dir / "config.json", json.dumps(config.config, indent=2).encode())
        yield


def _check_unused(run_dir: Path) -> None:
    """Raise UserError where a folder holds more than what a run leaves that was killed before it saved anything."""
    left = (LOCK, "config.json", "log.txt", FILE_NAME, "events.out.*", "*.tmp")
    if more := sorted(path for path in run_dir.iterdir() if not any(path.match(pattern) for pattern in left)):
        saved = [path for path in more if path.suffix == ".pth"]
        last = run_dir / "last.pth"
        chosen = last if last in saved or not saved else saved[-1]
        raise UserError(f"{run_dir} holds a run already: go on with -r {chosen}, or give another --run_id.")


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
