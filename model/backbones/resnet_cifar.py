"""ResNet-32 for 32x32 images (He et al., CVPR 2016, section 4.2) with multiple experts."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbones.multi_expert import MultiExpertBackbone


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
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.extra = channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.extra == 0:
            return x
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNetCifar(MultiExpertBackbone):
    """Stem: conv1, bn1, layer1. Expert: layer2, layer3, linear.

    Args:
        blocks: blocks in each stage; 5 is ResNet-32.
        widths: channels of the three stages; 16, 32, 64 in a plain ResNet-32.
        num_classes, use_norm, num_experts: see MultiExpertBackbone.
    """

    def __init__(self, blocks: int, widths: Sequence[int], num_classes: int, use_norm: bool, num_experts: int):
        super().__init__(num_classes, use_norm, num_experts)

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = BasicBlock(in_channels, channels, stride)
            return nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)))

        width1, width2, width3 = widths
        self.conv1 = nn.Conv2d(3, width1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(width1, width1, stride=1)
        self.add_expert_part("layer2", lambda: stage(width1, width2, stride=2))
        self.add_expert_part("layer3", lambda: stage(width2, width3, stride=2))
        self.add_classifiers(width3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def stem(self, images: Tensor) -> Tensor:
        return self.layer1(self.relu(self.bn1(self.conv1(images))))
