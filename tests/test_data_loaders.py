import pickle

import numpy as np
import pytest
import torch

from data_loader.class_profiles import held_out_counts
from data_loader.data_loaders import ImbalanceCIFAR10DataLoader, ImbalanceCIFAR100DataLoader, ImbalanceDigitsDataLoader
from data_loader.datasets import ImageSet, load_digits
from data_loader.samplers import batch_slices, shard
from data_loader.tensor_appearance import RandAugmentGroups
from data_loader.tensor_transforms import normalize
from utils.errors import UserError
from utils.torchvision_import import torchvision


@pytest.fixture
def loader():
    return ImbalanceDigitsDataLoader(batch_size=50, imb_factor=0.05)


def test_digits_split():
    train, test = load_digits(train=True), load_digits(train=False)
    assert len(train.targets) + len(test.targets) == 1797
    assert torch.bincount(test.targets).tolist() == [50] * 10
    assert torch.bincount(train.targets).min() >= ImbalanceDigitsDataLoader.largest_class
    trained_on = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in trained_on for image in test.images) < 3  # no test image was trained on


def test_training_batches(loader):
    batches = list(loader)
    assert len(batches) == len(loader) == 9
    assert [len(target) for _, target in batches] == [50] * 8 + [sum(loader.cls_num_list) - 400]
    targets = torch.cat([target for _, target in batches])
    assert torch.bincount(targets).tolist() == loader.cls_num_list
    assert batches[0][0].shape == (50, 3, 16, 16) and batches[0][0].dtype == torch.float32


def test_epochs_differ_and_repeat(loader):
    def epoch(number):
        loader.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    assert not torch.equal(epoch(1), epoch(2))
    torch.testing.assert_close(epoch(1), epoch(1), rtol=0, atol=0)
    of_seed_0 = epoch(1)
    loader.prepare(torch.device("cpu"), seed=8)
    assert not torch.equal(epoch(1), of_seed_0)


def test_processes_split_every_global_batch(loader):
    whole = [target for _, target in loader]
    shards = []
    for rank in range(2):
        loader.prepare(torch.device("cpu"), seed=0, rank=rank, world_size=2)
        shards.append(list(loader))
    for step, target in enumerate(whole):
        torch.testing.assert_close(torch.cat([shards[rank][step][1] for rank in range(2)]), target)


def test_shards_and_slices():
    assert [shard(slice(10, 17), r, 3) for r in range(3)] == [slice(10, 12), slice(12, 14), slice(14, 17)]
    assert batch_slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert batch_slices(9, 4, smallest=2) == [slice(0, 4), slice(4, 8)]
    assert batch_slices(9, 4)[-1] == slice(8, 9)


def test_test_images_are_all_there_and_not_augmented(loader):
    batches = loader.test.batches()
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(images, normalize(loader.test.images, loader.mean, loader.std))
    assert len(batches.targets) == 500 and batches.source == "test set"
    torch.testing.assert_close(torch.cat([target for _, target in batches]), batches.targets)


def test_distributions(loader):
    distributions = loader.test_distributions()
    targets = loader.test.targets.numpy()
    assert list(distributions)[0] == "forward50" and list(distributions)[-1] == "backward50"
    counts = np.bincount(targets[distributions["backward50"]], minlength=10)
    assert counts[0] == 1 and counts[-1] == 50 and (np.diff(counts) >= 0).all()
    assert all(len(set(indices)) == len(indices) for indices in distributions.values())


def test_two_views(loader):
    indices = np.array([3, 499, 250])
    ((first, second),) = loader.test.views(indices, pass_number=0)
    assert first.shape == second.shape == (3, 3, 16, 16)
    assert not torch.equal(first, second)
    ((again, _),) = loader.test.views(np.arange(500)[[250, 3]], pass_number=0)
    torch.testing.assert_close(again, first[[2, 0]], rtol=0, atol=1e-5)
    ((other, _),) = loader.test.views(indices, pass_number=1)
    assert not torch.equal(other, first)


class Color(ImbalanceCIFAR100DataLoader):
    """CIFAR's loader with ten random images in place of the test set."""

    def load(self, train):
        return ImageSet(torch.randint(1, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10))


def view(source, number):
    images, targets = (torch.cat(column) for column in zip(*source.mild_view(number), strict=True))
    assert torch.equal(targets, source.targets)
    return images


def test_mild_views_are_image_mirror_image_and_crops():
    loader = Color("", 8)
    assert loader.mild_view_numbers(4) == [0, 1, 2, 3, 4, 5]
    image = torch.cat([images for images, _ in loader.test.batches()])
    assert torch.equal(view(loader.test, 0), image)
    assert torch.equal(view(loader.test, 1), image.flip(3))
    padded = torch.nn.functional.pad(loader.test.images, (4, 4, 4, 4))
    shifts, flips = set(), set()
    for number in range(2, 30):
        crops = view(loader.test, number)
        for crop, whole in zip(crops, padded, strict=True):
            found = []
            for flip in (False, True):
                windows = whole.unfold(1, 32, 1).unfold(2, 32, 1)  # [3, 9, 9, 32, 32]
                windows = normalize(windows.permute(1, 2, 0, 3, 4).flatten(0, 1), loader.mean, loader.std)
                same = (windows == (crop.flip(2) if flip else crop)).flatten(1).all(dim=1)
                found += [(int(place), flip) for place in same.nonzero()[:, 0]]
            ((place, flip),) = found  # exactly one crop of the padded image, mirrored or not
            shifts.add(place)
            flips.add(flip)
    assert len(shifts) > 70 and flips == {False, True}


def test_mild_views_repeat_by_seed_and_number(loader):
    assert torch.equal(view(loader.test, 2), view(loader.test, 2))
    assert not torch.equal(view(loader.test, 2), view(loader.test, 3))
    before, epoch = view(loader.test, 2), [target for _, target in loader]
    other = ImbalanceDigitsDataLoader(batch_size=50, imb_factor=0.05)
    other.prepare(torch.device("cpu"), seed=8)
    assert not torch.equal(view(other.test, 2), before)
    assert all(torch.equal(a, target) for a, (_, target) in zip(epoch, loader, strict=True))


def test_digits_are_never_mirrored(loader):
    assert loader.mild_view_numbers(2) == [0, 2, 3] and not loader.mild_crop.flip
    with pytest.raises(ValueError, match="no mild view 1 here"):
        loader.test.mild_view(1)
    with pytest.raises(ValueError, match="no mild view -1 here"):
        loader.test.mild_view(-1)


def test_bad_values(tmp_path):
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        ImbalanceDigitsDataLoader(batch_size=0)
    with pytest.raises(ValueError, match="imb_factor"):
        ImbalanceDigitsDataLoader(batch_size=8, imb_factor=2)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"not CIFAR")
    loader = ImbalanceCIFAR100DataLoader(str(tmp_path), 8)
    with pytest.raises(UserError, match="does not hold the official CIFAR100 files"):
        next(iter(loader))
    assert (tmp_path / "cifar-100-python" / "train").read_bytes() == b"not CIFAR"


def test_class_names_and_image_size(loader):
    assert loader.class_names == [str(c) for c in range(10)] and loader.image_size == 16
    assert ImbalanceCIFAR100DataLoader.image_size == 32


def test_names_of_cifars_classes(cifar_dir):
    names = ImbalanceCIFAR100DataLoader(str(cifar_dir), 8).class_names
    with open(cifar_dir / "cifar-100-python" / "meta", "rb") as file:
        assert names == pickle.load(file)["fine_label_names"]
    assert ImbalanceCIFAR10DataLoader("", 8).class_names[3] == "cat"


def test_thumbnails_of_images_in_memory(loader):
    small, whole = loader.test.thumbnails([7], 8)[0], loader.test.thumbnails([3, 7], 64)[1]
    assert small.size == (8, 8) and whole.size == (16, 16)  # never enlarged
    assert np.array_equal(np.asarray(whole), loader.test.images[7].permute(1, 2, 0).numpy())


def test_balanced_sampling(loader):
    balanced = ImbalanceDigitsDataLoader(batch_size=50, imb_factor=0.05, balanced=True)
    assert len(balanced) == len(loader) == 9

    def epoch(number):
        balanced.set_epoch(number)
        return [torch.cat(column) for column in zip(*balanced, strict=True)]

    images, targets = epoch(1)
    assert len(images) == len(targets) == sum(balanced.cls_num_list)
    counts = torch.stack([torch.bincount(epoch(number)[1], minlength=10) for number in range(20)]).sum(dim=0)
    expected = 2 * len(targets)  # of each of 10 classes in 20 epochs
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert all(torch.equal(a, b) for a, b in zip(epoch(1), (images, targets), strict=True))
    assert not torch.equal(epoch(2)[1], targets)
    balanced.prepare(torch.device("cpu"), seed=0, rank=1, world_size=2)
    balanced.set_epoch(1)
    assert torch.equal(next(iter(balanced))[1], targets[25:50])  # the same epoch, whatever the processes


def test_other_test_images(loader):
    before = torch.cat([images for images, _ in loader.test.batches()])
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    other = loader.read(images)
    ((batch, targets),) = other.batches()
    torch.testing.assert_close(batch, normalize(images, loader.mean, loader.std))
    assert targets.tolist() == [0] * 5
    ((first, second),) = other.views(np.array([4, 0]), pass_number=0)
    assert first.shape == second.shape == (2, 3, 16, 16)
    assert view(other, 2).shape == (5, 3, 16, 16)
    assert torch.equal(torch.cat([images for images, _ in loader.test.batches()]), before)
    assert len(loader.test_distributions()["uniform"]) == 500


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
def test_test_images_that_cannot_be_used(loader, images, message):
    with pytest.raises(UserError, match=message):
        loader.read(images)


def test_what_is_held_out_of_every_class():
    assert held_out_counts([500, 30, 10, 2, 1], 0.05) == [25, 2, 1, 1, 0]
    assert held_out_counts([500, 10, 2, 1], 0.99) == [495, 9, 1, 0]  # never all
    assert held_out_counts([500, 1], 0) == [0, 0]
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="val_fraction must be at least 0 and below 1"):
            held_out_counts([5, 5], fraction)
    with pytest.raises(ValueError, match="a class with two training images"):
        held_out_counts([1, 1], 0.5)


def test_a_slice_of_the_training_images_validates(loader):
    sliced = ImbalanceDigitsDataLoader(batch_size=50, imb_factor=0.05, val_fraction=0.2)
    held_out, whole = sliced.split_validation(), loader.train_set
    counts = torch.bincount(held_out.targets)
    assert counts.tolist() == held_out_counts(loader.cls_num_list, 0.2) and held_out.source == "validation set"
    assert (torch.bincount(sliced.train_set.targets) + counts).tolist() == loader.cls_num_list
    assert torch.bincount(sliced.train_set.targets).tolist() == sliced.cls_num_list
    assert len(sliced) < len(loader)
    copy = sliced.read_labeled(None)
    together = torch.cat([sliced.train_set.images, copy.images]).flatten(1)
    assert torch.equal(together.sort(0).values, whole.images.flatten(1).sort(0).values)  # none lost, none twice
    sliced.prepare(torch.device("cpu"), seed=9)  # the slice is the data's, not the run's
    assert all(torch.equal(a[0], b[0]) for a, b in zip(held_out, sliced.split_validation(), strict=True))
    assert sliced.has_held_out_validation and not loader.has_held_out_validation
    assert torch.equal(sliced.test.images, loader.test.images)


def test_held_out_images_take_the_place_of_the_test_images(loader):
    sliced = ImbalanceDigitsDataLoader(batch_size=50, val_fraction=0.2)
    copy = sliced.read_labeled(None)
    assert torch.equal(copy.batches().targets, sliced.split_validation().targets)
    assert torch.equal(next(iter(copy.batches()))[0], next(iter(sliced.split_validation()))[0])
    assert len(copy.mild_view(2).targets) == len(copy.targets) < len(sliced.test.targets) == 500
    with pytest.raises(UserError, match="no validation images that are neither training nor test images"):
        loader.read_labeled(None)
    with pytest.raises(UserError, match="reads no image files: train with data_loader;args;val_fraction=0.05"):
        loader.read_labeled("list.txt")


def test_digits_of_fewer_pixels():
    fine, coarse = (ImbalanceDigitsDataLoader(8, resolution=r).load(train=False).images for r in (8, 4))
    assert coarse.shape == fine.shape == (500, 3, 16, 16)
    blocks = coarse.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)  # [500, 3, 4, 4, 16]
    assert (blocks == blocks[..., :1]).all()
    torch.testing.assert_close(
        blocks[..., 0].float(), torch.nn.functional.avg_pool2d(fine.float(), 4), atol=0.5, rtol=0
    )
    with pytest.raises(ValueError, match="resolution must be 1, 2, 4 or 8, not 3"):
        ImbalanceDigitsDataLoader(8, resolution=3)


class SmallCIFAR(ImbalanceCIFAR100DataLoader):
    """CIFAR's loader on the digits, for its arguments."""

    image_size = 16
    classes = 10
    largest_class = 60

    def load(self, train: bool) -> ImageSet:
        return load_digits(train, self.image_size)


def small_cifar(rank: int = 0, world_size: int = 1, **options) -> SmallCIFAR:
    loader = SmallCIFAR("", 50, imb_factor=0.5, **options)
    loader.prepare(torch.device("cpu"), seed=1, rank=rank, world_size=world_size)
    return loader


def test_every_augmentation_argument_of_cifar_changes_training():
    def images(**options):
        return torch.cat([batch for batch, _ in small_cifar(**options)])

    plain = images()
    defaults = {"flip": True, "crop_padding": 4, "rotation": 15.0, "color_jitter": 0.0, "rand_augment": 0}
    assert torch.equal(images(**defaults), plain)
    changes = ({"flip": False}, {"crop_padding": 2}, {"rotation": 0.0}, {"color_jitter": 0.4}, {"rand_augment": 2})
    for options in changes:
        assert not torch.equal(images(**options), plain), options
        assert torch.equal(images(**options), images(**options)), options
    weak, strong = (images(rand_augment=2, rand_augment_magnitude=magnitude) for magnitude in (1, 20))
    assert not torch.equal(weak, strong)
    for options in ({"crop_padding": -1}, {"rotation": 200.0}, {"color_jitter": -1.0}, {"rand_augment": 11}):
        with pytest.raises(ValueError, match=next(iter(options))):
            small_cifar(**options)


def test_processes_augment_as_one_does():
    options = {"color_jitter": 0.4, "rand_augment": 2}
    whole = list(small_cifar(**options))
    shards = [list(small_cifar(rank, 2, **options)) for rank in range(2)]
    for step, (images, _) in enumerate(whole):
        torch.testing.assert_close(torch.cat([shards[rank][step][0] for rank in range(2)]), images)
    resumed = small_cifar(**options)
    resumed.set_epoch(0, first_batch=2)
    assert torch.equal(next(iter(resumed))[0], whole[2][0])


def test_cifar_without_flips_has_no_mirrored_views():
    loader = small_cifar(flip=False)
    assert loader.mild_view_numbers(2) == [0, 2, 3] and small_cifar().mild_view_numbers(2) == [0, 1, 2, 3]
    for augmentation in (loader.augmentation, loader.mild_crop):
        assert not augmentation.sample_params(500, torch.Generator()).flip.any()
    assert not loader.views.sample_params(500, torch.Generator()).crop.flip.any()


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


def test_chosen_test_images(loader):
    few = loader.test.select(np.array([7, 3]))
    assert torch.equal(few.images, loader.test.images[[7, 3]]) and len(few.batches().targets) == 2
