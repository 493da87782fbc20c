"""Color jitter and RandAugment of small images, as operations on whole batches.

As in tensor_transforms.py parameters are sampled first, for all images of an epoch: processes can split a batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data_loader.tensor_transforms import color_jitter
from utils.torchvision_import import torchvision

GROUPS = 16  # of images of a batch that have an operation of RandAugment in common


class JitterParams(NamedTuple):
    """Parameters of the color jitter of B images."""

    factors: Tensor  # [B, 4] brightness, contrast, saturation factors; hue shift, 0
    order: Tensor  # [B, 4] int64, order of these four

    def select(self, indices: slice) -> "JitterParams":
        return JitterParams(*(field[indices] for field in self))


class ColorJitter:
    """Jitter of brightness, contrast and saturation, in an order of its own for each image.

    Args:
        strength: factors are uniform in [1 - strength, 1 + strength], and not below 0.
    """

    def __init__(self, strength: float):
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def sample_params(self, count: int, generator: torch.Generator) -> JitterParams:
        """Random parameters of `count` images, on the CPU."""
        factors = torch.zeros(count, 4)
        factors[:, :3].uniform_(self.low, self.high, generator=generator)
        return JitterParams(factors, torch.rand(count, 4, generator=generator).argsort(dim=1))

    def apply(self, images: Tensor, params: JitterParams) -> Tensor:
        """[B, 3, S, S] uint8 -> [B, 3, S, S] in 0..1."""
        device = images.device
        return color_jitter(images.float().div_(255), params.factors.to(device), params.order.to(device))


class OperationParams(NamedTuple):
    """Parameters of RandAugment for B images."""

    seeds: Tensor  # [B, K] int64: images with the same seed have the same operation

    def select(self, indices: slice) -> "OperationParams":
        return OperationParams(self.seeds[indices])


class RandAugmentGroups:
    """torchvision's RandAugment (arXiv 1909.13719) on whole batches.

    Each of the K operations of an image is drawn as torchvision draws it. The images of a batch fall into GROUPS groups
    at random, anew for each of the K, and those of a group have the operation in common: that is what makes it fast.

    Args:
        operations: K.
        magnitude: their strength, 0 to 30.
        batch_size: of the global batches, which groups do not cross.
    """

    def __init__(self, operations: int, magnitude: int, batch_size: int):
        self.operations, self.magnitude, self.batch_size = operations, magnitude, batch_size

    def sample_params(self, count: int, generator: torch.Generator) -> OperationParams:
        """Random parameters of the `count` images of an epoch, in its order, on the CPU."""
        batches = count // self.batch_size + 1
        seeds = torch.randint(2**62, (batches, GROUPS, self.operations), generator=generator)
        group = torch.randint(GROUPS, (count, self.operations), generator=generator)
        batch = torch.arange(count)[:, None] // self.batch_size
        return OperationParams(seeds[batch, group, torch.arange(self.operations)])

    def apply(self, images: Tensor, params: OperationParams) -> Tensor:
        """[B, 3, S, S] uint8 -> the same shape."""
        operation = torchvision().transforms.RandAugment(1, self.magnitude)
        images = images.clone()
        for seeds in params.seeds.unbind(1):
            for seed in seeds.unique().tolist():
                chosen = (seeds == seed).nonzero()[:, 0].to(images.device)
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed)
                    images[chosen] = operation(images[chosen])
        return images
