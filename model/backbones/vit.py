"""A Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) from timm as the trunk of E classifiers."""

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
        raise UserError("ViTModel needs timm, which is not installed: pip install timm") from error
    return timm


def make_trunk(variant: str, image_size: int, patch_size: int | None, pretrained: bool) -> Any:
    """A VisionTransformer of timm without its classifier. See `ViT` for the arguments.

    Raises:
        UserError: timm is missing or has no such variant, or the pretrained weights cannot be had.
        ValueError: the sizes do not fit.
    """
    timm = import_timm()
    variants = timm.list_models(module="vision_transformer")
    if variant.partition(".")[0] not in variants:  # a tag of pretrained weights may follow
        near = get_close_matches(variant, variants, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else 'timm.list_models("vit_*") lists them.'
        raise UserError(f'timm has no Vision Transformer "{variant}": {hint}')
    if image_size < 1 or (patch_size is not None and not 1 <= patch_size <= image_size):
        raise ValueError(f"patch_size must lie between 1 and image_size, not {patch_size} for {image_size} pixels")
    sizes = {"img_size": image_size} | ({} if patch_size is None else {"patch_size": patch_size})
    try:
        return timm.create_model(variant, pretrained=pretrained, num_classes=0, **sizes)
    except OSError as error:
        raise UserError(
            f'timm\'s weights for {variant} could not be downloaded ({error}): try again, or leave "pretrained" out.'
        ) from error


class ViT(MultiExpertBackbone):
    """Stem: the whole transformer, `trunk`. Expert: a classifier, `linear`.

    Args:
        variant: name of a VisionTransformer in timm.
        image_size: side of the images in pixels.
        patch_size: side of a patch in pixels; None for the variant's own.
        num_classes: C.
        use_norm: cosine classifiers with scale 30 instead of linear layers.
        num_experts: E.
        pretrained: start from timm's weights (downloaded).
    """

    def __init__(
        self,
        variant: str,
        image_size: int,
        patch_size: int | None,
        num_classes: int,
        use_norm: bool,
        num_experts: int,
        pretrained: bool,
    ):
        super().__init__(num_experts)
        self.image_size = image_size
        self.trunk = make_trunk(variant, image_size, patch_size, pretrained)
        self.add_classifiers(self.trunk.num_features, num_classes, use_norm)

    def stem(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> tokens, [B, T, D]."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"The network takes images of {self.image_size}x{self.image_size} pixels, not "
                f"{images.shape[-1]}x{images.shape[-2]}: set arch;args;image_size to what the data loader gives."
            )
        return self.trunk.forward_features(images)

    def pool(self, features: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]: the class token or the mean over the patches, as the variant has it."""
        return self.trunk.forward_head(features, pre_logits=True)

    def plain_name(self, name: str) -> str | None:
        """timm's name: the trunk's without `trunk.`; None for a classifier's."""
        plain = super().plain_name(name)
        return plain and plain.removeprefix("trunk.")
