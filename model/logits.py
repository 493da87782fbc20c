"""Expert logits of many images: one pass of the network, no gradient, once or in several views."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import EvaluationBatches
from utils import distributed
from utils.errors import UserError
from utils.logger import progress

CHECKED = 256  # images that are checked at once


@torch.inference_mode()
def network_logits(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Expert logits [B, E, C] of one batch, float32 on the CPU."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return network(images)["logits"].float().cpu()


def expert_logits(
    network: nn.Module, views: Iterable[EvaluationBatches], device: torch.device, description: str, shared: bool = False
) -> Tensor:
    """Expert logits of all images, in order, the mean over their views: [N, E, C], float32 on the CPU.

    Without gradient. However many views there are, there is one tensor of that size.

    Args:
        network: see `network_logits`.
        views: batches of the same images, once or in several views; each costs a pass of the network.
        device: of the network.
        description: of the progress bar.
        shared: all processes call this, share the work, and get all of the logits.
    """
    buffer = None
    for k, batches in enumerate(views):
        buffer = buffer or LogitsBuffer(len(batches.targets))
        title = f"{description}, view {k + 1}" if k else description
        for part, (images, _) in numbered(shard_of_process(batches) if shared else batches, title):
            buffer.put(part, network_logits(network, images, device), k)
    assert buffer is not None
    return buffer.gathered() if shared else buffer.filled()


def numbered(batches: EvaluationBatches, description: str) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Every batch after the images that it has, with a progress bar."""
    return zip(batches.parts, progress(batches, description, total=len(batches)), strict=True)


def shard_of_process(batches: EvaluationBatches) -> EvaluationBatches:
    return batches.shard(distributed.rank(), distributed.world_size())


def check_finite(logits: Tensor, description: str) -> Tensor:
    """The same logits [N, E, C], if all are finite.

    Raises:
        UserError: some are not; says of how many images.
    """
    broken = sum(int((~torch.isfinite(part)).flatten(1).any(dim=1).sum()) for part in torch.split(logits, CHECKED))
    if broken:
        error = UserError(
            f"The network's logits are not finite for {broken} of {len(logits)} images ({description}): its weights "
            "are damaged or it diverged in training; use another checkpoint."
        )
        error.shared = True  # of several processes each has all of the logits
        raise error
    return logits


def selected(logits: Tensor, indices: np.ndarray) -> Tensor:
    """The logits of some images, [N, E, C] and indices [M] -> [M, E, C]; not copied where they are all, in order."""
    if np.array_equal(indices, np.arange(len(logits))):
        return logits
    return logits[torch.as_tensor(indices)]


class LogitsBuffer:
    """Collects batches into one tensor of a known length, without a second copy of it in memory.

    Args:
        length: images that will come.
    """

    def __init__(self, length: int):
        self.length = length
        self.used = 0
        self.data: Tensor | None = None

    def put(self, part: slice, batch: Tensor, view: int = 0) -> None:
        """Keep the logits [B, ...] of some images; those of view 1, 2, ... go into the mean with the views before."""
        if self.data is None:
            self.data = batch.new_zeros(self.length, *batch.shape[1:])
        if view == 0:
            self.data[part] = batch
            self.used += len(batch)
        else:
            self.data[part].lerp_(batch, 1 / (view + 1))

    def filled(self) -> Tensor:
        """The logits of all images."""
        assert self.data is not None and self.used == self.length, f"{self.used} of {self.length} images came"
        return self.data

    def gathered(self) -> Tensor:
        """The logits of all images, of which every process has put in its own, in every process."""
        if distributed.world_size() == 1:
            return self.filled()
        own = (self.data.shape, self.data.dtype) if self.data is not None else ((), None)
        shape, dtype = distributed.from_first_process(own)
        if self.data is None:  # fewer batches than processes
            self.data = torch.zeros(shape, dtype=dtype)
        distributed.sum_over_processes(self.data)  # zeros stand for the others' images
        self.used = sum(used for (used,) in distributed.numbers_of_all(self.used))
        return self.filled()
