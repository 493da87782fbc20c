"""Augmentation of small images as tensor operations on whole batches, on whatever device the images are.

Every image of a batch has its own random parameters. They are sampled first (`sample_params`) and then applied
(`apply`), so that they can be repeated, split between processes and compared with Pillow.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Of the published training on CIFAR: zeros around an image before the crop, in pixels; largest rotation, in degrees.
CROP_PADDING, ROTATION = 4, 15.0


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """[B, 3, H, W], uint8 or float in 0..1 -> float32, each channel (x - mean) / std with x in 0..1."""
    if images.dtype == torch.uint8:
        images = images.float().div_(255)
    mean, std = images.new_tensor(mean), images.new_tensor(std)
    if images.is_contiguous(memory_format=torch.channels_last):  # whole pixel rows: three times as fast on a CPU
        pixel_rows = images.permute(0, 2, 3, 1).flatten(2)  # [B, H, W * 3], a view
        pixel_rows = (pixel_rows - mean.repeat(images.shape[3])).div_(std.repeat(images.shape[3]))
        return pixel_rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
    return (images - mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))


# --- Training: crop with zero padding, flip, rotation; pixel for pixel what torchvision does with Pillow. ------------


class GeometricParams(NamedTuple):
    """Parameters of crop, flip and rotation for B images."""

    top: Tensor  # [B] int64, first row of the crop in the padded image
    left: Tensor  # [B] int64, first column
    flip: Tensor  # [B] bool
    rotation: Tensor  # [B, 6] int64 from `rotation_coefficients`

    def select(self, indices: slice | Tensor) -> "GeometricParams":
        return GeometricParams(*(field[indices] for field in self))

    def to(self, device: torch.device) -> "GeometricParams":
        return GeometricParams(*(field.to(device, non_blocking=True) for field in self))


def rotation_coefficients(degrees: Tensor, size: int) -> Tensor:
    """Pillow's inverse affine map for a rotation about the center, in 16.16 fixed point.

    The pixel at (x, y) of the rotated image is the source pixel at (c0 x + c1 y + c2, c3 x + c4 y + c5) >> 16.

    Args:
        degrees: counter-clockwise angles, [B].
        size: width and height of the images.

    Returns:
        [B, 6] int64.
    """
    angle = -np.radians(degrees.double().numpy())
    cos = np.round(np.cos(angle), 15)
    sin = np.round(np.sin(angle), 15)
    center = size / 2
    c2 = -cos * center - sin * center + center
    c5 = sin * center - cos * center + center
    exact = np.stack([cos, sin, c2 + (cos + sin) * 0.5, -sin, cos, c5 + (cos - sin) * 0.5], axis=1)
    return torch.from_numpy(np.floor(exact * 65536 + 0.5).astype(np.int64))


@dataclass(frozen=True)
class CropFlipRotate:
    """Random crop with zero padding, random horizontal flip, random rotation (nearest neighbor, zero fill).

    Args:
        size: width and height of the images.
        padding: zeros added on every side before the crop.
        flip: whether images may be mirrored.
        degrees: rotations are uniform in [-degrees, degrees].
    """

    size: int
    padding: int = CROP_PADDING
    flip: bool = True
    degrees: float = ROTATION

    def sample_params(self, count: int, generator: torch.Generator) -> GeometricParams:
        """Random parameters of `count` images, on the CPU."""
        offsets = torch.randint(0, 2 * self.padding + 1, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        degrees = (torch.rand(count, generator=generator) * 2 - 1) * self.degrees
        return GeometricParams(offsets[0], offsets[1], flip, rotation_coefficients(degrees, self.size))

    def apply(self, images: Tensor, params: GeometricParams) -> Tensor:
        """[B, 3, S, S] and params of B images on the same device -> [B, 3, S, S]; one gather does all three steps."""
        steps = torch.arange(self.size, device=images.device)
        c = params.rotation.T[:, :, None, None]  # six of [B, 1, 1]
        x = steps[None, None, :]
        y = steps[None, :, None]
        # Backwards from the result to the source: undo the rotation, the flip, the crop.
        source_x = (c[0] * x + c[1] * y + c[2]) >> 16  # [B, S, S]
        source_y = (c[3] * x + c[4] * y + c[5]) >> 16
        inside = _within(source_x, self.size) & _within(source_y, self.size)
        source_x = torch.where(params.flip[:, None, None], self.size - 1 - source_x, source_x)
        source_x = source_x + (params.left - self.padding)[:, None, None]
        source_y = source_y + (params.top - self.padding)[:, None, None]
        inside &= _within(source_x, self.size) & _within(source_y, self.size)
        return _gather_pixels(images, source_y, source_x, inside)


def _within(coordinate: Tensor, size: int) -> Tensor:
    return (coordinate >= 0) & (coordinate < size)


def _gather_pixels(images: Tensor, y: Tensor, x: Tensor, inside: Tensor) -> Tensor:
    """images [B, C, S, S] at rows y and columns x [B, S, S], zero where not inside."""
    size = images.shape[-1]
    index = torch.where(inside, y * size + x, 0).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    pixels = images.flatten(2).gather(2, index).view_as(images)
    return pixels.mul_(inside[:, None])


# --- Test time: two random views of every image (MoCo v2's augmentation, arXiv 2003.04297). -------------------------


class ViewParams(NamedTuple):
    """Parameters of one random view of each of B images."""

    crop: GeometricParams  # crop and flip; the rotation is by 0 degrees
    jitter: Tensor  # [B] bool, whether colors change
    factors: Tensor  # [B, 4] brightness, contrast, saturation factors; hue shift
    order: Tensor  # [B, 4] int64, order of these four, a permutation of 0..3 in each row
    grayscale: Tensor  # [B] bool
    blur: Tensor  # [B] bool
    sigma: Tensor  # [B] of the blur, in pixels

    def select(self, indices: slice | Tensor) -> "ViewParams":
        return ViewParams(self.crop.select(indices), *(field[indices] for field in self[1:]))

    def to(self, device: torch.device) -> "ViewParams":
        return ViewParams(self.crop.to(device), *(field.to(device, non_blocking=True) for field in self[1:]))


@dataclass(frozen=True)
class ViewAugmentation:
    """Random crop with zero padding, color jitter, grayscale, Gaussian blur, flip, for small images.

    Departs from Pillow in that colors are not rounded to 8 bits between the operations and the blur is a true Gaussian
    (Pillow approximates one by box filters).

    Args:
        size: width and height of the images.
        flip: whether images may be mirrored.
    """

    size: int
    flip: bool = True

    def sample_params(self, count: int, generator: torch.Generator) -> ViewParams:
        """Random parameters of one view of each of `count` images, on the CPU."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(count).uniform_(low, high, generator=generator)

        def chosen(probability: float) -> Tensor:
            return torch.rand(count, generator=generator) < probability

        crop = CropFlipRotate(self.size, flip=self.flip, degrees=0.0).sample_params(count, generator)
        factors = [uniform(0.6, 1.4) for _ in ("brightness", "contrast", "saturation")]
        return ViewParams(
            crop,
            jitter=chosen(0.8),
            factors=torch.stack([*factors, uniform(-0.1, 0.1)], dim=1),
            order=torch.rand(count, 4, generator=generator).argsort(dim=1),
            grayscale=chosen(0.2),
            blur=chosen(0.2),
            sigma=uniform(0.1, 2.0),
        )

    def apply(self, images: Tensor, params: ViewParams) -> Tensor:
        """One view of each image: [B, 3, S, S] uint8 and params on the same device -> [B, 3, S, S] in 0..1."""
        images = CropFlipRotate(self.size).apply(images, params.crop).float().div_(255)
        chosen = params.jitter.nonzero()[:, 0]
        images[chosen] = color_jitter(images[chosen], params.factors[chosen], params.order[chosen])
        chosen = params.grayscale.nonzero()[:, 0]
        images[chosen] = luma(images[chosen]).expand(-1, 3, -1, -1)
        chosen = params.blur.nonzero()[:, 0]
        images[chosen] = gaussian_blur(images[chosen], params.sigma[chosen])
        return images


def luma(images: Tensor) -> Tensor:
    """ITU-R 601 gray value: [B, 3, H, W] -> [B, 1, H, W]."""
    weights = images.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = luma(images).mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(images), images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle, through HSV."""
    value, channel = images.max(dim=1)  # [B, H, W]
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, 1)
    r, g, b = images.unbind(1)
    sector = torch.where(
        channel == 0, (g - b) / safe, torch.where(channel == 1, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    sector = sector + 6 * shift[:, 0]  # hue in sixths of the circle
    shades = []
    for offset in (5, 3, 1):  # red, green, blue
        k = (offset + sector) % 6
        shades.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(shades, dim=1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply the four ADJUSTMENTS, to each image in an order of its own.

    Args:
        images: [B, 3, H, W] in 0..1.
        factors: brightness, contrast, saturation factors and hue shift, [B, 4].
        order: [B, 4], a permutation of 0..3 in each row.
    """
    images = images.clone()
    for step in order.unbind(1):  # [B]: which adjustment comes next for each image
        for kind, adjust in enumerate(ADJUSTMENTS):
            chosen = (step == kind).nonzero()[:, 0]
            images[chosen] = adjust(images[chosen], factors[chosen, kind].view(-1, 1, 1, 1))
    return images


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int = 8) -> Tensor:
    """Gaussian blur with a standard deviation per image; the border is repeated outwards.

    A blur of S pixels is a [S, S] matrix: rows and columns are blurred by two batched matrix products.

    Args:
        images: [B, 3, S, S].
        sigma: [B], in pixels, at most radius / 4 for the tails to be negligible.
        radius: pixels beyond which the kernel is cut off.
    """
    size = images.shape[-1]
    target = torch.arange(size, device=images.device)[:, None]
    source = torch.arange(-radius, size + radius, device=images.device)[None]
    distance = (target - source).float()  # [S, S + 2 radius]
    kernel = torch.exp(-0.5 * (distance / sigma[:, None, None]) ** 2) * (distance.abs() <= radius)
    kernel = kernel / kernel.sum(dim=2, keepdim=True)
    inner = kernel[:, :, radius : radius + size].clone()
    inner[:, :, 0] += kernel[:, :, :radius].sum(dim=2)
    inner[:, :, -1] += kernel[:, :, radius + size :].sum(dim=2)
    inner = inner[:, None]
    return inner @ images @ inner.transpose(2, 3)
