"""What every network of this project has in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class BaseModel(nn.Module, ABC):
    """A network of E experts over C classes.

    Attributes:
        num_classes: C.
        num_experts: E, 1 for a plain network.
    """

    num_classes: int
    num_experts: int

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, 3, H, W] -> {"output": [B, C] mean logits, "logits": [B, E, C], "feat": [B, E, D]}."""

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"{type(self).__name__}, {self.num_experts} expert(s), {parameters:,} trainable parameters"
