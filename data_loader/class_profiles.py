"""Class distributions: how long the tail of a training set is, which test images form a distribution.

Pure functions on counts and labels; no image is touched here.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

CIFAR_DISTRIBUTIONS = (
    "forward50",
    "forward25",
    "forward10",
    "forward5",
    "forward2",
    "uniform",
    "backward2",
    "backward5",
    "backward10",
    "backward25",
    "backward50",
)
SUBSET_SEED = 0  # long-tailed subsets are part of the benchmark's definition, not of a run's randomness


def long_tail_counts(largest: int, num_classes: int, imb_factor: float) -> list[int]:
    """Images that each class keeps: floor(largest * imb_factor^(c / (C-1))), exponential profile.

    Args:
        largest: images of the first class.
        num_classes: C >= 2.
        imb_factor: images of the last class over those of the first, in (0, 1]: the inverse of the imbalance ratio.

    Raises:
        ValueError: imb_factor outside (0, 1], or so small that a class would be empty.
    """
    if not 0 < imb_factor <= 1:
        raise ValueError(f"imb_factor must lie in (0, 1] (0.01 is imbalance ratio 100), not {imb_factor}")
    counts = [int(largest * imb_factor ** (c / (num_classes - 1))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(
            f"imb_factor {imb_factor} leaves the rarest class without an image; "
            f"with {largest} images in the largest class it must be at least {1 / largest:g}"
        )
    return counts


def parse_distribution(name: str) -> tuple[str, float]:
    """("forward" | "backward" | "uniform", ratio): "forward50" -> ("forward", 50.0), "uniform" -> ("uniform", 1.0).

    Raises:
        ValueError: the name is neither "uniform" nor "forward" or "backward" with a ratio of at least 1.
    """
    if name == "uniform":
        return name, 1.0
    match = re.fullmatch(r"(forward|backward)(\d+(?:\.\d+)?)", name)
    if not match or float(match[2]) < 1:
        raise ValueError(
            f'unknown test distribution "{name}": use "uniform", or "forward" or "backward" followed by '
            'a ratio of at least 1, such as "forward50"'
        )
    return match[1], float(match[2])


def check_distributions(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if each is a known distribution and there once.

    Raises:
        ValueError: a name is unknown or there twice, or there is none.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError("distributions must name at least one test distribution, and each once")
    for name in names:
        parse_distribution(name)
    return tuple(names)


def distribution_counts(images_per_class: int, cls_num_list: Sequence[int], name: str) -> list[int]:
    """Test images of each class in one test distribution.

    The class of rank i by descending training count gets floor(m * (1/ratio)^(i / (C-1))); "backward" reverses the
    ranks (Hong et al., LADE, CVPR 2021). Equal counts keep their class order.

    Args:
        images_per_class: m, images per class in the balanced test set.
        cls_num_list: training images per class, [C].
        name: "forward50", "uniform", "backward2", ...
    """
    direction, ratio = parse_distribution(name)
    rank = np.empty(len(cls_num_list), dtype=int)
    rank[np.argsort(-np.asarray(cls_num_list), kind="stable")] = np.arange(len(cls_num_list))
    if direction == "backward":
        rank = len(cls_num_list) - 1 - rank
    return [int(images_per_class * (1 / ratio) ** (i / (len(cls_num_list) - 1))) for i in rank]


def subset_indices(targets: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Indices of counts[c] images of every class c, in class order: [sum(counts)].

    A NumPy legacy generator, seeded 0, shuffles the images of one class after the other; the first counts[c] are kept.
    This defines the published CIFAR-LT subsets image by image.

    Args:
        targets: labels of all images, [N].
        counts: images wanted of each class, [C].
    """
    generator = np.random.RandomState(SUBSET_SEED)
    kept = []
    for label, count in enumerate(counts):
        of_class = np.flatnonzero(targets == label)
        generator.shuffle(of_class)
        kept.append(of_class[:count])
    return np.concatenate(kept)


def held_out_counts(counts: Sequence[int], fraction: float) -> list[int]:
    """Training images of each class that become validation images: [C].

    The fraction of each class, rounded; at least one of every class that has two or more, and never all of a class.

    Args:
        counts: training images per class, [C].
        fraction: in [0, 1); 0 holds out none.

    Raises:
        ValueError: the fraction is out of range, or positive while no class has two images.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1 (0.05 is recommended), not {fraction}")
    held_out = [min(max(int(n * fraction + 0.5), 1), n - 1) if fraction else 0 for n in counts]
    if fraction and not any(held_out):
        raise ValueError("val_fraction needs a class with two training images: leave it out")
    return held_out


def hold_out(targets: np.ndarray, counts: Sequence[int], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split a training set into what is trained on and a stratified validation slice: indices [M], [N - M].

    Which images it takes is part of the data's definition (SUBSET_SEED) and independent of a run's seed: an evaluation
    with another seed must hold out what training held out, and runs with several seeds should train on the same images.

    Args:
        targets: labels of the training images, [N].
        counts: images of each class in it, [C].
        fraction: see `held_out_counts`.

    Returns:
        The indices of the training images in their order, and of the validation images in class order.

    Raises:
        ValueError: see `held_out_counts`.
    """
    held_out = subset_indices(targets, held_out_counts(counts, fraction))
    return np.setdiff1d(np.arange(len(targets)), held_out), held_out


def distribution_indices(
    targets: np.ndarray, cls_num_list: Sequence[int], names: Iterable[str] = CIFAR_DISTRIBUTIONS
) -> dict[str, np.ndarray]:
    """Name -> indices of the test images of each test distribution; "uniform" is all of a balanced set, in file order.

    Of an unbalanced test set, each class offers as many images as the smallest class has. A class without a test image
    is in no distribution.

    Args:
        targets: labels of the test set, [N].
        cls_num_list: training images per class, [C].
        names: distributions wanted, in the order wanted.
    """
    available = np.bincount(targets, minlength=len(cls_num_list))
    smallest = int(available[available > 0].min())
    balanced = smallest == available.max()
    return {
        name: np.arange(len(targets))
        if name == "uniform" and balanced
        else subset_indices(targets, distribution_counts(smallest, cls_num_list, name))
        for name in names
    }
