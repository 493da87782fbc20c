"""Starting a multi-expert network from the weights of a plain one (`weights` in a config)."""

from pathlib import Path

from torch import Tensor, nn

from utils.checkpoint import load_checkpoint
from utils.errors import UserError

ADVICE = (
    "For Places-LT it is the caffe-converted ImageNet ResNet-152 that OLTR (arXiv 1904.05160) publishes, keys "
    "like conv1.weight, bn1.running_mean, layer3.0.conv2.weight, fc.weight; "
    'leave "weights" out to start from random ones.'
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a plain network's file.

    Raises:
        UserError: the file is missing or is something else; says where to get it and what its keys look like.
    """
    if not Path(path).is_file():
        raise UserError(f'There is no file {path}, which "weights" in the config names. {ADVICE}')
    try:
        return load_checkpoint(path)["model"]
    except UserError as error:
        raise UserError(f"{error} {ADVICE}") from error


def start_from(backbone: nn.Module, plain: dict[str, Tensor], source: str) -> list[str]:
    """Copy a plain network's weights by name, in place; every expert's layer3 and layer4 get the plain network's.

    Classifiers stay as they are: the classes differ.

    Args:
        backbone: a MultiExpertBackbone.
        plain: state dict of a plain network with parts conv1, bn1, layer1 .. layer4 and a classifier `fc`.
        source: where `plain` came from, for messages.

    Returns:
        The names that were filled.

    Raises:
        UserError: an entry is missing or has another shape (another depth, or `reduce_dimension`).
    """
    own, filled = backbone.state_dict(), {}
    for name, tensor in own.items():
        part, _, rest = name.partition(".")
        if part.startswith("linear"):
            continue
        if part.endswith("s"):  # layer3s.1.0.conv1.weight, of expert 1, comes from layer3.0.conv1.weight
            name_there = f"{part[:-1]}.{rest.partition('.')[2]}"
        else:
            name_there = name
        if name_there not in plain:
            if name.endswith("num_batches_tracked"):  # older files have none; it only counts
                continue
            raise UserError(f"{source} has no {name_there}. {ADVICE}")
        if plain[name_there].shape != tensor.shape:
            raise UserError(
                f"{name_there} is {list(plain[name_there].shape)} in {source} and {list(tensor.shape)} in "
                'the network: expert stages must have full width ("reduce_dimension": false) and the same '
                f"depth. {ADVICE}"
            )
        filled[name] = plain[name_there]
    backbone.load_state_dict(own | filled)
    return list(filled)
