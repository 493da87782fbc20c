"""AutoAugment and Cutout of small images.

As in tensor_transforms.py parameters are sampled first, for all images of an epoch: processes can split a batch, and a
resumed epoch continues with the same images.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_loader.tensor_appearance import OperationParams
from utils.torchvision_import import torchvision

POLICIES = ("cifar10", "imagenet", "svhn")  # torchvision's names; the first is meant for CIFAR-100 as well


class AutoAugment:
    """torchvision's AutoAugment (Cubuk et al., CVPR 2019, arXiv 1805.09501), with its own sub-policy for each image.

    Args:
        policy: one of POLICIES.
        mean: mean color of the images, in 0..1, which fills what comes from outside of an image.

    Raises:
        ValueError: there is no such policy.
    """

    def __init__(self, policy: str, mean: tuple[float, float, float]):
        if policy not in POLICIES:
            raise ValueError(f"auto_augment must be one of {', '.join(POLICIES)}, not {policy}")
        self.policy = policy
        self.fill = [round(255 * value) for value in mean]

    def sample_params(self, count: int, generator: torch.Generator) -> OperationParams:
        """A seed for each of `count` images."""
        return OperationParams(torch.randint(2**62, (count,), generator=generator))

    def apply(self, images: Tensor, params: OperationParams) -> Tensor:
        """[B, 3, S, S] uint8 -> the same shape, on the same device; Pillow does the work, on the CPU."""
        transforms = torchvision().transforms
        augment = transforms.AutoAugment(transforms.AutoAugmentPolicy(self.policy), fill=self.fill)
        augmented = []
        for pixels, seed in zip(images.permute(0, 2, 3, 1).cpu().numpy(), params.seeds.tolist(), strict=True):
            with torch.random.fork_rng(devices=[]):  # torchvision takes no generator
                torch.default_generator.manual_seed(seed)
                augmented.append(np.asarray(augment(Image.fromarray(pixels))))
        return torch.from_numpy(np.stack(augmented)).permute(0, 3, 1, 2).to(images.device)


class Cutout:
    """A square of the mean color at a random place (DeVries and Taylor, arXiv 1708.04552).

    Its center is uniform over the image, so that a part of the square may lie outside.

    Args:
        side: of the square, in pixels; 0 for none.
        size: width and height of the images.

    Raises:
        ValueError: the square is larger than an image.
    """

    def __init__(self, side: int, size: int):
        if not 0 <= side <= size:
            raise ValueError(f"cutout must be 0 to {size} pixels (half of the image is usual), not {side}")
        self.side = side
        self.size = size

    def sample_centers(self, count: int, generator: torch.Generator) -> Tensor:
        """Row and column of the center for each of `count` images, [count, 2]."""
        return torch.randint(self.size, (count, 2), generator=generator)

    def apply(self, images: Tensor, centers: Tensor) -> Tensor:
        """Change normalized images [B, 3, S, S], in which the mean color is 0, in place; centers [B, 2]."""
        first = centers.to(images.device)[:, :, None] - self.side // 2  # [B, 2, 1]
        steps = torch.arange(self.size, device=images.device)
        rows, columns = ((steps >= first) & (steps < first + self.side)).unbind(1)  # [B, S] each
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
