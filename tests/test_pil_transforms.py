import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_loader import pil_transforms
from utils.torchvision_import import torchvision


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    coarse = np.random.RandomState(0).randint(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC)


def test_color_jitter_is_torchvisions_pixel_for_pixel(photo):
    ours, theirs = pil_transforms.ColorJitter(0.4), torchvision().transforms.ColorJitter(0.4, 0.4, 0.4)
    for seed in range(60):
        torch.manual_seed(seed)
        mine = np.asarray(ours(photo))
        torch.manual_seed(seed)
        np.testing.assert_array_equal(mine, np.asarray(theirs(photo)), err_msg=str(seed))


def test_training_pipeline_is_torchvisions(photo):
    t = torchvision().transforms
    theirs = t.Compose([t.RandomResizedCrop(64), t.RandomHorizontalFlip(), t.ColorJitter(0.4, 0.4, 0.4, 0)])
    ours = pil_transforms.training(64, 0.4)
    for seed in range(10):
        torch.manual_seed(seed)
        mine = np.asarray(ours(photo))
        torch.manual_seed(seed)
        np.testing.assert_array_equal(mine, np.asarray(theirs(photo)))
    assert len(pil_transforms.training(64, 0.0).transforms) == 2


def test_views_differ_and_evaluation_repeats(photo):
    torch.manual_seed(0)
    pipeline, evaluated = pil_transforms.view(48, 0.2), pil_transforms.evaluation(224)
    first, second = pipeline(photo), pipeline(photo)
    assert first.size == second.size == (48, 48) and first != second
    assert evaluated(photo).size == (224, 224) and evaluated(photo) == evaluated(photo)


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose pixels say where they are: red is the column, green the row, blue 255 everywhere."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(73, 73), (97, 73), (73, 120)])
def test_mild_crops_lie_around_the_center_crop(width, height):
    """For S = 64 the shorter side becomes 73 pixels, which these images have: nothing is resized."""
    center = np.asarray(pil_transforms.evaluation(64)(coordinates(width, height)))
    pipeline = pil_transforms.mild_view(64, 2, mirror=True)
    torch.manual_seed(0)
    corners, flips = [], 0
    for _ in range(600):
        crop = np.asarray(pipeline(coordinates(width, height)))
        assert crop.shape == (64, 64, 3) and crop[..., 2].min() == 255  # black would be outside of the image
        flips += crop[0, 0, 0] > crop[0, -1, 0]
        corners.append((crop[..., 0].min(), crop[..., 1].min()))
    shifts = np.array(corners) - center[0, 0, :2].astype(int)
    assert shifts.min(axis=0).tolist() == [-4, -4] and shifts.max(axis=0).tolist() == [4, 4]
    assert np.abs(shifts.mean(axis=0)).max() < 0.4 and 240 < flips < 360  # within four standard errors or so


@pytest.mark.parametrize("size", [8, 13, 32, 64, 96, 224])
def test_no_mild_crop_leaves_the_image(size):
    shorter = round(size * 256 / 224)
    for width, height in ((shorter, shorter), (shorter + 1, shorter), (shorter, shorter + 2), (3 * shorter, shorter)):
        crop = pil_transforms.CropNearCenter(size, (shorter - size) // 2)
        image = Image.new("RGB", (width, height), (255, 255, 255))
        for _ in range(40):
            result = crop(image)
            assert result.size == (size, size) and result.getextrema() == ((255, 255),) * 3  # outside is black


def test_mild_views_without_crops_are_evaluation_and_its_mirror_image(photo):
    evaluated = pil_transforms.evaluation(64)(photo)
    assert pil_transforms.mild_view(64, 0, mirror=True)(photo) == evaluated
    assert pil_transforms.mild_view(64, 1, mirror=True)(photo) == ImageOps.mirror(evaluated)
    once = pil_transforms.mild_view(64, 2, mirror=False)
    columns = [np.asarray(once(coordinates(73, 73)))[0, [0, -1], 0] for _ in range(20)]
    assert all(left < right for left, right in columns)  # never mirrored
