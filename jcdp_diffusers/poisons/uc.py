"""
UC, unlearnable clusters: one universal noise per cluster of images, made without labels.

A network that somebody else trained gives features of the clean images, and k-means sorts the images into clusters.
For each cluster a generator is trained, whose input is one fixed random tensor and whose output is one noise. Added to
*any* image of the set, the noise is to move the image's features to the centre of the next cluster: the loss is the
Kullback-Leibler divergence of the features' softmax from the centre's. In the end each image gets the noise of its own
cluster. So the noise tells clusters apart, whatever an image shows.

* `uc`: the network is torchvision's ResNet-50.
* `uc-clip`: the network is an image tower of CLIP: ViT-B/32, which transformers has. The paper's is CLIP's ResNet-50,
  which open_clip has: preset `rn50`.

Kept from the released program: the noise is clamped to the bound (a clamped value has no gradient), and the generator
runs in training mode to the end, so batch normalisation takes the statistics of the one noise. Ours: each pass shows
the images in another order, and k-means and crops are drawn from the seed.

**Size.** The program adds the noise to views of 224 pixels and brings it to the images' own size in the end, by their
nearest pixels. That needs images of 224 pixels or more: of the noise for 224, smaller images would keep single pixels.
The presets `any-size`, `cpu` and `smoke` make noise of the images' own size, and add it before images are enlarged to
views. Nothing of ours has been compared with the authors' images.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from ..devices import seeded
from ..victims.checkpoints import digest
from . import Poison, pretrained, surrogate
from .checkpoint import Checkpoint
from .numbers import check_numbers


SOURCE = (
    "Zhang et al., Unlearnable Clusters: Towards Label-agnostic Unlearnable Examples, CVPR 2023, and its program "
    "jiamingzhang94/Unlearnable-Clusters"
)
SMALLEST_SIDE = 8
NOISE_ON = ("views", "images")
ALL_ALIKE = "images have surrogate features that are all alike, but must differ to be clustered."


@dataclass(frozen=True)
class UCSettings:
    """
    Numbers of UC.

    Args:
        epsilon (`float`): Bound of every value of the noise, in 1/255.
        clusters (`int`): Of k-means.
        kmeans_starts (`int`): Starts of k-means, of which the best is taken.
        offset (`int`): How many clusters further on the target is.
        epochs (`int`): Passes over all images, per cluster.
        max_steps (`int`, *optional*): Most steps per cluster; the learning rate falls to its last value within them.
        batch_size (`int`): Images of a step.
        learning_rate, last_learning_rate, weight_decay (`float`): Of Adam; the learning rate falls from the first to
            the last along a cosine.
        generator_width (`int`): Channels of the generator's outermost layers.
        generator_blocks (`int`): Its residual blocks.
        enlarged_size (`int`): Shorter side to which images are brought, in pixels.
        view_size (`int`): Side of the square that is cut out of them and that the surrogate sees, in pixels.
        noise_on (`str`): `"views"`: noise has the views' size and is added to them. `"images"`: it has the images'
            size and is added before they are enlarged.
        surrogate (`str`): One of `pretrained.NAMES`.
        weights (`str`, *optional*): Of the surrogate: see `pretrained.load`.
        normalisation (`str`, *optional*): Of the surrogate's input, where it is not that of its published weights.
        feature_std (`float`, *optional*): Features are divided so that they have this standard deviation, over all
            images and features. `None`: they stay as the surrogate gives them, as in the program.
        bfloat16 (`bool`): Whether the surrogate runs in mixed precision.

    Raises:
        ValueError: If a number is too small, or a cluster would be its own target.
    """

    epsilon: float = 16.0
    clusters: int = 10
    kmeans_starts: int = 10
    offset: int = 1
    epochs: int = 50
    max_steps: int | None = None
    batch_size: int = 256
    learning_rate: float = 1e-4
    last_learning_rate: float = 1e-6
    weight_decay: float = 5e-4
    generator_width: int = 64
    generator_blocks: int = 6
    enlarged_size: int = 256
    view_size: int = 224
    noise_on: str = "views"
    surrogate: str = "resnet50"
    weights: str | None = None
    normalisation: str | None = None
    feature_std: float | None = None
    bfloat16: bool = False

    def __post_init__(self):
        check_numbers(self)
        if self.clusters < 2:
            raise ValueError(f"clusters is {self.clusters}, but must be at least 2.")
        if self.offset % self.clusters == 0:
            raise ValueError(
                f"offset is {self.offset}, but must be no multiple of clusters {self.clusters}: features would go to "
                "the centre of their own cluster."
            )


@dataclass(frozen=True)
class UCCLIPSettings(UCSettings):
    """
    Numbers of UC-CLIP: those of [`UCSettings`], with another surrogate.

    Args:
        surrogate (`str`): One of `pretrained.NAMES`.
    """

    surrogate: str = "clip"


_CPU = {
    "max_steps": 150,
    "batch_size": 64,
    "enlarged_size": 72,
    "view_size": 64,
    "noise_on": "images",
    "bfloat16": True,
}
_SMOKE = {
    "clusters": 3,
    "kmeans_starts": 1,
    "epochs": 1,
    "max_steps": 2,
    "batch_size": 16,
    "generator_width": 4,
    "generator_blocks": 1,
    "enlarged_size": 36,
    "view_size": 32,
    "noise_on": "images",
    "weights": pretrained.RANDOM,
}
PRESETS = {
    "published": UCSettings(),
    # As published, for images of any size.
    "any-size": UCSettings(noise_on="images"),
    "gpu": UCSettings(bfloat16=True),
    # A small network on small views, and noise of the images' own size. SqueezeNet's features go up to hundreds: the
    # softmax of most centres would be one and the same feature.
    "cpu": UCSettings(surrogate="squeezenet1_0", feature_std=0.5, **_CPU),
    # Random weights: a first try, whose noise means nothing.
    "smoke": UCSettings(surrogate="squeezenet1_0", **_SMOKE),
}
CLIP_PRESETS = {
    "published": UCCLIPSettings(),
    "rn50": UCCLIPSettings(surrogate="open-clip-rn50"),
    "any-size": UCCLIPSettings(noise_on="images"),
    "gpu": UCCLIPSettings(bfloat16=True),
    # A tower takes views of one size only, which costs an hour or more for 10,000 images.
    "cpu": UCCLIPSettings(**_CPU | {"max_steps": 30, "batch_size": 32, "enlarged_size": 256, "view_size": 224}),
    "smoke": UCCLIPSettings(surrogate="clip-tiny", **_SMOKE),
}


def budget(settings: UCSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb(
    images: torch.Tensor,
    labels: None,
    settings: UCSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """See [`Poison`]."""
    name = "uc-clip" if isinstance(settings, UCCLIPSettings) else "uc"
    _check(images, settings)
    network = pretrained.load(
        settings.surrogate,
        weights=settings.weights,
        normalisation=settings.normalisation,
        seed=seed,
        device=device,
    )
    network.require_side(settings.view_size, "view_size")
    size = tuple(images.shape[2:]) if settings.noise_on == "images" else (settings.view_size, settings.view_size)
    # By their content: another file may have taken the place of the first one.
    decided = replace(settings, weights=digest(*network.state_dict().values()))
    kept = Checkpoint(checkpoint_dir, name, decided, seed, images, None)
    if (state := kept.load()) is None:
        features = features_of(network, images, settings, device, progress)
        scale = scale_of(features, settings.feature_std)
        members, centres = find_clusters(scale * features, settings, seed)
        state = {"members": members, "centres": centres, "scale": scale, "patterns": [], "training": None, "step": 0}
        kept.save(state)
    members, centres, patterns = state["members"], state["centres"], state["patterns"]

    steps = steps_per_cluster(len(images), settings)
    total, done = settings.clusters * steps, len(patterns) * steps + state["step"]
    with tqdm(total=total, initial=done, unit="step", desc=name, disable=not progress) as bar:
        while len(patterns) < settings.clusters:
            cluster, first = len(patterns), state["step"]
            training = PatternTraining(cluster, (images.shape[1], *size), settings, steps, seed, device)
            if state["training"] is not None:
                training.load_state_dict(state["training"])
            target = centres[(cluster + settings.offset) % settings.clusters].to(device)
            for step in range(first, steps):
                loss = training.step(step, network, images, target, state["scale"])
                bar.update()
                bar.set_postfix_str(f"cluster {cluster + 1} of {settings.clusters}, divergence {loss:.4f}")
                if kept.due() and step + 1 < steps:
                    kept.save(state | {"training": training.state_dict(), "step": step + 1})
            patterns.append(training.pattern())
            state |= {"training": None, "step": 0}
            kept.save(state)
    # A view's size becomes the images' own by their nearest pixels, as in the program.
    return F.interpolate(torch.cat(patterns), images.shape[2:])[members]


def _check(images: torch.Tensor, settings: UCSettings) -> None:
    height, width = images.shape[2:]
    if settings.noise_on not in NOISE_ON:
        raise ValueError(f"noise_on is {settings.noise_on!r}, but must be one of {', '.join(NOISE_ON)}.")
    if settings.enlarged_size < settings.view_size:
        raise ValueError(
            f"enlarged_size is {settings.enlarged_size}, but must be at least view_size {settings.view_size}."
        )
    smallest = settings.view_size if settings.noise_on == "views" else SMALLEST_SIDE
    if min(height, width) < smallest:
        other = "; preset 'any-size' has noise of the images' own size" if settings.noise_on == "views" else ""
        raise ValueError(
            f"images are {height}x{width}, but must be at least {smallest}x{smallest} for noise on "
            f"{settings.noise_on}{other}."
        )
    if len(images) < settings.clusters:
        raise ValueError(
            f"images holds {len(images)} images, but must hold at least one for each of {settings.clusters} clusters."
        )


def steps_per_cluster(count: int, settings: UCSettings) -> int:
    """Steps of one generator for `count` images."""
    steps = settings.epochs * -(-count // settings.batch_size)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def features_of(
    network: nn.Module, images: torch.Tensor, settings: UCSettings, device: torch.device, progress: bool
) -> torch.Tensor:
    """
    Features of the middle of each image.

    Args:
        network (`nn.Module`): From images in [0, 1] to features.
        images (`torch.Tensor`): float (N, C, H, W) in [0, 1].

    Returns:
        `torch.Tensor`: float32 (N, F), on the CPU.
    """
    features = []
    batches = images.split(settings.batch_size)
    with torch.no_grad(), surrogate.precision(settings.bfloat16, device):
        for batch in tqdm(batches, unit="batch", desc="features", disable=not progress):
            enlarged = resize(batch.to(device), settings.enlarged_size, antialias=True)
            features.append(network(center_crop(enlarged, settings.view_size)).cpu())
    return torch.cat(features)


def scale_of(features: torch.Tensor, std: float | None) -> float:
    """What features (N, F) are multiplied by so that they have a standard deviation; 1 where it is None."""
    if std is None:
        return 1.0
    own = features.std().item()
    if own == 0:
        raise ValueError(ALL_ALIKE)
    return std / own


def find_clusters(features: torch.Tensor, settings: UCSettings, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    K-means.

    Args:
        features (`torch.Tensor`): float32 (N, F).

    Returns:
        `tuple`: The cluster of each image, int64 (N,), and the clusters' centres, float32 (clusters, F).

    Raises:
        ValueError: If the features of all images are the same, but for rounding.
    """
    if features.std(dim=0).max() <= 1e-5 * features.abs().max():
        raise ValueError(ALL_ALIKE)
    found = KMeans(settings.clusters, n_init=settings.kmeans_starts, random_state=_number(seed)).fit(features.numpy())
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_).float()


class PatternTraining:
    """
    The training of one cluster's generator. All draws depend on the seed, the cluster and the step alone.

    Args:
        cluster (`int`): Its number.
        shape (`tuple` of `int`): `(C, H, W)` of the noise.
        settings (`UCSettings`): Of the method.
        steps (`int`): All steps of the training.
        seed (`int`): Of the method.
        device (`torch.device`): Where it runs.
    """

    def __init__(
        self,
        cluster: int,
        shape: tuple[int, int, int],
        settings: UCSettings,
        steps: int,
        seed: int,
        device: torch.device,
    ):
        self.settings, self.seeds, self.device = settings, (seed, cluster), device
        with seeded(_number(*self.seeds)):
            self.input = torch.rand(1, *shape).to(device)
            self.generator = Generator(shape[0], settings.generator_width, settings.generator_blocks).to(device)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, steps, eta_min=settings.last_learning_rate
        )
        self.draw = torch.Generator(device)
        side = settings.view_size
        self.cut = surrogate.CropFlip((side, side), 0, self.draw)

    def noise(self) -> torch.Tensor:
        """The noise (1, C, H, W) as it is now, within the bound."""
        epsilon = self.settings.epsilon / 255
        return self.generator(self.input).clamp(-epsilon, epsilon)

    def views(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Enlarged, cut and mirrored images (B, C, H, W) with the noise, in [0, 1]."""
        enlarged_size = self.settings.enlarged_size
        if self.settings.noise_on == "images":
            return self.cut(resize((images + noise).clamp(0, 1), enlarged_size, antialias=True))
        return (self.cut(resize(images, enlarged_size, antialias=True)) + noise).clamp(0, 1)

    def step(
        self, number: int, network: nn.Module, images: torch.Tensor, target: torch.Tensor, scale: float = 1.0
    ) -> float:
        """
        One step, on a batch of all images.

        Args:
            number (`int`): Of the step, from 0.
            network (`nn.Module`): From images in [0, 1] to features.
            images (`torch.Tensor`): float (N, C, H, W) in [0, 1], on any device.
            target (`torch.Tensor`): Centre of the cluster where features are to go, (F,).
            scale (`float`, *optional*, defaults to 1.0): Features are multiplied by it first.

        Returns:
            `float`: The loss before the step.
        """
        batch = self.rows(number, len(images))
        self.draw.manual_seed(_number(*self.seeds, number))
        views = self.views(images[batch].to(self.device), self.noise())
        with surrogate.precision(self.settings.bfloat16, self.device):
            features = network(views)
        loss = surrogate.finite(divergence(scale * features.float(), target))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def rows(self, number: int, count: int) -> torch.Tensor:
        """Rows of the images of a step: each pass has all images in an order of its own."""
        batch_size = self.settings.batch_size
        epoch, place = divmod(number, -(-count // batch_size))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_number(*self.seeds, epoch, 0)))
        return order[place * batch_size : (place + 1) * batch_size]

    @torch.no_grad()
    def pattern(self) -> torch.Tensor:
        """The noise (1, C, H, W) on the CPU. The generator stays in training mode, as in the program."""
        return self.noise().cpu()

    def state_dict(self) -> dict[str, Any]:
        """What a step changes."""
        parts = {"generator": self.generator, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, part in (
            ("generator", self.generator),
            ("optimizer", self.optimizer),
            ("schedule", self.schedule),
        ):
            part.load_state_dict(state[name])


def divergence(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the softmax of features (B, F) from that of a target (F,), averaged over the batch.
    """
    wanted = target.softmax(dim=0).expand_as(features)
    return F.kl_div(features.log_softmax(dim=1), wanted, reduction="batchmean")


class Generator(nn.Module):
    """
    The residual image-to-image network of Johnson et al. (ECCV 2016), as the program has it, with batch normalisation.

    A 7x7 convolution, two of stride 2, residual blocks of two 3x3 convolutions, two transposed ones of stride 2, and a
    7x7 convolution with tanh. Padding is by reflection. Sides that are no multiple of 4 are cut to size in the end.

    Args:
        channels (`int`): Of input and output.
        width (`int`): Channels of the outermost layers; four times as many in the blocks.
        blocks (`int`): Number of residual blocks.
    """

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), *_normalised(nn.Conv2d(channels, width, 7, bias=False))]
        for factor in (1, 2):
            layers += _normalised(nn.Conv2d(factor * width, 2 * factor * width, 3, stride=2, padding=1, bias=False))
        layers += [_Residual(4 * width) for _ in range(blocks)]
        for factor in (4, 2):
            up = nn.ConvTranspose2d(
                factor * width, factor * width // 2, 3, stride=2, padding=1, output_padding=1, bias=False
            )
            layers += _normalised(up)
        self.layers = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (B, channels, H, W) to the same shape, values in [-1, 1]."""
        return self.layers(x)[:, :, : x.shape[2], : x.shape[3]]


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            *_normalised(nn.Conv2d(channels, channels, 3, bias=False)),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def _normalised(convolution: nn.Module) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)]


def _number(*seeds: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


POISONS = (
    Poison("uc", "UC", SOURCE, PRESETS, budget, perturb, uses_labels=False, surrogate="pretrained"),
    Poison("uc-clip", "UC-CLIP", SOURCE, CLIP_PRESETS, budget, perturb, uses_labels=False, surrogate="pretrained"),
)
