"""What the augmentation arguments of all data loaders have in common."""

import math

#: Smallest and largest part of an image that torchvision's RandomResizedCrop shows.
CROP_SCALE = (0.08, 1.0)
#: torchvision's default, of 0 to 30.
RAND_AUGMENT_MAGNITUDE = 9


def check_augmentation(color_jitter: float, rand_augment: int, rand_augment_magnitude: int) -> None:
    """See that arguments are in range.

    Raises:
        ValueError: one is not.
    """
    if not 0 <= color_jitter < math.inf:
        raise ValueError(f"color_jitter must be at least 0 (0.4 is usual), not {color_jitter}")
    if not 0 <= rand_augment <= 10:
        raise ValueError(f"rand_augment must be 0 to 10 operations (2 is usual), not {rand_augment}")
    if not 0 <= rand_augment_magnitude <= 30:
        raise ValueError(f"rand_augment_magnitude must be 0 to 30, not {rand_augment_magnitude}")
