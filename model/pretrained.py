"""Starting a network from the weights of another one (`weights` in a config): a plain network's, or this project's."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from base.base_model import BaseModel
from model.backbones.multi_expert import experts_in
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

ADVICE = (
    "It takes a checkpoint of this project, or a plain network with keys like conv1.weight, bn1.running_mean, "
    'layer3.0.conv2.weight; leave "weights" out to start from random ones.'
)
PLACES_ADVICE = (
    "For Places-LT it is the caffe-converted ImageNet ResNet-152 that OLTR (arXiv 1904.05160) publishes. " + ADVICE
)
OWN = "backbone."  # how the names in a checkpoint of this project begin


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file.

    Raises:
        UserError: the file is missing or is something else; says where to get it and what its keys look like.
    """
    if not Path(path).is_file():
        raise UserError(f'There is no file {path}, which "weights" in the config names. {_advice(path)}')
    try:
        weights: dict[str, Tensor] = load_checkpoint(path)["model"]
    except UserError as error:
        raise UserError(f"{error} {_advice(path)}") from error
    return weights


def start_from(network: BaseModel, plain: Mapping[str, Tensor], source: str) -> list[str]:
    """Copy weights by name, in place. Classifiers stay as they are: the classes may differ, or are to be learned anew.

    A plain network's stages go to every expert. From a checkpoint of this project an expert takes the same expert's
    stages, or those of a network of one expert.

    Args:
        network: gets the weights.
        plain: state dict of a plain network (parts conv1, bn1, layer1 .. layer4, as torchvision names them), or of a
            network of this project.
        source: where `plain` came from, for messages.

    Returns:
        The names that were filled.

    Raises:
        UserError: an entry is missing or has another shape (another depth or width), or a checkpoint has several
            experts, but not as many as the network.
    """
    state, filled = network.state_dict(), {}
    from_here = any(name.startswith(OWN) for name in plain)
    experts = experts_in(plain)
    has_stages = len(network.expert_modules(0)) > 1  # experts are more than a classifier
    if from_here and has_stages and experts not in (1, network.num_experts):
        raise UserError(
            f"{source} has {experts} experts and this network {network.num_experts}: set arch;args;num_experts to "
            f"{experts}, or start from a network of one expert."
        )
    for name, tensor in state.items():
        plain_name = network.plain_name(name)
        if plain_name is None:
            continue
        found = next((n for n in (name, OWN + plain_name if from_here else plain_name) if n in plain), None)
        if found is None:
            if name.endswith("num_batches_tracked"):  # older files have none; it only counts
                continue
            if from_here:
                raise UserError(
                    f"{source} has no {name}: it belongs to another architecture. Use the arch that it was trained "
                    'with (num_classes and use_norm may differ, and num_experts if it was 1), or leave "weights" out.'
                )
            raise UserError(f"{source} has no {plain_name}. {_advice(source)}")
        if plain[found].shape != tensor.shape:
            shapes = f"{found} is {list(plain[found].shape)} in {source} and {list(tensor.shape)} in the network"
            if from_here:
                raise UserError(
                    f"{shapes}: use the arch that it was trained with (depth, reduce_dimension, image_size and the "
                    'like; the classifiers alone may differ), or leave "weights" out.'
                )
            raise UserError(
                f'{shapes}: expert stages must have full width ("reduce_dimension": false), and depth and image size '
                f"must be the same. {_advice(source)}"
            )
        filled[name] = plain[found]
    network.load_state_dict(state | filled)
    return list(filled)


def _advice(path: str | Path) -> str:
    """What "weights" takes; for a file that is called like the one of Places-LT, also where to get it."""
    return PLACES_ADVICE if "resnet152" in Path(path).name.lower() else ADVICE
