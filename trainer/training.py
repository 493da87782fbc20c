"""A training run from its config to its last checkpoint."""

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
from trainer.registry import TRAINERS, read_config
from trainer.run_folder import choose_run_dir, run_folder
from trainer.schedule import odd_schedule
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.logger import get_logger
from utils.parse_config import merge
from utils.seed import seed_everything


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
    checked = read_config(config or {}, checkpoint, resume, training=True)
    options = checked.build("trainer")
    logger = get_logger(verbosity=options.verbosity)
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
