"""The control for a poison: noise of the same size that carries no information about the classes."""

import torch

from ..data import LabelledImages
from ..data.perturbations import apply_perturbation


# What stands behind a poison's name where its control is meant.
SUFFIX = "-control"


def norm_matched(clean: LabelledImages, protected: LabelledImages, *, seed: int) -> LabelledImages:
    """
    The clean images with the poison's own noise, shuffled; see [`shuffled`].

    Args:
        clean (`LabelledImages`): The originals.
        protected (`LabelledImages`): The same images, protected, in the same order.
        seed (`int`): Of the shuffle.

    Raises:
        ValueError: If the two sets hold other ids or another order.
    """
    if clean.ids != protected.ids:
        raise ValueError(f"protected has {len(protected)} ids, but must have those of clean in their order.")
    noise = shuffled(protected.tensor() - clean.tensor(), seed=seed)
    return clean.with_images(apply_perturbation(clean.images, noise))


def shuffled(perturbation: torch.Tensor, seed: int) -> torch.Tensor:
    """
    Give each image the perturbation of one drawn at random, with its pixels in random places and random signs.

    What remains is what a budget counts: the largest values, the Euclidean norms and the numbers of pixels changed, as
    a set over all images, before the images' valid range cuts anything off. A poison that protects better than this
    does so by its pattern and not by its size. The noise must move to another image because sizes alone can tell
    classes apart: a victim still learns the classes from AR's noise that is shuffled in place.

    Args:
        perturbation (`torch.Tensor`): Float `(N, C, H, W)`.
        seed (`int`): Of the images, places and signs.

    Returns:
        `torch.Tensor`: float32 `(N, C, H, W)`.
    """
    draw = torch.Generator().manual_seed(seed)
    values = perturbation.float().flatten(2)
    values = values[torch.randperm(len(values), generator=draw)]
    places = torch.rand(len(values), 1, values.shape[2], generator=draw).argsort(dim=2)
    signs = 2 * torch.randint(2, values.shape, generator=draw) - 1
    return (signs * values.gather(2, places.expand_as(values))).reshape(perturbation.shape)
