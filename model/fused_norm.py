"""Batch norm, residual sum and ReLU as one compiled operation a direction, for training in bfloat16 on a CPU.

Where AMX makes convolutions fast, these three take almost half of a training step, each with passes of its own over
memory (`benchmarks/train_step.py --profile`). torch.compile makes two loops of each function below, one of the sums and
one of the result. Of a whole network it would not: it has a formula of its own for the variance (Welford's).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Shapes of activations (of whole and of last batches) that are compiled for before torch gives up and says so.
MOST_SHAPES = 256


def _by_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, near_mean: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """relu((x - mean) / sqrt(variance + eps) * weight + bias + residual), by channel, over batch and pixels.

    Ioffe & Szegedy, ICML 2015, algorithm 1. Both moments come from one pass, about a value near the mean so that their
    difference keeps its digits.

    Args:
        x, residual: [B, C, H, W].
        weight, bias, near_mean: [C].

    Returns:
        The result [B, C, H, W]; mean, 1 / sqrt(variance + eps) and biased variance, [C], in float32.
    """
    elements = x.numel() / x.shape[1]
    distance = x.float() - _by_channel(near_mean)
    first = distance.sum((0, 2, 3)) / elements
    variance = (distance.square().sum((0, 2, 3)) / elements - first.square()).clamp(min=0)
    mean, scale = near_mean + first, torch.rsqrt(variance + eps)
    normalized = (x.float() - _by_channel(mean)) * _by_channel(scale * weight) + _by_channel(bias)
    if residual is not None:
        normalized = normalized + residual
    return normalized.relu().to(x.dtype), mean, scale, variance


def _backward(
    gradient: Tensor, x: Tensor, result: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, with_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias from that of the result (Ioffe & Szegedy, section 3)."""
    elements = x.numel() / x.shape[1]
    passed = torch.where(result > 0, gradient, 0)  # what ReLU lets through
    standardized = (x.float() - _by_channel(mean)) * _by_channel(scale)
    of_bias = passed.float().sum((0, 2, 3))
    of_weight = (passed.float() * standardized).sum((0, 2, 3))
    centered = passed.float() - _by_channel(of_bias / elements) - standardized * _by_channel(of_weight / elements)
    of_x = (centered * _by_channel(scale * weight)).to(x.dtype)
    return of_x, passed if with_residual else None, of_weight, of_bias


@functools.cache
def _compiled(function: Callable) -> Callable:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    return torch.compile(function, dynamic=False)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, near_mean: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        result, mean, scale, variance = _compiled(_forward)(x, residual, weight, bias, near_mean, eps)
        ctx.save_for_backward(x, result, weight, mean, scale)
        ctx.with_residual = residual is not None
        ctx.mark_non_differentiable(mean, variance)
        return result, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, result, weight, mean, scale = ctx.saved_tensors
        of_x, of_residual, of_weight, of_bias = _compiled(_backward)(
            gradients[0], x, result, weight, mean, scale, ctx.with_residual
        )
        return of_x, of_residual, of_weight, of_bias, None, None


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that `norm_relu` takes together with what follows it, in training; else the same."""

    def norm_relu(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        result, mean, variance = _NormReLU.apply(x, residual, self.weight, self.bias, self.running_mean, self.eps)  # type: ignore[no-untyped-call]
        elements = x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (elements / (elements - 1)), self.momentum)
        return result  # type: ignore[no-any-return]


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), what follows a convolution in a residual network: [B, C, H, W] -> [B, C, H, W]."""
    if isinstance(norm, FusedBatchNorm2d) and norm.training:
        return norm.norm_relu(x, residual)
    out = norm(x)
    return F.relu(out if residual is None else out.add_(residual), inplace=True)


def fuse_batch_norm(network: nn.Module) -> bool:
    """Make every nn.BatchNorm2d of a network a FusedBatchNorm2d, in place.

    Returns:
        Whether there was one, in a backbone that calls `norm_relu`; other networks stay as they are.
    """
    backbones = [module for module in network.modules() if getattr(module, "calls_norm_relu", False)]
    norms = [norm for backbone in backbones for norm in backbone.modules() if type(norm) is nn.BatchNorm2d]
    for norm in norms:
        norm.__class__ = FusedBatchNorm2d  # the same object: a list of frozen modules may hold it
    return bool(norms)
