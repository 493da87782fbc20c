"""The data loader classes that a config may name in `data_loader.type`."""

from data_loader.datasets import CIFAR_CLASSES, ImageSet, load_cifar, load_digits
from data_loader.in_memory import InMemoryDataLoader
from data_loader.on_disk import ListDataLoader
from data_loader.published_lists import PublishedListDataLoader

__all__ = [
    "ImbalanceCIFAR10DataLoader",
    "ImbalanceCIFAR100DataLoader",
    "ImbalanceDigitsDataLoader",
    "ListDataLoader",
    "ImageNetLTDataLoader",
    "Places_LT",
    "iNaturalistDataLoader",
]


class _ImbalanceCIFAR(InMemoryDataLoader):
    image_size = 32
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    name: str

    def __init__(self, data_dir: str, batch_size: int, **options):
        super().__init__(batch_size, **options)
        self.data_dir = data_dir
        self.class_names = CIFAR_CLASSES[self.name]

    def load(self, train: bool) -> ImageSet:
        return load_cifar(self.name, self.data_dir, train)


class ImbalanceCIFAR100DataLoader(_ImbalanceCIFAR):
    """CIFAR-100-LT. `imb_factor` 0.01, 0.02, 0.1 are imbalance ratios 100, 50, 10; downloads the data when absent."""

    name = "CIFAR100"
    classes = 100
    largest_class = 500


class ImbalanceCIFAR10DataLoader(_ImbalanceCIFAR):
    """CIFAR-10-LT. `imb_factor` 0.01, 0.1 are imbalance ratios 100, 10; downloads the data when absent."""

    name = "CIFAR10"
    classes = 10
    largest_class = 5000


class ImbalanceDigitsDataLoader(InMemoryDataLoader):
    """A long-tailed version of scikit-learn's handwritten digits, for the demo and the tests: no download.

    120 training images in the largest class; 50 test images in every class. A `resolution` below 8 makes them hard to
    tell apart, see data_loader.datasets.load_digits.
    """

    image_size = 16
    mean, std = (0.3, 0.3, 0.3), (0.37, 0.37, 0.37)
    classes = 10
    largest_class = 120

    def __init__(self, batch_size: int, imb_factor: float = 0.05, flip: bool = False, resolution: int = 8, **options):
        if resolution not in (1, 2, 4, 8):
            raise ValueError(f"resolution must be 1, 2, 4 or 8, not {resolution}")
        super().__init__(batch_size, imb_factor=imb_factor, flip=flip, **options)
        self.resolution = resolution

    def load(self, train: bool) -> ImageSet:
        return load_digits(train, self.image_size, self.resolution)


class ImageNetLTDataLoader(PublishedListDataLoader):
    """ImageNet-LT. Lists data_txt/ImageNet_LT/ImageNet_LT_*.txt, images under data/ImageNet_LT."""

    lists = "ImageNet_LT/ImageNet_LT_{}.txt"


class Places_LT(PublishedListDataLoader):  # noqa: N801 the reference's name
    """Places-LT. Lists data_txt/Places_LT_v2/Places_LT_*.txt, images under data/Place365.

    Labels are renumbered by falling training frequency, as in the reference's checkpoints; `class_map` says what they
    were.
    """

    lists = "Places_LT_v2/Places_LT_{}.txt"
    renumber = True


class iNaturalistDataLoader(PublishedListDataLoader):  # noqa: N801 the reference's name
    """iNaturalist 2018. Lists data_txt/iNaturalist18/iNaturalist18_*.txt, images under data/iNaturalist.

    The validation images are the test images, too.
    """

    lists = "iNaturalist18/iNaturalist18_{}.txt"
    test_name = "val"
    smallest_view = 0.08

    def __init__(
        self,
        data_dir: str,
        batch_size: int,
        mean: list[float] = (0.466, 0.471, 0.380),
        std: list[float] = (0.195, 0.194, 0.192),
        color_jitter: float = 0.0,
        distributions: list[str] = ("forward3", "forward2", "uniform", "backward2", "backward3"),
        **options,
    ):
        super().__init__(
            data_dir, batch_size, mean=mean, std=std, color_jitter=color_jitter, distributions=distributions, **options
        )
