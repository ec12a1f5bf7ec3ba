"""
Perceptual distance from frozen features of a classifier: LPIPS (Zhang et al., CVPR 2018) as a diffusers model.

The `lpips` package registers each head twice, cannot be saved as safetensors and downloads weights when it is built.
Here the same network is a plain `ModelMixin`: it saves and loads like a UNet, and computes the same bits as
`lpips.LPIPS`.

Its gradient is wanted at every reverse step, on images that are small for a network made for 224x224. Two kinds of
convolution are then mostly waste, and can be had for less (`rearranged=True`, the same but for rounding): one with a
stride, whose few input channels leave vector instructions idle, is a convolution of blocks of pixels; one whose kernel
is larger than the map multiplies padding most of the time, and is a product with a matrix of what is left.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .repository import check_safetensors, check_weights, lay_aligned, read_json


class Fire(nn.Module):
    """SqueezeNet's block: a 1x1 squeeze, then a 1x1 and a 3x3 expansion side by side (Iandola et al., 2016)."""

    def __init__(self, channels: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def _alexnet() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip


def _vgg16() -> list[nn.Module]:
    layers, channels = [], 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in block:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return layers[:-1]  # no tap lies behind the last pooling


def _squeezenet1_1() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64), Fire(128, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128), Fire(256, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    ]  # fmt: skip


def _squeezenet1_0() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 96, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256),
        nn.MaxPool2d(3, 2, ceil_mode=True), Fire(512, 64, 256),
    ]  # fmt: skip


# Per trunk: its layers, indexed as torchvision's `features`; after which of them a feature map is taken; those maps'
# channels; the smallest square input that leaves every map non-empty; and the (shift, scale) from [-1, 1] to the input
# that the trunk was trained on, channel by channel.
_IMAGENET = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
_UNIT_RANGE = ((-1.0, -1.0, -1.0), (2.0, 2.0, 2.0))
TRUNKS = {
    "alex": (_alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31, _IMAGENET),
    "vgg": (_vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16, _IMAGENET),
    "squeeze": (_squeezenet1_1, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), 17, _IMAGENET),
    "squeezenet1_0": (
        _squeezenet1_0, (0, 3, 4, 5, 7, 8, 9, 10, 12), (96, 128, 128, 256, 256, 384, 384, 512, 512), 21, _UNIT_RANGE,
    ),
}  # fmt: skip
_OF_LPIPS = ("alex", "vgg", "squeeze")


def convolve_blocks(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """
    A convolution with stride s as one with stride 1 of blocks of s x s pixels, each a pixel of s^2 times the channels,
    by a kernel that is padded to whole blocks.

    Args:
        layer (`nn.Conv2d`): Its stride, kernel and padding are the same in both directions.
        x (`torch.Tensor`): (B, C, H, W).

    Returns:
        `torch.Tensor`: (B, C', H', W'), as the layer itself gives but for rounding.
    """
    stride, kernel, padding = layer.stride[0], layer.kernel_size[0], layer.padding[0]
    whole = -(-kernel // stride) * stride
    height, width = (((side + 2 * padding - kernel) // stride) * stride + whole for side in x.shape[-2:])
    x = F.pad(x, (padding, width - padding - x.shape[-1], padding, height - padding - x.shape[-2]))
    weight = F.pad(layer.weight, (0, whole - kernel, 0, whole - kernel))
    # As `pixel_unshuffle`, but channels last in the same copy: pooling is several times as fast then.
    blocks = x.unflatten(2, (-1, stride)).unflatten(4, (-1, stride)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.conv2d(blocks.permute(0, 3, 1, 2), F.pixel_unshuffle(weight, stride), layer.bias)


def convolution_matrix(layer: nn.Conv2d, channels: int, height: int, width: int) -> torch.Tensor:
    """
    The matrix that does what a convolution does without its bias.

    Args:
        layer (`nn.Conv2d`): Of the trunk.
        channels, height, width (`int`): C, H and W of its input.

    Returns:
        `torch.Tensor`: From (H, W, C), flattened, to (H', W', C'), flattened: shape (H W C, H' W' C').
    """
    values = channels * height * width
    basis = torch.eye(values).to(layer.weight).view(values, height, width, channels).permute(0, 3, 1, 2)
    columns = F.conv2d(basis, layer.weight, None, layer.stride, layer.padding)
    return columns.permute(0, 2, 3, 1).flatten(1).contiguous()


def unit_length(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A feature map (B, C, H, W) divided by its length over channels, and that length (B, 1, H, W)."""
    # At a pixel where all channels are zero the root's gradient would be infinite; the floor makes it zero and changes
    # no distance, since the division adds 1e-10 anyway.
    length = x.square().sum(1, keepdim=True).clamp_min(1e-30).sqrt()
    return x / (length + 1e-10), length


class LPIPSModel(ModelMixin, ConfigMixin):
    """
    Frozen perceptual distance between images in [-1, 1].

    D(x, y) = sum over feature maps of the spatial mean of w . (f(x) - f(y))^2, with f normalised to unit length over
    channels and w the calibrated heads (equation 1 of Zhang et al.), or ones if `calibrated` is False. It stays in
    float32 under `.to(dtype)`: normalised features divide by lengths that half precision rounds to zero.

    Args:
        trunk (`str`, defaults to `"alex"`): `"alex"`, `"vgg"` (VGG16), `"squeeze"` (SqueezeNet 1.1), or
            `"squeezenet1_0"`, for which no heads were ever published.
        calibrated (`bool`, defaults to `True`): With the published heads' shape (weights are random until loaded), or
            plain features.
    """

    _keep_in_fp32_modules = ["layers", "heads"]

    @register_to_config
    def __init__(self, trunk: str = "alex", calibrated: bool = True):
        super().__init__()
        if trunk not in TRUNKS:
            raise ValueError(f"trunk is {trunk!r}, but must be one of {tuple(TRUNKS)}.")
        if calibrated and trunk == "squeezenet1_0":
            raise ValueError(
                "calibrated is True, but trunk 'squeezenet1_0' has no published heads: pass calibrated=False."
            )
        build, self.taps, channels, self.smallest_input, (shift, scale) = TRUNKS[trunk]
        self.layers = nn.Sequential(*build())
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in channels) if calibrated else None
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32)[None, :, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32)[None, :, None, None], persistent=False)
        self.requires_grad_(False).eval()
        self._matrices: dict[tuple, tuple[int, torch.Tensor]] = {}

    @property
    def name(self) -> str:
        """What a purification configuration calls this network: `"lpips-alex"`, or `"features-squeezenet1_0"`."""
        return f"{'lpips' if self.config.calibrated else 'features'}-{self.config.trunk}"

    @classmethod
    def from_lpips(cls, net="alex") -> "LPIPSModel":
        """
        Take trunk and heads over from the `lpips` package.

        Args:
            net (`str` or `lpips.LPIPS`): `"alex"`, `"vgg"` or `"squeeze"`: lpips ships the heads, and torchvision
                downloads the ImageNet trunk once (233, 528 or 5 MB). Or a network that was already built.
        """
        import lpips

        if isinstance(net, str) and net not in _OF_LPIPS:
            raise ValueError(f"net is {net!r}, but must be one of {_OF_LPIPS}, or a network of lpips.")
        try:
            source = lpips.LPIPS(net=net, verbose=False) if isinstance(net, str) else net
        except OSError as error:  # URLError is one
            raise OSError(
                f"net is {net!r}, but must be one whose trunk can be downloaded ({error}): load it where there is a "
                "network and save it with save_pretrained, or take from_trunk_file."
            ) from error
        model = cls(trunk=source.pnet_type.removesuffix("16"), calibrated=bool(source.lpips))
        state = {}
        for key, value in source.state_dict().items():
            part, *rest = key.split(".")
            if part == "net":  # net.slice2.3.weight: lpips keeps torchvision's layer numbers inside its slices
                state["layers." + ".".join(rest[1:])] = value
            elif part.startswith("lin") and part != "lins":  # lin0.model.1.weight, registered again as lins.0
                state[f"heads.{part[3:]}.weight"] = value
        model.load_state_dict(state)
        return model

    @classmethod
    def from_trunk_file(cls, path: str | os.PathLike, trunk: str = "squeezenet1_0") -> "LPIPSModel":
        """
        Plain, uncalibrated features of an ImageNet classifier, for machines without network.

        Args:
            path (`str` or `os.PathLike`): A safetensors file of a torchvision classifier (keys `features.0.weight`,
                ...), in any float type.
            trunk (`str`, defaults to `"squeezenet1_0"`): Which network it holds.

        Raises:
            ValueError: If the file is broken, or does not hold that network; the sentence names it.
        """
        from safetensors.torch import load_file

        check_safetensors(path)
        model = cls(trunk=trunk, calibrated=False)
        found = {key.removeprefix("features."): value for key, value in load_file(path).items()}
        for key, weight in model.layers.state_dict().items():
            if key not in found:
                raise ValueError(f"path is {os.fspath(path)!r}, but must hold 'features.{key}' for a {trunk} trunk.")
            if found[key].shape != weight.shape:
                raise ValueError(
                    f"path is {os.fspath(path)!r}, where 'features.{key}' has shape {tuple(found[key].shape)}, but "
                    f"must have {tuple(weight.shape)} for a {trunk} trunk."
                )
        model.layers.load_state_dict({key: found[key] for key in model.layers.state_dict()})
        return model

    def _apply(self, fn, recurse=True):
        def move_only(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._matrices.clear()
        return super()._apply(move_only, recurse)

    def check_size(self, height: int, width: int) -> None:
        """Refuse images that leave a feature map of the trunk empty."""
        if min(height, width) < self.smallest_input:
            raise ValueError(
                f"images are {height}x{width}, but must be at least {self.smallest_input}x{self.smallest_input} for "
                f"the trunk {self.config.trunk!r}: enlarge them first or choose another trunk."
            )

    def maps(self, images: torch.Tensor, *, rearranged: bool = False) -> list[torch.Tensor]:
        """
        Feature maps as they leave the trunk.

        Args:
            images (`torch.Tensor`): float32, shape (B, 3, H, W) or (B, 1, H, W) (grey, shown to all three channels),
                in [-1, 1], noise on top allowed.
            rearranged (`bool`): Take the convolutions in fewer operations, equal but for rounding; else as torch does,
                bit for bit what `lpips` computes.

        Raises:
            ValueError: If the images are too small for the trunk.
        """
        self.check_size(*images.shape[-2:])
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale
        maps = []
        for index, layer in enumerate(self.layers):
            x = self._convolve(index, layer, x) if rearranged and isinstance(layer, nn.Conv2d) else layer(x)
            if index in self.taps:
                maps.append(x)
        return maps

    def features(self, images: torch.Tensor, *, rearranged: bool = False) -> list[torch.Tensor]:
        """Feature maps of unit length over channels; arguments as for `maps`."""
        return [unit_length(x)[0] for x in self.maps(images, rearranged=rearranged)]

    def _convolve(self, index: int, layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if layer.stride[0] > 1:
            return convolve_blocks(layer, x)
        channels, height, width = x.shape[1:]
        if height * width >= layer.kernel_size[0] * layer.kernel_size[1]:
            return layer(x)
        version, matrix = self._matrices.get((index, height, width), (None, None))
        if version != layer.weight._version:
            matrix = convolution_matrix(layer, channels, height, width)
            self._matrices[index, height, width] = layer.weight._version, matrix
        # All of these layers keep the size of their map.
        columns = x.permute(0, 2, 3, 1).flatten(1) @ matrix
        return columns.view(-1, height, width, layer.out_channels).permute(0, 3, 1, 2) + layer.bias.view(-1, 1, 1)

    def distance(self, features: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
        """Distance per image between two lists of feature maps: shape (B,)."""
        total = 0
        for index, (a, b) in enumerate(zip(features, others, strict=True)):
            squares = (a - b) ** 2
            weighted = self.heads[index](squares) if self.heads is not None else squares.sum(1, keepdim=True)
            total = total + weighted.mean([2, 3])
        return total[:, 0]

    def slopes(self, maps: list[torch.Tensor], features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gradient of the distance, summed over the batch, with respect to `maps`; `features` are what it is to."""
        slopes = []
        for index, (x, target) in enumerate(zip(maps, features, strict=True)):
            feature, length = unit_length(x)
            weight = 1.0 if self.heads is None else self.heads[index].weight
            slope = (feature - target).mul_(weight * (2 / x[0, 0].numel()))  # with respect to the feature
            along = (feature * slope).sum(1, keepdim=True).mul_((length + 1e-10) / length)
            slopes.append(slope.sub_(feature.mul_(along)).div_(length + 1e-10))
        return slopes

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Distance per image between two batches of images in [-1, 1], shape (B, C, H, W): shape (B,)."""
        return self.distance(self.features(images), self.features(others))


def lpips_at_hand() -> LPIPSModel | None:
    """
    LPIPS with the first of its trunks `alex`, `vgg` and `squeeze` whose weights torch has downloaded before.

    Returns:
        [`LPIPSModel`]: None where there is none, for nothing is downloaded.
    """
    from torchvision.models import get_model_weights

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for net, name in (("alex", "alexnet"), ("vgg", "vgg16"), ("squeeze", "squeezenet1_1")):
        if (cache / Path(get_model_weights(name).IMAGENET1K_V1.url).name).is_file():
            return LPIPSModel.from_lpips(net)
    return None


def load_perceptual(name: str | os.PathLike) -> LPIPSModel:
    """
    The network of the perceptual guide, as commands, grids and purifiers' folders name it.

    Args:
        name (`str` or `os.PathLike`): `alex`, `vgg` or `squeeze` of the `lpips` package; a folder with an
            `LPIPSModel`; or a safetensors file of torchvision's SqueezeNet 1.0.

    Raises:
        ValueError: If it is none of these, or a file is broken; the sentence names the file.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"perceptual is {os.fspath(name)!r}, but must hold a config.json, that of an LPIPSModel.")
        read_json(Path(name) / "config.json")
        check_weights(Path(name))
        try:
            network = LPIPSModel.from_pretrained(name)
        except Exception as error:  # whatever diffusers says of files that nobody here has written
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"perceptual is {os.fspath(name)!r}, but must hold an LPIPSModel that can be loaded ({reason:.300})."
            ) from error
        lay_aligned(network)
        return network
    if Path(name).is_file():
        return LPIPSModel.from_trunk_file(name)
    if name not in _OF_LPIPS:
        raise ValueError(
            f"perceptual is {os.fspath(name)!r}, but must be one of {', '.join(_OF_LPIPS)}, a folder with an "
            "LPIPSModel or a safetensors file of SqueezeNet 1.0."
        )
    return LPIPSModel.from_lpips(name)
