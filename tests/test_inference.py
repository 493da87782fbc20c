"""The frozen copy of a network: the same logits, whatever the network does with its batch norm."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_json, golden_weights
from torch import nn

import model.model
from model.inference import inference_copy
from model.model import ResNet32Model

NETWORKS = golden_json("models.json")


def with_statistics(network: nn.Module) -> nn.Module:
    """Give every batch norm statistics, weights and biases unlike the initial ones, which do nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 2),
                (module.bias.data, -1, 1),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network


@pytest.mark.parametrize("name", [name for name, entry in NETWORKS.items() if "152" not in entry["type"]])
def test_every_batch_norm_of_the_networks_is_folded(name):
    network = getattr(model.model, NETWORKS[name]["type"])(**NETWORKS[name]["args"])
    network.load_state_dict(golden_weights(network.state_dict()))
    size = 32 if "cifar" in name else 64
    copy, images = inference_copy(network, size), torch.randn(2, 3, size, size)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    with torch.no_grad():
        torch.testing.assert_close(copy(images)["logits"], network.eval()(images)["logits"], atol=1e-4, rtol=1e-4)


def test_the_network_is_left_alone_and_the_copy_is_frozen():
    network = with_statistics(ResNet32Model(10, num_experts=3)).train()
    state, random = deepcopy(network.state_dict()), torch.get_rng_state()
    copy = inference_copy(network, 16)
    assert torch.equal(torch.get_rng_state(), random) and network.training and not copy.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any(p.requires_grad for p in copy.parameters()) and all(p.requires_grad for p in network.parameters())


class Odd(nn.Module):
    """A network of two experts around some layers; subclasses say which, and how they are used."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.build(channels)
        self.linear = nn.Linear(channels, 10)

    def forward(self, images):
        logits = self.linear(self.features(images).mean(dim=(2, 3)))
        return {"logits": torch.stack([logits, -0.5 * logits], dim=1)}


def conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


class ActivatedNorm(nn.BatchNorm2d):
    """Batch norm and its activation in one, as timm's BatchNormAct2d."""

    def forward(self, x):
        return F.relu(super().forward(x))


class NormWithActivation(Odd):
    def build(self, channels):
        self.conv1, self.bn1 = conv(3, channels), ActivatedNorm(channels)
        self.layers = nn.Sequential(conv(channels, channels), ActivatedNorm(channels), conv(channels, channels))

    def features(self, x):
        return self.layers(self.bn1(self.conv1(x)))


class PreActivation(Odd):
    """The norm comes before the convolution of the same number, and they have as many channels."""

    def build(self, channels):
        self.stem = conv(3, channels)
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, channels)

    def features(self, x):
        return self.conv1(F.relu(self.bn1(self.stem(x))))


class SharedConvolution(Odd):
    """One convolution used twice, once with the norm and once without."""

    def build(self, channels):
        self.stem = conv(3, channels)
        self.conv1 = conv(channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)

    def features(self, x):
        x = F.relu(self.bn1(self.conv1(self.stem(x))))
        return F.relu(self.conv1(x))


class NotInOrder(Odd):
    """A list whose neighbors are not applied one after the other, and a sequence that starts with a norm."""

    def build(self, channels):
        self.parts = nn.ModuleList([conv(channels, channels), nn.BatchNorm2d(channels), conv(3, channels)])
        self.layers = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, channels))

    def features(self, x):
        return self.layers(self.parts[0](self.parts[1](self.parts[2](x))))


class UsesTheNorm(Odd):
    """Asks its norm for more than a call."""

    def build(self, channels):
        self.conv1, self.bn1 = conv(3, channels), nn.BatchNorm2d(channels)

    def features(self, x):
        return F.relu(self.bn1(self.conv1(x))) * self.bn1.running_var[:, None, None]


class BatchStatistics(Odd):
    """A norm without running statistics, and one whose width is not the convolution's."""

    def build(self, channels):
        self.conv1, self.bn1 = conv(3, channels), nn.BatchNorm2d(channels, track_running_stats=False)
        self.conv2, self.bn2 = conv(channels // 2, channels), nn.BatchNorm2d(channels // 2)

    def features(self, x):
        x = self.bn1(self.conv1(x))
        return self.conv2(self.bn2(x[:, ::2]))


class NotANumber(Odd):
    """Folding would be right, but logits that are NaN cannot tell."""

    def build(self, channels):
        self.conv1, self.bn1 = conv(3, channels), nn.BatchNorm2d(channels)

    def features(self, x):
        return self.bn1(self.conv1(x)) * torch.where(x.std() < 1.5, torch.nan, 1.0)  # random images give NaN


#: Network -> batch norms that remain in the copy.
ODD = {
    NormWithActivation: 2,
    PreActivation: 1,
    SharedConvolution: 1,
    NotInOrder: 2,
    UsesTheNorm: 1,
    BatchStatistics: 2,
    NotANumber: 1,
}


@pytest.mark.parametrize("kind", ODD)
def test_an_unforeseen_structure_gives_right_logits(kind):
    torch.manual_seed(0)
    network = with_statistics(kind()).train()
    copy = inference_copy(network, 8)
    images = 3 * torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        expected = network.eval()(images)["logits"]
        torch.testing.assert_close(copy(images)["logits"], expected, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(expected).all() and not any(p.requires_grad for p in copy.parameters())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in copy.modules()) == ODD[kind]
