"""The networks that a config may name in `arch.type`, built from `arch.args` alone."""

from typing import Any

from torch import Tensor, nn

from base.base_model import BaseModel
from model.backbones.multi_expert import MultiExpertBackbone
from model.backbones.resnet import BasicBlock, Bottleneck, ResNet
from model.backbones.resnet_cifar import ResNetCifar
from model.backbones.timm_trunk import TimmTrunk
from model.backbones.vit import ViT

__all__ = [
    "ResNet32Model",
    "ResNet10Model",
    "ResNet18Model",
    "ResNet34Model",
    "ResNet50Model",
    "ResNet101Model",
    "ResNet152Model",
    "ResNeXt50Model",
    "ResNeXt152Model",
    "ViTModel",
    "TimmModel",
]


class Model(BaseModel):
    """A backbone under the name that published checkpoints give it."""

    def __init__(self, num_classes: int, backbone: MultiExpertBackbone):
        super().__init__()
        self.num_classes = num_classes
        self.num_experts = backbone.num_experts
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W] -> {"output": [B, C] mean logits, "logits": [B, E, C], "feat": [B, E, D]}."""
        return self.backbone(images)

    def expert_modules(self, expert: int) -> list[nn.Module]:
        return self.backbone.expert_modules(expert)

    def plain_name(self, name: str) -> str | None:
        return self.backbone.plain_name(name.removeprefix("backbone."))


class ResNet32Model(Model):
    """ResNet-32 for 32x32 images.

    Args:
        num_classes: C.
        reduce_dimension: narrower expert stages (24, 48 channels instead of 32, 64).
        use_norm: cosine classifiers (scale 30) instead of linear ones.
        num_experts: E; 1 is the plain network.
        returns_feat: accepted for the reference's configs; the output is the same either way.
        layer2_output_dim, layer3_output_dim: override the widths of the expert stages.
    """

    def __init__(
        self,
        num_classes: int,
        reduce_dimension: bool = False,
        use_norm: bool = False,
        num_experts: int = 1,
        returns_feat: bool = True,
        layer2_output_dim: int | None = None,
        layer3_output_dim: int | None = None,
    ):
        super().__init__(
            num_classes,
            ResNetCifar(
                blocks=(5, 5, 5),
                num_classes=num_classes,
                reduce_dimension=reduce_dimension,
                use_norm=use_norm,
                num_experts=num_experts,
                layer2_output_dim=layer2_output_dim,
                layer3_output_dim=layer3_output_dim,
            ),
        )


class LargeImageModel(Model):
    """A ResNet or ResNeXt for 224x224 images; subclasses say which.

    Args:
        num_classes: C.
        reduce_dimension: narrower expert stages (widths 192, 384 instead of 256, 512).
        use_norm: cosine classifiers (scale 30) instead of linear ones.
        num_experts: E; 1 is the plain network.
        share_layer3: layer3 belongs to the stem, so that experts are layer4 and classifier alone.
        returns_feat: accepted for the reference's configs; the output is the same either way.
        layer2_output_dim, layer3_output_dim, layer4_output_dim: override the widths.
    """

    block: type[BasicBlock | Bottleneck] = Bottleneck
    blocks: tuple[int, int, int, int]
    groups = 1
    base_width = 64

    def __init__(
        self,
        num_classes: int,
        reduce_dimension: bool = False,
        use_norm: bool = False,
        num_experts: int = 1,
        share_layer3: bool = False,
        returns_feat: bool = True,
        layer2_output_dim: int | None = None,
        layer3_output_dim: int | None = None,
        layer4_output_dim: int | None = None,
    ):
        super().__init__(
            num_classes,
            ResNet(
                block=self.block,
                blocks=self.blocks,
                num_classes=num_classes,
                reduce_dimension=reduce_dimension,
                use_norm=use_norm,
                num_experts=num_experts,
                share_layer3=share_layer3,
                layer2_output_dim=layer2_output_dim,
                layer3_output_dim=layer3_output_dim,
                layer4_output_dim=layer4_output_dim,
                groups=self.groups,
                base_width=self.base_width,
            ),
        )


class ResNet10Model(LargeImageModel):
    block = BasicBlock
    blocks = (1, 1, 1, 1)


class ResNet18Model(LargeImageModel):
    block = BasicBlock
    blocks = (2, 2, 2, 2)


class ResNet34Model(LargeImageModel):
    block = BasicBlock
    blocks = (3, 4, 6, 3)


class ResNet50Model(LargeImageModel):
    blocks = (3, 4, 6, 3)


class ResNet101Model(LargeImageModel):
    blocks = (3, 4, 23, 3)


class ResNet152Model(LargeImageModel):
    blocks = (3, 8, 36, 3)


class ResNeXt50Model(ResNet50Model):
    groups = 32
    base_width = 4


class ResNeXt152Model(ResNet152Model):
    groups = 32
    base_width = 4


class ViTModel(Model):
    """A Vision Transformer from timm (`pip install timm`) that all experts share; an expert is a classifier.

    Args:
        num_classes: C.
        use_norm: cosine classifiers (scale 30) instead of linear ones.
        num_experts: E; 1 is the plain network.
        returns_feat: accepted as in the other networks; the output is the same either way.
        variant: a VisionTransformer of timm, with or without a tag of pretrained weights.
        image_size: side of the images that the data loader gives, in pixels.
        patch_size: side of a patch in pixels; the variant's own by default.
        pretrained: start from timm's weights. They are fetched (once, then from timm's cache) wherever the network is
            built, in evaluation, too; "weights" in a config takes a file instead and reads it in training alone.
    """

    def __init__(
        self,
        num_classes: int,
        use_norm: bool = False,
        num_experts: int = 1,
        returns_feat: bool = True,
        variant: str = "vit_tiny_patch16_224",
        image_size: int = 224,
        patch_size: int | None = None,
        pretrained: bool = False,
    ):
        super().__init__(
            num_classes,
            ViT(
                variant=variant,
                image_size=image_size,
                patch_size=patch_size,
                num_classes=num_classes,
                use_norm=use_norm,
                num_experts=num_experts,
                pretrained=pretrained,
            ),
        )


class TimmModel(Model):
    """A network of timm (`pip install timm`), of any kind, that all experts share; an expert is a classifier.

    Args:
        num_classes: C.
        variant: of timm, with or without a tag of pretrained weights; timm.list_models() lists them.
        use_norm: cosine classifiers (scale 30) instead of linear ones.
        num_experts: E; 1 is the plain network.
        pretrained: start from timm's weights, see ViTModel.
        drop_path_rate: stochastic depth, of variants that have it; 0 for none.
    """

    def __init__(
        self,
        num_classes: int,
        variant: str,
        use_norm: bool = False,
        num_experts: int = 1,
        pretrained: bool = False,
        drop_path_rate: float = 0.0,
    ):
        options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        super().__init__(num_classes, TimmTrunk(variant, num_classes, use_norm, num_experts, pretrained, **options))
