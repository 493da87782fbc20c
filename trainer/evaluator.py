"""Expert logits once over the test images, then every metric of every test distribution from them."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from base.base_data_loader import EvaluationBatches
from model.metric import class_hits, percent_correct, shot_groups
from utils.logger import progress


@torch.inference_mode()
def network_logits(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Expert logits [B, E, C] of one batch, float32 on the CPU."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return network(images)["logits"].float().cpu()


def expert_logits(network: nn.Module, batches: EvaluationBatches, device: torch.device, description: str) -> Tensor:
    """Expert logits of all images, in order: [N, E, C], float32 on the CPU. One pass of the network, no gradient."""
    rows = RowBuffer(len(batches.targets))
    for images, _ in progress(batches, description, total=len(batches)):
        rows.append(network_logits(network, images, device))
    return rows.filled()


class RowBuffer:
    """Collects batches into one tensor of a known number of rows, without a second copy of it in memory."""

    def __init__(self, rows: int):
        self.rows, self.used, self.data = rows, 0, None

    def append(self, batch: Tensor) -> None:
        if self.data is None:
            self.data = batch.new_empty(self.rows, *batch.shape[1:])
        self.data[self.used : self.used + len(batch)] = batch
        self.used += len(batch)

    def filled(self) -> Tensor:
        assert self.used == self.rows, f"{self.used} of {self.rows} rows came"
        return self.data


class DistributionScorer:
    """Accuracy of class scores on any selection of the test images.

    Args:
        logits: expert logits of all test images, [N, E, C].
        targets: their labels, [N].
        cls_num_list: training images per class, which the shot groups go by, [C].
    """

    def __init__(self, logits: Tensor, targets: Tensor, cls_num_list: Sequence[int]):
        self.logits, self.targets, self.num_classes = logits, targets, len(cls_num_list)
        self.groups = shot_groups(cls_num_list)
        self.expert_hits = logits.argmax(dim=2) == targets[:, None]  # [N, E]

    def score(self, rows: np.ndarray, predict) -> dict:
        """Results on the images `rows`, in percent; None for a group without an image.

        Args:
            rows: [M] row numbers.
            predict: function from expert logits [M, E, C] to class scores [M, C].
        """
        rows = torch.as_tensor(rows)
        prediction = predict(self.logits[rows]).argmax(dim=1)
        hits = class_hits(prediction, self.targets[rows], self.num_classes)
        return {
            "images": len(rows),
            "top1": percent_correct(*hits),
            **{name: percent_correct(*hits, classes) for name, classes in self.groups.items()},
            "experts_top1": (100 * self.expert_hits[rows].double().mean(dim=0)).tolist(),
        }


def score_equal_weights(
    scorer: DistributionScorer, distributions: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, dict]:
    """Results of the mean of the experts' logits on each named distribution."""
    experts = scorer.logits.shape[1]
    return {
        name: {
            **scorer.score(distributions[name], lambda logits: logits.mean(dim=1)),
            "weights": [1 / experts] * experts,
        }
        for name in names
    }
