"""An exponential moving average of a network's weights, validated and saved beside the last ones."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.checkpoint import load_weights


class WeightAverage(AveragedModel):
    """The average of a network's weights and batch statistics, in `module`; every step of the optimizer updates it.

    Args:
        network: the average starts from its present weights.
        optimizer: of the network.
        decay: part of the average that remains in each step.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, decay: float):
        super().__init__(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.n_averaged += 1  # at 0 the first update would be a copy, also in a resumed run
        optimizer.register_step_post_hook(lambda *_: self.update_parameters(network))

    def restore(self, checkpoint: Mapping, path: str | Path) -> None:
        """Continue the average of a checkpoint, or start from its weights if it has none.

        Raises:
            UserError: the average belongs to another network.
        """
        load_weights(self.module, checkpoint.get("ema") or checkpoint["model"], path)
