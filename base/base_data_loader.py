"""The contract between data and everything else: what a data loader class in a config gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError


class BaseDataLoader(ABC):
    """Training batches, validation batches, the test images once, and the test distributions as rows of them.

    Iterating gives one epoch of augmented training batches (images [B, 3, H, W] float32, target [B] int64), on
    `self.device`. With several processes each gets its share of every global batch.

    Args:
        batch_size: the global batch, over all processes.

    Raises:
        UserError: batch_size is below 1.
    """

    #: Training images per class, [C].
    cls_num_list: list[int]
    #: The label that a class has in the data set's own files, for every label used here; None where they agree.
    class_map: list[int] | None = None

    def __init__(self, batch_size: int):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}.")
        self.batch_size = batch_size
        self.device = torch.device("cpu")
        self.seed, self.epoch, self.rank, self.world_size = 0, 0, 0, 1

    @property
    def num_classes(self) -> int:
        return len(self.cls_num_list)

    def prepare(self, device: torch.device, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Say where batches are wanted, what seeds the draws, and which of several processes this is.

        Raises:
            UserError: there are fewer images in a batch than processes.
        """
        if self.batch_size < world_size:
            raise UserError(
                f"batch_size is {self.batch_size} for all of {world_size} processes: make it at least {world_size}."
            )
        self.device, self.seed, self.rank, self.world_size = device, seed, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle and the augmentation draws of the next iteration."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches."""

    @abstractmethod
    def split_validation(self) -> "EvaluationBatches":
        """The validation images, un-augmented. Where a data set has none, its test images stand in."""

    @abstractmethod
    def test_batches(self) -> "EvaluationBatches":
        """The balanced test images, once each, un-augmented, in a fixed order."""

    @abstractmethod
    def test_distributions(self) -> dict[str, np.ndarray]:
        """Test distributions in the order of the tables: name -> rows of `test_batches`."""

    @abstractmethod
    def two_view_batches(self, rows: np.ndarray, draw: int) -> "EvaluationBatches":
        """Two random views of the given test images, as batches (view1, view2), in the order of the rows.

        Args:
            rows: rows of `test_batches`.
            draw: number of the draw; the same number gives the same views of the same rows.
        """


class EvaluationBatches:
    """Batches that can be iterated again and again, with their number and the labels of all their images.

    Args:
        make: makes a fresh iterator of batches.
        count: number of batches.
        targets: labels in the order of the images, [N], on the CPU.
        source: what the images are, for messages, e.g. "test set".
    """

    def __init__(self, make, count: int, targets: Tensor, source: str):
        self._make, self._count = make, count
        self.targets, self.source = targets, source

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator:
        return self._make()
