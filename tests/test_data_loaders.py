"""The contract of data loaders, in memory and from disk; and what is special in memory."""

import pickle

import numpy as np
import pytest
import torch
from test_on_disk import folder, make  # noqa: F401 (a fixture)

from data_loader import data_loaders
from data_loader.class_profiles import held_out_counts
from data_loader.data_loaders import ImbalanceCIFAR10DataLoader, ImbalanceCIFAR100DataLoader, ImbalanceDigitsDataLoader
from data_loader.datasets import ImageSet, load_digits
from data_loader.samplers import balanced_order, batch_slices, shard
from data_loader.tensor_appearance import RandAugmentGroups
from data_loader.tensor_transforms import normalize
from utils.errors import UserError
from utils.parse_config import parameters_of
from utils.torchvision_import import torchvision

CPU = torch.device("cpu")


def digits(**options) -> ImbalanceDigitsDataLoader:
    return ImbalanceDigitsDataLoader(batch_size=50, **options)


class SmallCIFAR(ImbalanceCIFAR100DataLoader):
    """CIFAR's loader on the digits, for its arguments."""

    image_size = 16
    classes = 10
    largest_class = 60

    def load(self, train: bool) -> ImageSet:
        return load_digits(train, self.image_size)


def small_cifar(**options) -> SmallCIFAR:
    return SmallCIFAR("", 50, imb_factor=0.5, **options)


@pytest.fixture(params=["in memory", "on disk"])
def kind(request, folder):  # noqa: F811
    """Makes a loader of either kind."""
    return small_cifar if request.param == "in memory" else lambda **options: make(folder, **options)


def epoch(loader, number: int = 1, seed: int = 1, rank: int = 0, world_size: int = 1, first_batch: int = 0) -> list:
    """The batches of an epoch, (images, targets)."""
    loader.prepare(CPU, seed, rank, world_size)
    loader.set_epoch(number, first_batch)
    return list(loader)


def pixels(batches) -> torch.Tensor:
    return torch.cat([images for images, *_ in batches])


def labels(batches) -> torch.Tensor:
    return torch.cat([targets for _, targets in batches])


# --- training ---


def test_an_epoch_has_every_image_once_and_repeats(kind):
    loader = kind(color_jitter=0.4, rand_augment=2)
    before = torch.get_rng_state()
    batches = epoch(loader)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone
    size, total = loader.batch_size, sum(loader.cls_num_list)
    assert [len(targets) for _, targets in batches] == [size] * (total // size) + [total % size]
    assert len(batches) == len(loader) and torch.bincount(labels(batches)).tolist() == loader.cls_num_list
    assert pixels(batches).dtype == torch.float32 and pixels(batches).shape[1:] == (3, *[loader.image_size] * 2)
    assert torch.equal(pixels(epoch(loader)), pixels(batches))
    for other in (epoch(loader, number=2), epoch(loader, seed=8)):
        assert not torch.equal(pixels(other), pixels(batches))
    resumed = epoch(loader, first_batch=1)
    assert len(resumed) == len(batches) - 1 and torch.equal(pixels(resumed), pixels(batches[1:]))


@pytest.mark.parametrize("balanced", [False, True])
def test_processes_split_every_global_batch(kind, balanced):
    loader = kind(color_jitter=0.4, rand_augment=2, balanced=balanced)
    whole, *shards = epoch(loader), *(epoch(loader, rank=rank, world_size=2) for rank in range(2))
    for batch, *parts in zip(whole, *shards, strict=True):
        assert torch.equal(pixels(parts), batch[0]) and torch.equal(labels(parts), batch[1])


def test_every_augmentation_argument_changes_training(kind):
    plain, defaults = pixels(epoch(kind())), {name: p.default for name, p in parameters_of(type(kind())).items()}
    geometry = {"crop_padding": 2, "rotation": 0.0} if "rotation" in defaults else {"crop_scale": [0.9, 1.0]}
    jitter = {"color_jitter": 0.0 if defaults["color_jitter"] else 0.4}
    changes = {"flip": False, "rand_augment": 2, **geometry, **jitter}
    assert torch.equal(pixels(epoch(kind(**{name: defaults[name] for name in changes}))), plain)
    for name, value in changes.items():
        assert not torch.equal(pixels(epoch(kind(**{name: value}))), plain), name
    weak, strong = (pixels(epoch(kind(rand_augment=2, rand_augment_magnitude=m))) for m in (1, 20))
    assert not torch.equal(weak, strong)


@pytest.mark.parametrize(
    "options",
    [
        {"color_jitter": -0.1},
        {"color_jitter": float("nan")},
        {"rand_augment": -1},
        {"rand_augment": 11},
        {"rand_augment_magnitude": 31},
        {"val_fraction": 1.0},
        {"distributions": ["up3"]},
    ],
    ids=str,
)
def test_arguments_out_of_range(kind, options):
    with pytest.raises(ValueError, match=next(iter(options)).removesuffix("s")):
        kind(**options)


def test_balanced_sampling(kind):
    order = balanced_order(torch.tensor([0] * 90 + [1] * 9 + [2]), 6000, torch.Generator().manual_seed(0))
    times = torch.bincount(order, minlength=100)
    classes = torch.stack([times[:90].sum(), times[90:99].sum(), times[99]])
    assert len(order) == 6000 and times.min() > 0 and (classes - 2000).abs().max() < 150
    loader = kind(balanced=True)
    assert len(labels(epoch(loader))) == sum(loader.cls_num_list)
    assert torch.equal(pixels(epoch(loader)), pixels(epoch(loader)))
    assert not torch.equal(labels(epoch(loader, number=2)), labels(epoch(loader)))


def test_shards_and_slices():
    assert [shard(slice(10, 17), r, 3) for r in range(3)] == [slice(10, 12), slice(12, 14), slice(14, 17)]
    assert batch_slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert batch_slices(9, 4, smallest=2) == [slice(0, 4), slice(4, 8)]
    assert batch_slices(9, 4)[-1] == slice(8, 9)


# --- test images and others in their place ---


def test_random_views_depend_on_image_and_pass_alone(kind):
    source = kind().test
    ((first, second),) = source.views(np.array([3, 11, 5]), pass_number=0)
    assert first.shape == second.shape == (3, *first.shape[1:]) and not torch.equal(first, second)
    ((again, _),) = source.views(np.array([5, 3]), pass_number=0)
    torch.testing.assert_close(again, first[[2, 0]], rtol=0, atol=1e-5)
    ((other, _),) = source.views(np.array([5, 3]), pass_number=1)
    assert not torch.equal(other, again)


def test_mild_views_are_image_mirror_image_and_crops(kind):
    loader = kind()
    source, numbers = loader.test, loader.mild_view_numbers(2)
    image, mirrored, crop, further = (pixels(source.mild_view(number)) for number in numbers)
    assert numbers == [0, 1, 2, 3] and torch.equal(labels(source.mild_view(3)), source.targets)
    assert torch.equal(image, pixels(source.batches())) and torch.equal(mirrored, image.flip(3))
    assert torch.equal(pixels(source.mild_view(2)), crop) and not torch.equal(crop, further)
    loader.prepare(CPU, seed=8)
    assert not torch.equal(pixels(source.mild_view(2)), crop)


def test_some_of_the_images(kind):
    source = kind().test
    few = source.select(np.array([7, 3]))
    assert torch.equal(pixels(few.batches()), pixels(source.batches())[[7, 3]])
    assert torch.equal(few.targets, source.targets[[7, 3]]) and len(few.mild_view(2).targets) == 2


def test_a_slice_of_the_training_images_validates(kind):
    loader, whole = kind(val_fraction=0.25), kind()
    held_out = loader.split_validation()
    counts = torch.bincount(held_out.targets).tolist()
    assert counts == held_out_counts(whole.cls_num_list, 0.25) and held_out.source == "validation set"
    assert [a + b for a, b in zip(counts, loader.cls_num_list, strict=True)] == whole.cls_num_list
    assert torch.bincount(labels(epoch(loader))).tolist() == loader.cls_num_list
    assert loader.has_held_out_validation and not whole.has_held_out_validation
    loader.prepare(CPU, seed=9)  # the slice is the data's, not the run's
    assert torch.equal(pixels(loader.read_labeled(None).batches()), pixels(held_out))
    assert torch.equal(pixels(loader.test.batches()), pixels(whole.split_validation()))
    assert whole.split_validation().source == "test set"
    with pytest.raises(UserError, match="no validation images that are neither training nor test images"):
        whole.read_labeled(None)


# --- in memory ---


def test_digits_split():
    train, test = load_digits(train=True), load_digits(train=False)
    assert len(train.targets) + len(test.targets) == 1797
    assert torch.bincount(test.targets).tolist() == [50] * 10
    assert torch.bincount(train.targets).min() >= ImbalanceDigitsDataLoader.largest_class
    trained_on = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in trained_on for image in test.images) < 3  # no test image was trained on


def test_digits_of_fewer_pixels():
    fine, coarse = (digits(resolution=r).test.images for r in (8, 4))
    assert coarse.shape == fine.shape == (500, 3, 16, 16)
    blocks = coarse.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)  # [500, 3, 4, 4, 16]
    assert (blocks == blocks[..., :1]).all()
    mean = torch.nn.functional.avg_pool2d(fine.float(), 4)
    torch.testing.assert_close(blocks[..., 0].float(), mean, atol=0.5, rtol=0)


def test_digits_and_their_distributions():
    loader = digits()
    assert len(loader.test.batches().targets) == 500
    assert torch.equal(pixels(loader.test.batches()), normalize(loader.test.images, loader.mean, loader.std))
    distributions = loader.test_distributions()
    assert list(distributions)[0] == "forward50" and list(distributions)[-1] == "backward50"
    counts = np.bincount(loader.test.targets.numpy()[distributions["backward50"]], minlength=10)
    assert counts[0] == 1 and counts[-1] == 50 and (np.diff(counts) >= 0).all()
    assert all(len(set(indices)) == len(indices) for indices in distributions.values())


@pytest.mark.parametrize("make_loader", [digits, lambda: small_cifar(flip=False)], ids=["digits", "flip off"])
def test_nothing_is_mirrored_where_flip_is_off(make_loader):
    loader = make_loader()
    assert loader.mild_view_numbers(2) == [0, 2, 3]
    for augmentation in (loader.augmentation, loader.mild_crop):
        assert not augmentation.sample_params(500, torch.Generator()).flip.any()
    assert not loader.views.sample_params(500, torch.Generator()).crop.flip.any()
    for number in (1, -1):
        with pytest.raises(ValueError, match=f"no mild view {number} here"):
            loader.test.mild_view(number)


def test_mild_crops_are_crops_of_the_padded_image():
    source = small_cifar().test.select(np.arange(0, 500, 50))
    padded = torch.nn.functional.pad(source.images, (4, 4, 4, 4))
    shifts = set()
    for number in range(2, 30):
        for crop, whole in zip(pixels(source.mild_view(number)), padded, strict=True):
            windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)  # [81, 3, 16, 16]
            windows = normalize(windows, source.loader.mean, source.loader.std)
            found = [(windows == image).flatten(1).all(dim=1).nonzero() for image in (crop, crop.flip(2))]
            assert sum(map(len, found))
            shifts |= {(int(place), flip) for flip, places in enumerate(found) for place in places}
    assert len({place for place, _ in shifts}) > 70 and {flip for _, flip in shifts} == {False, True}


def test_unlabeled_images_as_a_tensor():
    loader, images = digits(), torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    ((batch, targets),) = loader.read(images).batches()
    assert torch.equal(batch, normalize(images, loader.mean, loader.std)) and targets.tolist() == [0] * 5
    assert loader.read(images).names == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("some/folder", "There is no image file under some/folder"),
        (None, r"takes a folder of images or a uint8 tensor \[N, 3, 16, 16\], not a NoneType"),
        (torch.zeros(2, 3, 16, 16), r"not float32 \[2, 3, 16, 16\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 tensor \[N, 3, 16, 16\] .* not uint8 \[2, 3, 8, 8\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "with one image at least"),
        (torch.zeros(0, 3, 16, 16, dtype=torch.uint8), "with one image at least"),
    ],
)
def test_images_that_cannot_be_used(images, message):
    with pytest.raises(UserError, match=message):
        digits().read(images)
    with pytest.raises(UserError, match="reads no image files: train with data_loader;args;val_fraction=0.05"):
        digits().read_labeled("list.txt")


def test_thumbnails_are_never_enlarged():
    source = digits().test
    small, whole = source.thumbnails([7], 8)[0], source.thumbnails([3, 7], 64)[1]
    assert small.size == (8, 8) and whole.size == (16, 16)
    assert np.array_equal(np.asarray(whole), source.images[7].permute(1, 2, 0).numpy())


def test_bad_values_in_memory(tmp_path):
    for options in ({"crop_padding": -1}, {"rotation": 200.0}, {"imb_factor": 2}, {"resolution": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            digits(**options)
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        ImbalanceDigitsDataLoader(batch_size=0)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"not CIFAR")
    with pytest.raises(UserError, match="does not hold the official CIFAR100 files"):
        next(iter(ImbalanceCIFAR100DataLoader(str(tmp_path), 8)))
    assert (tmp_path / "cifar-100-python" / "train").read_bytes() == b"not CIFAR"


def test_rand_augment_draws_each_operation_as_torchvision_does():
    """Of many images of one value, brightness and the like change some; the share unchanged is torchvision's."""
    ours = RandAugmentGroups(1, 9, batch_size=16)
    images = torch.full((4000, 3, 4, 4), 100, dtype=torch.uint8)
    changed = ours.apply(images, ours.sample_params(4000, torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    theirs = torchvision().transforms.RandAugment(1, 9)
    expected = torch.stack([theirs(image) for image in images[:1000]])
    share = ((changed == 100).flatten(1).all(dim=1)).float().mean()
    assert abs(share - ((expected == 100).flatten(1).all(dim=1)).float().mean()) < 0.06 and 0.2 < share < 0.9


# --- figures of the data sets ---


def test_figures_of_the_data_sets_are_the_published_ones():
    for cifar in (ImbalanceCIFAR100DataLoader, ImbalanceCIFAR10DataLoader):
        assert (cifar.mean, cifar.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.4)
    for name, test, figures in (
        ("ImageNetLTDataLoader", "test", imagenet),
        ("Places_LT", "test", imagenet),
        ("iNaturalistDataLoader", "val", ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192), 0.0)),
    ):
        loader = getattr(data_loaders, name)
        defaults = parameters_of(loader)
        assert loader.test_name == test
        assert tuple(defaults[figure].default for figure in ("mean", "std", "color_jitter")) == figures


def test_names_of_cifars_classes(cifar_dir):
    names = ImbalanceCIFAR100DataLoader(str(cifar_dir), 8).class_names
    with open(cifar_dir / "cifar-100-python" / "meta", "rb") as file:
        assert names == pickle.load(file)["fine_label_names"]
    assert ImbalanceCIFAR10DataLoader("", 8).class_names[3] == "cat"
