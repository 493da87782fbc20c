"""Data loader for large images of a published data set: its own lists, among them one for every test distribution."""

from pathlib import Path

import numpy as np

from data_loader.image_lists import ImageList
from data_loader.on_disk import ListDataLoader
from utils.errors import UserError


class PublishedListDataLoader(ListDataLoader):
    """A published data set: its lists under `data_txt/`, among them one for every test distribution.

    Subclasses set `lists`, and `test_name`, `smallest_view`, `renumber` where they differ from ImageNet-LT's.

    Args:
        data_dir: folder of the images.
        batch_size: global batch.
        list_dir: folder of the lists.
        train_list, val_list, test_list: other lists than the published ones; with another test list, the test
            distributions are chosen from it.
        options: see ListDataLoader.
    """

    lists: str
    test_name = "test"

    def __init__(
        self,
        data_dir: str,
        batch_size: int,
        list_dir: str = "data_txt",
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        **options,
    ):
        self.list_dir = Path(list_dir)
        self.own_test_list = test_list is not None
        super().__init__(
            data_dir,
            train_list or self._list("train"),
            test_list or self._list(self.test_name),
            batch_size,
            val_list or test_list or self._list("val"),
            **options,
        )

    def _list(self, name: str) -> str:
        return str(self.list_dir / self.lists.format(name))

    def test_distributions(self) -> dict[str, np.ndarray]:
        """Indices of the images that the published lists name; with a test list of one's own, chosen from it.

        Raises:
            UserError: a list is missing, or names an image that the test list does not.
        """
        self.check_data()
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
