"""Data loader for large images of a published data set: its own lists, among them one for every test distribution."""

from pathlib import Path

import numpy as np

from base.base_data_loader import TrainedOn
from data_loader.augmentation import CROP_SCALE, RAND_AUGMENT_MAGNITUDE
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS
from data_loader.image_lists import ImageList
from data_loader.on_disk import IMAGENET_MEAN, IMAGENET_STD, ListDataLoader
from utils.errors import UserError


class PublishedListDataLoader(ListDataLoader):
    """A published data set: its lists under `data_txt/`, among them one for every test distribution.

    Subclasses set `lists`, and `test_name`, `published`, `mean`, `std`, `jitter`, `smallest_view`, `renumber` where
    they differ from ImageNet-LT's.

    Args:
        data_dir: folder of the images.
        batch_size, shuffle, num_workers, balanced, retain_epoch_size, on_bad_image, image_size: as in ListDataLoader.
        list_dir: folder of the lists.
        train_list, val_list, test_list: other lists than the published ones; with another test list, the test
            distributions are chosen from it.
        distributions: names of the test distributions; by default the published ones.
        flip, crop_scale, rand_augment, rand_augment_magnitude: as in ListDataLoader.
        color_jitter: as in ListDataLoader; None for what the data set is usually trained with.
        val_fraction: as in ListDataLoader; for iNaturalist, whose validation images are its test images.
        trained_on: see ListDataLoader.
    """

    lists: str
    test_name = "test"
    published = CIFAR_DISTRIBUTIONS
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    jitter = 0.4

    def __init__(
        self,
        data_dir: str,
        batch_size: int,
        shuffle: bool = True,
        num_workers: int = 4,
        balanced: bool = False,
        retain_epoch_size: bool = True,
        on_bad_image: str | None = None,
        image_size: int = 224,
        list_dir: str = "data_txt",
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        distributions: list[str] | None = None,
        val_fraction: float = 0.0,
        color_jitter: float | None = None,
        flip: bool = True,
        crop_scale: list[float] = CROP_SCALE,
        rand_augment: int = 0,
        rand_augment_magnitude: int = RAND_AUGMENT_MAGNITUDE,
        trained_on: TrainedOn | None = None,
    ):
        self.list_dir = Path(list_dir)
        self.own_test_list = test_list is not None
        super().__init__(
            data_dir=data_dir,
            train_list=train_list or self._list("train"),
            test_list=test_list or self._list(self.test_name),
            batch_size=batch_size,
            val_list=val_list or test_list or self._list("val"),
            image_size=image_size,
            mean=self.mean,
            std=self.std,
            distributions=distributions or self.published,
            color_jitter=self.jitter if color_jitter is None else color_jitter,
            shuffle=shuffle,
            num_workers=num_workers,
            balanced=balanced,
            retain_epoch_size=retain_epoch_size,
            on_bad_image=on_bad_image,
            val_fraction=val_fraction,
            flip=flip,
            crop_scale=crop_scale,
            rand_augment=rand_augment,
            rand_augment_magnitude=rand_augment_magnitude,
            trained_on=trained_on,
        )

    def _list(self, name: str) -> str:
        return str(self.list_dir / self.lists.format(name))

    def test_distributions(self) -> dict[str, np.ndarray]:
        """Indices of the images that the published lists name; with a test list of one's own, chosen from it.

        Raises:
            UserError: a list is missing, or names an image that the test list does not; the test images have no labels.
        """
        self._check_test_labels()
        if self.own_test_list:
            return super().test_distributions()
        index_of = {name: index for index, name in enumerate(self.test_images.names())}
        indices = {}
        for name in self.distributions:
            images = ImageList.read(self._list(name), self.test_images.data_dir)
            try:
                indices[name] = np.array([index_of[path] for path in images.names()])
            except KeyError as error:
                raise UserError(
                    f"{images.list_path} names {error.args[0]}, which {self.test_images.list_path} does "
                    "not: take both from the same source."
                ) from None
        return indices
