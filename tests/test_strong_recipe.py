"""AutoAugment, Cutout, and the config of the strong recipe."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from data_loader.datasets import ImageSet
from data_loader.strong_transforms import AutoAugment, Cutout
from trainer.registry import read_config
from utils.errors import UserError
from utils.parse_config import read_json
from utils.torchvision_import import torchvision

CONFIG = read_json(ROOT / "configs" / "config_cifar100_ir100_tade_strong.json")


class RandomImages(ImbalanceCIFAR100DataLoader):
    """CIFAR-100-LT of 500 random images in its largest class and 5 in its rarest, without the files."""

    def load(self, train: bool) -> ImageSet:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (1000, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageSet(images.repeat_interleave(50, dim=0), torch.arange(100).repeat_interleave(500))


def epoch(rank: int = 0, world_size: int = 1, first_batch: int = 0, **options) -> list[torch.Tensor]:
    loader = RandomImages("absent", 64, imb_factor=0.002, **options)
    loader.prepare(torch.device("cpu"), 3, rank, world_size)
    loader.set_epoch(2, first_batch)
    return [images for images, _ in loader]


def test_an_epoch_repeats_whole_from_within_and_in_two_processes():
    options = {"rotation": 0.0, "auto_augment": "cifar10", "cutout": 16}
    state = torch.get_rng_state()
    whole = epoch(**options)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, whole[3:], epoch(first_batch=3, **options)))
    halves = [epoch(rank, 2, **options) for rank in (0, 1)]
    assert all(torch.equal(batch, torch.cat(parts)) for batch, *parts in zip(whole, *halves, strict=True))
    plain, colors = epoch(rotation=0.0)[0], epoch(rotation=0.0, auto_augment="cifar10")[0]
    assert plain.shape == colors.shape and not torch.equal(plain, colors)
    changed = (plain != colors).flatten(1).any(1).float().mean()
    assert 0.7 < changed < 1  # some sub-policies are drawn and not applied


def test_autoaugment_is_torchvisions_with_the_mean_color_outside():
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    ours = AutoAugment("cifar10", (0.5, 0.25, 0.75))
    params = ours.sample_params(20, torch.Generator().manual_seed(0))
    transforms = torchvision().transforms
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128, 64, 191])
    for image, seed, augmented in zip(images, params.seeds.tolist(), ours.apply(images, params), strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert augmented.permute(1, 2, 0).tolist() == np.asarray(expected).tolist()


def test_cutout_hides_a_square_that_may_hang_over_the_edge():
    centers = Cutout(16, 32).sample_centers(4000, torch.Generator().manual_seed(0))
    hidden = Cutout(16, 32).apply(torch.ones(4000, 3, 32, 32), centers) == 0
    assert (hidden == hidden[:, :1]).all()
    area = hidden[:, 0].sum((1, 2))
    assert area.max() == 256 and area.min() == 64
    assert area.float().mean() == pytest.approx(14**2, rel=0.03)  # 2 of 16 pixels lie outside, on average
    rows, columns = centers[0].tolist()
    assert hidden[0, 0, max(rows - 8, 0) : rows + 8, max(columns - 8, 0) : columns + 8].all()
    assert not (Cutout(0, 32).apply(torch.ones(2, 3, 32, 32), centers[:2]) == 0).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"auto_augment": "cifar100"}, "one of cifar10, imagenet, svhn, not cifar100"),
        ({"cutout": 33}, "0 to 32 pixels"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RandomImages("absent", 64, **options)


def test_the_config_is_accepted():
    config = read_config(CONFIG)
    assert config.build("trainer").ema_decay == 0.999 and config.build("data_loader").cutout.side == 16
    with pytest.raises(UserError, match="ema_decay must be at least 0 and below 1"):
        read_config({**CONFIG, "trainer": {"epochs": 1, "ema_decay": 1.0}}).build("trainer")
