"""Augmentation of large images, one by one in worker processes: torchvision's transforms on Pillow images.

Each pipeline maps an RGB image to an RGB image of S x S; turning it into numbers and normalizing is done for whole
batches on the training device, which is exact and leaves the workers a quarter of the bytes to move.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from utils.torchvision_import import torchvision

Pipeline = Callable[[Image.Image], Image.Image]


def training(
    size: int,
    jitter: float,
    flip: bool = True,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    rand_augment: int = 0,
    magnitude: int = 9,
) -> Pipeline:
    """Random resized crop, flip, RandAugment, and color jitter of brightness, contrast and saturation.

    Args:
        size: S.
        jitter: strength of the color jitter; 0 for none.
        flip: whether images may be mirrored.
        crop_scale: smallest and largest part of an image that a crop shows, as fractions of its area.
        rand_augment: operations of RandAugment (arXiv 1909.13719); 0 for none.
        magnitude: their strength, 0 to 30.
    """
    t = torchvision().transforms
    steps: list[Pipeline] = [t.RandomResizedCrop(size, scale=crop_scale)]
    if flip:
        steps.append(t.RandomHorizontalFlip())
    if rand_augment:
        steps.append(t.RandAugment(rand_augment, magnitude))
    if jitter:
        steps.append(ColorJitter(jitter))
    return t.Compose(steps)


class ColorJitter:
    """torchvision's ColorJitter of brightness, contrast and saturation: the same factors and pixels, in less time.

    Brightness and contrast change each value by itself, so a table of 256 values replaces the blending of two images.

    Args:
        strength: factors are uniform in [1 - strength, 1 + strength].
    """

    def __init__(self, strength: float):
        self.jitter = torchvision().transforms.ColorJitter(strength, strength, strength)

    def __call__(self, image: Image.Image) -> Image.Image:
        order, brightness, contrast, saturation, _ = self.jitter.get_params(
            self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, self.jitter.hue
        )
        for kind in order.tolist():
            if kind == 0:
                image = blend_with_value(image, 0, brightness)
            elif kind == 1:
                histogram = image.convert("L").histogram()
                mean = float(np.arange(256) @ histogram) / sum(histogram)
                image = blend_with_value(image, int(mean + 0.5), contrast)
            elif kind == 2:
                image = ImageEnhance.Color(image).enhance(saturation)
        return image


def blend_with_value(image: Image.Image, value: int, factor: float) -> Image.Image:
    """What Pillow's Image.blend makes of a uniform image of `value` and `image`, by a table, which is faster."""
    table = np.float32(value) + np.float32(factor) * (np.arange(256, dtype=np.float32) - np.float32(value))
    return image.point(table.clip(0, 255).astype(np.uint8).tolist() * 3)


def evaluation(size: int) -> Pipeline:
    """Shorter side to S * 256 / 224, center crop."""
    t = torchvision().transforms
    return t.Compose([t.Resize(shorter_side(size)), t.CenterCrop(size)])


def shorter_side(size: int) -> int:
    """What the shorter side is scaled to before an image of S x S is cropped."""
    return round(size * 256 / 224)


def mild_view(size: int, number: int, mirror: bool) -> Pipeline:
    """One of the views whose logits are averaged: 0 as in evaluation, 1 its mirror image, from 2 on a crop near it.

    Args:
        size: S.
        number: which view; all from 2 on are alike but for what is random.
        mirror: whether crops may be mirrored.
    """
    t = torchvision().transforms
    if number < 2:
        return t.Compose([evaluation(size), ImageOps.mirror]) if number else evaluation(size)
    steps = [t.Resize(shorter_side(size)), CropNearCenter(size, (shorter_side(size) - size) // 2)]
    return t.Compose([*steps, t.RandomHorizontalFlip()] if mirror else steps)


class CropNearCenter:
    """The center crop, moved at random: both shifts are uniform whole numbers in [-reach, reach].

    Args:
        size: S, width and height of the crop.
        reach: at most half of what the shorter side has beyond S, so that no crop leaves the image.
    """

    def __init__(self, size: int, reach: int):
        self.size, self.reach = size, reach

    def __call__(self, image: Image.Image) -> Image.Image:
        right, down = torch.randint(-self.reach, self.reach + 1, (2,)).tolist()
        left = round((image.width - self.size) / 2) + right
        top = round((image.height - self.size) / 2) + down
        return image.crop((left, top, left + self.size, top + self.size))


def view(size: int, smallest: float, mirror: bool = True) -> Pipeline:
    """One random view for test-time training (MoCo v2's augmentation, arXiv 2003.04297).

    Args:
        size: S.
        smallest: least share of the image that the random resized crop keeps.
        mirror: whether the view may be mirrored.
    """
    t = torchvision().transforms
    steps = [
        t.RandomResizedCrop(size, scale=(smallest, 1.0)),
        t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        t.RandomGrayscale(p=0.2),
        t.RandomApply([_RandomBlur(0.1, 2.0)], p=0.5),
    ]
    return t.Compose([*steps, t.RandomHorizontalFlip()] if mirror else steps)


class _RandomBlur:
    """Gaussian blur with a random standard deviation, in pixels."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(self.low, self.high))))
