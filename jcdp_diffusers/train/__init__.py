"""The purifier's training: `train_purifier` turns raw images and a UNet into a plain DDPM repository."""

from .config import TrainingConfig
from .loop import train_purifier


__all__ = ["TrainingConfig", "train_purifier"]
