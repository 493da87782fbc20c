"""A training run from its config to its last checkpoint."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from base.base_data_loader import BaseDataLoader
from model.freeze import freeze
from trainer.build import (
    build_loader,
    build_loss,
    build_network,
    check_schedule,
    chosen_metrics,
    load_start_weights,
    parameter_groups,
    synchronize_batch_norm,
)
from trainer.continuity import check_continuity
from trainer.devices import choose_device, device_name
from trainer.options import TrainerOptions
from trainer.precision import choose_precision
from trainer.registry import TRAINERS, changed_config, log_without_effect, make_config
from trainer.run_folder import choose_run_dir, run_folder
from trainer.schedule import moved_schedule, odd_schedule
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.logger import get_logger
from utils.parse_config import ConfigParser, merge
from utils.reference_config import config_of
from utils.seed import seed_everything

SECTIONS = ("name", "arch", "data_loader", "optimizer", "loss", "lr_scheduler", "trainer")


def training_config(config: Mapping, checkpoint: Mapping | None = None, source: object = "") -> ConfigParser:
    """The checked config of a training run: the checkpoint's, if any, with what `config` changes.

    Args:
        config: sections, or single values by path (utils.parse_config.merge).
        checkpoint: content of the checkpoint to go on from.
        source: its path, for messages.

    Raises:
        UserError: a section is missing or wrong.
    """
    before = config_of(checkpoint or {})
    if checkpoint is not None and "format" not in checkpoint and config:  # a stranger's: only its network counts
        before = {key: before[key] for key in ("arch",) if key in before}
    if not before and not config:
        raise UserError(f"{source} carries no config: give the one it was trained with, -c CONFIG.")
    checked = changed_config(before, config)
    for section in SECTIONS:
        checked[section]  # names the first that is missing
    return checked if checkpoint else with_moved_schedule(checked, config)


def with_moved_schedule(checked: ConfigParser, asked: Mapping) -> ConfigParser:
    """The config of a new run, its schedule moved where other epochs are asked for than those that it was made for.

    Args:
        checked: the config asked for.
        asked: what it was made of: sections, with the epochs of the schedule, and single values by path.
    """
    section = asked.get("trainer")
    whole = section.get("epochs") if isinstance(section, Mapping) else None
    if "trainer;epochs" not in asked or whole is None:
        return checked
    made_for = merge(checked.config, {"trainer;epochs": whole})
    moved = moved_schedule(made_for, checked["trainer"]["epochs"], kept=asked)
    if not moved:
        return checked
    shown = ", ".join(f"{path} {json.dumps(value)}" for path, value in moved.items())
    get_logger().info(f"The schedule moves with the epochs, which were {whole}: {shown}.")
    return make_config(merge(checked.config, moved))


def warn_if_nothing_learned(accuracy: float | None, loader: BaseDataLoader) -> None:
    """Say so where training accuracy (percent) is not above that of always naming one class."""
    counts = [1] * loader.num_classes if loader.balanced else loader.cls_num_list
    best_guess = 100 * max(counts) / sum(counts)
    if accuracy is not None and accuracy <= best_guess:
        get_logger().warning(
            f"The network has learned nothing: in the last epoch it was right on {accuracy:.1f} % of the training "
            f"images, and always naming one class is on {best_guess:.1f} %. Lower the learning rate, or train longer."
        )


def train(
    config: Mapping | None = None,
    *,
    resume: Path | str | None = None,
    device: str | None = None,
    run_id: str | None = None,
    allow_changes: bool = False,
) -> dict:
    """Train as a config says.

    Args:
        config: the config, or with `resume` what is to change in the checkpoint's: sections, or single values by path
            ("optimizer;args;lr": 0.05).
        resume: checkpoint to go on from.
        device: "cpu", "cuda", "cuda:1", GPU numbers such as "0,1"; None for CUDA if present.
        run_id: name of the run's folder; None for date and time.
        allow_changes: with `resume`, go on although other data or another training is asked for than before
            (trainer/continuity.py says which changes are free).

    Returns:
        The last epoch's values, and the paths of the run folder and its checkpoints (BaseTrainer.train).

    Raises:
        UserError: something is wrong that the caller can mend.
    """
    resume = Path(resume) if resume else None
    checkpoint = load_checkpoint(resume) if resume else None
    checked = training_config(config or {}, checkpoint, resume)
    options = checked.build("trainer")
    logger = get_logger(verbosity=options.verbosity)
    log_without_effect(checked)
    seed = checked.get("seed", 1)
    seed_everything(seed)
    chosen_device, gpus = choose_device(device, checked.get("n_gpu", 1))
    options.precision = choose_precision(options.precision, chosen_device, (checkpoint or {}).get("precision"))
    loader = build_loader(checked, chosen_device)
    loader.check_shards()
    distributed.by_first_process(loader.check_files)
    fingerprint = loader.fingerprint()
    if checkpoint:
        check_continuity(checkpoint, resume, checked, loader.cls_num_list, fingerprint, allow_changes)
    weights = checkpoint["model"] if checkpoint else None
    network = build_network(checked, loader.num_classes, chosen_device, weights)
    if options.sync_batchnorm and distributed.world_size() > 1:
        synchronize_batch_norm(network, chosen_device)
    criterion = build_loss(checked, loader.cls_num_list).to(chosen_device)
    frozen = freeze(network, checked.get("freeze", []))
    optimizer = checked.build("optimizer", parameter_groups(checked, network))
    check_schedule(checked)
    if odd := odd_schedule(checked.config):
        logger.warning(odd)
    scheduler = checked.build("lr_scheduler", optimizer)
    if checked.get("weights") and not checkpoint:
        load_start_weights(checked, network)
    asked = merge({} if checkpoint else checked.config, config or {})  # a file does not choose where is written
    save_dir = asked.get("trainer", {}).get("save_dir", TrainerOptions.save_dir)
    run_dir = choose_run_dir(checked, Path(save_dir), resume, checkpoint, run_id)
    trainer = TRAINERS[options.type](
        network,
        criterion,
        chosen_metrics(checked),
        loader,
        optimizer,
        scheduler,
        options,
        run_dir,
        extra_state={
            "config": checked.config,
            "cls_num_list": loader.cls_num_list,
            "class_map": loader.class_map,
            "class_names": loader.class_names if loader.is_named else None,
            "fingerprint": fingerprint,
            "seed": seed,
            "device": device_name(chosen_device),
        },
        gpus=gpus,
        frozen=frozen,
    )
    if checkpoint:
        trainer.resume(checkpoint, resume)
    with ExitStack() as stack:
        distributed.by_first_process(lambda: stack.enter_context(run_folder(checked, run_dir, resume)))
        logger.info(
            f"{checked['name']}: {sum(loader.cls_num_list)} training images, {loader.num_classes} classes, "
            f"{len(loader)} batches an epoch. Run folder: {run_dir}"
        )
        results = trainer.train()
    if distributed.is_main():
        warn_if_nothing_learned(results["accuracy"], loader)
        logger.info(f"Done. Last epoch: {results['last']}" + (f", best: {results['best']}" if results["best"] else ""))
    return results
