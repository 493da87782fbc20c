"""A frozen copy of a network that computes the same logits faster."""

import re
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from base.base_model import BaseModel
from model.fused_norm import FusedBatchNorm2d
from model.sync_batchnorm import SyncBatchNorm2d

#: Root mean square of what rounding may change in logits, relative to their spread. Convolutions on CUDA are TF32.
ROUNDING = {"cpu": 1e-3}
ROUNDING_ELSEWHERE = 2e-2


def inference_copy(network: BaseModel, image_size: int) -> nn.Module:
    """A frozen copy in eval mode, channels last, each batch norm folded into the convolution before it.

    Which convolution comes before is told from names (see `foldable`), so the copy is tried out: where its logits for
    random images differ by more than rounding (about 1e-5), or it fails, batch norm stays as it is.

    Args:
        network: stays as it is.
        image_size: side in pixels of images that the network takes.
    """
    copy = deepcopy(network).eval().requires_grad_(False)
    pairs = foldable(copy)
    if pairs:
        weight = next(copy.parameters())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, image_size, image_size, generator=generator).to(weight.device, weight.dtype)
        expected = _logits(copy, images)
        try:
            for parent, convolution, norm in pairs:
                setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm)))
                setattr(parent, norm, nn.Identity())
            right = _same(_logits(copy, images), expected)
        except Exception:  # the network wants more of its batch norm than an Identity can give
            right = False
        if not right:
            copy = deepcopy(network).eval().requires_grad_(False)
    return copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def foldable(network: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Batch norms that seem to follow a convolution: (parent, name of the convolution, name of the batch norm) each.

    The convolution before `bn1` is its sibling `conv1`, that before a batch norm in an nn.Sequential is the module
    before it there. Classes derived from nn.BatchNorm2d or nn.Conv2d may do more than these, and are left out, but for
    SyncBatchNorm2d and FusedBatchNorm2d, which are plain ones outside training.
    """
    pairs = []
    for parent in network.modules():
        for name, norm in parent._modules.items():
            before = _name_before(parent, name)
            convolution = parent._modules.get(before) if before else None
            if not isinstance(norm, nn.BatchNorm2d) or type(norm) not in (
                nn.BatchNorm2d,
                FusedBatchNorm2d,
                SyncBatchNorm2d,
            ):
                continue
            if type(convolution) is nn.Conv2d and before is not None:
                if norm.running_mean is not None and norm.num_features == convolution.out_channels:
                    pairs.append((parent, before, name))
    return pairs


def _name_before(parent: nn.Module, name: str) -> str | None:
    if type(parent) is nn.Sequential:
        names = list(parent._modules)
        return names[names.index(name) - 1] if name != names[0] else None
    match = re.fullmatch(r"bn(\d*)", name)
    return f"conv{match[1]}" if match else None


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    return network(images)["logits"].float()


def _same(logits: Tensor, expected: Tensor) -> bool:
    """Whether two sets of logits [B, E, C] agree but for rounding, for every expert; NaN agrees with nothing."""
    difference = (logits - expected).square().mean(dim=(0, 2)).sqrt()  # [E]
    tolerance = ROUNDING.get(logits.device.type, ROUNDING_ELSEWHERE)
    return bool((difference <= tolerance * expected.std(dim=(0, 2))).all())
