"""Batch norm over the whole batch that several processes share, on any device (torch's own needs a GPU)."""

from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed


class _Normalize(torch.autograd.Function):
    """Normalization over batch and pixels of all processes; the gradient follows from the same sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, C, H, W], [C], [C] -> normalized [B, C, H, W]; mean [C], biased variance [C] and number of elements."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = distributed.sum_over_processes(torch.cat([values.sum(dim=(0, 2, 3)), count]))
        total, mean = sums[-1], sums[:-1] / sums[-1]
        squares = (values - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        variance = distributed.sum_over_processes(squares) / total
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        normalized = (values - mean[:, None, None]) * (scale * weight)[:, None, None] + bias[:, None, None]
        return normalized.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, total = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        standardized = (x.to(mean.dtype) - mean[:, None, None]) * scale[:, None, None]
        of_bias = gradient.sum(dim=(0, 2, 3))
        of_weight = (gradient * standardized).sum(dim=(0, 2, 3))
        means = distributed.sum_over_processes(torch.stack([of_bias, of_weight])) / total
        of_x = gradient - means[0][:, None, None] - standardized * means[1][:, None, None]
        return (of_x * (scale * weight)[:, None, None]).to(x.dtype), of_weight, of_bias, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of all processes' images; else the same."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        normalized, mean, variance, total = _Normalize.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
        return normalized  # type: ignore[no-any-return]


def synchronize_batch_norm(network: nn.Module) -> None:
    """Replace every nn.BatchNorm2d of a network by SyncBatchNorm2d, in place, with the same parameters and buffers."""
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.BatchNorm2d:
                shared = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                shared.__dict__.update(norm.__dict__)
                setattr(parent, name, shared)
