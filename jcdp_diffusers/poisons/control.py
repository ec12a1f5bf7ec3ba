"""The control for a poison: noise of the very same size that means nothing."""

import torch


def shuffled(perturbation: torch.Tensor, seed: int) -> torch.Tensor:
    """Moves the pixels of each image's perturbation to random places and gives every value a random sign.

    What remains is what a budget counts: the largest value, the Euclidean norm and the number of pixels changed, image
    by image, before the images' valid range cuts anything off. A poison that protects better than this does so by what
    it looks like, not by how much of it there is.

    Args:
        perturbation: float `(N, C, H, W)`.
        seed: of the places and signs.

    Returns:
        float32 `(N, C, H, W)`.
    """
    draw = torch.Generator().manual_seed(seed)
    values = perturbation.float().flatten(2)
    places = torch.rand(len(values), 1, values.shape[2], generator=draw).argsort(dim=2)
    signs = 2 * torch.randint(2, values.shape, generator=draw) - 1
    return (signs * values.gather(2, places.expand_as(values))).reshape(perturbation.shape)
