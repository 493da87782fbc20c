"""Batch norm, residual sum and ReLU as one operation (model/fused_norm.py), against torch's three."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import fused_norm
from model.freeze import freeze
from model.fused_norm import FusedBatchNorm2d, fuse_batch_norm, norm_relu
from model.inference import inference_copy
from model.model import ResNet10Model, ResNet32Model
from model.sync_batchnorm import SyncBatchNorm2d, synchronize_batch_norm
from trainer import trainer
from trainer.trainer import compiled

CPU = torch.device("cpu")


@pytest.fixture
def eager(monkeypatch):
    """The functions themselves instead of what torch.compile makes of them."""
    monkeypatch.setattr(fused_norm, "_compiled", lambda function: function)


def random(*shape: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = mean + torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))
    return values.to(dtype).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def norms(channels: int) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    plain = nn.BatchNorm2d(channels, momentum=0.3)
    with torch.no_grad():
        plain.weight.copy_(random(channels))
        plain.bias.copy_(random(channels + 1)[:channels])
    parent = nn.Sequential(deepcopy(plain))
    parent.calls_norm_relu = True
    assert fuse_batch_norm(parent) and type(parent[0]) is FusedBatchNorm2d
    return plain, parent[0]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_values_statistics_and_gradients_are_those_of_torch(eager, with_residual, mean):
    """In float32; after three batches of different sizes. With a mean of 300 standard deviations, the one-pass
    variance about 0 would keep two digits: once the running mean is near, as in training, it keeps them all."""
    plain, fused = norms(5)
    for norm in (plain, fused):
        norm.running_mean.fill_(mean)
    for batch in (4, 7, 3):
        x = random(batch, 5, 6, 6, mean=mean)
        residual = random(batch + 10, 5, 6, 6)[:batch] if with_residual else None
        weight = random(batch + 20, 5, 6, 6)[:batch]
        found = {}
        for name, norm in (("plain", plain), ("fused", fused)):
            inputs = [x.clone().requires_grad_(), *([residual.clone().requires_grad_()] if with_residual else [])]
            norm.zero_grad()
            if name == "plain":
                out = F.relu(norm(inputs[0]) + (inputs[1] if with_residual else 0))
            else:
                out = norm_relu(norm, *inputs)
            (out * weight).sum().backward()
            found[name] = [out, *(t.grad for t in inputs), norm.weight.grad, norm.bias.grad]
        for a, b in zip(found["plain"], found["fused"], strict=True):
            torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4)
    assert fused.num_batches_tracked == 3
    torch.testing.assert_close(fused.running_mean, plain.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused.running_var, plain.running_var, rtol=2e-4, atol=1e-6)


def test_a_channel_without_variance_gives_no_nan(eager):
    _, fused = norms(2)
    x = torch.full((2, 2, 3, 3), 1000.3, requires_grad=True)
    out = norm_relu(fused, x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and (fused.running_var >= 0).all()


def test_outside_training_it_is_batch_norm(eager):
    plain, fused = norms(3)
    x, residual = random(4, 3, 5, 5), random(5, 3, 5, 5)[:4]
    expected = F.relu(plain.eval()(x) + residual)
    assert torch.equal(norm_relu(fused.eval(), x, residual), expected) and torch.equal(fused(x), plain(x))
    assert torch.equal(norm_relu(plain, x, residual), expected)


@pytest.mark.parametrize("arch", [ResNet32Model, ResNet10Model])
def test_a_network_keeps_names_and_values_and_is_folded_for_inference(arch):
    network = arch(num_classes=4, num_experts=2, reduce_dimension=True, use_norm=True)
    before, names = network.state_dict(), [name for name, _ in network.named_modules()]
    assert fuse_batch_norm(network)
    after = network.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in network.named_modules()] == names
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())
    copy = inference_copy(network, 32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())


def test_frozen_modules_stay_frozen():
    network = ResNet32Model(num_classes=4, num_experts=1)
    frozen = freeze(network, ["backbone.bn1"])
    before = network.backbone.bn1
    assert compiled(network, CPU, "bf16").backbone.bn1 is before and type(before) is FusedBatchNorm2d
    assert before in frozen


def test_other_networks_and_shared_statistics_stay():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert not fuse_batch_norm(other) and type(other[1]) is nn.BatchNorm2d
    shared = ResNet32Model(num_classes=4, num_experts=2)
    synchronize_batch_norm(shared)
    assert not fuse_batch_norm(shared)  # and so --compile compiles the whole network
    assert not any(isinstance(module, FusedBatchNorm2d) for module in shared.modules())
    assert any(isinstance(module, SyncBatchNorm2d) for module in shared.modules())


def test_what_compile_compiles(monkeypatch):
    whole = []

    def compile_(network, dynamic, mode):
        whole.append((network, mode))
        return network

    monkeypatch.setattr(trainer.torch, "compile", compile_)
    network, other = ResNet32Model(num_classes=4, num_experts=2), nn.Sequential(nn.BatchNorm2d(4))
    assert compiled(network, CPU, "fp32") is network and whole.pop() == (network, None)
    assert compiled(network, torch.device("cuda"), "bf16") is network and whole.pop() == (network, "reduce-overhead")
    with monkeypatch.context() as several:
        several.setattr(trainer.distributed, "world_size", lambda: 2)
        assert compiled(network, torch.device("cuda"), "fp32") is network and whole.pop() == (network, None)
    assert not any(isinstance(module, FusedBatchNorm2d) for module in network.modules())
    assert compiled(network, CPU, "bf16") is network and not whole
    assert any(isinstance(module, FusedBatchNorm2d) for module in network.modules())
    assert compiled(other, CPU, "bf16") is other and whole == [(other, None)]


def test_compiled_functions_do_the_same():
    """With torch.compile itself, in bf16, on a whole batch and a smaller last one."""
    plain, fused = norms(16)
    for batch in (6, 5):
        x = random(batch, 16, 4, 4, dtype=torch.bfloat16)
        residual, weight = (random(batch + more, 16, 4, 4, dtype=torch.bfloat16)[:batch] for more in (10, 20))
        found = []
        for norm in (plain, fused):
            inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            norm.zero_grad()
            out = norm_relu(norm, *inputs)
            (out * weight).sum().backward()
            found.append([out, *(t.grad for t in inputs), norm.weight.grad, norm.bias.grad, *norm.buffers()])
        assert found[1][0].dtype == found[1][1].dtype == torch.bfloat16
        assert found[1][0].is_contiguous(memory_format=torch.channels_last)
        for a, b in zip(*found, strict=True):
            assert (a.float() - b.float()).norm() <= 0.01 * a.float().norm()
