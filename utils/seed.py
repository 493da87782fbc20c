"""Random numbers: one seed, and for every epoch or pass a generator that depends on nothing else."""

import random

import numpy as np
import torch

# Streams: order and augmentation in training, test-time views, order of test-time updates, partners in mixup, mild
# views to average, labeled test images to calibrate on.
TRAINING, VIEWS, SHUFFLE, MIXUP, MILD_VIEWS, CALIBRATION = 0, 1, 2, 3, 4, 5


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices). Called by scripts, never on import."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_generator(seed: int, epoch: int, stream: int = 0) -> torch.Generator:
    """CPU generator for one epoch: the same (seed, epoch, stream) always gives the same random numbers.

    So a run that is resumed at epoch k goes on exactly as the uninterrupted run would have.

    Args:
        seed: the run's seed.
        epoch: epoch or pass number.
        stream: separates independent uses of the same epoch, TRAINING, VIEWS, SHUFFLE, MIXUP, MILD_VIEWS or
            CALIBRATION.
    """
    mixed = np.random.SeedSequence([seed, epoch, stream]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 32 | int(mixed[1]))
