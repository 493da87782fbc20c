"""Mixup: training on mixtures of two images and of their losses."""

import numpy as np
import torch
from torch import Tensor


def mixup(
    images: Tensor, target: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """Mix every image of a batch with another one (Zhang et al., ICLR 2018, arXiv 1710.09412, equation 1).

    One lambda ~ Beta(alpha, alpha) a batch. The larger share is an image's own, so that training accuracy keeps its
    meaning; over all pairs of a batch this is the same as not ordering the shares.

    Args:
        images: [B, 3, H, W].
        target: their classes, [B].
        alpha: 0.4 for long-tailed CIFAR (BalPoE, arXiv 2305.14217); 0 leaves the batch as it is.
        generator: of lambda and the partners, on the CPU.

    Returns:
        The mixtures [B, 3, H, W], in the memory format of the images; the shares of the loss, in 0..1, each with its
        targets [B]: those of the images, then those of their partners.
    """
    if not alpha:
        return images, [(1.0, target)]
    own = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator))).beta(alpha, alpha)
    share = max(own, 1 - own)
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    return torch.lerp(images[partner], images, share), [(share, target), (1 - share, target[partner])]
