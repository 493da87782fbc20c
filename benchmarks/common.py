"""What the benchmarks share: random images in CIFAR-100's shape, and the record of where a figure comes from."""

import json
import os
import platform
import sys
from pathlib import Path

import torch

from comparison.tables import commit
from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from data_loader.datasets import ImageSet

#: The columns of the README's table; data sets with fewer test distributions show those they have.
TABLE_DISTRIBUTIONS = ("forward50", "forward10", "uniform", "backward10", "backward50")


class RandomCIFAR100(ImbalanceCIFAR100DataLoader):
    """As many random images of each class as asked for, 500 as CIFAR-100 has them for training by default."""

    per_class = 500

    def load(self, train: bool) -> ImageSet:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (100 * self.per_class, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ImageSet(images, torch.arange(100).repeat_interleave(self.per_class))


def processor() -> str:
    """Model of the CPU, with the matrix instructions that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"


def write_record(path: Path, device: torch.device, content: dict) -> None:
    """Write figures as JSON, with the command, commit, versions and machine that they come from."""
    record = {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
