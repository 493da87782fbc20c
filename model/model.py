"""The networks that a config may name in `arch.type`, built from `arch.args` alone."""

from typing import Any

from torch import Tensor, nn

from base.base_model import BaseModel
from model.backbones.multi_expert import MultiExpertBackbone
from model.backbones.resnet import BasicBlock, Bottleneck, ResNet, ResNeXtBottleneck
from model.backbones.resnet_cifar import ResNetCifar
from model.backbones.timm_trunk import TimmTrunk, make_trunk

__all__ = ["ResNet32Model", "ResNet10Model", "ResNet18Model", "ResNet34Model", "ResNet50Model", "ResNet101Model"]
__all__ += ["ResNet152Model", "ResNeXt50Model", "ResNeXt152Model", "ViTModel", "TimmModel"]


class Model(BaseModel):
    """A backbone under the name that published checkpoints give it; subclasses build it.

    Args:
        num_classes: C.
        use_norm: cosine classifiers (scale 30) instead of linear ones.
        num_experts: E; 1 is the plain network.
        returns_feat: accepted for the reference's configs; the output is the same either way.
    """

    backbone: MultiExpertBackbone

    def __init__(self, num_classes: int, use_norm: bool = False, num_experts: int = 1, returns_feat: bool = True):
        super().__init__()
        self.num_classes = num_classes
        self.use_norm = use_norm
        self.num_experts = num_experts

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
        reduce_dimension: narrower expert stages (24, 48 channels instead of 32, 64).
        layer2_output_dim, layer3_output_dim: override the widths of the expert stages.
        num_classes, options: see Model.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        reduce_dimension: bool = False,
        layer2_output_dim: int | None = None,
        layer3_output_dim: int | None = None,
        **options: Any,
    ):
        super().__init__(num_classes, **options)
        width2, width3 = (24, 48) if reduce_dimension else (32, 64)
        widths = (16, layer2_output_dim or width2, layer3_output_dim or width3)
        self.backbone = ResNetCifar(5, widths, num_classes, self.use_norm, self.num_experts)


class LargeImageModel(Model):
    """A ResNet or ResNeXt for 224x224 images; subclasses say which.

    Args:
        reduce_dimension: narrower expert stages (widths 192, 384 instead of 256, 512).
        share_layer3: layer3 belongs to the stem, so that experts are layer4 and classifier alone.
        layer2_output_dim, layer3_output_dim, layer4_output_dim: override the widths.
        num_classes, options: see Model.
    """

    block: type[BasicBlock | Bottleneck] = Bottleneck
    blocks: tuple[int, int, int, int]

    def __init__(
        self,
        num_classes: int,
        *,
        reduce_dimension: bool = False,
        share_layer3: bool = False,
        layer2_output_dim: int | None = None,
        layer3_output_dim: int | None = None,
        layer4_output_dim: int | None = None,
        **options: Any,
    ):
        super().__init__(num_classes, **options)
        width3, width4 = (192, 384) if reduce_dimension else (256, 512)
        widths = (64, layer2_output_dim or 128, layer3_output_dim or width3, layer4_output_dim or width4)
        self.backbone = ResNet(
            self.block, self.blocks, widths, num_classes, self.use_norm, self.num_experts, share_layer3
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
    block = ResNeXtBottleneck


class ResNeXt152Model(ResNet152Model):
    block = ResNeXtBottleneck


class ViTModel(Model):
    """A Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) from timm (`pip install timm`).

    All experts share it; an expert is a classifier.

    Args:
        variant: a VisionTransformer of timm, with or without a tag of pretrained weights.
        image_size: side of the images that the data loader gives, in pixels.
        patch_size: side of a patch in pixels; the variant's own by default.
        pretrained: start from timm's weights. They are fetched (once, then from timm's cache) wherever the network is
            built, in evaluation, too; "weights" in a config takes a file instead and reads it in training alone.
        num_classes, options: see Model.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        variant: str = "vit_tiny_patch16_224",
        image_size: int = 224,
        patch_size: int | None = None,
        pretrained: bool = False,
        **options: Any,
    ):
        super().__init__(num_classes, **options)
        if image_size < 1 or (patch_size is not None and not 1 <= patch_size <= image_size):
            raise ValueError(f"patch_size must lie between 1 and image_size, not {patch_size} for {image_size} pixels")
        trunk = make_trunk(variant, pretrained, "vision_transformer", img_size=image_size, patch_size=patch_size)
        self.backbone = TimmTrunk(trunk, num_classes, self.use_norm, self.num_experts, image_size)


class TimmModel(Model):
    """A network of timm (`pip install timm`), of any kind, that all experts share; an expert is a classifier.

    Args:
        variant: of timm, with or without a tag of pretrained weights; timm.list_models() lists them.
        pretrained: start from timm's weights, see ViTModel.
        drop_path_rate: stochastic depth, of variants that have it; 0 for none.
        num_classes, options: see Model.
    """

    def __init__(
        self,
        num_classes: int,
        variant: str,
        *,
        pretrained: bool = False,
        drop_path_rate: float = 0.0,
        **options: Any,
    ):
        super().__init__(num_classes, **options)
        trunk = make_trunk(variant, pretrained, drop_path_rate=drop_path_rate or None)
        self.backbone = TimmTrunk(trunk, num_classes, self.use_norm, self.num_experts)
