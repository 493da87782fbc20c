"""Data loader for small images: all of them in memory, augmented as whole batches on the training device."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base.base_data_loader import EvaluationBatches, ImageSource
from data_loader.class_profiles import held_out_counts, hold_out, long_tail_counts, subset_indices
from data_loader.datasets import ImageSet
from data_loader.image_lists import ImageList, list_folder, read_small
from data_loader.image_loader import ImageDataLoader, digest
from data_loader.samplers import batch_slices
from data_loader.strong_transforms import AutoAugment, Cutout
from data_loader.tensor_appearance import ColorJitter, RandAugmentGroups
from data_loader.tensor_transforms import CROP_PADDING, ROTATION, CropFlipRotate, ViewAugmentation, normalize
from utils.bad_images import BadImage
from utils.errors import UserError
from utils.seed import MILD_VIEWS, VIEWS, epoch_generator

EVALUATION_BATCH = {"cpu": 64, "cuda": 1024}  # what fits the cache; what fills the GPU

Change = Callable[[Tensor, slice], Tensor]
"""(images [B, 3, S, S] uint8, which of all these are) -> changed images."""


class InMemoryDataLoader(ImageDataLoader):
    """Small images: one uint8 tensor on the training device, augmented as whole batches.

    Subclasses set `image_size`, `mean`, `std`, `largest_class`, `classes` and implement `load`.

    Args:
        batch_size: global batch.
        num_workers: accepted for the reference's configs; nothing is left for worker processes to do.
        imb_factor: images of the rarest class over those of the largest, in (0, 1].
        crop_padding: pixels of zeros around an image in training, before a random crop of its size.
        rotation: rotations in training are uniform in [-rotation, rotation] degrees.
        auto_augment: policy of AutoAugment on each training image, "cifar10", "imagenet" or "svhn"; None for none.
        cutout: side of a square of the mean color that hides a part of each training image, in pixels; 0 for none.
        options: see ImageDataLoader.

    Raises:
        ValueError: an argument is out of range.
    """

    preparation = "A picture of another size is scaled on its shorter side (bilinear), and its middle is cropped."
    classes: int
    largest_class: int

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        imb_factor: float = 0.01,
        crop_padding: int = CROP_PADDING,
        rotation: float = ROTATION,
        auto_augment: str | None = None,
        cutout: int = 0,
        **options,
    ):
        super().__init__(batch_size, **options)
        if not 0 <= crop_padding <= self.image_size or not 0 <= rotation <= 180:
            raise ValueError(
                f"crop_padding must be 0 to {self.image_size} pixels and rotation 0 to 180 degrees, not {crop_padding} "
                f"and {rotation}"
            )
        self.subset_counts = long_tail_counts(self.largest_class, self.classes, imb_factor)
        held_out = held_out_counts(self.subset_counts, self.val_fraction)
        if self.has_data:
            self.has_held_out_validation = self.val_fraction > 0
            self.cls_num_list = [whole - part for whole, part in zip(self.subset_counts, held_out, strict=True)]
        self.augmentation = CropFlipRotate(self.image_size, crop_padding, self.mirror, rotation)
        self.appearance: list = [AutoAugment(auto_augment, self.mean)] if auto_augment is not None else []
        if self.rand_augment:
            self.appearance.append(RandAugmentGroups(self.rand_augment, self.rand_augment_magnitude, batch_size))
        if self.color_jitter:
            self.appearance.append(ColorJitter(self.color_jitter))
        self.cutout = Cutout(cutout, self.image_size)
        self.views = ViewAugmentation(self.image_size, flip=self.mirror)
        self.mild_crop = CropFlipRotate(self.image_size, flip=self.mirror, degrees=0.0)

    def load(self, train: bool) -> ImageSet:
        """The whole training set, or the balanced test set."""
        raise NotImplementedError

    @cached_property
    def _split(self) -> tuple[ImageSet, ImageSet]:
        """The long-tailed training set, and what is held out of it."""
        self.check_data()
        whole = self.load(train=True)
        subset = whole.select(subset_indices(whole.targets.numpy(), self.subset_counts))
        trained, held_out = hold_out(subset.targets.numpy(), self.subset_counts, self.val_fraction)
        return subset.select(trained), subset.select(held_out)

    @property
    def train_set(self) -> ImageSet:
        """The long-tailed training set."""
        return self._split[0]

    @cached_property
    def test(self) -> "MemoryImages":
        self.check_data()
        return MemoryImages(self, self.load(train=False))

    @property
    def validation(self) -> "MemoryImages":
        """What is held out of training; without `val_fraction` the test images, for no data set here has others."""
        if self.has_held_out_validation:
            return MemoryImages(self, self._split[1], "validation set")
        return self.test

    def fingerprint(self, read_images: bool = True) -> dict[str, str]:
        """Of labels and pixels."""
        if not read_images:
            return {}
        images, targets = self.train_set
        return {"labels": digest(targets.numpy()), "pixels": digest(images.numpy())}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, shards, generator = self._epoch(self.train_set.targets)
        order = order.to(self.device)
        params = self.augmentation.sample_params(len(order), generator).to(self.device)
        further = [change.sample_params(len(order), generator) for change in self.appearance]
        centers = self.cutout.sample_centers(len(order), generator)
        images, targets = (tensor.to(self.device) for tensor in self.train_set)
        for part in shards:
            indices = order[part]
            augmented = self.augmentation.apply(images[indices], params.select(part))
            for change, its_params in zip(self.appearance, further, strict=True):
                augmented = change.apply(augmented, its_params.select(part))
            normalized = normalize(augmented, self.mean, self.std)
            yield self.cutout.apply(normalized, centers[part]) if self.cutout.side else normalized, targets[indices]

    def read(self, images: Tensor | str | Path | ImageList) -> "MemoryImages":
        """Unlabeled images.

        Args:
            images: [N, 3, S, S] uint8, RGB in 0..255, with S = `image_size`; or a folder, all image files under which
                are taken in order of their paths, or an ImageList. Files of other sizes are scaled to S on their
                shorter side and cropped to the middle; those that cannot be decoded are skipped.

        Raises:
            UserError: a tensor has another shape or type, or there is no image.
        """
        names, skipped, name, size = None, [], type(self).__name__, self.image_size
        if isinstance(images, (str, Path)):
            images = list_folder(images)
        if isinstance(images, ImageList):
            images, names, skipped = read_small(images, size)
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
        unlabeled = ImageSet(images.cpu(), torch.zeros(len(images), dtype=torch.int64))
        return MemoryImages(self, unlabeled, names=names, skipped=skipped)

    def read_labeled(self, images: object) -> ImageSource:
        """The held-out validation images; refuses others, for there are no files here that a list could name."""
        if images is None:
            return self.held_out()
        raise UserError(
            f"{type(self).__name__} reads no image files: train with data_loader;args;val_fraction=0.05 to "
            "calibrate on what is held out, or use --calibrate_on_test of test_train_*.py."
        )


class MemoryImages(ImageSource):
    """Images in memory.

    Args:
        loader: says device and seed, how views are made, and how images are normalized.
        image_set: the images, [N, 3, S, S] uint8, and their labels.
        what: they are, for messages.
        names: of the images; None for their numbers.
        skipped: files that are not among them.
    """

    def __init__(
        self,
        loader: InMemoryDataLoader,
        image_set: ImageSet,
        what: str = "test set",
        names: Sequence[str] | None = None,
        skipped: Sequence[BadImage] = (),
    ):
        self.loader = loader
        self.images, self.targets = image_set
        self.what = what
        self._names = names
        self.skipped = skipped

    @property
    def names(self) -> list[str]:
        return super().names if self._names is None else list(self._names)

    def select(self, indices: np.ndarray) -> "MemoryImages":
        names = None if self._names is None else [self._names[index] for index in indices]
        chosen = ImageSet(self.images, self.targets).select(indices)
        return MemoryImages(self.loader, chosen, self.what, names, self.skipped)

    def thumbnails(self, indices: Sequence[int], size: int) -> list[Image.Image | None]:
        pictures: list[Image.Image | None] = []
        for image in self.images[torch.as_tensor(indices, dtype=torch.int64)]:
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            picture.thumbnail((size, size))
            pictures.append(picture)
        return pictures

    def batches(self) -> EvaluationBatches:
        return self._changed([lambda images, part: images])

    def mild_view(self, number: int) -> EvaluationBatches:
        self.loader.check_view_number(number)
        if number == 0:
            return self.batches()
        if number == 1:
            return self._changed([lambda images, part: images.flip(3)])
        generator = epoch_generator(self.loader.seed, number, MILD_VIEWS)
        params = self.loader.mild_crop.sample_params(len(self.targets), generator)
        return self._changed([applied(self.loader.mild_crop, params)])

    def views(self, indices: np.ndarray, pass_number: int) -> EvaluationBatches:
        augmentation, chosen = self.loader.views, torch.as_tensor(indices)
        generator = epoch_generator(self.loader.seed, pass_number, VIEWS)
        # Sampled for all images, so that the views of an image do not depend on which others are asked for.
        params = [augmentation.sample_params(len(self.targets), generator).select(chosen) for _ in range(2)]
        return self._changed([applied(augmentation, own) for own in params], chosen)

    def _changed(self, changes: Sequence[Change], indices: Tensor | None = None) -> EvaluationBatches:
        """Batches (images, target) with one change of the images, (view1, view2) with two."""
        loader = self.loader
        chosen = torch.arange(len(self.targets)) if indices is None else indices
        targets = self.targets[chosen]

        def batches(parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
            for part in parts:
                images = self.images[chosen[part]].to(loader.device)
                changed = [normalize(change(images, part), loader.mean, loader.std) for change in changes]
                yield tuple(changed) if len(changed) > 1 else (changed[0], targets[part].to(loader.device))

        size = EVALUATION_BATCH.get(loader.device.type, EVALUATION_BATCH["cuda"])
        return EvaluationBatches(batches, batch_slices(len(targets), size), targets, self.what)


def applied(augmentation: CropFlipRotate | ViewAugmentation, params) -> Change:
    """An augmentation with the parameters of all images."""
    return lambda images, part: augmentation.apply(images, params.select(part).to(images.device))
