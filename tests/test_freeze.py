"""Freezing parts of a network, as in two-stage training."""

import pytest
import torch
from torch import nn

from model.freeze import freeze
from model.model import ResNet32Model
from utils.errors import UserError

EVERYTHING_BUT_CLASSIFIERS = [f"backbone.{part}" for part in ("conv1", "bn1", "layer1", "layer2s", "layer3s")]


def network() -> ResNet32Model:
    return ResNet32Model(5, reduce_dimension=True, num_experts=2)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_classifiers_alone_train():
    model = network()
    frozen = freeze(model, EVERYTHING_BUT_CLASSIFIERS)
    assert trained(model) == model.classifier_names()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(any(norm is module for module in frozen) for norm in norms)
    assert not any(module in frozen for module in (model, model.backbone, model.backbone.linears[0]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    for module in frozen:
        module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 16, 16))["output"].logsumexp(dim=1).sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == model.classifier_names()  # no weight decay, no statistics


def test_a_prefix_is_whole_parts_of_a_name():
    model = network()
    freeze(model, ["backbone.layer3s.1.4.", "backbone.layer1.0.conv1.weight", "backbone.linears.0"])
    assert {name for name, _ in model.named_parameters()} - trained(model) == {
        *(f"backbone.layer3s.1.4.{name}" for name, _ in model.backbone.layer3s[1][4].named_parameters()),
        "backbone.layer1.0.conv1.weight",
        "backbone.linears.0.weight",
        "backbone.linears.0.bias",
    }
    ten = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    freeze(ten, ["1"])
    assert ten[10].weight.requires_grad and not ten[1].weight.requires_grad


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("backbone.layer3", 'Unknown parameter prefix in freeze "backbone.layer3": did you mean "backbone.layer3s"'),
        ("backbone.layer2", 'did you mean "backbone.layer2s"'),
        ("layer1", 'did you mean "backbone.layer1"'),
        ("backbone.layer1.0.con1", 'did you mean "backbone.layer1.0.conv1".*Valid: backbone.layer1.0.bn1,'),
        ("backbone.linears.2", "Valid: backbone.linears.0, backbone.linears.1"),
        ("", "Unknown parameter prefix"),
    ],
)
def test_a_wrong_prefix_names_the_nearest(prefix, message):
    model = network()
    with pytest.raises(UserError, match=message):
        freeze(model, ["backbone.conv1", prefix])
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_something_must_be_left_to_train():
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(network(), ["backbone"])
