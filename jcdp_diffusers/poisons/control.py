"""The control for a poison: noise of the very same size that means nothing."""

import torch


def shuffled(perturbation: torch.Tensor, seed: int) -> torch.Tensor:
    """Gives each image the perturbation of one drawn at random, with its pixels in random places and random signs.

    What remains is what a budget counts: the largest values, the Euclidean norms and the numbers of pixels changed, as
    a set over all images, before the images' valid range cuts anything off. A poison that protects better than this
    does so by what it looks like, not by how much of it there is. Noise must change its image because sizes alone can
    tell classes apart: of AR's noise, shuffled in place, a victim still learns the classes.

    Args:
        perturbation: float `(N, C, H, W)`.
        seed: of the images, places and signs.

    Returns:
        float32 `(N, C, H, W)`.
    """
    draw = torch.Generator().manual_seed(seed)
    values = perturbation.float().flatten(2)
    values = values[torch.randperm(len(values), generator=draw)]
    places = torch.rand(len(values), 1, values.shape[2], generator=draw).argsort(dim=2)
    signs = 2 * torch.randint(2, values.shape, generator=draw) - 1
    return (signs * values.gather(2, places.expand_as(values))).reshape(perturbation.shape)
