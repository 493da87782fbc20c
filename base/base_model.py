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

    @abstractmethod
    def expert_modules(self, expert: int) -> list[nn.Module]:
        """What one expert, counted from 0, has to itself, in the order of use; its classifier is last."""

    def classifier_names(self) -> set[str]:
        """Names of the classifiers' parameters and buffers, as in `state_dict`."""
        classifiers = [self.expert_modules(expert)[-1] for expert in range(self.num_experts)]
        tensors = {id(tensor) for module in classifiers for tensor in module.state_dict(keep_vars=True).values()}
        return {name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in tensors}

    def plain_name(self, name: str) -> str | None:
        """The entry of a plain network's state dict that an entry of this network can start from.

        Args:
            name: a key of `state_dict`.

        Returns:
            The plain network's key, or None for an entry of a classifier: the classes differ.
        """
        return None if name in self.classifier_names() else name

    def __str__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"{type(self).__name__}, {self.num_experts} expert(s), {parameters:,} trainable parameters"
