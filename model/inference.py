"""A frozen copy of a network that computes the same logits faster."""

import re
from copy import deepcopy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from base.base_model import BaseModel

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
    plain = deepcopy(network).eval().requires_grad_(False)
    folded = deepcopy(plain)
    for parent, before, name in foldable(folded):
        setattr(parent, before, fuse_conv_bn_eval(getattr(parent, before), getattr(parent, name)))
        setattr(parent, name, nn.Identity())
    copy = folded if _same_logits(folded, plain, image_size) else plain
    return copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def foldable(network: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Batch norms that seem to follow a convolution: (parent, name of the convolution, name of the batch norm) each.

    The convolution before `bn1` is its sibling `conv1`, that before a batch norm in an nn.Sequential is the module
    before it there. Other classes derived from nn.BatchNorm2d or nn.Conv2d may do more than these, and are left out.
    """
    found = []
    for parent in network.modules():
        names = list(parent._modules)
        for k, name in enumerate(names):
            if type(parent) is nn.Sequential:
                before = names[k - 1] if k else ""
            else:
                before = re.sub(r"^bn(?=\d*$)", "conv", name)
            convolution, norm = parent._modules.get(before), parent._modules[name]
            if type(convolution) is nn.Conv2d and (type(norm) is nn.BatchNorm2d or type(norm) is nn.SyncBatchNorm):
                if norm.running_mean is not None and norm.num_features == convolution.out_channels:
                    found.append((parent, before, name))
    return found


@torch.no_grad()
def _same_logits(network: nn.Module, expected: nn.Module, image_size: int) -> bool:
    """Whether the logits of two networks agree but for rounding, for every expert; NaN agrees with nothing."""
    weight = next(expected.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, image_size, image_size, generator=generator).to(weight.device, weight.dtype)
    right = expected(images)["logits"].float()
    try:
        logits = network(images)["logits"].float()
    except Exception:  # the network wants more of its batch norm than an Identity can give
        return False
    difference = (logits - right).square().mean(dim=(0, 2)).sqrt()  # [E]
    tolerance = ROUNDING.get(logits.device.type, ROUNDING_ELSEWHERE)
    return bool((difference <= tolerance * right.std(dim=(0, 2))).all())
