"""ResNet-32 for 32x32 images (He et al., CVPR 2016, section 4.2) with multiple experts."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.multi_expert import MultiExpertBackbone
from model.fused_norm import norm_relu

STEM_WIDTH = 16


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the parameter-free shortcut "option A": where the stride is 2, every second pixel,
    with the new channels filled with zeros on both sides."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        if channels < in_channels:
            raise ValueError(f"a stage cannot be narrower than the one before it ({channels} after {in_channels})")
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.extra == 0:
            return x
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), self.shortcut(x))


def make_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


class ResNetCifar(MultiExpertBackbone):
    """Stem: conv1, bn1, layer1 (16 channels). Expert: layer2, layer3, linear.

    Args:
        blocks: blocks in each of the three stages; (5, 5, 5) is ResNet-32.
        num_classes: C.
        reduce_dimension: expert stages of 24 and 48 channels instead of 32 and 64.
        use_norm: cosine classifier with scale 30 instead of a linear layer.
        num_experts: E.
        layer2_output_dim, layer3_output_dim: override the widths of the expert stages.
    """

    calls_norm_relu = True

    def __init__(
        self,
        blocks: tuple[int, int, int],
        num_classes: int,
        reduce_dimension: bool,
        use_norm: bool,
        num_experts: int,
        layer2_output_dim: int | None,
        layer3_output_dim: int | None,
    ):
        super().__init__(num_experts)
        width2 = layer2_output_dim or (24 if reduce_dimension else 32)
        width3 = layer3_output_dim or (48 if reduce_dimension else 64)
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = make_stage(STEM_WIDTH, STEM_WIDTH, blocks[0], stride=1)
        self.add_expert_part("layer2", lambda: make_stage(STEM_WIDTH, width2, blocks[1], stride=2))
        self.add_expert_part("layer3", lambda: make_stage(width2, width3, blocks[2], stride=2))
        self.add_classifiers(width3, num_classes, use_norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def stem(self, images: Tensor) -> Tensor:
        return self.layer1(norm_relu(self.bn1, self.conv1(images)))
