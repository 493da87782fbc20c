import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_loader.tensor_transforms import (
    CropFlipRotate,
    GeometricParams,
    ViewAugmentation,
    ViewParams,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    luma,
    normalize,
    rotation_coefficients,
)
from utils.seed import epoch_generator
from utils.torchvision_import import torchvision


def random_params(count: int, size: int = 32):
    """Parameters, with the angles that torchvision needs to repeat them."""
    generator = torch.Generator().manual_seed(5)
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    degrees = torch.rand(count, generator=generator) * 30 - 15
    return GeometricParams(top, left, flip, rotation_coefficients(degrees, size)), degrees


def with_pillow(image: torch.Tensor, given: GeometricParams, degrees: torch.Tensor, i: int, size: int) -> np.ndarray:
    functional = torchvision().transforms.functional
    photo = functional.pad(Image.fromarray(image.permute(1, 2, 0).numpy()), 4)
    photo = functional.crop(photo, int(given.top[i]), int(given.left[i]), size, size)
    photo = functional.hflip(photo) if given.flip[i] else photo
    return np.asarray(functional.rotate(photo, float(degrees[i])))


@pytest.mark.parametrize("size", [32, 16, 31])
def test_training_augmentation_equals_torchvision_pixel_for_pixel(size):
    images = torch.randint(1, 256, (300, 3, size, size), dtype=torch.uint8)
    given, degrees = random_params(300, size)
    result = CropFlipRotate(size).apply(images, given)
    for i in range(300):
        expected = with_pillow(images[i], given, degrees, i, size)
        np.testing.assert_array_equal(result[i].permute(1, 2, 0).numpy(), expected)


def test_normalize_is_torchvisions():
    transforms = torchvision().transforms
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = pipeline(Image.fromarray(image.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(normalize(image[None], mean, std)[0], expected, rtol=0, atol=0)


def test_parameters_cover_their_ranges_and_depend_on_the_epoch():
    augmentation = CropFlipRotate(32)
    params = augmentation.sample_params(4000, epoch_generator(1, 1))
    assert params.top.unique().tolist() == list(range(9)) and params.left.unique().tolist() == list(range(9))
    assert 0.45 < params.flip.float().mean() < 0.55
    angles = torch.rad2deg(torch.atan2(params.rotation[:, 3].double(), params.rotation[:, 0].double()))
    assert 14.5 < angles.max() < 15.01 and -15.01 < angles.min() < -14.5
    assert not torch.equal(params.top, augmentation.sample_params(4000, epoch_generator(1, 2)).top)
    assert torch.equal(params.top, augmentation.sample_params(4000, epoch_generator(1, 1)).top)
    assert not CropFlipRotate(32, flip=False).sample_params(100, epoch_generator(1, 1)).flip.any()


@pytest.fixture
def photos():
    """Smooth random images, [40, 3, 32, 32] uint8."""
    coarse = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return (torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") * 255).byte()


@pytest.mark.parametrize(
    ("ours", "name", "factors"),
    [
        (adjust_brightness, "adjust_brightness", (0.6, 1.0, 1.4)),
        (adjust_contrast, "adjust_contrast", (0.6, 1.0, 1.4)),
        (adjust_saturation, "adjust_saturation", (0.6, 1.0, 1.4)),
        (adjust_hue, "adjust_hue", (-0.1, 0.0, 0.05, 0.1)),
    ],
)
def test_colors_change_as_torchvision_changes_them(photos, ours, name, factors):
    for factor in factors:
        theirs = getattr(torchvision().transforms.functional, name)
        result = ours(photos.float() / 255, torch.full((40, 1, 1, 1), factor))
        torch.testing.assert_close(result, theirs(photos.float() / 255, factor), rtol=0, atol=2e-4)
        channels_last = photos.permute(0, 2, 3, 1).numpy()
        pillow = np.stack([np.asarray(theirs(Image.fromarray(photo), factor)) for photo in channels_last])
        assert np.abs(result.numpy() * 255 - pillow.transpose(0, 3, 1, 2)).mean() < 1.2  # it rounds to 8 bits, hue too


def test_gray_is_pillows(photos):
    expected = np.stack([np.asarray(Image.fromarray(p.numpy()).convert("L")) for p in photos.permute(0, 2, 3, 1)])
    assert np.abs(luma(photos.float())[:, 0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_gaussian_and_close_to_pillows(photos, sigma):
    result = gaussian_blur(photos.float(), torch.full((40,), sigma))
    blurred = [Image.fromarray(p.numpy()).filter(ImageFilter.GaussianBlur(sigma)) for p in photos.permute(0, 2, 3, 1)]
    expected = np.stack([np.asarray(photo) for photo in blurred]).transpose(0, 3, 1, 2)
    assert np.abs(result.numpy() - expected).mean() < 1
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, torch.tensor([sigma])), flat)
    point = torch.zeros(1, 3, 33, 33)
    point[:, :, 16, 16] = 1
    line = gaussian_blur(point, torch.tensor([sigma]))[0, 0, 16]
    torch.testing.assert_close(line, line.flip(0))
    torch.testing.assert_close(line[17] / line[16], torch.tensor(np.exp(-0.5 / sigma**2), dtype=torch.float32))


def test_views_stay_in_range_and_do_not_depend_on_the_batch(photos):
    augmentation = ViewAugmentation(32)
    given = augmentation.sample_params(40, epoch_generator(1, 0))
    views, some = augmentation.apply(photos, given), torch.tensor([31, 4, 17])
    assert views.shape == (40, 3, 32, 32) and views.min() >= 0 and views.max() <= 1 + 1e-6
    alone = augmentation.apply(photos[some], given.select(some))
    torch.testing.assert_close(alone, views[some], rtol=0, atol=1e-6)


def test_view_probabilities():
    given = ViewAugmentation(32).sample_params(20_000, epoch_generator(3, 0))
    assert isinstance(given, ViewParams)
    for field, probability in ((given.jitter, 0.8), (given.grayscale, 0.2), (given.blur, 0.2), (given.crop.flip, 0.5)):
        assert abs(float(field.float().mean()) - probability) < 0.02
    low, high = given.factors.amin(dim=0), given.factors.amax(dim=0)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=0.002, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=0.002, rtol=0)
    assert (given.order.sort(dim=1).values == torch.arange(4)).all()
