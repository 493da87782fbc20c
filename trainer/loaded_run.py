"""The one door from Python: a checkpoint with its network, its data and what its logits carry."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from base.base_data_loader import BaseDataLoader
from model.inference import inference_copy
from model.loss import CrossEntropyLoss, DiverseExpertLoss
from tade import Aggregator, class_prior
from tade.priors import EPSILON
from trainer.build import aggregator_maker, build_loader, build_loss, build_network
from trainer.devices import choose_device, parallel
from trainer.logits import expert_logits, mean_logits
from trainer.registry import log_without_effect, make_config
from trainer.results import CheckpointRecord
from utils.checkpoint import load_checkpoint, load_weights, sha256
from utils.errors import UserError
from utils.logger import get_logger
from utils.parse_config import ConfigParser, merge
from utils.reference_config import config_of
from utils.seed import seed_everything

#: Sections of a training config that count after training.
SECTIONS = (
    "name",
    "n_gpu",
    "seed",
    "arch",
    "data_loader",
    "loss",
    "optimizer",
    "metrics",
    "aggregator",
    "averaged_views",
)


@dataclass
class LoadedRun:
    """A trained network, ready to be evaluated, adapted and asked for predictions.

    Args:
        network: for inference, frozen, on `device`; images [B, 3, H, W] -> {"logits": [B, E, C], ...}.
        num_experts: E.
        loader: the data it was trained on, and the test images.
        device: where it runs.
        config: checked; of the checkpoint, with the overrides.
        checkpoint: which file it came from.
        expert_log_priors: the log prior that each expert's logits carry, by the loss it was trained with, [E, C].
        log_prior: log of the training class prior, [C].
    """

    network: nn.Module
    num_experts: int
    loader: BaseDataLoader
    device: torch.device
    config: ConfigParser
    checkpoint: CheckpointRecord
    expert_log_priors: Tensor
    log_prior: Tensor

    @property
    def cls_num_list(self) -> list[int]:
        """Training images per class, [C]."""
        return self.loader.cls_num_list

    @property
    def seed(self) -> int:
        return self.config.get("seed", 1)

    @property
    def mild_views(self) -> list[int]:
        """The views whose logits are averaged, as the loader numbers them; empty where images are used as they are."""
        crops = self.config.get("averaged_views", 0)
        return self.loader.mild_view_numbers(crops) if crops else []

    @cached_property
    def test_logits(self) -> Tensor:
        """Expert logits of all test images in their order, [N, E, C], on the CPU. Several processes share the work.

        Of the un-augmented images, or with `averaged_views` in the config their mean over these views.
        """
        if views := self.mild_views:
            return mean_logits(self.network, self.loader.mild_view_batches, views, self.device, "test images")
        return expert_logits(self.network, self.loader.test_batches(), self.device, "test images", shared=True)

    @cached_property
    def targets(self) -> Tensor:
        """Labels of the test images, [N]."""
        return self.loader.test_batches().targets

    def make_aggregator(self, expert_log_priors: Tensor, log_prior: Tensor) -> Aggregator:
        """A new aggregator as the config names it; the published method where it names none."""
        return aggregator_maker(self.config)(expert_log_priors, log_prior)


def load_run(path: Path | str, device: str | None = None, overrides: Mapping[str, object] | None = None) -> LoadedRun:
    """Open a checkpoint of this project or of the reference.

    Args:
        path: the .pth file.
        device: "cpu", "cuda", "cuda:1", GPU numbers such as "0,1"; None for CUDA if present.
        overrides: what to change in its config: sections ("data_loader": {...}) or single values by path
            ("data_loader;args;data_dir": "photos").

    Raises:
        UserError: the file is missing or damaged, carries no config that is understood and none is given, does not fit
            its network, or was trained on other class counts than the data has.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    config = evaluation_config(checkpoint, overrides or {}, path)
    log_without_effect(config)
    seed_everything(config.get("seed", 1))
    chosen_device, gpus = choose_device(device, config.get("n_gpu", 1))
    loader = build_loader(config, chosen_device)
    trained_on = checkpoint.get("cls_num_list")
    if trained_on and list(trained_on) != list(loader.cls_num_list):
        raise UserError(
            f"{path} was trained on {sum(trained_on)} images in {len(trained_on)} classes, and "
            f"the config's data has {sum(loader.cls_num_list)} in {loader.num_classes}: use the test "
            "config of the same data set and imbalance ratio."
        )
    network = build_network(config, loader.num_classes, chosen_device)
    load_weights(network, checkpoint["model"], path)
    return LoadedRun(
        network=parallel(inference_copy(network, loader.image_size), chosen_device, gpus),
        num_experts=network.num_experts,
        loader=loader,
        device=chosen_device,
        config=config,
        checkpoint=CheckpointRecord(
            str(path), sha256(path), checkpoint.get("epoch"), checkpoint.get("selected_by", "unknown")
        ),
        expert_log_priors=carried_log_priors(config, checkpoint.get("epoch"), loader, network.num_experts),
        log_prior=torch.log(class_prior(loader.cls_num_list) + EPSILON),
    )


def evaluation_config(checkpoint: Mapping, overrides: Mapping[str, object], source: Path) -> ConfigParser:
    """The checked config of a checkpoint's evaluation: its own sections that count after training, with overrides.

    Of a stranger's config, sections that are not understood are left out, so that overrides can take their place.
    """
    config = config_of(checkpoint)
    kept = {key: config[key] for key in SECTIONS if key in config}
    if "format" not in checkpoint:
        kept = {key: section for key, section in kept.items() if _is_understood(key, section)}
    if not kept and not overrides:
        raise UserError(f"{source} carries no config: give the one it was trained with, -c CONFIG.")
    return make_config(merge(kept, overrides))


def _is_understood(key: str, section: object) -> bool:
    try:
        make_config({key: section})
    except UserError:
        return False
    return True


def carried_log_priors(config: ConfigParser, epoch: int | None, loader: BaseDataLoader, num_experts: int) -> Tensor:
    """The log prior that each expert's logits carry, up to a constant, by the loss it was trained with: [E, C].

    Class-balanced sampling makes the prior of what was seen in training uniform: log pi is missing from every expert.

    Args:
        config: where it names no loss, cross entropy is assumed for one expert, and the method's own loss for several.
        epoch: the last of training, for losses with a schedule; where it is not known, training has reached its end.
        loader: the data of training.
        num_experts: E.
    """
    counts = loader.cls_num_list
    if "loss" in config:
        loss = build_loss(config, counts)
    else:
        loss = CrossEntropyLoss(counts) if num_experts == 1 else DiverseExpertLoss(counts)
        get_logger().info(f"The config names no loss: logits are taken to carry what {type(loss).__name__} leaves.")
    loss.set_epoch(sys.maxsize if epoch is None else epoch)
    carried = loss.log_priors(num_experts)
    return carried - torch.log(class_prior(counts) + EPSILON) if loader.balanced else carried
