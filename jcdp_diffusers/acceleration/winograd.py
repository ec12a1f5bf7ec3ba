"""
3x3 convolutions by Winograd's algorithm: a quarter of the multiplications, in float32 on a CPU.

F(4x4, 3x3) of Lavin and Gray (*Fast Algorithms for Convolutional Neural Networks*, CVPR 2016): the input is cut into
6x6 tiles that overlap by two pixels, each is transformed along both sides, the 36 numbers of a tile are multiplied by
those of the transformed weights, channels against channels, and the products are transformed back into 4x4 pixels of
the output. In exact arithmetic that is the convolution itself; in float32 a result is off by some 3e-6 of its standard
deviation, where torch's convolution is off by 1e-6 and one in bfloat16 by 1e-2. `results/throughput.jsonl` has what it
saves in time, and what it does to purified images.
"""

import math

import torch
from diffusers import UNet2DModel
from torch import nn


TILE = 4  # pixels of the output along a side of a tile
TAPS = TILE + 2  # pixels of the input that they depend on, and numbers of a transformed line
TILES_AT_A_TIME = 128  # enough rows for a fast matrix product, few enough for its operands to stay in the cache
# Below these, transforming takes longer than the multiplications that it saves.
SMALLEST_SIDE = 8
FEWEST_CHANNELS = 64

# The paper's G times 24: three weights of a line, as a polynomial, at the points 0, 1, -1, 2, -2 and infinity.
_G = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
)  # fmt: skip
_ONES = 7  # of the 36 products the one at the point (1, 1): what is added to it is added to every pixel of the tile


class WinogradConv2d(nn.Conv2d):
    """
    In the place of a 3x3 convolution, with its weights under their names, so that they are saved and loaded as before.

    Args:
        conv (`nn.Conv2d`): 3x3, stride 1, padded by one pixel, one group. Its weights are transformed now, and again
            whenever a state is loaded; they take four times their size.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("kernel", transformed(conv.weight), persistent=False)
        self.register_load_state_dict_post_hook(_transform_again)
        self.train(conv.training)

    def _apply(self, fn, recurse=True):
        """Rounded weights are transformed anew: rounding what is transformed would cost five times as much."""
        before = self.weight.dtype
        super()._apply(fn, recurse)
        if self.weight.dtype != before:
            self.kernel = transformed(self.weight)
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """
        The convolution, as it is where the algorithm does not suit the input.

        Args:
            input (`torch.Tensor`): (B, C, H, W).

        Returns:
            `torch.Tensor`: (B, C', H, W), channels last.
        """
        return convolve(input, self.kernel, self.bias) if suits(input) else super().forward(input)


def suits(features: torch.Tensor) -> bool:
    """Whether features are enough whole tiles of float32 on a CPU, and no gradient is to go through them."""
    height, width = features.shape[-2:]
    whole = min(height, width) >= SMALLEST_SIDE and height % TILE == width % TILE == 0
    return whole and runs_on(features) and not (torch.is_grad_enabled() and features.requires_grad)


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether a tensor has the type and the device that the algorithm is for."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def transformed(weight: torch.Tensor) -> torch.Tensor:
    """
    Weights as the products need them.

    Args:
        weight (`torch.Tensor`): Of the convolution, (C', C, 3, 3).

    Returns:
        `torch.Tensor`: (36, C, C'), in the same type; summed in float64.
    """
    g = _G.to(weight.device) / 24
    lines = torch.einsum("ia,ocab,jb->ijco", g, weight.detach().double(), g)
    return lines.flatten(0, 1).to(weight.dtype).contiguous()


@torch.library.custom_op("jcdp_diffusers::winograd", mutates_args=())  # one operation to a compiler
def convolve(features: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """
    A 3x3 convolution, padded by one pixel.

    Images are taken a few at a time, always as many, so that each has the same bits whichever place of a batch it has.

    Args:
        features (`torch.Tensor`): float32, (B, C, H, W), H and W multiples of 4.
        kernel (`torch.Tensor`): From `transformed`.
        bias (`torch.Tensor`, *optional*): (C',).

    Returns:
        `torch.Tensor`: (B, C', H, W), channels last.
    """
    batch, channels, height, width = features.shape
    rows, columns, out_channels = height // TILE, width // TILE, kernel.shape[2]
    count = math.gcd(batch, max(1, TILES_AT_A_TIME // (rows * columns)))
    features = features.permute(0, 2, 3, 1)

    def empty(*shape):
        return torch.empty(shape, dtype=features.dtype)

    padded = features.new_zeros(count, height + 2, width + 2, channels)
    by_row = empty(TAPS, count, rows, width + 2, channels)
    tiles = empty(TAPS, TAPS, count, rows, columns, channels)
    products = empty(TAPS, TAPS, count, rows, columns, out_channels)
    back_by_row = empty(TILE, TAPS, count, rows, columns, out_channels)
    out = empty(batch, rows, TILE, columns, TILE, out_channels)
    for start in range(0, batch, count):
        padded[:, 1:-1, 1:-1] = features[start : start + count]
        transform([padded[:, tap : tap + height - 3 : TILE] for tap in range(TAPS)], by_row)
        transform([by_row[:, :, :, tap : tap + width - 3 : TILE] for tap in range(TAPS)], tiles.transpose(0, 1))
        torch.bmm(tiles.view(TAPS**2, -1, channels), kernel, out=products.view(TAPS**2, -1, out_channels))
        if bias is not None:
            products.view(TAPS**2, -1, out_channels)[_ONES] += bias
        transform_back(products, back_by_row)
        transform_back(back_by_row.transpose(0, 1), out[start : start + count].permute(4, 2, 0, 1, 3, 5))
    return out.view(batch, height, width, out_channels).permute(0, 3, 1, 2)


@convolve.register_fake
def _shape(features: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    batch, _, height, width = features.shape
    return features.new_empty(batch, height, width, kernel.shape[2]).permute(0, 3, 1, 2)


def transform(pixels, out) -> None:
    """From six pixels of a line to six numbers, the paper's B^T, with sums that two of them share."""
    p0, p1, p2, p3, p4, p5 = pixels
    even, odd = torch.sub(p4, p2, alpha=4), torch.sub(p3, p1, alpha=4)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.sub(p4, p2, out=even)
    torch.sub(p3, p1, out=odd)
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.add(p4, torch.sub(p0, p2, alpha=1.25, out=even), alpha=4, out=out[0])
    torch.add(p5, torch.sub(p1, p3, alpha=1.25, out=odd), alpha=4, out=out[5])


def transform_back(products, out) -> None:
    """From six products of a line to four pixels, the paper's A^T: sums with the points' powers as weights."""
    m0, m1, m2, m3, m4, m5 = products
    even, odd, even_of_2, odd_of_2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    torch.add(odd, odd_of_2, alpha=2, out=out[1])
    torch.add(even, even_of_2, alpha=4, out=out[2])
    torch.add(m0, even.add_(even_of_2), out=out[0])
    torch.add(m5, odd.add_(odd_of_2, alpha=8), out=out[3])


def _transform_again(layer: WinogradConv2d, incompatible_keys) -> None:
    layer.kernel.copy_(transformed(layer.weight))


def use_winograd(unet: UNet2DModel) -> None:
    """
    Let the convolutions of a network's resnets use the algorithm, where they have pixels and channels enough.

    Args:
        unet (`UNet2DModel`): Changed in place; for inference, because transformed weights do not follow an optimizer.
    """
    size = unet.config.sample_size
    side = size if isinstance(size, int | None) else min(size)
    deepest = len(unet.down_blocks) - 1
    levels = [*enumerate(unet.down_blocks)] + ([] if unet.mid_block is None else [(deepest, unet.mid_block)])
    levels += [(deepest - index, block) for index, block in enumerate(unet.up_blocks)]
    for level, block in levels:
        if side is None or side >> level >= SMALLEST_SIDE:
            for resnet in block.resnets:
                for name in ("conv1", "conv2"):
                    layer = getattr(resnet, name)
                    if min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS:
                        setattr(resnet, name, WinogradConv2d(layer))


def uses_winograd(unet: UNet2DModel) -> bool:
    """Whether a network computes convolutions by the algorithm, in the type and on the device that it has now."""
    return any(isinstance(module, WinogradConv2d) and runs_on(module.weight) for module in unet.modules())
