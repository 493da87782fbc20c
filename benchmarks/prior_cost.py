"""Time and memory of PriorAggregator at the size of iNaturalist's test set, on made-up logits.

python benchmarks/prior_cost.py [--classes 8142] [--images 24426]
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tade import PriorAggregator, class_prior  # noqa: E402


def peak() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=8142)
    parser.add_argument("--images", type=int, default=24426)
    args = parser.parse_args()
    profile = 1000 * 0.002 ** (torch.arange(args.classes) / (args.classes - 1))
    log_prior = class_prior(profile.clamp(min=2).int().tolist()).log()
    logits = torch.randn(args.images, 1, args.classes, generator=torch.Generator().manual_seed(0))
    logits += 0.3 * log_prior
    targets = torch.arange(args.images) % args.classes
    logits[torch.arange(args.images), 0, targets] += 12
    views = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)), logits.clone()
    print(
        f"logits and views {3 * logits.numel() * 4 / 2**30:.2f} GiB, peak before {peak():.2f} GiB, "
        f"{torch.get_num_threads()} threads"
    )
    for classwise in (False, True):
        for pairs in (None, [views]):
            aggregator = PriorAggregator(torch.zeros(1, args.classes), log_prior, classwise=classwise)
            start = time.perf_counter()
            aggregator.fit(logits, pairs)
            seconds, what = time.perf_counter() - start, "with" if pairs else "without"
            print(f"fit, classwise {classwise}, {what} views: {seconds:.1f} s, peak {peak():.2f} GiB")
    stream = PriorAggregator(torch.zeros(1, args.classes), log_prior)
    for first in range(0, stream.buffer, 64):
        part = slice(first, first + 64)
        start = time.perf_counter()
        stream.update(logits[part], (views[0][part], views[1][part]))
    print(f"update of 64 images, buffer full: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
