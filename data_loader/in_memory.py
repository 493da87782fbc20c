"""Data loader for small images: all of them in memory, augmented as whole batches on the training device."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from base.base_data_loader import BaseDataLoader, EvaluationBatches
from data_loader.class_profiles import check_distributions, draw_distributions, draw_rows, long_tail_counts
from data_loader.datasets import ImageSet
from data_loader.samplers import batch_slices, epoch_order, process_share
from data_loader.tensor_transforms import CropFlipRotate, ViewAugmentation, normalize
from utils.seed import TRAINING, VIEWS, epoch_generator

EVALUATION_BATCH = {"cpu": 64, "cuda": 1024}  # what fits the cache; what fills the GPU


class InMemoryDataLoader(BaseDataLoader):
    """Small images: one uint8 tensor on the training device, augmented as whole batches.

    Subclasses set `size`, `mean`, `std`, `largest_class`, `classes`, `mirror` and implement `load`.

    Args:
        batch_size: global batch.
        shuffle: visit the training images in random order.
        imb_factor: images of the rarest class over those of the largest, in (0, 1].
        distributions: test distributions to evaluate, e.g. ["forward50", "uniform"].
        num_workers: accepted for the reference's configs; nothing is left for worker processes to do.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: int
    largest_class: int
    mirror = True

    def __init__(self, batch_size: int, shuffle: bool, imb_factor: float, distributions: list[str], num_workers: int):
        super().__init__(batch_size)
        self.shuffle = shuffle
        self.cls_num_list = long_tail_counts(self.largest_class, self.classes, imb_factor)
        self.distributions = check_distributions(distributions)
        self.augmentation = CropFlipRotate(self.size, flip=self.mirror)
        self.views = ViewAugmentation(self.size, flip=self.mirror)

    def load(self, train: bool) -> ImageSet:
        """The whole training set, or the balanced test set."""
        raise NotImplementedError

    @cached_property
    def train_set(self) -> ImageSet:
        """The long-tailed training set."""
        whole = self.load(train=True)
        return whole.rows(draw_rows(whole.targets.numpy(), self.cls_num_list))

    @cached_property
    def test_set(self) -> ImageSet:
        return self.load(train=False)

    def __len__(self) -> int:
        return len(batch_slices(sum(self.cls_num_list), self.batch_size, smallest=2 * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, self.epoch, TRAINING)
        images, targets = (tensor.to(self.device) for tensor in self.train_set)
        order = epoch_order(len(targets), self.shuffle, generator).to(self.device)
        draw = self.augmentation.draw(len(targets), generator).to(self.device)
        for batch in batch_slices(len(order), self.batch_size, smallest=2 * self.world_size):
            share = process_share(batch, len(order), self.rank, self.world_size)
            rows = order[share]
            augmented = self.augmentation.apply(images[rows], draw.rows(share))
            yield normalize(augmented, self.mean, self.std), targets[rows]

    def split_validation(self) -> EvaluationBatches:
        """The test images: neither CIFAR nor the digits come with validation images of their own."""
        return self.test_batches()

    def test_batches(self) -> EvaluationBatches:
        images, targets = self.test_set
        parts = self._evaluation_slices(len(targets))

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for part in parts:
                yield normalize(images[part].to(self.device), self.mean, self.std), targets[part].to(self.device)

        return EvaluationBatches(batches, len(parts), targets, "test set")

    def _evaluation_slices(self, count: int) -> list[slice]:
        return batch_slices(count, EVALUATION_BATCH.get(self.device.type, EVALUATION_BATCH["cuda"]))

    def test_distributions(self) -> dict[str, np.ndarray]:
        return draw_distributions(self.test_set.targets.numpy(), self.cls_num_list, self.distributions)

    def two_view_batches(self, rows: np.ndarray, draw: int) -> EvaluationBatches:
        rows = torch.as_tensor(rows)
        generator = epoch_generator(self.seed, draw, VIEWS)
        # Drawn for all test images, so that an image's views do not depend on which others are asked for.
        draws = [self.views.draw(len(self.test_set.targets), generator).rows(rows) for _ in range(2)]
        parts = self._evaluation_slices(len(rows))

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for part in parts:
                images = self.test_set.images[rows[part]].to(self.device)
                yield tuple(
                    normalize(self.views.apply(images, view.rows(part).to(self.device)), self.mean, self.std)
                    for view in draws
                )

        return EvaluationBatches(batches, len(parts), self.test_set.targets[rows], "two views of test images")
