"""The contract between data and everything else: what a data loader class in a config gives."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.bad_images import BadImage
from utils.errors import UserError


@dataclass(frozen=True)
class TrainedOn:
    """What a checkpoint says of the data it was trained on: enough to predict other images without them.

    Args:
        cls_num_list: training images per class, [C].
        class_map, class_names: see BaseDataLoader; None where the checkpoint says nothing of them.
    """

    cls_num_list: list[int]
    class_map: list[int] | None = None
    class_names: list[str] | None = None


class BaseDataLoader(ABC):
    """Training batches, validation batches, the test images once, and the test distributions as indices of them.

    Iterating gives one epoch of augmented training batches (images [B, 3, H, W] float32, target [B] int64), on
    `self.device`. With several processes each gets its shard of every global batch, and all get equally many shards.
    Where images were left out because they cannot be decoded, a shard may have fewer, even none.

    Args:
        batch_size: the global batch, over all processes.

    Raises:
        UserError: batch_size is below 1.
    """

    #: Training images per class, [C].
    cls_num_list: list[int]
    #: Width and height of the images that the network sees, in pixels.
    image_size: int
    #: How a picture becomes an image of that size, in words.
    preparation: str = "Images have this size already."
    #: The label that a class has in the data set's own files, for every label used here; None where they agree.
    class_map: list[int] | None = None
    #: False after `with_test_images`: then the test images have no labels, and no test distributions.
    has_test_labels: bool = True
    #: Whether training sees the classes equally often, whatever their numbers of images.
    balanced: bool = False
    #: Whether a mirrored image keeps its class.
    mirror: bool = True
    #: Training images that were left out because they cannot be decoded, by index, as this process has found them;
    #: None where the first one ends the training.
    bad_training_images: dict[int, BadImage] | None = None
    #: Files that are not among the test images, because they cannot be decoded.
    files_left_out: Sequence[BadImage] = ()
    #: Whether the images of `split_validation` are neither training nor test images.
    has_held_out_validation: bool = False
    #: False where it was made from `TrainedOn`: there are no images but those that `with_test_images` is given.
    has_data: bool = True

    def __init__(self, batch_size: int):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}.")
        self.batch_size = batch_size
        self.device = torch.device("cpu")
        self.seed = 0
        self.epoch = 0
        self.first_batch = 0
        self.rank = 0
        self.world_size = 1

    @property
    def num_classes(self) -> int:
        return len(self.cls_num_list)

    @cached_property
    def class_names(self) -> list[str]:
        """The name of every class, [C]; by default its number in the data set's own files."""
        return [str(number) for number in self.class_map or range(self.num_classes)]

    @property
    def is_named(self) -> bool:
        """Whether classes have names, and not just numbers."""
        return self.class_names != [str(number) for number in self.class_map or range(self.num_classes)]

    def take(self, trained_on: TrainedOn) -> None:
        """Do without the data: all that is known of them is what a checkpoint says."""
        self.has_data = self.has_test_labels = self.has_held_out_validation = False
        self.cls_num_list = list(trained_on.cls_num_list)
        self.class_map = trained_on.class_map
        if trained_on.class_names:
            self.class_names = list(trained_on.class_names)

    def prepare(self, device: torch.device, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Say where batches are wanted, what seeds the random numbers, and which of several processes this is."""
        self.device = device
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def check_shards(self) -> None:
        """See that every process can train on its shard of every batch.

        Raises:
            UserError: a shard has fewer than two images, or there is no batch: batch norm cannot train on one image.
        """
        smallest = 2 * self.world_size
        if self.batch_size < smallest:
            processes = "" if self.world_size == 1 else f" for all of {self.world_size} processes"
            raise UserError(
                f"batch_size is {self.batch_size}{processes}, and every process needs two images of a batch: make it "
                f"at least {smallest}."
            )
        if not len(self):
            raise UserError(
                f"There are {sum(self.cls_num_list)} training images, and a batch has {smallest} at least: give more "
                "images, or start fewer processes."
            )

    def fingerprint(self, read_images: bool = True) -> dict[str, str]:
        """Digests that tell these training images from others, in their order: part ("labels", ...) -> hexadecimal.

        Args:
            read_images: whether training images may be read for it; without, parts may be left out.
        """
        return {}

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the order and the augmentation of the next iteration; it leaves out the batches before the first."""
        self.epoch = epoch
        self.first_batch = first_batch

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches."""

    @abstractmethod
    def split_validation(self) -> "EvaluationBatches":
        """The validation images, un-augmented; the test images where a data set has no validation images."""

    @abstractmethod
    def test_batches(self) -> "EvaluationBatches":
        """The balanced test images, once each, un-augmented, in a fixed order."""

    @property
    def test_names(self) -> list[str]:
        """The name of every test image, [N]: a path, or by default its number."""
        return [str(number) for number in range(len(self.test_batches().targets))]

    def thumbnails(self, indices: Sequence[int], size: int) -> list[Image.Image | None]:
        """Small pictures of test images, for reports; None of an image that cannot be shown, by default of all.

        Args:
            indices: of images of `test_batches`.
            size: longest side in pixels; smaller images keep their size.
        """
        return [None] * len(indices)

    @abstractmethod
    def test_distributions(self) -> dict[str, np.ndarray]:
        """Test distributions in the order of the tables: name -> indices of images of `test_batches`.

        Raises:
            UserError: the test images have no labels.
        """

    @abstractmethod
    def two_view_batches(self, indices: np.ndarray, pass_number: int) -> "EvaluationBatches":
        """Two random views of the given test images, as batches (view1, view2), in the order of the indices.

        Args:
            indices: of images of `test_batches`, [M].
            pass_number: the same number gives the same views of the same images.
        """

    def mild_view_numbers(self, crops: int) -> list[int]:
        """The mild views to average, as `mild_view_batches` numbers them: image, mirror image if allowed, crops."""
        return [0, *([1] if self.mirror else []), *range(2, crops + 2)]

    @abstractmethod
    def mild_view_batches(self, number: int) -> "EvaluationBatches":
        """One mild view of all test images, as batches (image, target) in the order of `test_batches`.

        Unlike the views of `two_view_batches` it changes no color and hides little, so that its prediction is about as
        good as the image's own.

        Args:
            number: 0 is the image itself, 1 its mirror image, each from 2 on another random crop, mirrored half of the
                time. The same number gives the same view.

        Raises:
            ValueError: number is below 0, or 1 where images may not be mirrored.
        """

    def _check_view_number(self, number: int) -> None:
        if number < 0 or (number == 1 and not self.mirror):
            raise ValueError(f"there is no mild view {number} here; there are {self.mild_view_numbers(1)} and above")

    @abstractmethod
    def with_test_images(self, images: Any) -> Self:
        """A copy of this loader whose test images are others, unlabeled; this loader stays as it is.

        In the copy's `test_batches` every label is 0.

        Args:
            images: what the class takes: a folder or an ImageList, or a tensor.

        Raises:
            UserError: these images cannot be used.
        """

    @abstractmethod
    def with_labeled_images(self, images: Any) -> Self:
        """The same with labeled images, which the network was not trained on: `test_batches` has their labels.

        Args:
            images: what the class takes: a list file or a folder of class folders.

        Raises:
            UserError: these images cannot be used, or some were trained on.
        """

    @abstractmethod
    def with_validation_images(self) -> Self:
        """A copy of this loader whose test images are the held-out validation images, with their labels.

        Raises:
            UserError: there are none (`has_held_out_validation`).
        """

    @abstractmethod
    def with_chosen_test_images(self, indices: np.ndarray) -> Self:
        """A copy of this loader with only some of its test images, indices [M]."""

    def check_files(self, training: bool = True) -> None:
        """See that files are where the config says, before anything is computed; nothing where there are no files.

        Args:
            training: also those that are trained on, not only the test images.

        Raises:
            UserError: they are not; says what to do.
        """
        return None

    def _check_held_out_validation(self) -> None:
        self._check_data()
        if not self.has_held_out_validation:
            raise UserError(
                "The data have no validation images that are neither training nor test images: train with "
                "data_loader;args;val_fraction=0.05, or give labeled images of your own."
            )

    def _check_data(self) -> None:
        """Raise UserError where there are no images, of training or for testing."""
        if not self.has_data:
            raise UserError(
                "This run was opened without its data, which is enough to predict images and no more: open it with "
                "load_run(path), where the data are."
            )

    def _check_test_labels(self) -> None:
        self._check_data()
        if not self.has_test_labels:
            raise UserError("The test images are unlabeled, and test distributions need labels: name no distribution.")


def digest(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of bytes or arrays, its first half in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.tobytes() if isinstance(part, np.ndarray) else part)
    return whole.hexdigest()[:32]


class EvaluationBatches:
    """Batches that can be iterated again and again, with the labels of all images.

    Args:
        make: parts -> a fresh iterator of their batches.
        parts: which images each batch has.
        targets: labels of all images in their order, [N], on the CPU.
        source: what the images are, for messages, e.g. "test set".
        bad: of images that cannot be decoded, by their index in the data loader's list: filled by the iteration, which
            gives zeros in their place. None where such an image ends the iteration.
    """

    def __init__(
        self,
        make: Callable[[Sequence[slice]], Iterator[tuple[Tensor, ...]]],
        parts: Sequence[slice],
        targets: Tensor,
        source: str,
        bad: dict[int, BadImage] | None = None,
    ):
        self.bad = bad
        self._make = make
        self.parts = parts
        self.targets = targets
        self.source = source

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self._make(self.parts)

    def shard(self, rank: int, world_size: int) -> "EvaluationBatches":
        """The batches of one of several processes; the labels stay those of all images."""
        return EvaluationBatches(self._make, self.parts[rank::world_size], self.targets, self.source, self.bad)
