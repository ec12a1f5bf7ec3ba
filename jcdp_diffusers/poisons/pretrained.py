"""
Image networks that somebody else trained, as the surrogates of poisons: extractors of features.

* `resnet50`, `squeezenet1_0`: torchvision's ImageNet classifiers. Features are what their last layer reads: 2048 of
  ResNet-50; 512 of SqueezeNet, averaged over the last map.
* `clip`: an image tower of CLIP through transformers, ViT-B/32 of OpenAI by default. Features are its image embedding.
* `open-clip-rn50`: CLIP's ResNet-50 through open_clip, which transformers does not have. 1024 features.
* `clip-tiny`: two layers of a CLIP tower on 32x32 pixels, which nobody has trained: for first tries.

Weights are downloaded when they are first used, drawn at random, or read from a local file. Nothing is unpickled:
files are safetensors, or torch's own through its loader for weights alone.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..devices import seeded
from ..outputs import public_name


NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
RANDOM = "random"


@dataclass(frozen=True)
class _Kind:
    """
    One kind of network.

    Args:
        build (`Callable`): `build(weights)`, with weights None (downloaded), `"random"`, or what a user gave.
        normalisation (`str`): One of `NORMALISATIONS`, as it was trained.
        smallest (`int`): Smallest side of an input in pixels.
    """

    build: Callable[[str | None], nn.Module]
    normalisation: str
    smallest: int


class Pretrained(nn.Module):
    """
    A frozen network in eval mode, from images to features.

    Args:
        network (`nn.Module`): From normalised images (B, 3, H, W) to features (B, F).
        normalisation (`str`): One of `NORMALISATIONS`.
        sides (`tuple`): Smallest and largest side of an input in pixels; the largest may be None.
    """

    def __init__(self, network: nn.Module, normalisation: str, sides: tuple[int, int | None]):
        super().__init__()
        self.network = network
        self.sides = sides
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATIONS[normalisation])
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 (B, F) of images (B, 1 or 3, H, W) in [0, 1]; grey images are seen as colourless ones."""
        images = (images.expand(-1, 3, -1, -1) - self.mean) / self.std
        return self.network(images.contiguous(memory_format=torch.channels_last)).float()

    def require_side(self, side: int, name: str) -> None:
        """
        Check that the network takes square images of a size.

        Raises:
            ValueError: If it does not; `name` is the argument.
        """
        smallest, largest = self.sides
        if side < smallest or (largest is not None and side > largest):
            accepted = f"{smallest}" if smallest == largest else f"at least {smallest}"
            raise ValueError(f"{name} is {side}, but must be {accepted} pixels for this surrogate.")


def load(
    name: str, *, weights: str | None = None, normalisation: str | None = None, seed: int = 0, device="cpu"
) -> Pretrained:
    """
    A network by its name.

    Args:
        name (`str`): One of `NAMES`.
        weights (`str`, *optional*): `None` downloads the published ones; `"random"` draws them from `seed`; else a
            local file, or for `clip` a folder or a Hub id, for `open-clip-rn50` a tag of open_clip as well.
        normalisation (`str`, *optional*): One of `NORMALISATIONS`, for weights that were trained with another than the
            published ones.
        seed (`int`, *optional*, defaults to 0): Of random weights.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where it runs.

    Returns:
        [`Pretrained`]

    Raises:
        ValueError: If there is no such network or normalisation, or the weights cannot be had or are of another
            network.
    """
    if name not in _KINDS:
        raise ValueError(f"surrogate is {name!r}, but must be one of {', '.join(NAMES)}.")
    if normalisation is not None and normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation is {normalisation!r}, but must be one of {', '.join(NORMALISATIONS)}.")
    kind = _KINDS[name]
    with seeded(seed):
        network = kind.build(weights)
    fixed = getattr(network, "input_size", None)
    pretrained = Pretrained(network, normalisation or kind.normalisation, (fixed or kind.smallest, fixed))
    return pretrained.to(device=device, memory_format=torch.channels_last)


def public_weights(weights: str | None) -> str | None:
    """What a card or record calls weights: of a file its name and a hash of it, of a folder its name."""
    if weights is None or not Path(weights).is_file():
        return None if weights is None else public_name(weights)
    with open(weights, "rb") as file:
        return f"{public_name(weights)} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"


class _Pooled(nn.Module):
    """Feature maps, averaged over their pixels."""

    def __init__(self, maps: nn.Module):
        super().__init__()
        self.maps = maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.maps(images).mean(dim=(2, 3))


class _Embedding(nn.Module):
    """The image embedding of a CLIP tower of transformers."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        self.input_size = tower.config.image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values=images).image_embeds


def _torchvision(name: str, weights: str | None) -> nn.Module:
    from torchvision.models import get_model

    if weights not in (None, RANDOM):
        network = get_model(name)
        _load_weights(network, name, weights)
        return network
    try:
        return get_model(name, weights="IMAGENET1K_V1" if weights is None else None)
    except OSError as error:  # of a download
        raise ValueError(
            f"weights is None, but the published ones of {name} must be downloaded, which failed ({error}); a local "
            "file is accepted."
        ) from error


def _resnet50(weights: str | None) -> nn.Module:
    network = _torchvision("resnet50", weights)
    network.fc = nn.Identity()
    return network


def _squeezenet(weights: str | None) -> nn.Module:
    return _Pooled(_torchvision("squeezenet1_0", weights).features)


def _clip(weights: str | None) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if weights == RANDOM:
        return _Embedding(CLIPVisionModelWithProjection(CLIPVisionConfig()))
    source = "openai/clip-vit-base-patch32" if weights is None else weights
    try:
        return _Embedding(CLIPVisionModelWithProjection.from_pretrained(source, use_safetensors=True))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"weights is {weights!r}, but must be a folder or Hub id of a CLIP image tower in safetensors; {source!r} "
            "cannot be opened as one."
        ) from error


def _clip_tiny(weights: str | None) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if weights != RANDOM:
        raise ValueError(f"weights is {weights!r}, but must be {RANDOM!r} for surrogate 'clip-tiny'.")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    return _Embedding(CLIPVisionModelWithProjection(config))


def _open_clip(weights: str | None) -> nn.Module:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "surrogate is 'open-clip-rn50', but must be another where open_clip is missing: pip install "
            "'jcdp-diffusers[open-clip]'."
        ) from error
    tag = {None: "openai", RANDOM: None}.get(weights, weights)
    local = tag is not None and Path(tag).exists()
    if tag is not None and not local and tag not in open_clip.list_pretrained_tags_by_model("RN50"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model("RN50"))
        raise ValueError(f"weights is {weights!r}, but must be a local file, {RANDOM!r} or one of {tags}.")
    tower = open_clip.create_model("RN50", pretrained=None if local else tag).visual
    if local:
        _load_weights(tower, "open-clip-rn50", weights)
    tower.input_size = 224
    return tower


def _load_weights(network: nn.Module, name: str, file: str) -> None:
    """All weights of a network from a local file: those of `network`, alone or below `state_dict`."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"weights is {file!r}, but must be a file that exists, or {RANDOM!r}.")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch's loader raises depends on the bytes
        raise ValueError(
            f"weights is {path.name!r}, but must be safetensors or a file of torch's with tensors alone; it is "
            "neither, or is damaged."
        ) from error
    found = _without_prefix(found.get("state_dict", found) if isinstance(found, Mapping) else {})
    wanted = network.state_dict()
    # A file without a counter of batches is one of before torch had it.
    differing = [
        key
        for key, value in wanted.items()
        if not key.endswith("num_batches_tracked") and (key not in found or found[key].shape != value.shape)
    ]
    if differing:
        raise ValueError(
            f"weights is {path.name!r}, but must hold those of {name}: {differing[0]!r} is missing or has another "
            "shape."
        )
    network.load_state_dict({key: found.get(key, value) for key, value in wanted.items()})


def _without_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a network that was part of another one: `module.conv1.weight` becomes `conv1.weight`."""
    for prefix in ("module.", "visual.", "visual_encoder."):
        if any(key.startswith(prefix) for key in weights):
            return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return dict(weights)


_KINDS = {
    "resnet50": _Kind(_resnet50, "imagenet", 32),
    "squeezenet1_0": _Kind(_squeezenet, "imagenet", 21),
    "clip": _Kind(_clip, "clip", 32),
    "open-clip-rn50": _Kind(_open_clip, "clip", 224),
    "clip-tiny": _Kind(_clip_tiny, "clip", 32),
}
NAMES = tuple(_KINDS)
