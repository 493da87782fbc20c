"""What all data loaders here have in common: their arguments, the order of an epoch, the test distributions."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from base.base_data_loader import BaseDataLoader, ImageSource, TrainedOn
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS, check_distributions, distribution_indices
from data_loader.samplers import balanced_order, batch_slices, shard
from utils.errors import UserError
from utils.seed import TRAINING, epoch_generator


class ImageDataLoader(BaseDataLoader):
    """Images of a long-tailed training set, and of a test set that test distributions are chosen from.

    Args:
        batch_size: global batch.
        shuffle: visit the training images in random order.
        distributions: test distributions to evaluate: "forward50", "uniform", "backward2", ...
        balanced: sample classes, not images, uniformly, with replacement; `shuffle` then has no effect.
        val_fraction: part of every class's training images that is not trained on but validates, see `hold_out`; 0, the
            published protocol, has the test images validate where there is no list of others.
        flip: whether an image may be mirrored: in training, in random views and in averaged ones. False where mirrored
            images may be of another class.
        color_jitter: brightness, contrast and saturation jitter in training; 0 for none.
        rand_augment: operations of torchvision's RandAugment on each training image; 0 for none.
        rand_augment_magnitude: their strength, 0 to 30.
        trained_on: what a checkpoint says of the data, in their place; then they are not read.

    Raises:
        ValueError: an argument is out of range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        batch_size: int,
        shuffle: bool = True,
        distributions: list[str] = CIFAR_DISTRIBUTIONS,
        balanced: bool = False,
        val_fraction: float = 0.0,
        flip: bool = True,
        color_jitter: float = 0.0,
        rand_augment: int = 0,
        rand_augment_magnitude: int = 9,  # torchvision's default
        trained_on: TrainedOn | None = None,
    ):
        super().__init__(batch_size)
        if not 0 <= color_jitter < math.inf:
            raise ValueError(f"color_jitter must be at least 0 (0.4 is usual), not {color_jitter}")
        if not 0 <= rand_augment <= 10:
            raise ValueError(f"rand_augment must be 0 to 10 operations (2 is usual), not {rand_augment}")
        if not 0 <= rand_augment_magnitude <= 30:
            raise ValueError(f"rand_augment_magnitude must be 0 to 30, not {rand_augment_magnitude}")
        self.shuffle = shuffle
        self.distributions = check_distributions(distributions)
        self.balanced = balanced
        self.val_fraction = val_fraction
        self.mirror = flip
        self.color_jitter = color_jitter
        self.rand_augment = rand_augment
        self.rand_augment_magnitude = rand_augment_magnitude
        if trained_on:
            self.has_data = False
            self.cls_num_list = list(trained_on.cls_num_list)
            self.class_map = trained_on.class_map
            if trained_on.class_names:
                self.class_names = list(trained_on.class_names)

    @property
    def epoch_size(self) -> int:
        """Samples in an epoch."""
        return sum(self.cls_num_list)

    def _slices(self) -> list[slice]:
        return batch_slices(self.epoch_size, self.batch_size, smallest=2 * self.world_size)

    def __len__(self) -> int:
        return len(self._slices())

    def _epoch(self, targets: Tensor) -> tuple[Tensor, list[slice], torch.Generator]:
        """The order of this epoch's images, this process's shards of its batches, and what draws their augmentation.

        Args:
            targets: labels of the training images, [N].
        """
        generator = epoch_generator(self.seed, self.epoch, TRAINING)
        if self.balanced:
            order = balanced_order(targets, self.epoch_size, generator)
        elif self.shuffle:
            order = torch.randperm(len(targets), generator=generator)
        else:
            order = torch.arange(len(targets))
        batches = self._slices()[self.first_batch :]
        return order, [shard(batch, self.rank, self.world_size) for batch in batches], generator

    def test_distributions(self) -> dict[str, np.ndarray]:
        return distribution_indices(self.test.targets.numpy(), self.cls_num_list, self.distributions)

    def held_out(self) -> ImageSource:
        """The validation images, where they are neither training nor test images.

        Raises:
            UserError: there are none.
        """
        self.check_data()
        if not self.has_held_out_validation:
            raise UserError(
                "The data have no validation images that are neither training nor test images: train with "
                "data_loader;args;val_fraction=0.05, or give labeled images of your own."
            )
        return self.validation

    def check_data(self) -> None:
        """Raise UserError where there are no images, of training or for testing."""
        if not self.has_data:
            raise UserError(
                "This run was opened without its data, which is enough to predict images and no more: open it with "
                "load_run(path), where the data are."
            )

    def check_view_number(self, number: int) -> None:
        """Raise ValueError where there is no mild view of that number."""
        if number < 0 or (number == 1 and not self.mirror):
            raise ValueError(f"there is no mild view {number} here; there are {self.mild_view_numbers(1)} and above")


def digest(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of bytes or arrays, its first half in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.tobytes() if isinstance(part, np.ndarray) else part)
    return whole.hexdigest()[:32]
