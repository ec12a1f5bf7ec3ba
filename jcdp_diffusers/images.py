"""The images that a purification may be given: PIL, NumPy or torch, refused where something would be lost silently."""

import numpy as np
import torch
from PIL import Image


Images = Image.Image | list[Image.Image] | np.ndarray | torch.Tensor
ROUNDING = 1e-6  # by which floats may lie outside [0, 1]: what resizing and dividing by 255 leave


def pictures_of(pictures: list[Image.Image], channels: int) -> list[Image.Image]:
    """PIL images as mode RGB for 3 channels or L for 1; refuses lists of other things, sizes or what would be lost."""
    if not pictures:
        raise ValueError("images is an empty list, but must hold at least one image.")
    if wrong := [picture for picture in pictures if not isinstance(picture, Image.Image)]:
        raise TypeError(f"images is a list with a {type(wrong[0]).__name__}, but must hold PIL images.")
    if len(sizes := {picture.size for picture in pictures}) > 1:
        raise ValueError(f"images has sizes {sorted(sizes)[:3]}, but must have one size in one call.")
    return [_without_loss(picture, channels) for picture in pictures]


def _without_loss(picture: Image.Image, channels: int) -> Image.Image:
    """A palette, black and white, grey for RGB, or alpha that is opaque everywhere; nothing else is converted."""
    mode, wanted = picture.mode, {1: "L", 3: "RGB"}[channels]
    if picture.has_transparency_data:
        if picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"images has a PIL image of mode {mode!r} with transparency, but must be opaque.")
        picture = picture.convert({"LA": "L", "L": "L"}.get(mode, "RGB"))
    elif mode in ("1", "P"):
        picture = picture.convert("L" if mode == "1" else "RGB")
    if picture.mode == "L" and wanted == "RGB":
        picture = picture.convert("RGB")
    if picture.mode != wanted:
        raise ValueError(
            f"images has a PIL image of mode {mode!r}, but must have mode {wanted!r} for a UNet of {channels} "
            "channels: convert it first."
        )
    return picture


def within_unit_range(images: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Float images in [0, 1], of which what rounding has left outside is moved to the nearest end."""
    floating = images.is_floating_point() if isinstance(images, torch.Tensor) else images.dtype.kind == "f"
    if not floating:
        raise ValueError(f"images is of type {images.dtype}, but must be a float type in [0, 1]: divide by 255.")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images has shape {tuple(images.shape)}, but must have four non-empty dimensions.")
    if not bool((images == images).all()):
        raise ValueError("images has NaN values, but every value must be a number in [0, 1].")
    low, high = float(images.min()), float(images.max())
    limits = torch.finfo(images.dtype) if isinstance(images, torch.Tensor) else np.finfo(images.dtype)
    tolerance = max(ROUNDING, float(limits.eps))
    if low < -tolerance or high > 1 + tolerance:
        raise ValueError(f"images has values from {low:.9g} to {high:.9g}, but must lie in [0, 1].")
    return images.clip(0, 1) if low < 0 or high > 1 else images


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to uint8 on the CPU, rounded once: what an image's content id is made from."""
    return images.mul(127.5).add_(127.5).round_().clamp_(0, 255).to("cpu", torch.uint8)
