"""Images that fit in memory: CIFAR-10, CIFAR-100 and scikit-learn's digits, as plain tensors."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_loader.class_profiles import subset_indices
from utils import distributed
from utils.errors import UserError
from utils.torchvision_import import torchvision

DIGITS_TEST_PER_CLASS = 50

#: In the order of the labels, as in the data sets' own files.
CIFAR_CLASSES = {
    "CIFAR10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "CIFAR100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
        can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
        lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
        palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
        rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
        sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
        willow_tree wolf woman worm
    """.split(),
}


class ImageSet(NamedTuple):
    """Images and their labels."""

    images: Tensor  # [N, 3, S, S] uint8
    targets: Tensor  # [N] int64

    def select(self, indices: np.ndarray) -> "ImageSet":
        chosen = torch.as_tensor(indices)
        return ImageSet(self.images[chosen], self.targets[chosen])


def load_cifar(name: str, data_dir: str | Path, train: bool) -> ImageSet:
    """CIFAR-10 or CIFAR-100 in its official files, downloaded into `data_dir` when absent.

    Args:
        name: "CIFAR10" or "CIFAR100".
        data_dir: folder that holds cifar-10-batches-py or cifar-100-python.
        train: the 50,000 training or the 10,000 test images.

    Raises:
        UserError: the files there are not CIFAR's (their MD5 sums differ), or the download failed.
    """
    dataset_class = getattr(torchvision().datasets, name)
    folder = Path(data_dir) / dataset_class.base_folder
    try:
        with distributed.first_process_first():
            dataset = dataset_class(str(data_dir), train=train, download=not folder.exists())
    except OSError as error:
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({error}): put its official python "
            f"files there, or point data_loader;args;data_dir at them."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"{folder} does not hold the official {name} files (their MD5 sums differ): remove that folder "
            "to have them downloaded, or point data_loader;args;data_dir elsewhere."
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.as_tensor(dataset.targets))


def load_digits(train: bool, image_size: int = 16, noise: float = 0.0) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (8x8 gray), enlarged without smoothing and repeated over three channels.

    The test set takes 50 images of every class, the training set the others (124 to 133 a class).

    Args:
        train: training or test images.
        image_size: width and height in pixels, a multiple of 8.
        noise: standard deviation of noise on every pixel of the enlarged images, where white is 1; the same noise
            every time.
    """
    from sklearn.datasets import load_digits as load

    gray, targets = load(return_X_y=True)
    images = torch.from_numpy((gray.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
    scale = image_size // 8
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if noise:
        noisy = images / 255 + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        images = (255 * noisy.clamp(0, 1)).round().to(torch.uint8)
    images = images.repeat(1, 3, 1, 1)
    test_indices = subset_indices(targets, [DIGITS_TEST_PER_CLASS] * 10)
    indices = np.setdiff1d(np.arange(len(targets)), test_indices) if train else test_indices
    return ImageSet(images, torch.from_numpy(targets).long()).select(indices)
