"""Data loaders for large images: list files, decoding and augmentation in worker processes."""

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from base.base_data_loader import BaseDataLoader, EvaluationBatches, TrainedOn, digest
from data_loader import pil_transforms
from data_loader.augmentation import CROP_SCALE, RAND_AUGMENT_MAGNITUDE, check_augmentation
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS, check_distributions, distribution_indices, hold_out
from data_loader.file_check import check_listed_files
from data_loader.image_lists import ImageList, ListDataset, collate, list_class_folders, list_folder, thumbnail
from data_loader.overlaps import compare_lists, shared_files
from data_loader.samplers import EpochBatches, balanced_order, batch_slices, epoch_order, shard
from data_loader.tensor_transforms import normalize
from data_loader.workers import fetched, usable_cores
from utils.bad_images import BadImage
from utils.errors import UserError
from utils.logger import get_logger
from utils.seed import MILD_VIEWS, TRAINING, VIEWS, epoch_generator
from utils.signals import ignore_in_worker

EVALUATION_BATCH = 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ListDataLoader(BaseDataLoader):
    """Any images on disk, named by list files of "relative/path.jpg label" lines.

    Args:
        data_dir: folder that the paths are relative to.
        train_list, test_list: list files. Training labels are 0 to C-1, each with an image at least.
        batch_size: global batch.
        val_list: list file of validation images; without one, the test images are used.
        image_size: S, width and height in pixels of the images that the network sees.
        mean, std: of each channel, in 0..1.
        distributions: test distributions, chosen from the test list: "forward50", "uniform", "backward2", ...
        color_jitter: brightness, contrast and saturation jitter in training; 0 for none.
        flip: whether an image may be mirrored: in training, in random views and in averaged ones. False where mirrored
            images may be of another class.
        crop_scale: smallest and largest part of an image that training shows, as fractions of its area.
        rand_augment: operations of torchvision's RandAugment on each training image; 0 for none.
        rand_augment_magnitude: their strength, 0 to 30.
        shuffle: visit training images in random order.
        num_workers: worker processes that decode and augment, one for each usable core at most.
        balanced: sample classes, not images, uniformly, with replacement; `shuffle` then has no effect.
        retain_epoch_size: with `balanced`, an epoch has as many samples as there are images; else C times as many as
            the largest class has.
        on_bad_image: "stop" at a file that cannot be decoded, or "skip" it, in training, evaluation and prediction, and
            list it; None stops, but for the unlabeled images of `with_test_images`, which are skipped.
        class_names: file with the name of one class a line, for predictions; without it, classes are called by number.
        val_fraction: where there is no list of validation images: part of every class's training images that is not
            trained on but validates, see `hold_out`.
        trained_on: instead of lists, what a checkpoint says of them; then no list is read.

    Raises:
        UserError: a list is missing or wrong, a class has no training image.
        ValueError: an argument is out of range.
    """

    smallest_view = 0.2  # smallest part of an image that a random view shows, as a fraction of its area
    renumber = False  # whether classes are numbered anew, by falling training frequency

    def __init__(
        self,
        data_dir: str,
        train_list: str,
        test_list: str,
        batch_size: int,
        val_list: str | None = None,
        image_size: int = 224,
        mean: list[float] = IMAGENET_MEAN,
        std: list[float] = IMAGENET_STD,
        distributions: list[str] = CIFAR_DISTRIBUTIONS,
        color_jitter: float = 0.4,
        shuffle: bool = True,
        num_workers: int = 4,
        balanced: bool = False,
        retain_epoch_size: bool = True,
        on_bad_image: str | None = None,
        class_names: str | None = None,
        val_fraction: float = 0.0,
        flip: bool = True,
        crop_scale: list[float] = CROP_SCALE,
        rand_augment: int = 0,
        rand_augment_magnitude: int = RAND_AUGMENT_MAGNITUDE,
        trained_on: TrainedOn | None = None,
    ):
        super().__init__(batch_size)
        if on_bad_image not in ("stop", "skip", None):
            raise ValueError(f'on_bad_image must be "stop" or "skip", not "{on_bad_image}"')
        check_augmentation(color_jitter, rand_augment, rand_augment_magnitude)
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two numbers, 0 < smallest <= largest <= 1, not {list(crop_scale)}")
        if image_size < 8 or num_workers < 0 or len(mean) != 3 or len(std) != 3:
            raise ValueError("image_size must be at least 8, num_workers at least 0, mean and std three numbers each")
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.mirror = flip
        self.augmentation = (color_jitter, flip, tuple(crop_scale), rand_augment, rand_augment_magnitude)
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.balanced = balanced
        self.retain_epoch_size = retain_epoch_size
        self.on_bad_image = on_bad_image
        self.distributions = check_distributions(distributions)
        self._training: DataLoader | None = None
        self._batches = EpochBatches()
        skip = on_bad_image == "skip"
        self.bad_training_images = {} if skip else None
        self._bad_validation_images: dict[int, BadImage] | None = {} if skip else None
        self._bad_test_images: dict[int, BadImage] | None = {} if skip else None
        if trained_on:
            self.take(trained_on)
            self.train_images = self.val_images = self.test_images = ImageList.of(Path(train_list), [])
            if class_names is not None and trained_on.class_names is None:
                self.class_names = self._read_class_names(class_names)
            return
        self.train_images = ImageList.read(train_list, data_dir)
        self.test_images = ImageList.read(test_list, data_dir)
        own_validation = val_list not in (None, test_list)
        if own_validation and val_fraction:
            raise ValueError(
                f"val_fraction is for data without validation images, and here is {val_list}: leave it out"
            )
        self.val_images = ImageList.read(val_list, data_dir) if own_validation else self.test_images
        self.cls_num_list = self._count_classes()
        if val_fraction:
            trained, held_out = hold_out(self.train_images.targets, self.cls_num_list, val_fraction)
            self.val_images = self.train_images.select(held_out)
            self.train_images = self.train_images.select(trained)
            self.cls_num_list = np.bincount(self.train_images.targets).tolist()
        if self.renumber:
            self._renumber()
        found, self.has_held_out_validation = compare_lists(self.train_images, self.val_images, self.test_images)
        for notice in found:
            get_logger().warning(notice)
        if class_names is not None:
            self.class_names = self._read_class_names(class_names)

    @property
    def preparation(self) -> str:  # type: ignore[override]
        side = pil_transforms.shorter_side(self.image_size)
        return (
            f"A picture's shorter side is scaled to {side} pixels (bilinear, antialiased), and its middle is cropped."
        )

    def _count_classes(self) -> list[int]:
        counts = np.bincount(self.train_images.targets)
        if len(counts) < 2 or not counts.all():
            empty = "1" if len(counts) < 2 else str(int(np.flatnonzero(counts == 0)[0]))
            raise UserError(
                f"{self.train_images.list_path} has no image of class {empty}: labels must run from 0 to "
                "C-1 without a gap, two classes at least."
            )
        for images in {id(i): i for i in (self.val_images, self.test_images)}.values():
            images.check_labels(len(counts))
        missing = len(counts) - len(np.unique(self.test_images.targets))
        if missing:
            get_logger().warning(
                f"{self.test_images.list_path} has no image of {missing} of the {len(counts)} "
                "classes: accuracy says nothing about them."
            )
        return counts.tolist()

    def _read_class_names(self, path: str) -> list[str]:
        """The name of every class, in the order of the labels used here."""
        try:
            names = [os.fsdecode(name) for name in Path(path).read_bytes().splitlines()]
        except OSError as error:
            raise UserError(
                f"The class names {path} cannot be read ({error.strerror}): give a file with one name a "
                "line, or leave class_names out."
            ) from error
        if len(names) != self.num_classes:
            raise UserError(
                f"{path} has {len(names)} lines and the training list {self.num_classes} classes: give one "
                "name a line, in the order of the labels."
            )
        return [names[number] for number in self.class_map or range(self.num_classes)]

    def with_test_images(self, images: str | Path | ImageList) -> Self:
        """A copy of this loader whose test images are others, unlabeled; this loader stays as it is.

        Args:
            images: a folder, all image files under which are taken in order of their paths, or an ImageList.

        Raises:
            UserError: `images` is neither of these, or has no image.
        """
        if isinstance(images, (str, Path)):
            images = list_folder(images)
        if not isinstance(images, ImageList):
            raise UserError(
                f"{type(self).__name__} reads image files: give a folder or an ImageList, not {type(images).__name__}."
            )
        other = self._with_test_list(images.with_targets(np.zeros(len(images), np.int64)))
        other.has_test_labels = False
        other._bad_test_images = None if self.on_bad_image == "stop" else {}
        return other

    def with_labeled_images(self, images: str | Path) -> Self:
        """A copy of this loader whose test images are others, labeled; this loader stays as it is.

        Args:
            images: a list file like the training list, its paths relative to the same folder or absolute, its labels
                the data set's own; or a folder that holds folders with the names of classes.

        Raises:
            UserError: the list or the folder is wrong, or an image is in the training list.
        """
        self._check_data()
        if Path(images).is_dir():
            labeled = list_class_folders(images, self.class_names)
        else:
            labeled = ImageList.read(images, self.train_images.data_dir)
            labeled.check_labels(self.num_classes)
            if self.class_map:
                labeled = labeled.with_targets(np.argsort(self.class_map)[labeled.targets])
        if shared := shared_files(self.train_images, labeled):
            raise UserError(
                f"{len(shared)} images of {images} were trained on, such as {os.fsdecode(min(shared))}: give labeled "
                "images that were not."
            )
        return self._with_test_list(labeled)

    def with_validation_images(self) -> Self:
        self._check_held_out_validation()
        return self._with_test_list(self.val_images)

    def _with_test_list(self, images: ImageList) -> Self:
        other = copy.copy(self)
        other.test_images = images
        other._training = None
        other._batches = EpochBatches()
        other._bad_test_images = None if self._bad_test_images is None else {}
        return other

    def with_chosen_test_images(self, indices: np.ndarray) -> Self:
        return self._with_test_list(self.test_images.select(indices))

    def check_files(self, training: bool = True) -> None:
        lists = {"train_list": self.train_images} if training else {}
        lists["test_list"] = self.test_images
        if training and self.val_images is not self.test_images:
            lists["val_list"] = self.val_images
        for name, images in lists.items():
            check_listed_files(images, name, some=self._bad_test_images is not None)

    def _renumber(self) -> None:
        """Number the classes by falling training frequency; equally frequent ones keep their order."""
        order = np.argsort(-np.array(self.cls_num_list), kind="stable")
        new = np.argsort(order)
        self.class_map = order.tolist()
        self.cls_num_list = [self.cls_num_list[label] for label in order]
        same = self.val_images is self.test_images
        self.train_images = self.train_images.with_targets(new[self.train_images.targets])
        self.test_images = self.test_images.with_targets(new[self.test_images.targets])
        self.val_images = self.test_images if same else self.val_images.with_targets(new[self.val_images.targets])

    def fingerprint(self, read_images: bool = True) -> dict[str, str]:
        """Of labels and paths as the list has them; what the files hold does not count."""
        images = self.train_images
        return {"labels": digest(images.targets), "paths": digest(images.text, images.offsets)}

    @property
    def _epoch_size(self) -> int:
        if self.balanced and not self.retain_epoch_size:
            return max(self.cls_num_list) * self.num_classes
        return len(self.train_images)

    def __len__(self) -> int:
        return len(batch_slices(self._epoch_size, self.batch_size, smallest=2 * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, self.epoch, TRAINING)
        if self.balanced:
            order = balanced_order(torch.from_numpy(self.train_images.targets), self._epoch_size, generator)
        else:
            order = epoch_order(len(self.train_images), self.shuffle, generator)
        items = list(zip(order.tolist(), _seeds(len(order), generator), strict=True))
        slices = batch_slices(len(order), self.batch_size, smallest=2 * self.world_size)[self.first_batch :]
        self._batches.batches = [items[shard(batch, self.rank, self.world_size)] for batch in slices]
        if self._training is None:
            pipeline = pil_transforms.training(self.image_size, *self.augmentation)
            dataset = ListDataset(self.train_images, [pipeline], self.on_bad_image == "skip")
            self._training = self._data_loader(dataset, self._batches, persistent=True)
        for images, targets, bad in fetched(self._training):
            keep_bad(bad, self.bad_training_images)
            shown = images[0] if images else torch.zeros(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
            yield self._prepare(shown), targets.to(self.device, non_blocking=True)

    def _data_loader(self, dataset: ListDataset, batches, persistent: bool = False) -> DataLoader:
        count = min(self.num_workers, usable_cores())
        if not persistent and len(batches) == 1:  # one worker would do all, and take its time to start
            count = 0
        workers = {"persistent_workers": persistent, "prefetch_factor": 4} if count else {}
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=count,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=ignore_in_worker,
            **workers,
        )

    def _prepare(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 -> normalized, on the device."""
        return normalize(images.to(self.device, non_blocking=True), self.mean, self.std)

    def _evaluation(
        self,
        images: ImageList,
        pipelines: list,
        indices: Sequence[int],
        seeds: Sequence[int],
        source: str,
        bad_images: dict[int, BadImage] | None,
    ) -> EvaluationBatches:
        """Batches of (images, labels) for one pipeline; of (images of the first, images of the second) for two."""
        items = list(zip(np.asarray(indices).tolist(), seeds, strict=True))

        def batches(parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
            dataset = ListDataset(images, pipelines, skip_bad=bad_images is not None)
            chosen = [items[part] for part in parts]
            for batch, (columns, targets, bad) in zip(chosen, fetched(self._data_loader(dataset, chosen)), strict=True):
                prepared = tuple(self._prepare(column) for column in columns)
                if bad:
                    keep_bad(bad, bad_images)
                    missing = {image.index for image in bad}
                    good = [index not in missing for index, _ in batch]
                    targets = torch.from_numpy(images.targets)[[index for index, _ in batch]]
                    prepared = self._with_zeros(prepared, good, len(pipelines))
                yield prepared if len(prepared) > 1 else (*prepared, targets.to(self.device))

        targets = torch.from_numpy(images.targets)[torch.as_tensor(indices)]
        return EvaluationBatches(batches, batch_slices(len(items), EVALUATION_BATCH), targets, source, bad_images)

    def _with_zeros(self, columns: Sequence[Tensor], good: list[bool], views: int) -> tuple[Tensor, ...]:
        """Columns of the images that are good, with zeros for the others: [G, 3, S, S] -> [B, 3, S, S] each."""
        whole = [torch.zeros(len(good), 3, self.image_size, self.image_size, device=self.device) for _ in range(views)]
        for images, column in zip(whole, columns, strict=False):  # without any good image there is no column
            images[torch.tensor(good, device=self.device)] = column
        return tuple(whole)

    def split_validation(self) -> EvaluationBatches:
        source = "test set" if self.val_images is self.test_images else "validation set"
        return self._plain(self.val_images, source, self._bad_validation_images)

    @property
    def test_names(self) -> list[str]:
        return self.test_images.names()

    def test_batches(self) -> EvaluationBatches:
        return self._plain(self.test_images, "test set", self._bad_test_images)

    def _plain(self, images: ImageList, source: str, bad_images: dict[int, BadImage] | None) -> EvaluationBatches:
        if not len(images):
            self._check_data()
        pipeline = pil_transforms.evaluation(self.image_size)
        return self._evaluation(images, [pipeline], range(len(images)), [0] * len(images), source, bad_images)

    def thumbnails(self, indices: Sequence[int], size: int) -> list[Image.Image | None]:
        return [thumbnail(self.test_images.path(index), size) for index in indices]

    def test_distributions(self) -> dict[str, np.ndarray]:
        self._check_test_labels()
        return distribution_indices(self.test_images.targets, self.cls_num_list, self.distributions)

    def two_view_batches(self, indices: np.ndarray, pass_number: int) -> EvaluationBatches:
        # Seeds for all test images, so that the views of an image do not depend on which others are asked for.
        seeds = np.array(_seeds(len(self.test_images), epoch_generator(self.seed, pass_number, VIEWS)))[indices]
        pipelines = [pil_transforms.view(self.image_size, self.smallest_view, self.mirror)] * 2
        source = "two views of test images"
        return self._evaluation(self.test_images, pipelines, indices, seeds.tolist(), source, self._bad_test_images)

    def mild_view_batches(self, number: int) -> EvaluationBatches:
        self._check_view_number(number)
        count = len(self.test_images)
        seeds = _seeds(count, epoch_generator(self.seed, number, MILD_VIEWS))
        pipeline = pil_transforms.mild_view(self.image_size, number, self.mirror)
        source = "mild view of test images"
        return self._evaluation(self.test_images, [pipeline], range(count), seeds, source, self._bad_test_images)


def keep_bad(found: Sequence[BadImage | UserError], kept: dict[int, BadImage] | None) -> None:
    """Keep the records that `collate` has of images that are left out.

    Raises:
        UserError: they are not to be left out.
    """
    for problem in found:
        if isinstance(problem, UserError):
            raise problem
        if kept is not None:
            kept[problem.index] = problem


def _seeds(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2**62, (count,), generator=generator).tolist()
