"""From a checked config to objects: data loader, network, loss, optimizer."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from base.base_data_loader import BaseDataLoader, TrainedOn
from base.base_model import BaseModel
from model.loss import Loss
from model.pretrained import read_weights, start_from
from trainer.registry import METRICS
from utils import distributed
from utils.errors import UserError
from utils.logger import get_logger
from utils.parse_config import ConfigParser
from utils.torchvision_import import torchvision

TORCHVISION_NAMES = {
    "ResNet18Model": "resnet18",
    "ResNet34Model": "resnet34",
    "ResNet50Model": "resnet50",
    "ResNet101Model": "resnet101",
    "ResNet152Model": "resnet152",
    "ResNeXt50Model": "resnext50_32x4d",
}


def build_loader(config: ConfigParser, device: torch.device, trained_on: TrainedOn | None = None) -> BaseDataLoader:
    """The data of the config, or a loader that does without them, if it can, where `trained_on` is given."""
    loader = config.build("data_loader", trained_on=trained_on)
    loader.prepare(device, config.get("seed", 1), distributed.rank(), distributed.world_size())
    return loader


def build_network(
    config: ConfigParser, num_classes: int, device: torch.device, state: Mapping[str, Tensor] | None = None
) -> BaseModel:
    """The network of the config, on the device.

    Args:
        config: with the section `arch`.
        num_classes: of the data.
        device: where the network goes.
        state: weights that it is to be filled with; a network of more than twice their size is not built.

    Raises:
        UserError: it has another number of classes than the data, or is much larger than the weights.
    """
    with SizeLimit(state) if state else nullcontext():
        network = config.build("arch")
    if network.num_classes != num_classes:
        raise UserError(
            f"arch;args;num_classes is {network.num_classes} and the data has {num_classes} classes: "
            f'set it to {num_classes}, e.g. --set "arch;args;num_classes={num_classes}".'
        )
    get_logger().info(f"{network}, on {device}")
    return network.to(device)


class SizeLimit(TorchFunctionMode):
    """In its body, tensors may be made of twice as many elements in all as a state dict has, and a million more.

    The config inside a file of 1 kB can ask for a network that fills the memory: it is refused before it does.
    """

    MAKERS = {"empty", "zeros", "ones", "full", "rand", "randn"}

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        self.left = 2 * sum(tensor.numel() for tensor in state.values()) + 10**6

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.MAKERS:
            size = args[0] if args and isinstance(args[0], (tuple, list)) else args
            self.left -= max(1, math.prod(n for n in size if isinstance(n, int)))
            if self.left < 0:
                raise UserError(
                    "The network of the checkpoint's config is much larger than its weights, and does not fit the "
                    "architecture of the config: use the config it was trained with."
                )
        return func(*args, **(kwargs or {}))


def build_loss(config: ConfigParser, cls_num_list: Sequence[int]) -> Loss:
    return config.build("loss", cls_num_list=list(cls_num_list))


def chosen_metrics(config: ConfigParser) -> dict[str, Callable]:
    """The metrics that a config lists, by name."""
    return {name: METRICS[name] for name in config.get("metrics", ["accuracy"])}


def load_start_weights(config: ConfigParser, network: BaseModel) -> None:
    """Fill the network from what `weights` in the config names: a file, or "torchvision" (ImageNet; downloaded).

    Raises:
        UserError: the weights are missing or do not fit.
    """
    source = config["weights"]
    if source == "torchvision":
        arch = config["arch"]["type"]
        if arch not in TORCHVISION_NAMES:
            raise UserError(
                f'"weights": "torchvision" is there for {", ".join(TORCHVISION_NAMES)}, not for {arch}: '
                "leave it out, or give the path of a file."
            )
        try:
            plain = torchvision().models.get_model(TORCHVISION_NAMES[arch], weights="IMAGENET1K_V1").state_dict()
        except OSError as error:
            raise UserError(
                f"torchvision's weights for {arch} could not be downloaded ({error}): try again, or leave "
                '"weights" out.'
            ) from error
    else:
        plain = read_weights(source)
    filled = start_from(network, plain, source)
    get_logger().info(f"{len(filled)} entries start from {source}; the classifiers are fresh.")


def synchronize_batch_norm(network: torch.nn.Module, device: torch.device) -> None:
    """Make every plain batch norm of a network torch's SyncBatchNorm, in place, with the same parameters and buffers.

    Raises:
        UserError: it cannot compute on the device.
    """
    if device.type == "cpu":
        error = UserError("trainer;sync_batchnorm needs GPUs, and this run is on CPUs: leave it out.")
        error.shared = True
        raise error
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if type(norm) is torch.nn.BatchNorm2d:
                setattr(parent, name, torch.nn.SyncBatchNorm.convert_sync_batchnorm(norm))


def parameter_groups(config: ConfigParser, network: BaseModel) -> list[dict]:
    """Trainable parameters for the optimizer: one group, or with `optimizer.share_lr` classifiers and all else apart.

    The classifiers train at `lr`, the rest at `share_lr`.
    """
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    share_lr = config["optimizer"].get("share_lr")
    if share_lr is None:
        return [{"params": list(trainable.values())}]
    heads = network.classifier_names()
    groups = [
        {"params": [p for name, p in trainable.items() if name in heads]},
        {"params": [p for name, p in trainable.items() if name not in heads], "lr": share_lr},
    ]
    return [group for group in groups if group["params"]]


def check_schedule(config: ConfigParser) -> None:
    """Step the schedule once on nothing: some refuse their arguments only then, after a whole epoch.

    Raises:
        UserError: the schedule refuses its arguments.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = config.build("lr_scheduler", optimizer)
    optimizer.step()
    try:
        scheduler.step()
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f'Config section "lr_scheduler" ({type(scheduler).__name__}): {error}.') from error
