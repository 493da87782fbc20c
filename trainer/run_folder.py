"""Where a run lives, and who may write there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from utils import distributed
from utils.bad_images import FILE_NAME
from utils.checkpoint import load_checkpoint, whole_epochs
from utils.errors import UserError
from utils.files import write_atomically
from utils.lock import NAME as LOCK
from utils.lock import locked
from utils.logger import get_logger
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
    chosen = save_dir / name / (run_id or datetime.now().strftime("%m%d_%H%M%S"))
    if checkpoint and resume and not run_id and (resume.parent / "config.json").exists():
        last = resume.parent / "last.pth"
        further = last != resume and _progress_of(last) > _progress(checkpoint)
        if not further and _named_place(checkpoint.get("config") or {}) == _named_place(config.config):
            chosen = resume.parent
    return distributed.from_first_process(chosen)


def _named_place(config: Mapping) -> tuple:
    """Where a config wants its runs."""
    section = config.get("trainer")
    return config.get("name"), section.get("save_dir") if isinstance(section, Mapping) else None


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
