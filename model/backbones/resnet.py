"""ResNet and ResNeXt for large images (He et al., CVPR 2016; Xie et al., CVPR 2017) with multiple experts."""

from collections.abc import Sequence

from torch import Tensor, nn

from model.backbones.multi_expert import MultiExpertBackbone


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. Output channels: `width`."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride and the groups), 1x1 convolutions. Output channels: 4 * `width`."""

    expansion = 4
    groups = 1
    base_width = 64  # inner channels of a group, where `width` is 64

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        inner, out = int(width * self.base_width / 64) * self.groups, width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


class ResNeXtBottleneck(Bottleneck):
    """32 groups of 4 * `width` / 64 channels in the 3x3 convolution."""

    groups = 32
    base_width = 4


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    """Identity, or a projection where the shape changes: 1x1 convolution with the stride, batch norm."""
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class ResNet(MultiExpertBackbone):
    """Stem: conv1, bn1, max pooling, layer1, layer2. Expert: layer3, layer4, linear.

    Args:
        block: BasicBlock, Bottleneck or ResNeXtBottleneck.
        blocks: blocks in each of the four stages.
        widths: of the four stages. A plain ResNet's are 64, 128, 256, 512, also with bottlenecks, whose output has four
            times as many channels.
        num_classes, use_norm, num_experts: see MultiExpertBackbone.
        share_layer3: layer3 belongs to the stem.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        use_norm: bool,
        num_experts: int,
        share_layer3: bool,
    ):
        super().__init__(num_classes, use_norm, num_experts)
        channels = [64, *(width * block.expansion for width in widths)]

        def stage(number: int) -> nn.Sequential:
            width = widths[number - 1]
            first = block(channels[number - 1], width, stride=1 if number == 1 else 2)
            others = (block(channels[number], width, stride=1) for _ in range(blocks[number - 1] - 1))
            return nn.Sequential(first, *others)

        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(1)
        self.layer2 = stage(2)
        self.share_layer3 = share_layer3
        if share_layer3:
            self.layer3 = stage(3)
        else:
            self.add_expert_part("layer3", lambda: stage(3))
        self.add_expert_part("layer4", lambda: stage(4))
        self.add_classifiers(channels[4])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer2(self.layer1(x))
        return self.layer3(x) if self.share_layer3 else x
