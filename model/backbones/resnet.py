"""ResNet and ResNeXt for large images (He et al., CVPR 2016; Xie et al., CVPR 2017) with multiple experts."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.multi_expert import MultiExpertBackbone
from model.fused_norm import norm_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Output channels: `width`."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, groups: int, base_width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), self.downsample(x) if self.downsample else x)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride and the groups), 1x1 convolutions. Output channels: 4 * `width`."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, groups: int, base_width: int):
        super().__init__()
        inner, out = int(width * base_width / 64) * groups, width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(in_channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        return norm_relu(self.bn3, self.conv3(out), self.downsample(x) if self.downsample else x)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """Projection shortcut where the shape changes: 1x1 convolution with the stride, batch norm."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class ResNet(MultiExpertBackbone):
    """Stem: conv1, bn1, max pooling, layer1 (64), layer2 (128). Expert: layer3, layer4, linear.

    Widths are those of a stage's 3x3 convolutions in a plain ResNet; a bottleneck stage gives four times as many
    channels.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: blocks in each of the four stages.
        num_classes: C.
        reduce_dimension: expert stages of width 192 and 384 instead of 256 and 512.
        use_norm: cosine classifier with scale 30 instead of a linear layer.
        num_experts: E.
        share_layer3: layer3 belongs to the stem (at full width unless overridden).
        layer2_output_dim, layer3_output_dim, layer4_output_dim: override the widths.
        groups, base_width: of the 3x3 convolutions in bottlenecks; 32 and 4 make a ResNeXt.
    """

    calls_norm_relu = True

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        num_classes: int,
        reduce_dimension: bool,
        use_norm: bool,
        num_experts: int,
        share_layer3: bool,
        layer2_output_dim: int | None,
        layer3_output_dim: int | None,
        layer4_output_dim: int | None,
        groups: int = 1,
        base_width: int = 64,
    ):
        super().__init__(num_experts)
        width2 = layer2_output_dim or 128
        width3 = layer3_output_dim or (192 if reduce_dimension else 256)
        width4 = layer4_output_dim or (384 if reduce_dimension else 512)

        def stage(in_width: int, width: int, count: int, stride: int) -> nn.Sequential:
            out = width * block.expansion
            first = block(in_width, width, stride, groups, base_width)
            return nn.Sequential(first, *(block(out, width, 1, groups, base_width) for _ in range(count - 1)))

        x = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, blocks[0], stride=1)
        self.layer2 = stage(64 * x, width2, blocks[1], stride=2)
        self.share_layer3 = share_layer3
        if share_layer3:
            self.layer3 = stage(width2 * x, width3, blocks[2], stride=2)
        else:
            self.add_expert_part("layer3", lambda: stage(width2 * x, width3, blocks[2], stride=2))
        self.add_expert_part("layer4", lambda: stage(width3 * x, width4, blocks[3], stride=2))
        self.add_classifiers(width4 * x, num_classes, use_norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al., ICCV 2015, with the fan of the output
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def stem(self, images: Tensor) -> Tensor:
        x = norm_relu(self.bn1, self.conv1(images))
        x = self.layer2(self.layer1(F.max_pool2d(x, 3, stride=2, padding=1)))
        return self.layer3(x) if self.share_layer3 else x
