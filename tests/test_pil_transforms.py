import numpy as np
import pytest
import torch
from PIL import Image

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


def test_views_and_evaluation_sizes(photo):
    torch.manual_seed(0)
    pipeline = pil_transforms.view(48, 0.2)
    first, second = pipeline(photo), pipeline(photo)
    assert first.size == second.size == (48, 48) and first != second
    evaluated = pil_transforms.evaluation(224)
    assert evaluated(photo).size == (224, 224) and evaluated(photo) == evaluated(photo)
