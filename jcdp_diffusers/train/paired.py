"""
A network that takes a protection off, trained on pairs: images before and after the protection tool.

Whoever has the tool can protect other images and learn the way back. BridgePure (Wang et al., NeurIPS 2025) trains a
diffusion bridge from the protected to the clean image. LightShed (Foerster et al., USENIX Security 2025) trains an
auto-encoder that predicts the perturbation, and subtracts it. Ours is the second idea with this package's UNets. Let
x' be protected images, x their originals, and s the root mean square of x' - x over all pairs. The network f minimises

    mean ((x' - x) / s - f(x'))^2

which is the fraction of the perturbation's power that is left. The restored image is x' - s f(x'). Neither paper's own
network is here. LightShed's loss for unprotected images is left out, too: every image counts as protected. Images are
neither mirrored nor shifted, because a perturbation is not the same when mirrored.

The result is a repository of diffusers: `UNet2DModel.from_pretrained(folder)` opens it; `paired.json` has s.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data import LabelledImages, to_uint8
from ..devices import has_bfloat16, seeded
from ..outputs import write_atomically
from ..purify.dataset_card import SUMMARY_NAME
from ..saved_state import SavedState
from .denoising import random_generator
from .images import channels_first, epoch_order, normalize
from .reading import read_json
from .record import fingerprint
from .unets import UNETS, named_unet


FACTS_NAME = "paired.json"
_BATCH = 256  # images that are restored at a time


@dataclasses.dataclass(frozen=True)
class PairedSettings:
    """
    Numbers of the training on pairs.

    Args:
        unet (`str`): Name of the network, one of `unets.UNETS`.
        epochs (`int`): Passes over the pairs.
        batch_size (`int`): Pairs of a step; the last step of an epoch may have fewer.
        learning_rate (`float`): Of Adam; it falls by half a cosine to 0, once per step.
        clip_norm (`float`): Largest norm of the gradient.
        bfloat16 (`bool`): Whether convolutions run in bfloat16, where the device has instructions for it.
    """

    unet: str = "ddpm-cifar10"
    epochs: int = 250
    batch_size: int = 128
    learning_rate: float = 2e-4
    clip_norm: float = 1.0
    bfloat16: bool = True


def check_pairs(protected: LabelledImages, settings: PairedSettings) -> None:
    """
    Refuse images that the network cannot take.

    Raises:
        ValueError: If height or width is not a multiple of what it needs.
    """
    height, width = protected.images.shape[1:3]
    divisor = 2 ** (len(UNETS[settings.unet]["block_out_channels"]) - 1)
    if height % divisor or width % divisor:
        raise ValueError(
            f"pairs has images of {height}x{width} pixels, but both must be multiples of {divisor} for the network "
            f"{settings.unet!r}."
        )


def loss_of(
    unet: nn.Module, protected: torch.Tensor, originals: torch.Tensor, scale: float, *, bfloat16: bool = False
) -> torch.Tensor:
    """
    The fraction of the perturbation's power that a network does not explain.

    Args:
        unet (`UNet2DModel`): The network.
        protected, originals (`torch.Tensor`): float32 (B, C, H, W) in [-1, 1].
        scale (`float`): Root mean square of the perturbation.
        bfloat16 (`bool`, *optional*): See [`PairedSettings`].

    Returns:
        `torch.Tensor`: A scalar.
    """
    return F.mse_loss(_perturbation(unet, protected, bfloat16), (protected - originals) / scale)


def train_paired(
    protected: LabelledImages,
    originals: LabelledImages,
    folder: str | os.PathLike,
    settings: PairedSettings,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> None:
    """
    Train the way back and write it to a folder; a training that was cut off goes on, a finished one is left as it is.

    Equal arguments give equal weights on one machine with one number of threads.

    Args:
        protected, originals (`LabelledImages`): Row by row the same images, after the tool and before it.
        folder (`str` or `os.PathLike`): The repository. The state of the training lies beside it until it is done.
        settings ([`PairedSettings`]): Of network and training.
        seed (`int`, *optional*): Of weights and order.
        device (`str` or `torch.device`, *optional*): Where it runs.
        progress (`bool`, *optional*): Show a bar.

    Raises:
        ValueError: If the images do not suit the network, the tool has changed nothing, or the folder holds another
            training.
        FloatingPointError: If the loss is no longer finite.
    """
    check_pairs(protected, settings)
    if np.array_equal(protected.images, originals.images):
        raise ValueError("protected has the images of originals, but the tool must have changed them.")
    folder = Path(folder)
    about = {
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "pairs": len(protected),
        "protected": fingerprint(protected),
        "originals": fingerprint(originals),
    }
    if (folder / FACTS_NAME).exists():
        if read_facts(folder)["about"] != about:
            raise ValueError(f"folder is {str(folder)!r}, but must be empty or hold the training on the same pairs.")
        return
    kept = SavedState(folder.with_suffix(".pt"), json.dumps(about))
    height, width, channels = protected.images.shape[1:]
    unet = named_unet(settings.unet, in_channels=channels, sample_size=height, seed=seed)
    unet.register_to_config(sample_size=height if height == width else [height, width])
    scale, losses = _train(unet, protected, originals, settings, seed, torch.device(device), kept, progress)
    facts = {"about": about, "scale": scale, "losses": losses, "seconds": round(kept.seconds, 1)}
    _write(unet, folder, facts)
    kept.path.unlink(missing_ok=True)


def _train(unet, protected, originals, settings: PairedSettings, seed: int, device, kept: SavedState, progress: bool):
    """All epochs that are left; the perturbation's size and the mean loss of each epoch."""
    unet.to(device, memory_format=torch.channels_last).train()
    after, before = (channels_first(data.images).to(device) for data in (protected, originals))
    scale = _root_mean_square(after, before)
    optimizer = torch.optim.Adam(unet.parameters(), lr=settings.learning_rate)
    steps = -(-len(after) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    losses = []
    if (state := kept.load()) is not None:
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        losses = state["losses"]
    with tqdm(total=settings.epochs, initial=len(losses), unit="epoch", desc="pairs", disable=not progress) as bar:
        for epoch in range(len(losses), settings.epochs):
            total = torch.zeros((), device=device)
            # Dropout draws from the global state; an epoch's is a function of its number.
            with seeded(random_generator(seed, "dropout", epoch).initial_seed(), device):
                for rows in torch.from_numpy(epoch_order(seed, epoch, len(after))).split(settings.batch_size):
                    rows = rows.to(device)
                    batch = (normalize(images[rows]) for images in (after, before))
                    loss = loss_of(unet, *batch, scale, bfloat16=settings.bfloat16)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(unet.parameters(), settings.clip_norm)
                    optimizer.step()
                    schedule.step()
                    total += loss.detach()
            losses.append(total.item() / steps)
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"the loss became {losses[-1]} in epoch {epoch + 1}: learning_rate is {settings.learning_rate}; "
                    "try a lower one."
                )
            bar.update()
            bar.set_postfix_str(f"left of the perturbation: {losses[-1]:.1%}")
            if kept.due():
                parts = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict()}
                kept.save(parts | {"schedule": schedule.state_dict(), "losses": losses})
    unet.to(memory_format=torch.contiguous_format).eval()
    return scale, losses


def _root_mean_square(after: torch.Tensor, before: torch.Tensor) -> float:
    """Of the difference of uint8 images, in units of [-1, 1]; summed in whole numbers, so the same on every device."""
    total = sum(
        (one.long() - other.long()).square().sum().item() for one, other in zip(after.split(1024), before.split(1024))
    )
    return (total / after.numel()) ** 0.5 / 127.5


def _write(unet: UNet2DModel, folder: Path, facts: dict) -> None:
    """The repository, whole or not at all; two processes that have trained the same write the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unet.save_pretrained(temporary)
        write_atomically(temporary / "README.md", _CARD.format(pairs=facts["about"]["pairs"]))
        write_atomically(temporary / SUMMARY_NAME, json.dumps({"seconds_of_work": facts["seconds"]}) + "\n")
        write_atomically(temporary / FACTS_NAME, json.dumps(facts, indent=2) + "\n")
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / FACTS_NAME).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_CARD = """---
library_name: diffusers
tags:
- unlearnable-examples
---
# A way back from one protection

A `UNet2DModel` that predicts the perturbation of images in [-1, 1] in units of `scale` (`paired.json`). It was trained
on {pairs} images before and after one protection tool, and knows that tool alone. It is no DDPM and generates nothing.

**It assumes that the protection tool and its seed are public**: without the tool there are no pairs to learn from, and
another seed may make another noise.
"""


def read_facts(folder: str | os.PathLike) -> dict:
    """What `paired.json` of a repository says: `scale`, `losses`, `seconds` and `about`."""
    expected = {"about": dict, "scale": (int, float), "losses": list, "seconds": (int, float)}
    return read_json(Path(folder) / FACTS_NAME, expected)


@torch.no_grad()
def restore(
    data: LabelledImages, folder: str | os.PathLike, *, device: str | torch.device = "cpu", bfloat16: bool = True
) -> LabelledImages:
    """
    Take the protection off images, and round them to 8 bits.

    Args:
        data (`LabelledImages`): Protected images.
        folder (`str` or `os.PathLike`): From [`train_paired`].
        device (`str` or `torch.device`, *optional*): Where it runs.
        bfloat16 (`bool`, *optional*): See [`PairedSettings`].

    Returns:
        `LabelledImages`: The same rows with other images.
    """
    scale = read_facts(folder)["scale"]
    unet = UNet2DModel.from_pretrained(folder).eval().to(device, memory_format=torch.channels_last)
    restored = []
    for batch in channels_first(data.images).split(_BATCH):
        images = normalize(batch.to(device))
        restored.append((images - scale * _perturbation(unet, images, bfloat16)).cpu() / 2 + 0.5)
    return data.with_images(to_uint8(torch.cat(restored)))


def _perturbation(unet: nn.Module, images: torch.Tensor, bfloat16: bool) -> torch.Tensor:
    """What the network takes for the perturbation of images (B, C, H, W) in [-1, 1], in units of its size."""
    enabled = bfloat16 and has_bfloat16(images.device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
        # A UNet of diffusers asks for a timestep: 0 is that of an image without Gaussian noise.
        return unet(images, torch.zeros((), dtype=torch.int64, device=images.device)).sample.float()
