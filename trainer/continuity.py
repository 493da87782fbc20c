"""Whether a resumed run still learns the same from the same data."""

from collections.abc import Mapping

from trainer.registry import read_config
from utils.errors import UserError
from utils.logger import get_logger
from utils.parse_config import ConfigParser, differences

#: Values of a config that may change on the way: how long and how fast to learn, where data and runs are, what is
#: measured. The fingerprint speaks for the lists of training images; the weights and the optimizer's state do for the
#: network and the optimizer's type.
FREE = {
    *"name n_gpu metrics weights averaged_views aggregator trainer lr_scheduler arch optimizer".split(),
    *(f"data_loader;args;{name}" for name in "batch_size num_workers on_bad_image data_dir list_dir".split()),
    *(f"data_loader;args;{name}" for name in "train_list val_list test_list distributions class_names".split()),
}
NOT_FREE = {"trainer;mixup_alpha", "trainer;type"}
#: What a config that does not say means.
DEFAULTS = {"seed": 1, "freeze": []}


def changes(checkpoint: Mapping, config: ConfigParser, counts: list[int], fingerprint: Mapping[str, str]) -> list[str]:
    """What differs between a run and the checkpoint that it continues, in words.

    Args:
        checkpoint: its content; what it does not carry is not compared.
        config: of the run.
        counts: training images per class, [C].
        fingerprint: of the training images (BaseDataLoader.fingerprint).
    """
    found: list[str] = []
    if before := checkpoint.get("config"):
        try:
            compared = differences(DEFAULTS | read_config(before).complete(), DEFAULTS | config.complete())
        except UserError as error:
            compared = {}
            found.append(f"its config cannot be compared ({error})")
        for path, (was, now) in compared.items():
            if path in NOT_FREE or not any(path == free or path.startswith(f"{free};") for free in FREE):
                found.append(f"{path} was {was} and is {now}")
    trained_on = checkpoint.get("cls_num_list")
    if trained_on and trained_on != list(counts):
        found.append(
            f"{sum(trained_on)} training images were in {len(trained_on)} classes and {sum(counts)} are in "
            f"{len(counts)}, otherwise distributed"
        )
    return found + [f"the training images' {part} differ" for part in other_parts(checkpoint, fingerprint)]


def other_parts(checkpoint: Mapping, fingerprint: Mapping[str, str]) -> list[str]:
    """The parts of the fingerprint ("labels", "paths", "pixels") in which a checkpoint's differs, of those in both."""
    before = checkpoint.get("fingerprint") or {}
    return [part for part, digest in fingerprint.items() if before.get(part, digest) != digest]


def check_continuity(
    checkpoint: Mapping,
    source: object,
    config: ConfigParser,
    counts: list[int],
    fingerprint: Mapping[str, str],
    allow: bool,
) -> None:
    """Check that a run continues as it began.

    Args:
        checkpoint, config, counts, fingerprint: see `changes`.
        source: path of the checkpoint.
        allow: only warn of what differs.

    Raises:
        UserError: something differs that makes it another training.
    """
    found = changes(checkpoint, config, counts, fingerprint)
    if not found:
        return
    what = "; ".join(found[:5]) + (f" (and {len(found) - 5} more)" if len(found) > 5 else "")
    if not allow:
        raise UserError(
            f"{source} was trained otherwise: {what}; undo that, or go on all the same with --allow_changes."
        )
    get_logger().warning(f"Going on otherwise than {source} was trained: {what}.")
