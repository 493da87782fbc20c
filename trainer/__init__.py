"""Training alone: from a config to its last checkpoint. From Python: `train`."""

from trainer.training import train

__all__ = ["train"]
