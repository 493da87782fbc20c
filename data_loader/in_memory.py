"""Data loader for small images: all of them in memory, augmented as whole batches on the training device."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base.base_data_loader import BaseDataLoader, EvaluationBatches, TrainedOn, digest
from data_loader.augmentation import RAND_AUGMENT_MAGNITUDE, check_augmentation
from data_loader.class_profiles import (
    check_distributions,
    distribution_indices,
    held_out_counts,
    hold_out,
    long_tail_counts,
    subset_indices,
)
from data_loader.datasets import ImageSet
from data_loader.image_lists import ImageList, list_folder, read_small
from data_loader.samplers import balanced_order, batch_slices, epoch_order, shard
from data_loader.tensor_appearance import ColorJitter, RandAugmentGroups
from data_loader.tensor_transforms import CROP_PADDING, ROTATION, CropFlipRotate, ViewAugmentation, normalize
from utils.errors import UserError
from utils.seed import MILD_VIEWS, TRAINING, VIEWS, epoch_generator

EVALUATION_BATCH = {"cpu": 64, "cuda": 1024}  # what fits the cache; what fills the GPU


class InMemoryDataLoader(BaseDataLoader):
    """Small images: one uint8 tensor on the training device, augmented as whole batches.

    Subclasses set `image_size`, `mean`, `std`, `largest_class`, `classes`, `mirror` (True) and implement `load`.

    Args:
        batch_size: global batch.
        shuffle: visit the training images in random order.
        imb_factor: images of the rarest class over those of the largest, in (0, 1].
        distributions: test distributions to evaluate, e.g. ["forward50", "uniform"].
        num_workers: accepted for the reference's configs; nothing is left for worker processes to do.
        balanced: sample classes, not images, uniformly, with replacement; an epoch has as many samples as without, and
            `shuffle` has no effect.
        val_fraction: part of every class's training images that is not trained on but validates, see `hold_out`; 0, the
            published protocol, has the test images validate.
        flip: whether an image may be mirrored: in training, in random views and in averaged ones; None for `mirror`.
        crop_padding: pixels of zeros around an image in training, before a random crop of its size.
        rotation: rotations in training are uniform in [-rotation, rotation] degrees.
        color_jitter: brightness, contrast and saturation jitter in training; 0 for none.
        rand_augment: operations of torchvision's RandAugment on each training image; 0 for none.
        rand_augment_magnitude: their strength, 0 to 30.
        trained_on: what a checkpoint says of the data, in their place; then they are not loaded.

    Raises:
        ValueError: an argument is out of range.
    """

    preparation = "A picture of another size is scaled on its shorter side (bilinear), and its middle is cropped."
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: int
    largest_class: int
    #: Paths of the test images, where these were read from files.
    file_names: list[str] | None = None

    def __init__(
        self,
        batch_size: int,
        shuffle: bool,
        imb_factor: float,
        distributions: list[str],
        num_workers: int,
        balanced: bool = False,
        val_fraction: float = 0.0,
        flip: bool | None = None,
        crop_padding: int = CROP_PADDING,
        rotation: float = ROTATION,
        color_jitter: float = 0.0,
        rand_augment: int = 0,
        rand_augment_magnitude: int = RAND_AUGMENT_MAGNITUDE,
        trained_on: TrainedOn | None = None,
    ):
        super().__init__(batch_size)
        check_augmentation(color_jitter, rand_augment, rand_augment_magnitude)
        if not 0 <= crop_padding <= self.image_size or not 0 <= rotation <= 180:
            raise ValueError(
                f"crop_padding must be 0 to {self.image_size} pixels and rotation 0 to 180 degrees, not {crop_padding} "
                f"and {rotation}"
            )
        self.mirror = self.mirror if flip is None else flip
        self.shuffle = shuffle
        self.balanced = balanced
        self.val_fraction = val_fraction
        self.has_held_out_validation = val_fraction > 0
        self.subset_counts = long_tail_counts(self.largest_class, self.classes, imb_factor)
        held_out = held_out_counts(self.subset_counts, val_fraction)
        self.cls_num_list = [whole - part for whole, part in zip(self.subset_counts, held_out, strict=True)]
        self.distributions = check_distributions(distributions)
        self.augmentation = CropFlipRotate(self.image_size, crop_padding, self.mirror, rotation)
        self.appearance = [
            *([RandAugmentGroups(rand_augment, rand_augment_magnitude, batch_size)] if rand_augment else []),
            *([ColorJitter(color_jitter)] if color_jitter else []),
        ]
        self.views = ViewAugmentation(self.image_size, flip=self.mirror)
        self.mild_crop = CropFlipRotate(self.image_size, flip=self.mirror, degrees=0.0)
        if trained_on:
            self.take(trained_on)

    def load(self, train: bool) -> ImageSet:
        """The whole training set, or the balanced test set."""
        raise NotImplementedError

    @cached_property
    def _split(self) -> tuple[ImageSet, ImageSet]:
        """The long-tailed training set, and what is held out of it."""
        self._check_data()
        whole = self.load(train=True)
        subset = whole.select(subset_indices(whole.targets.numpy(), self.subset_counts))
        trained, held_out = hold_out(subset.targets.numpy(), self.subset_counts, self.val_fraction)
        return subset.select(trained), subset.select(held_out)

    @property
    def train_set(self) -> ImageSet:
        """The long-tailed training set."""
        return self._split[0]

    @cached_property
    def test_set(self) -> ImageSet:
        self._check_data()
        return self.load(train=False)

    def fingerprint(self, read_images: bool = True) -> dict[str, str]:
        """Of labels and pixels."""
        if not read_images:
            return {}
        images, targets = self.train_set
        return {"labels": digest(targets.numpy()), "pixels": digest(images.numpy())}

    def __len__(self) -> int:
        return len(batch_slices(sum(self.cls_num_list), self.batch_size, smallest=2 * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, self.epoch, TRAINING)
        count = len(self.train_set.targets)
        if self.balanced:
            order = balanced_order(self.train_set.targets, count, generator)
        else:
            order = epoch_order(count, self.shuffle, generator)
        order = order.to(self.device)
        params = self.augmentation.sample_params(count, generator).to(self.device)
        further = [change.sample_params(count, generator) for change in self.appearance]
        images, targets = (tensor.to(self.device) for tensor in self.train_set)
        for batch in batch_slices(count, self.batch_size, smallest=2 * self.world_size)[self.first_batch :]:
            part = shard(batch, self.rank, self.world_size)
            indices = order[part]
            augmented = self.augmentation.apply(images[indices], params.select(part))
            for change, its_params in zip(self.appearance, further, strict=True):
                augmented = change.apply(augmented, its_params.select(part))
            yield normalize(augmented, self.mean, self.std), targets[indices]

    def split_validation(self) -> EvaluationBatches:
        """The images held out of training; without `val_fraction` the test images, for neither CIFAR nor the digits
        come with validation images of their own."""
        if not self.has_held_out_validation:
            return self.test_batches()
        return self._batches_of(self._split[1], lambda images, part: images, "validation set")

    def test_batches(self) -> EvaluationBatches:
        return self._test_batches(lambda images, part: images, "test set")

    def _test_batches(self, change: Callable[[Tensor, slice], Tensor], source: str) -> EvaluationBatches:
        return self._batches_of(self.test_set, change, source)

    def _batches_of(
        self, image_set: ImageSet, change: Callable[[Tensor, slice], Tensor], source: str
    ) -> EvaluationBatches:
        """All images of a set, changed batch by batch: `change` gets [B, 3, S, S] uint8 and which these are."""
        images, targets = image_set

        def batches(parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
            for part in parts:
                changed = change(images[part].to(self.device), part)
                yield normalize(changed, self.mean, self.std), targets[part].to(self.device)

        return EvaluationBatches(batches, self._evaluation_slices(len(targets)), targets, source)

    def _evaluation_slices(self, count: int) -> list[slice]:
        return batch_slices(count, EVALUATION_BATCH.get(self.device.type, EVALUATION_BATCH["cuda"]))

    def thumbnails(self, indices: Sequence[int], size: int) -> list[Image.Image | None]:
        pictures: list[Image.Image | None] = []
        for image in self.test_set.images[torch.as_tensor(indices, dtype=torch.int64)]:
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            picture.thumbnail((size, size))
            pictures.append(picture)
        return pictures

    def test_distributions(self) -> dict[str, np.ndarray]:
        self._check_test_labels()
        return distribution_indices(self.test_set.targets.numpy(), self.cls_num_list, self.distributions)

    def two_view_batches(self, indices: np.ndarray, pass_number: int) -> EvaluationBatches:
        chosen = torch.as_tensor(indices)
        generator = epoch_generator(self.seed, pass_number, VIEWS)
        # Sampled for all test images, so that the views of an image do not depend on which others are asked for.
        count = len(self.test_set.targets)
        view_params = [self.views.sample_params(count, generator).select(chosen) for _ in range(2)]

        def batches(parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
            for part in parts:
                images = self.test_set.images[chosen[part]].to(self.device)
                yield tuple(
                    normalize(self.views.apply(images, params.select(part).to(self.device)), self.mean, self.std)
                    for params in view_params
                )

        parts = self._evaluation_slices(len(chosen))
        return EvaluationBatches(batches, parts, self.test_set.targets[chosen], "two views of test images")

    def mild_view_batches(self, number: int) -> EvaluationBatches:
        self._check_view_number(number)
        if number == 0:
            return self.test_batches()
        if number == 1:
            return self._test_batches(lambda images, part: images.flip(3), "mirrored test images")
        generator = epoch_generator(self.seed, number, MILD_VIEWS)
        params = self.mild_crop.sample_params(len(self.test_set.targets), generator)
        return self._test_batches(
            lambda images, part: self.mild_crop.apply(images, params.select(part).to(self.device)),
            "random crops of test images",
        )

    def with_test_images(self, images: Tensor | str | Path | ImageList) -> Self:
        """A copy of this loader whose test images are others, unlabeled; this loader stays as it is.

        Args:
            images: [N, 3, S, S] uint8, RGB in 0..255, with S = `image_size`; or a folder, all image files under which
                are taken in order of their paths, or an ImageList. Files of other sizes are scaled to S on their
                shorter side and cropped to the middle; those that cannot be decoded are left out.

        Raises:
            UserError: a tensor has another shape or type, or there is no image.
        """
        other = copy.copy(self)
        other.has_test_labels = False
        if isinstance(images, (str, Path)):
            images = list_folder(images)
        if isinstance(images, ImageList):
            images, read, other.files_left_out = read_small(images, self.image_size)
            other.file_names = read.names()
        else:
            other.file_names = None
            self._check_images(images)
        other.test_set = ImageSet(images.cpu(), torch.zeros(len(images), dtype=torch.int64))
        return other

    def _check_images(self, images: Tensor) -> None:
        name, size = type(self).__name__, self.image_size
        if not isinstance(images, Tensor):
            raise UserError(
                f"{name} takes a folder of images or a uint8 tensor [N, 3, {size}, {size}], not a "
                f"{type(images).__name__}."
            )
        if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size) or not len(images):
            raise UserError(
                f"{name} takes test images as a uint8 tensor [N, 3, {size}, {size}] with one image at least, not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}: convert them."
            )

    @property
    def test_names(self) -> list[str]:
        return self.file_names or super().test_names

    def with_labeled_images(self, images: object) -> Self:
        """Refused: there are no files here that a list could name. See BaseDataLoader."""
        raise UserError(
            f"{type(self).__name__} reads no image files: train with data_loader;args;val_fraction=0.05 to "
            "calibrate on what is held out, or use --calibrate_on_test of test_train_*.py."
        )

    def with_validation_images(self) -> Self:
        self._check_held_out_validation()
        other = copy.copy(self)
        other.test_set = self._split[1]
        return other

    def with_chosen_test_images(self, indices: np.ndarray) -> Self:
        other = copy.copy(self)
        other.test_set = self.test_set.select(indices)
        return other
