"""What was predicted, image by image: kept out of results.json, shown by report.html."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

Thumbnails = Callable[[Sequence[int], int], list[Image.Image | None]]
"""(indices of images, longest side in pixels) -> small pictures of them; None where there is none."""


@dataclass(frozen=True)
class Outcomes:
    """What was predicted for each image of a distribution.

    Args:
        indices: of the test images, [M].
        targets: labels, [M].
        prediction: classes, [M].
        confidence: their probabilities in 0..1, [M].
    """

    indices: Tensor
    targets: Tensor
    prediction: Tensor
    confidence: Tensor

    @property
    def correct(self) -> Tensor:
        """Boolean [M]."""
        return self.prediction == self.targets
