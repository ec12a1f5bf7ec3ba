"""
Several purifications of the same images, one per epoch in turn.

Purification draws an image anew around the protected one. What it invents differs from draw to draw, so a victim that
sees another draw in every epoch learns less of it by heart; what it keeps is in all of them.
"""

from collections.abc import Sequence

import torch

from ..data import LabelledImages


class Draws:
    """
    A hook: epoch e trains on draw e modulo their number.

    Args:
        others (`Sequence[LabelledImages]`): The draws after the first, which is the training set itself; the same rows
            in the same order.
    """

    def __init__(self, others: Sequence[LabelledImages]):
        self.draws = 1 + len(others)
        self.others = [torch.from_numpy(draw.images).permute(0, 3, 1, 2).contiguous() for draw in others]

    def epoch_images(self, epoch: int, images: torch.Tensor) -> torch.Tensor:
        draw = epoch % self.draws
        return images if draw == 0 else self.others[draw - 1].to(images.device)
