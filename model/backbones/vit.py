"""A Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) from timm as the trunk of E classifiers."""

from torch import Tensor

from model.backbones.timm_trunk import TimmTrunk
from utils.errors import UserError


class ViT(TimmTrunk):
    """Stem: the whole transformer, for images of one size.

    Args:
        variant: name of a VisionTransformer in timm.
        image_size: side of the images in pixels.
        patch_size: side of a patch in pixels; None for the variant's own.
        num_classes, use_norm, num_experts, pretrained: see TimmTrunk.
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
        if image_size < 1 or (patch_size is not None and not 1 <= patch_size <= image_size):
            raise ValueError(f"patch_size must lie between 1 and image_size, not {patch_size} for {image_size} pixels")
        sizes = {"img_size": image_size} | ({} if patch_size is None else {"patch_size": patch_size})
        super().__init__(variant, num_classes, use_norm, num_experts, pretrained, "vision_transformer", **sizes)
        self.image_size = image_size

    def stem(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> tokens, [B, T, D]."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"The network takes images of {self.image_size}x{self.image_size} pixels, not "
                f"{images.shape[-1]}x{images.shape[-2]}: set arch;args;image_size to what the data loader gives."
            )
        return super().stem(images)
