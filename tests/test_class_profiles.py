import hashlib

import numpy as np
import pytest
from conftest import golden_json

from data_loader.class_profiles import (
    CIFAR_DISTRIBUTIONS,
    check_distributions,
    distribution_counts,
    distribution_indices,
    held_out_counts,
    long_tail_counts,
    subset_indices,
)
from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from model.metric import shot_groups

GOLDEN_COUNTS = golden_json("cifar100_lt_counts.json")
FACTORS = {10: 0.1, 50: 0.02, 100: 0.01}


@pytest.mark.parametrize("ratio", FACTORS)
def test_long_tail_counts_are_the_references(ratio):
    assert long_tail_counts(500, 100, FACTORS[ratio]) == GOLDEN_COUNTS[f"train_ir{ratio}"]["per_class"]


def test_cifar10_total():
    assert sum(long_tail_counts(5000, 10, 0.01)) == 12406


@pytest.mark.parametrize("name", [n for n in CIFAR_DISTRIBUTIONS if n != "uniform"])
def test_distribution_counts_are_the_references(name):
    counts = distribution_counts(100, long_tail_counts(500, 100, 0.01), name)
    assert counts == GOLDEN_COUNTS[f"test_{name}"]["per_class"]


def test_distributions_follow_the_training_counts_not_the_class_numbers():
    for name, counts in (("forward10", [1, 10, 3]), ("backward10", [10, 1, 3]), ("uniform", [10, 10, 10])):
        assert distribution_counts(10, [5, 100, 50], name) == counts


@pytest.mark.parametrize("name", ["sideways5", "forward", "forward0.5", "backward-2", "Uniform"])
def test_unknown_distribution(name):
    with pytest.raises(ValueError, match="unknown test distribution"):
        distribution_counts(10, [3, 2, 1], name)


@pytest.mark.parametrize("factor", [0, -0.1, 1.5, 0.001, 0.0019])  # with the last, one class alone is empty
def test_bad_imbalance(factor):
    with pytest.raises(ValueError, match=r"imb_factor must lie in \(0, 1\]|imb_factor .* it must be at least 0.002"):
        long_tail_counts(500, 100, factor)
    assert long_tail_counts(500, 100, 0.002)[-1] == 1


def test_what_is_held_out_of_every_class():
    assert held_out_counts([500, 30, 10, 2, 1], 0.05) == [25, 2, 1, 1, 0]
    assert held_out_counts([500, 10, 2, 1], 0.99) == [495, 9, 1, 0]  # never all
    assert held_out_counts([500, 1], 0) == [0, 0]
    for fraction in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="val_fraction must be at least 0 and below 1"):
            held_out_counts([5, 5], fraction)
    with pytest.raises(ValueError, match="a class with two training images"):
        held_out_counts([1, 1], 0.5)


def test_uniform_is_in_file_order_where_all_classes_have_as_many_images():
    targets = np.array([1, 0, 2, 2, 1, 0])
    assert distribution_indices(targets, [9, 5, 1], ["uniform"])["uniform"].tolist() == list(range(6))
    uneven = distribution_indices(np.append(targets, 0), [9, 5, 1], ["uniform"])["uniform"]
    assert np.append(targets, 0)[uneven].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("ratio", "sizes"), [(100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))])
def test_shot_groups(ratio, sizes):
    groups = shot_groups(long_tail_counts(500, 100, FACTORS[ratio]))
    assert tuple(int(groups[name].sum()) for name in ("many", "medium", "few")) == sizes
    assert (sum(groups.values()) == 1).all()


@pytest.mark.parametrize("names", [[], ["uniform", "uniform"], ["up5"]])
def test_lists_of_distributions(names):
    with pytest.raises(ValueError, match="distribution"):
        check_distributions(names)


def test_subsets_are_repeatable_and_leave_numpy_alone():
    targets = np.repeat(np.arange(5), 20)
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    indices = subset_indices(targets, [20, 10, 5, 2, 1])
    assert (np.random.get_state()[1] == before).all()
    assert (indices == subset_indices(targets, [20, 10, 5, 2, 1])).all()
    assert np.bincount(targets[indices]).tolist() == [20, 10, 5, 2, 1]


INDEX_SUMS = golden_json("cifar100_lt_indices_sha256.json")  # of the indices as little-endian int64


def checksum(indices: np.ndarray) -> str:
    return hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("ratio", FACTORS)
def test_training_images_are_the_references(cifar_dir, ratio):
    loader = ImbalanceCIFAR100DataLoader(str(cifar_dir), 128, imb_factor=FACTORS[ratio])
    whole = loader.load(train=True)
    indices = subset_indices(whole.targets.numpy(), loader.cls_num_list)
    assert checksum(indices) == INDEX_SUMS[f"train_ir{ratio}"]
    assert (loader.train_set.images == whole.images[indices]).all()


def test_test_images_are_the_references(cifar_dir):
    loader = ImbalanceCIFAR100DataLoader(str(cifar_dir), 128, imb_factor=0.01)
    distributions = distribution_indices(loader.test.targets.numpy(), loader.cls_num_list)
    assert list(distributions) == list(CIFAR_DISTRIBUTIONS)
    assert len(distributions.pop("uniform")) == 10_000
    for name, indices in distributions.items():
        assert checksum(indices) == INDEX_SUMS[f"test_{name}"], name
