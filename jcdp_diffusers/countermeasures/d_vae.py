"""
D-VAE (Yu et al., ICML 2024; yuyi-sd/D-VAE): a variational auto-encoder that takes the protection out of images.

It is trained on the protected images themselves and needs their labels, but no other images. The encoder's noisy
bottleneck passes little. What a class has in common is easy to learn, so a second decoder, given an embedding of the
label, has to account for it: it draws the perturbation p. With r the reconstruction of image x, the loss is

    MSE(r, x) + MSE(clip(r + p), x) + kl_weight * max(KL, kl_target) + max(mean p^2, least_perturbation)

of which the last term comes in after some epochs. It is done twice. The first time KL may be small, and p is
subtracted from the images. The second time a new network is trained on the result with a larger KL; p is subtracted
again, and the reconstruction of that is the output.

From the released program, as its script for CIFAR-10 calls it: there the second decoder is given the bottleneck's
sample and an embedding of the label for each place. Ours: images are rounded to 8 bits, where the program truncates;
a set smaller than a batch is one batch; images of other sizes have an embedding of theirs. `d-vae-small` is ours too:
a narrower network and fewer epochs, for a CPU. Neither was compared with published figures.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data import LabelledImages, to_uint8
from ..devices import seeded
from ..outputs import write_atomically
from ..purify.dataset_card import SUMMARY_NAME
from ..saved_state import SavedState
from ..victims.networks import BasicBlock
from . import Context, Countermeasure


@dataclass(frozen=True)
class DVAESettings:
    """
    Numbers of D-VAE.

    Args:
        width (`int`): Channels of the encoder's first stage; its output has twice as many.
        latent (`int`): Channels of the bottleneck.
        epochs (`int`): Of each of the two trainings; 100 is published for CIFAR-100.
        batch_size (`int`): Images of a step; an incomplete batch is left out.
        learning_rate (`float`): Of Adam; it falls by half a cosine to 0, once per epoch.
        clip_norm (`float`): Largest L2 norm of the whole gradient.
        kl_targets (`tuple[float, float]`): Of the first and the second training: KL, summed over channels and averaged
            over places, is not pushed below it.
        kl_weight (`float`): Of KL.
        least_perturbation (`float`): The mean square of p is not pushed below it.
        free_epochs (`int`): Epochs in which the mean square of p does not count.
    """

    width: int = 64
    latent: int = 256
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 5e-3
    clip_norm: float = 5.0
    kl_targets: tuple[float, float] = (1.0, 3.0)
    kl_weight: float = 0.01
    least_perturbation: float = 0.002
    free_epochs: int = 11


SETTINGS = {
    "d-vae": DVAESettings(),
    "d-vae-small": DVAESettings(width=16, latent=64, epochs=30),
}
SMOKE_SETTINGS = dict.fromkeys(SETTINGS, DVAESettings(width=8, latent=16, epochs=2))


class DisentanglingVAE(nn.Module):
    """
    The network.

    Args:
        num_classes (`int`): Number of labels.
        shape (`tuple[int, int, int]`): `(C, H, W)` of the images; height and width are even.
        settings (`DVAESettings`): Its width and latent channels count.
    """

    def __init__(self, num_classes: int, shape: tuple[int, int, int], settings: DVAESettings):
        super().__init__()
        channels, height, width = shape
        first, second = settings.width, 2 * settings.width
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            BasicBlock(first, first, 1),
            BasicBlock(first, first, 1),
            BasicBlock(first, second, 2),
        )
        self.mean = nn.Conv2d(second, settings.latent, 1)
        self.log_variance = nn.Conv2d(second, settings.latent, 1)
        self.widen = nn.Conv2d(settings.latent, second, 1)
        self.embedding = nn.Embedding(num_classes, second * (height // 2) * (width // 2))
        self.image_decoder = nn.Sequential(*_decoder(second, channels), nn.Sigmoid())
        self.perturbation_decoder = nn.Sequential(*_decoder(second, channels))

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction and perturbation, both (B, C, H, W), and KL, a scalar, for images in [0, 1]."""
        features = self.encoder(images)
        mean, log_variance = self.mean(features), self.log_variance(features)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
        sample = self.widen(mean + noise * (log_variance / 2).exp())
        perturbation = self.perturbation_decoder(sample + self.embedding(labels).reshape(sample.shape))
        divergence = -(1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1) / 2
        return self.image_decoder(sample), perturbation, divergence.mean()


def _decoder(channels: int, image_channels: int) -> list[nn.Module]:
    half, quarter = channels // 2, channels // 4
    return [
        nn.ConvTranspose2d(channels, half, 4, stride=2, padding=1),
        nn.ConvTranspose2d(half, half, 3, padding=1),
        nn.InstanceNorm2d(half),
        nn.ReLU(),
        nn.ConvTranspose2d(half, quarter, 3, padding=1),
        nn.InstanceNorm2d(quarter),
        nn.ReLU(),
        nn.ConvTranspose2d(quarter, image_channels, 3, padding=1),
    ]


def loss_of(
    images: torch.Tensor,
    reconstruction: torch.Tensor,
    perturbation: torch.Tensor,
    divergence: torch.Tensor,
    settings: DVAESettings,
    *,
    kl_target: float,
    epoch: int,
) -> torch.Tensor:
    """The loss of one batch in an epoch counted from 0; see the file's text."""
    loss = F.mse_loss(reconstruction, images) + F.mse_loss((reconstruction + perturbation).clamp(0, 1), images)
    loss = loss + settings.kl_weight * divergence.clamp(min=kl_target)
    if epoch >= settings.free_epochs:
        loss = loss + perturbation.square().mean().clamp(min=settings.least_perturbation)
    return loss


def check_images(data: LabelledImages, name: str) -> None:
    """Refuse a training set without labels, or of images of odd height or width."""
    height, width, _ = data.images.shape[1:]
    if data.labels is None:
        raise ValueError(f"data has no labels, but {name} needs one for every image.")
    if height % 2 or width % 2:
        raise ValueError(f"data has images of {height}x{width} pixels, but for {name} both must be even.")


def disentangle(data: LabelledImages, context: Context, settings: DVAESettings, name: str) -> LabelledImages:
    """
    Take the perturbation out of a training set.

    Args:
        data (`LabelledImages`): Images of even height and width, with labels.
        context ([`Context`]): Its seed decides weights, order and noise; the state of the training and its seconds are
            kept in its `checkpoint_dir`.
        settings (`DVAESettings`): Of network and training.
        name (`str`): Of the folder within `checkpoint_dir`.

    Returns:
        `LabelledImages`: The same rows with other images.

    Raises:
        ValueError: If there are no labels, or height or width is odd.
    """
    check_images(data, name)
    with context.place_for_work(f"{name}-{context.seed}") as folder:
        folder.mkdir(exist_ok=True)
        return _disentangle(data, context, settings, name, folder)


def _disentangle(
    data: LabelledImages, context: Context, settings: DVAESettings, name: str, folder: Path
) -> LabelledImages:
    """Both trainings that are left, with their state and the seconds of all of them in a folder."""
    height, width, channels = data.images.shape[1:]
    device = torch.device(context.device)
    labels = torch.from_numpy(data.labels.copy()).to(device)
    images = data.tensor()
    content = hashlib.sha256(np.ascontiguousarray(data.images))
    content.update(data.labels.tobytes())
    run = f"{name}, {settings}, seed {context.seed}, data {content.hexdigest()[:16]}"
    kept = SavedState(folder / "state.pt", run)
    state = kept.load() or {"round": 0}
    if state["round"] > 0:
        images = state["images"].float() / 255

    for number in range(state["round"], 2):
        generator = torch.Generator(device).manual_seed(2 * context.seed + number)
        with seeded(2 * context.seed + number, device):
            model = DisentanglingVAE(context.num_classes, (channels, height, width), settings)
        model.to(device)
        desc = f"{name}: training {number + 1} of 2"
        _train(model, images.to(device), labels, settings, number, generator, kept, desc, context.progress)
        images = _without_perturbation(model, images.to(device), labels, generator, settings, number).cpu()
        eight_bit = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
        images = eight_bit.float() / 255
        write_atomically(folder / SUMMARY_NAME, json.dumps({"seconds_of_work": round(kept.seconds, 3)}) + "\n")
        kept.save({"round": number + 1, "images": eight_bit})
    return data.with_images(to_uint8(images))


def _train(
    model,
    images,
    labels,
    settings: DVAESettings,
    number: int,
    generator,
    kept: SavedState,
    desc: str,
    progress: bool,
):
    """One training; it continues from the state that is kept of it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    begun = 0
    state = kept.load()
    if state is not None and state["round"] == number and "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        begun = state["epoch"]
    batch_size = min(settings.batch_size, len(images))
    model.train()
    with tqdm(total=settings.epochs, initial=begun, unit="epoch", desc=desc, disable=not progress) as bar:
        for epoch in range(begun, settings.epochs):
            optimizer.param_groups[0]["lr"] = (
                settings.learning_rate * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
            )
            order = torch.randperm(len(images), generator=generator, device=generator.device)
            for rows in order[: len(images) // batch_size * batch_size].split(batch_size):
                made = model(images[rows], labels[rows], generator)
                target = settings.kl_targets[number]
                loss = loss_of(images[rows], *made, settings, kl_target=target, epoch=epoch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
                optimizer.step()
            bar.update()
            if kept.due():
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                parts |= {"images": (255 * images).round().to(torch.uint8).cpu(), "generator": generator.get_state()}
                kept.save(parts | {"round": number, "epoch": epoch + 1})


@torch.no_grad()
def _without_perturbation(model, images, labels, generator, settings: DVAESettings, number: int) -> torch.Tensor:
    """The images less the perturbation; the second time, the reconstruction of that."""
    model.eval()
    found = []
    for batch, targets in zip(images.split(settings.batch_size), labels.split(settings.batch_size), strict=True):
        less = (batch - model(batch, targets, generator)[1]).clamp(0, 1)
        found.append(less if number == 0 else model(less, targets, generator)[0])
    return torch.cat(found)


def _registered(
    name: str, cost: str, settings: Mapping[str, DVAESettings] = SETTINGS, smoke: Countermeasure | None = None
) -> Countermeasure:
    def function(data: LabelledImages, context: Context) -> LabelledImages:
        return disentangle(data, context, settings[name], name)

    source = "D-VAE, disentangling variational auto-encoder (Yu et al., ICML 2024; yuyi-sd/D-VAE)"
    source += "" if name == "d-vae" else "; ours: narrower and shorter, for a CPU"
    options = {"takes": "bytes", "check": lambda data: check_images(data, name), "smoke": smoke}
    return Countermeasure(name, "dataset", source, cost, function, asdict(settings[name]), **options)


_COSTS = {
    "d-vae": "two trainings of an auto-encoder, 60 epochs each, and three passes over the images",
    "d-vae-small": "two trainings of a narrow auto-encoder, 30 epochs each, and three passes",
}

COUNTERMEASURES = tuple(
    _registered(name, cost, smoke=_registered(name, cost, SMOKE_SETTINGS)) for name, cost in _COSTS.items()
)
