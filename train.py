"""Train a network.

python train.py -c configs/config_cifar100_ir100_tade.json      start
python train.py -r saved/NAME/RUN/last.pth                      go on
torchrun --nproc_per_node 4 train.py -c ...                     several processes
"""

from pathlib import Path

import model.metric
from trainer.devices import choose_device, device_name
from trainer.setup import (
    TRAINING_SECTIONS,
    build_loader,
    build_model,
    check_schedule,
    load_start_weights,
    parameter_groups,
    run_script,
)
from trainer.trainer import Trainer
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.logger import get_logger
from utils.parse_config import ConfigParser, choose_run_dir, create_run_dir
from utils.seed import seed_everything


def main(config: ConfigParser) -> dict:
    """Train as the config says.

    Returns:
        The last epoch's values, and the paths of the run folder and its checkpoints (BaseTrainer.train).
    """
    for section in TRAINING_SECTIONS:
        config[section]  # names the first that is missing
    options = config.build("trainer")
    logger = get_logger(verbosity=options.verbosity)
    seed = config.get("seed", 1)
    seed_everything(seed)
    device, gpus = choose_device(config.device, config.get("n_gpu", 1))
    loader = build_loader(config, device)
    network = build_model(config, loader.num_classes, device)
    criterion = config.build("loss", cls_num_list=loader.cls_num_list).to(device)
    optimizer = config.build("optimizer", parameter_groups(config, network))
    check_schedule(config)
    scheduler = config.build("lr_scheduler", optimizer)
    metrics = {name: getattr(model.metric, name) for name in config.get("metrics", ["accuracy"])}
    checkpoint = load_checkpoint(config.resume) if config.resume else None
    if config.get("weights") and not checkpoint:
        load_start_weights(config, network)
    run_dir = choose_run_dir(config, Path(options.save_dir), checkpoint)
    trainer = Trainer(
        network,
        criterion,
        metrics,
        loader,
        optimizer,
        scheduler,
        options,
        run_dir,
        {
            "config": config.config,
            "cls_num_list": loader.cls_num_list,
            "class_map": loader.class_map,
            "seed": seed,
            "device": device_name(device),
        },
        gpus,
    )
    if checkpoint:
        trainer.resume(checkpoint, config.resume)
    create_run_dir(config, run_dir)
    logger.info(
        f"{config['name']}: {sum(loader.cls_num_list)} training images, {loader.num_classes} classes, "
        f"{len(loader)} batches an epoch. Run folder: {run_dir}"
    )
    results = trainer.train()
    if distributed.is_main():
        logger.info(f"Done. Last epoch: {results['last']}" + (f", best: {results['best']}" if results["best"] else ""))
    return results


if __name__ == "__main__":
    run_script(main, __doc__, training=True)
