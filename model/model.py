"""The networks that a config may name in `arch.type`, built from `arch.args` alone."""

from torch import Tensor

from base.base_model import BaseModel
from model.backbones.multi_expert import MultiExpertBackbone
from model.backbones.resnet_cifar import ResNetCifar

__all__ = ["ResNet32Model"]


class Model(BaseModel):
    """A backbone under the name that published checkpoints give it."""

    def __init__(self, num_classes: int, backbone: MultiExpertBackbone):
        super().__init__()
        self.num_classes, self.num_experts = num_classes, backbone.num_experts
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W] -> {"output": [B, C] mean logits, "logits": [B, E, C], "feat": [B, E, D]}."""
        return self.backbone(images)


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

    def __init__(self, num_classes: int, reduce_dimension: bool = False, use_norm: bool = False, num_experts: int = 1,
                 returns_feat: bool = True, layer2_output_dim: int | None = None,
                 layer3_output_dim: int | None = None):
        super().__init__(num_classes, ResNetCifar((5, 5, 5), num_classes, reduce_dimension, use_norm, num_experts,
                                                  layer2_output_dim, layer3_output_dim))
