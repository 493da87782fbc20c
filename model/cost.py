"""Parameters and multiply-adds of a network, by its parts. What is counted: see commands/gflops.py."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from base.base_model import BaseModel
from model.backbones.multi_expert import CosineClassifier
from utils.errors import UserError

KINDS = {
    nn.Conv2d: "convolutions",
    nn.BatchNorm2d: "batch norm",
    nn.Linear: "linear layers",
    CosineClassifier: "cosine classifier",
}
COLUMNS = ("convolutions", "batch norm", "linear layers", "classifier", "cosine classifier")


def _count_cosine_classifier(layer: Any, inputs: tuple[Tensor], cosines: Tensor) -> None:
    """thop handler: D multiply-adds for each of the B * C cosines."""
    layer.total_ops += layer.weight.shape[0] * cosines.numel()


def _count_batch_norm(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    """thop handler: two operations an element, as thop counted when the published figures were made (now four)."""
    layer.total_ops += 2 * output.numel()


def count_macs(network: BaseModel, image_size: int) -> pd.DataFrame:
    """Cost of one forward pass of one image [3, image_size, image_size], by part of the network.

    Returns:
        Rows "stem", "expert 1", ..., "total"; columns "parameters" (number), one of multiply-adds (number) for each
        kind of layer, their sum "MACs", and "published way", the sum without cosine classifiers.

    Raises:
        UserError: thop is missing, or distutils, which it needs and Python has no more since 3.12.
    """
    try:
        from thop import profile
    except ModuleNotFoundError as error:
        raise UserError(f"thop counts multiply-adds and lacks {error.name}: pip install thop setuptools") from error
    handlers = {CosineClassifier: _count_cosine_classifier, nn.BatchNorm2d: _count_batch_norm}
    _, _, counted = profile(
        network, (torch.zeros(1, 3, image_size, image_size),), handlers, verbose=False, ret_layer_info=True
    )
    for module in network.modules():  # thop leaves its counters in containers
        for counter in ("total_ops", "total_params"):
            module._buffers.pop(counter, None)
    experts = {
        id(module): f"expert {e + 1}"
        for e in range(network.num_experts)
        for part in network.expert_modules(e)
        for module in part.modules()
    }
    classifiers = {network.expert_modules(e)[-1] for e in range(network.num_experts)}
    parts = ["stem", *(f"expert {e + 1}" for e in range(network.num_experts))]
    table = pd.DataFrame(0, index=parts, columns=["parameters", *COLUMNS])
    for name, module in network.named_modules():
        part = experts.get(id(module), "stem")
        table.loc[part, "parameters"] += sum(p.numel() for p in module.parameters(recurse=False))
        if type(module) in KINDS:
            kind = "classifier" if type(module) is nn.Linear and module in classifiers else KINDS[type(module)]
            table.loc[part, kind] += int(_look_up(counted, name))
    table["MACs"] = table[list(COLUMNS)].sum(axis=1)
    table["published way"] = table["MACs"] - table["cosine classifier"]
    table.loc["total"] = table.sum()
    return table


def _look_up(counted: dict, name: str) -> float:
    """thop's operations of a module, from its nested dict of name -> (operations, parameters, dict of children)."""
    *parents, last = name.split(".")
    for parent in parents:
        counted = counted[parent][2]
    return counted[last][0]
