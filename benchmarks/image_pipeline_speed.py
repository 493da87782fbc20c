"""Images a second of one worker's training pipeline for large images, against plain Pillow and torchvision.

  python -m benchmarks.image_pipeline_speed LIST.txt DATA_DIR [--images 200] [--repeats 5]

Both sides decode JPEGs and apply a random resized crop to 224, a flip and color jitter. The plain side is torchvision's
and ends in the worker with normalized floats; here the worker makes bytes, and the training device turns whole batches
into numbers (the rate with that on the same core is printed, too). The sides run in turn; medians. Both have the
same random parameters, and the largest difference of the results is printed.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from data_loader import pil_transforms
from data_loader.image_lists import ImageList, ListDataset, collate
from data_loader.on_disk import IMAGENET_MEAN, IMAGENET_STD
from data_loader.tensor_transforms import normalize
from utils.torchvision_import import torchvision

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = ImageList.read(args.list, args.data_dir)
    indices = [int(i) for i in torch.linspace(0, len(images) - 1, args.images)]
    t = torchvision().transforms
    plain_pipeline = t.Compose(
        [
            t.RandomResizedCrop(224),
            t.RandomHorizontalFlip(),
            t.ColorJitter(0.4, 0.4, 0.4, 0),
            t.ToTensor(),
            t.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    dataset = ListDataset(images, [pil_transforms.training(224, 0.4)])

    def plain(part: list[int]) -> torch.Tensor:
        return torch.stack([plain_pipeline(Image.open(images.path(index)).convert("RGB")) for index in part])

    def plain_with_same_seeds(part: list[int]) -> torch.Tensor:
        results = []
        for index in part:
            torch.manual_seed(index)
            results.append(plain([index]))
        return torch.cat(results)

    def here(part: list[int]) -> torch.Tensor:
        return collate([dataset[index, index] for index in part])[0][0]

    def with_numbers(part: list[int]) -> torch.Tensor:
        return normalize(here(part), IMAGENET_MEAN, IMAGENET_STD)

    parts = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    difference = max(float((plain_with_same_seeds(part) - with_numbers(part)).abs().max()) for part in parts)
    times = {plain: [], here: [], with_numbers: []}
    for _ in range(args.repeats):
        for side, taken in times.items():
            start = time.perf_counter()
            for part in parts:
                side(part)
            taken.append(time.perf_counter() - start)
    rates = {side.__name__: len(indices) / statistics.median(taken) for side, taken in times.items()}
    print(f"plain: {rates['plain']:.0f} images/s per worker")
    for side, name in ((here, "here"), (with_numbers, "here, numbers on the same core")):
        ratio = statistics.median(p / h for p, h in zip(times[plain], times[side], strict=True))
        print(f"{name}: {rates[side.__name__]:.0f} images/s, {ratio:.2f} times as many")
    print(f"largest difference of a normalized value: {difference:.1e}")


if __name__ == "__main__":
    main()
