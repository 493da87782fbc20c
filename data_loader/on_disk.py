"""Data loaders for large images: list files, decoding and augmentation in worker processes."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from base.base_data_loader import EvaluationBatches, ImageSource
from data_loader import pil_transforms
from data_loader.class_profiles import hold_out
from data_loader.file_check import check_listed_files
from data_loader.image_lists import ImageList, ListDataset, collate, list_class_folders, list_folder, thumbnail
from data_loader.image_loader import ImageDataLoader, digest
from data_loader.overlaps import compare_lists, shared_files
from data_loader.samplers import batch_slices
from data_loader.tensor_transforms import normalize
from data_loader.workers import fetched, usable_cores
from utils.bad_images import BadImage
from utils.errors import UserError
from utils.logger import get_logger
from utils.seed import MILD_VIEWS, VIEWS, epoch_generator
from utils.signals import ignore_in_worker

EVALUATION_BATCH = 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ListDataLoader(ImageDataLoader):
    """Any images on disk, named by list files of "relative/path.jpg label" lines.

    Args:
        data_dir: folder that the paths are relative to.
        train_list, test_list: list files. Training labels are 0 to C-1, each with an image at least.
        batch_size: global batch.
        val_list: list file of validation images; without one, the test images are used.
        image_size: S, width and height in pixels of the images that the network sees.
        mean, std: of each channel, in 0..1.
        color_jitter: brightness, contrast and saturation jitter in training; 0 for none.
        crop_scale: smallest and largest part of an image that training shows, as fractions of its area.
        num_workers: worker processes that decode and augment, one for each usable core at most.
        retain_epoch_size: with `balanced`, an epoch has as many samples as there are images; else C times as many as
            the largest class has.
        on_bad_image: "stop" at a file that cannot be decoded, or "skip" it, in training, evaluation and prediction, and
            list it; None stops, but for unlabeled images, which are skipped.
        class_names: file with the name of one class a line, for predictions; without it, classes are called by number.
        options: see ImageDataLoader.

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
        color_jitter: float = 0.4,
        crop_scale: list[float] = (0.08, 1.0),  # torchvision's default
        num_workers: int = 4,
        retain_epoch_size: bool = True,
        on_bad_image: str | None = None,
        class_names: str | None = None,
        **options,
    ):
        super().__init__(batch_size, color_jitter=color_jitter, **options)
        if on_bad_image not in ("stop", "skip", None):
            raise ValueError(f'on_bad_image must be "stop" or "skip", not "{on_bad_image}"')
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two numbers, 0 < smallest <= largest <= 1, not {list(crop_scale)}")
        if image_size < 8 or num_workers < 0 or len(mean) != 3 or len(std) != 3:
            raise ValueError("image_size must be at least 8, num_workers at least 0, mean and std three numbers each")
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.crop_scale = tuple(crop_scale)
        self.num_workers = num_workers
        self.retain_epoch_size = retain_epoch_size
        self.on_bad_image = on_bad_image
        self.bad_training_images = {} if on_bad_image == "skip" else None
        self._training: DataLoader | None = None
        self._batches: list[list[tuple[int, int]]] = []
        if self.has_data:
            self._read_lists(data_dir, train_list, val_list, test_list)
        if class_names is not None and "class_names" not in vars(self):
            self.class_names = self._read_class_names(class_names)

    def _read_lists(self, data_dir: str, train_list: str, val_list: str | None, test_list: str) -> None:
        """Set the three lists of images, and what follows from them; `val_images` is `test_images` without a list."""
        self.train_images = ImageList.read(train_list, data_dir)
        self.test_images = self.val_images = ImageList.read(test_list, data_dir)
        if val_list not in (None, test_list):
            if self.val_fraction:
                raise ValueError(
                    f"val_fraction is for data without validation images, and here is {val_list}: leave it out"
                )
            self.val_images = ImageList.read(val_list, data_dir)
        self.cls_num_list = self._count_classes()
        if self.val_fraction:
            trained, held_out = hold_out(self.train_images.targets, self.cls_num_list, self.val_fraction)
            self.val_images = self.train_images.select(held_out)
            self.train_images = self.train_images.select(trained)
            self.cls_num_list = np.bincount(self.train_images.targets).tolist()
        if self.renumber:
            self._renumber()
        found, self.has_held_out_validation = compare_lists(self.train_images, self.val_images, self.test_images)
        for notice in found:
            get_logger().warning(notice)

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
        paths = self.train_images.paths.tolist()
        ends = np.cumsum([0, *map(len, paths)]).astype(np.int64)
        return {"labels": digest(self.train_images.targets), "paths": digest(b"".join(paths), ends)}

    def check_files(self) -> None:
        check_listed_files(self.train_images, some=self.on_bad_image == "skip")
        for source in (self.test, self.validation):
            source.check_files()

    @property
    def epoch_size(self) -> int:
        if self.balanced and not self.retain_epoch_size:
            return max(self.cls_num_list) * self.num_classes
        return super().epoch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, shards, generator = self._epoch(torch.from_numpy(self.train_images.targets))
        items = list(zip(order.tolist(), seeds(len(order), generator), strict=True))
        self._batches[:] = [items[part] for part in shards]
        if self._training is None:
            pipeline = pil_transforms.training(
                self.image_size,
                self.color_jitter,
                self.mirror,
                self.crop_scale,
                self.rand_augment,
                self.rand_augment_magnitude,
            )
            self._training = self.loader_of(ListDataset(self.train_images, [pipeline]), self._batches, persistent=True)
        for (images,), targets, bad in fetched(self._training):
            if any(bad):
                keep_bad(bad, self.bad_training_images, self.train_images)
                good = torch.tensor([problem is None for problem in bad])
                images, targets = images[good], targets[good]
            yield self.prepared(images), targets.to(self.device, non_blocking=True)

    def loader_of(self, dataset: ListDataset, batches: list, persistent: bool = False) -> DataLoader:
        """torch's DataLoader of batches of items (index, seed).

        Args:
            dataset: gives the items.
            batches: the batches.
            persistent: its workers stay alive for further epochs, for which `batches` is changed in place.
        """
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

    def prepared(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 -> normalized, on the device."""
        return normalize(images.to(self.device, non_blocking=True), self.mean, self.std)

    @cached_property
    def test(self) -> "ListImages":
        self.check_data()
        return ListImages(self, self.test_images, self.on_bad_image == "skip")

    @cached_property
    def validation(self) -> "ListImages":  # type: ignore[override]
        if not self.has_data or self.val_images is self.test_images:
            return self.test
        return ListImages(self, self.val_images, self.on_bad_image == "skip", "validation set")

    def read(self, images: str | Path | ImageList) -> "ListImages":
        """Unlabeled images.

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
        unlabeled = images.with_targets(np.zeros(len(images), np.int64))
        return ListImages(self, unlabeled, self.on_bad_image != "stop")

    def read_labeled(self, images: str | Path | None) -> "ListImages":
        """Labeled images.

        Args:
            images: a list file like the training list, its paths relative to the same folder or absolute, its labels
                the data set's own; or a folder that holds folders with the names of classes; None for the held-out
                validation images.

        Raises:
            UserError: the list or the folder is wrong, or an image is in the training list; there is no such image.
        """
        if images is None:
            return self.held_out()
        self.check_data()
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
        return ListImages(self, labeled, self.on_bad_image == "skip")


class ListImages(ImageSource):
    """Images of a list, decoded anew in every pass.

    Args:
        loader: says device, seed and workers, how views are made, and how images are normalized.
        images: their paths and labels.
        skip: whether those that cannot be decoded are skipped; otherwise the first one ends the pass.
        what: they are, for messages.
    """

    def __init__(self, loader: ListDataLoader, images: ImageList, skip: bool, what: str = "test set"):
        self.loader = loader
        self.files = images
        self.what = what
        self.targets = torch.from_numpy(images.targets)
        self.bad = {} if skip else None

    @property
    def names(self) -> list[str]:
        return self.files.names()

    def thumbnails(self, indices: Sequence[int], size: int) -> list[Image.Image | None]:
        return [thumbnail(self.files.path(index), size) for index in indices]

    def check_files(self) -> None:
        check_listed_files(self.files, some=self.bad is not None)

    def select(self, indices: np.ndarray) -> "ListImages":
        return ListImages(self.loader, self.files.select(indices), self.bad is not None, self.what)

    def batches(self) -> EvaluationBatches:
        return self.mild_view(0)

    def mild_view(self, number: int) -> EvaluationBatches:
        self.loader.check_view_number(number)
        pipeline = pil_transforms.mild_view(self.loader.image_size, number, self.loader.mirror)
        indices = np.arange(len(self.targets))
        return self._transformed([pipeline], indices, epoch_generator(self.loader.seed, number, MILD_VIEWS))

    def views(self, indices: np.ndarray, pass_number: int) -> EvaluationBatches:
        pipeline = pil_transforms.view(self.loader.image_size, self.loader.smallest_view, self.loader.mirror)
        return self._transformed([pipeline] * 2, indices, epoch_generator(self.loader.seed, pass_number, VIEWS))

    def _transformed(self, pipelines: list, indices: np.ndarray, generator: torch.Generator) -> EvaluationBatches:
        """Batches (images, target) of one pipeline, (view1, view2) of two."""
        # Seeds for all images, so that the views of an image do not depend on which others are asked for.
        of_image = seeds(len(self.targets), generator)
        items = [(index, of_image[index]) for index in np.asarray(indices).tolist()]
        loader = self.loader

        def batches(parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
            workers = loader.loader_of(ListDataset(self.files, pipelines), [items[part] for part in parts])
            for views, targets, bad in fetched(workers):
                keep_bad(bad, self.bad, self.files)
                prepared = [loader.prepared(view) for view in views]
                yield tuple(prepared) if len(prepared) > 1 else (prepared[0], targets.to(loader.device))

        targets = self.targets[torch.as_tensor(indices)]
        return EvaluationBatches(batches, batch_slices(len(items), EVALUATION_BATCH), targets, self.what, self.bad)


def keep_bad(found: Sequence[BadImage | None], kept: dict[int, BadImage] | None, images: ImageList) -> None:
    """Keep the records of images that cannot be decoded.

    Raises:
        UserError: there is one, and such images are not to be skipped (`kept` is None).
    """
    for bad in filter(None, found):
        if kept is None:
            raise UserError(
                f"The image {images.path(bad.index)} {bad.reason}: mend or replace it, take it off the list, or leave "
                'such images out, --set "data_loader;args;on_bad_image=skip".'
            )
        kept[bad.index] = bad


def seeds(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2**62, (count,), generator=generator).tolist()
