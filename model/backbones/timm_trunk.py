"""Any network of timm as the trunk of E classifiers."""

import types
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from model.backbones.multi_expert import MultiExpertBackbone
from utils.errors import UserError
from utils.torchvision_import import torchvision


def import_timm() -> types.ModuleType:
    """The timm package, imported late: it is an optional extra and costs seconds.

    Raises:
        UserError: it is not installed.
    """
    torchvision()  # timm imports torchvision, which may need help
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError("ViTModel and TimmModel need timm, which is not installed: pip install timm") from error
    return timm


def make_trunk(variant: str, pretrained: bool, module: str = "", **options: object) -> Any:
    """A network of timm without its classifier.

    Args:
        variant: with or without a tag of pretrained weights.
        pretrained: with timm's weights (downloaded).
        module: of timm, that the variant must belong to; any by default.
        options: of timm.create_model; None for the variant's own.

    Raises:
        UserError: timm is missing or has no such variant, or the pretrained weights cannot be had.
        ValueError: the variant refuses an option.
    """
    timm = import_timm()
    variants = timm.list_models(module=module)
    if variant.partition(".")[0] not in variants:  # a tag of pretrained weights may follow
        near = get_close_matches(variant, variants, n=3)
        kind = "Vision Transformer" if module else "network"
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists what there is."
        raise UserError(f'timm has no {kind} "{variant}": {hint}')
    try:
        return timm.create_model(variant, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"{variant} refuses an argument ({error})") from error
    except (OSError, RuntimeError) as error:  # timm has a variant without weights, too
        if not pretrained:
            raise
        raise UserError(
            f'timm\'s weights for {variant} could not be had ({error}): try again, or leave "pretrained" out.'
        ) from error


class TimmTrunk(MultiExpertBackbone):
    """Stem: the whole network of timm, `trunk`. Expert: a classifier, `linear`.

    Args:
        trunk: from `make_trunk`.
        num_classes, use_norm, num_experts: see MultiExpertBackbone.
        image_size: side in pixels of the only images that the trunk takes; None for any.
    """

    def __init__(self, trunk: Any, num_classes: int, use_norm: bool, num_experts: int, image_size: int | None = None):
        super().__init__(num_classes, use_norm, num_experts)
        self.trunk = trunk
        self.image_size = image_size
        self.add_classifiers(getattr(trunk, "head_hidden_size", trunk.num_features))

    def stem(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> features as the variant has them, feature maps or tokens."""
        size = self.image_size
        if size is not None and images.shape[-2:] != (size, size):
            raise UserError(
                f"The network takes images of {size}x{size} pixels, not {images.shape[-1]}x{images.shape[-2]}: set "
                "arch;args;image_size to what the data loader gives."
            )
        return self.trunk.forward_features(images)

    def pool(self, features: Tensor) -> Tensor:
        """Features -> [B, D], as the variant has it: pooled, or the class token."""
        return self.trunk.forward_head(features, pre_logits=True)

    def plain_name(self, name: str) -> str | None:
        """timm's name: the trunk's without `trunk.`; None for a classifier's."""
        plain = super().plain_name(name)
        return plain and plain.removeprefix("trunk.")
