"""Parts of a network that do not train (`freeze` in a config), as in two-stage training."""

from collections.abc import Iterable, Sequence

from torch import nn

from utils.errors import UserError, unknown


def freeze(network: nn.Module, prefixes: Sequence[str]) -> list[nn.Module]:
    """Stop the training of all parameters whose names begin with one of the prefixes.

    Args:
        network: changed in place.
        prefixes: whole parts of names, such as "backbone.layer3s" (every expert's) or "backbone.layer3s.0.1.conv1";
            "backbone.layer1" is not the beginning of "backbone.layer10.weight".

    Returns:
        The modules in which nothing trains any more. Keep them in eval mode, also after `network.train()`: batch norm
        would go on updating its statistics, and dropout would go on dropping.

    Raises:
        UserError: a prefix is no parameter's, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters(remove_duplicate=False)]
    for prefix in prefixes:
        if not any(_begins(name, prefix) for name in names):
            raise unknown("parameter prefix in freeze", prefix, _choices(names, prefix))
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if any(_begins(name, prefix) for prefix in prefixes):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"freeze leaves nothing to train ({', '.join(prefixes)}): leave out what is to learn.")
    return [
        module
        for name, module in network.named_modules()
        if not any(parameter.requires_grad for parameter in module.parameters())
        and (any(True for _ in module.parameters()) or any(_begins(name, prefix) for prefix in prefixes))
    ]


def _begins(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(prefix.rstrip(".") + ".")


def _choices(names: Iterable[str], prefix: str) -> set[str]:
    """What could have been meant: the names one part longer than as much of the prefix as is right, or two if none."""
    parts, right = prefix.split("."), 0
    while any(_begins(name, ".".join(parts[: right + 1])) for name in names):
        right += 1
    beginning = ".".join(parts[:right])
    length = right + 1 if right else 2
    return {".".join(name.split(".")[:length]) for name in names if not right or _begins(name, beginning)}
