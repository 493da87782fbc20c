"""The contract between data and everything else: what a data loader class in a config gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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


@dataclass(frozen=True)
class EvaluationBatches:
    """Batches that can be iterated again and again, with the labels of all images.

    Args:
        make: parts -> a fresh iterator of their batches.
        parts: which images each batch has.
        targets: labels of all images in their order, [N], on the CPU.
        source: what the images are, for messages, e.g. "test set".
        bad: of images that cannot be decoded, by index: filled by the iteration, which gives a black image in their
            place. None where such an image ends the iteration.
    """

    make: Callable[[Sequence[slice]], Iterator[tuple[Tensor, ...]]]
    parts: Sequence[slice]
    targets: Tensor
    source: str
    bad: dict[int, BadImage] | None = None

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.make(self.parts)

    def shard(self, rank: int, world_size: int) -> "EvaluationBatches":
        """The batches of one of several processes; the labels stay those of all images."""
        return replace(self, parts=self.parts[rank::world_size])


class ImageSource(ABC):
    """Images to evaluate or predict, in a fixed order: a data set's own test images, or others in their place."""

    #: Labels, [N], on the CPU; 0 for unlabeled images.
    targets: Tensor
    #: Images that a pass has found and that cannot be decoded, by index; None where the first one ends the pass.
    bad: dict[int, BadImage] | None = None
    #: Files that are not among the images, because they cannot be decoded.
    skipped: Sequence[BadImage] = ()

    @abstractmethod
    def batches(self) -> EvaluationBatches:
        """Every image once, un-augmented: batches (images [B, 3, H, W], target [B])."""

    @abstractmethod
    def views(self, indices: np.ndarray, pass_number: int) -> EvaluationBatches:
        """Two random views of some images, [M] indices, in that order: batches (view1, view2).

        The same pass_number gives the same views of the same images, whichever others are asked for.
        """

    @abstractmethod
    def mild_view(self, number: int) -> EvaluationBatches:
        """One mild view of every image: batches (images, target).

        Unlike `views` it changes no color and hides little, so that its prediction is about as good as the image's own.

        Args:
            number: 0 is the image itself, 1 its mirror image, each from 2 on another random crop, mirrored half of the
                time. The same number gives the same view.

        Raises:
            ValueError: number is below 0, or 1 where images may not be mirrored.
        """

    def check_files(self) -> None:
        """Raise UserError where image files are not where they should be; nothing where there are no files."""
        return None

    @abstractmethod
    def select(self, indices: np.ndarray) -> "ImageSource":
        """Some of the images, [M] indices."""

    @property
    def names(self) -> list[str]:
        """The name of every image, [N]: a path, or by default its number."""
        return [str(number) for number in range(len(self.targets))]

    def thumbnails(self, indices: Sequence[int], size: int) -> list[Image.Image | None]:
        """Small pictures, their longest side `size` pixels at most; None of those that cannot be shown."""
        return [None] * len(indices)


class BaseDataLoader(ABC):
    """Training batches, validation and test images, and the test distributions as indices of test images.

    Iterating gives one epoch of augmented training batches (images [B, 3, H, W] float32, target [B] int64), on
    `self.device`. With several processes each gets its shard of every global batch, and all get equally many shards.
    Where images are skipped because they cannot be decoded, a shard may have fewer, even none.

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
    #: Whether training sees the classes equally often, whatever their numbers of images.
    balanced: bool = False
    #: Whether a mirrored image keeps its class.
    mirror: bool = True
    #: Training images that this process has found and that cannot be decoded, by index; None where the first one ends
    #: the training.
    bad_training_images: dict[int, BadImage] | None = None
    #: Whether the images of `validation` are neither training nor test images.
    has_held_out_validation: bool = False
    #: Without data there are no images but those of `read`.
    has_data: bool = True

    def __init__(self, batch_size: int):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}.")
        self.batch_size = batch_size
        self.set_epoch(0)
        self.prepare(torch.device("cpu"), seed=0)

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

    def check_files(self) -> None:
        """Raise UserError where image files, of training or others, are not where the config says."""
        return None

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

    @property
    @abstractmethod
    def test(self) -> ImageSource:
        """The balanced test images; raises UserError without data."""

    @property
    def validation(self) -> ImageSource:
        """The validation images; the test images where a data set has none."""
        return self.test

    def split_validation(self) -> EvaluationBatches:
        """The validation images in batches, un-augmented."""
        return self.validation.batches()

    @abstractmethod
    def test_distributions(self) -> dict[str, np.ndarray]:
        """Test distributions in the order of the tables: name -> indices of test images."""

    def mild_view_numbers(self, crops: int) -> list[int]:
        """The mild views to average, see ImageSource: image, mirror image if allowed, random crops."""
        return [0, *([1] if self.mirror else []), *range(2, crops + 2)]

    @abstractmethod
    def read(self, images: Any) -> ImageSource:
        """Unlabeled images in place of the test images.

        Args:
            images: what the class takes: a folder, an ImageList or a tensor.

        Raises:
            UserError: these images cannot be used.
        """

    @abstractmethod
    def read_labeled(self, images: Any | None) -> ImageSource:
        """Labeled images that the network was not trained on.

        Args:
            images: what the class takes: a list file or a folder of class folders; None for the validation images.

        Raises:
            UserError: these images cannot be used, some were trained on, or there are no held-out validation images.
        """
