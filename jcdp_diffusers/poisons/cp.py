"""
CP, contrastive poisoning: noise for which a contrastive loss is small without anything being learned.

An encoder and the noise minimise the same contrastive loss in turns. The gradient for the noise passes through both
views, their augmentation and, with `through_targets`, the second network of MoCo v2 and BYOL.

* `cp-c`, class-wise: all images of a class share one pattern, from a uniformly random start.
* `cp-s`, sample-wise: every image has noise of its own. It starts as the class-wise pattern of the image's label,
  which is made first with another encoder. Labels enter through that start alone.

Presets named after a framework are for it; the others are for SimCLR. `published` has the paper's method with the
released numbers. `code`, `code-moco-v2` and `code-byol` add what the released program does beyond that:

* The second network follows within each forward pass, and keys enter the queue there. So each step of the descent
  moves them too, and a batch with five steps enters a queue of eight batches five times. For BYOL there are two passes
  per step, so its momentum is 0.999 squared.
* BYOL's targets are detached, so the gradient through its second network has no effect.
* On its four processes SimCLR's gradient is a quarter: each process differentiates its own features alone, and then
  the mean over processes is taken.
* A pass of the noise leaves out the images that do not fill a batch.

Not taken over: batch normalisation over each process's quarter of a batch, and normalised images. Its released noise
for SimCLR is that of round 160 of 200. Victims warm up there, encoders of poisons do not. The paper passes the
gradient through BYOL's targets; the published figures for BYOL come from a program that does not. Ours: kornia
resamples a crop in one step. Nothing of ours has been compared with the authors' published noise.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from . import Poison
from .checkpoint import Checkpoint
from .encoder import Encoder, EncoderSettings, in_turns
from .surrogate import sign_step


SOURCE = (
    "He et al., Indiscriminate Poisoning Attacks on Unsupervised Contrastive Learning, ICLR 2023, and its released "
    "program (kaiwenzha/contrastive-poisoning)"
)
LEAST_LEARNING_RATE = 1e-3  # where the cosine ends, of the highest one


@dataclass(frozen=True)
class CPSettings(EncoderSettings):
    """
    Numbers of CP, class-wise: those of [`EncoderSettings`], and these.

    Args:
        model_steps, noise_batches (`int`, *optional*): 20 each, published.
        planned_rounds (`int`): The learning rate falls by half a cosine to a thousandth over so many rounds, once per
            round, although `rounds` may be fewer.
    """

    model_steps: int | None = 20
    noise_batches: int | None = 20
    loss_factor: float = 0.5 / 0.07
    planned_rounds: int = 1000

    def __post_init__(self):
        super().__post_init__()
        if self.rounds > self.planned_rounds:
            raise ValueError(f"rounds is {self.rounds}, but must be at most planned_rounds, {self.planned_rounds}.")

    def learning_rate_in(self, number: int) -> float:
        """Counted from 1 as in the released program, so that the first round has less than the highest one."""
        cosine = (1 + math.cos(math.pi * (number + 1) / self.planned_rounds)) / 2
        return self.learning_rate * (LEAST_LEARNING_RATE + (1 - LEAST_LEARNING_RATE) * cosine)


# What sample-wise noise and the class-wise noise that it starts from have each for itself.
OF_EACH_NOISE = ("step", "steps", "rounds", "planned_rounds", "model_steps", "noise_batches")


@dataclass(frozen=True)
class CPSampleSettings(CPSettings):
    """
    Numbers of CP, sample-wise: those of [`CPSettings`], with these differences.

    `jcdp poison --set FIELD=VALUE` changes both noises, except for steps and rounds (`OF_EACH_NOISE`), which
    `--set start.FIELD=VALUE` changes in the class-wise one.

    Args:
        model_steps, noise_batches (`int`, *optional*): None, published: whole passes.
        start (`CPSettings`): How the class-wise noise is made that the sample-wise noise starts from.
    """

    steps: int = 5
    rounds: int = 160
    planned_rounds: int = 200
    model_steps: int | None = None
    noise_batches: int | None = None
    start: CPSettings = CPSettings()

    def __post_init__(self):
        super().__post_init__()
        if self.start.epsilon > self.epsilon:
            raise ValueError(f"start.epsilon is {self.start.epsilon}, but must be at most epsilon, {self.epsilon}.")

    def shared(self) -> dict[str, tuple[str, ...]]:
        """See [`~poisons.Poison.changed`]."""
        return {"start": tuple(entry.name for entry in fields(CPSettings) if entry.name not in OF_EACH_NOISE)}


_MOCO = {"learning_rate": 0.3, "temperature": 0.2, "loss_factor": 0.2 / 0.07, "key_momentum": 0.99, "queue": 4096}
_BYOL = {"learning_rate": 1.0, "temperature": None, "loss_factor": 1.0, "key_momentum": 0.999}
FRAMEWORKS = {
    "simclr": {},
    "moco-v2": {"framework": "moco-v2", "through_targets": True, **_MOCO},
    "byol": {"framework": "byol", "through_targets": True, **_BYOL},
}
# What the released program does beside the method; see the file's text.
SIDE_EFFECTS = {
    "simclr": {"loss_factor": 0.5 / 0.07 / 4, "drop_last": True},
    "moco-v2": {"follow_noise_steps": True, "drop_last": True},
    "byol": {"follow_noise_steps": True, "drop_last": True, "through_targets": False, "key_momentum": 0.999**2},
}
# Of the sample-wise noise: only SimCLR's is that of an earlier round; BYOL's takes one short step.
SAMPLE_WISE = {
    "simclr": {},
    "moco-v2": {"rounds": 200},
    "byol": {"rounds": 200, "steps": 1, "step": 0.16},
}


def _presets(framework: str) -> dict[str, tuple[CPSettings, CPSampleSettings]]:
    """Class-wise and sample-wise numbers for one framework."""
    published = CPSettings(**FRAMEWORKS[framework])
    batches = {"batch_size": 128, "learning_rate": published.learning_rate / 4}
    few = {"batch_size": 20, "learning_rate": published.learning_rate / 25, "width": 4, "step": 4.0, "steps": 1}
    few |= {"model_steps": 1, "noise_batches": 1}
    if published.key_momentum is not None:
        batches["key_momentum"] = few["key_momentum"] = 0.99
    if published.queue is not None:
        batches["queue"], few["queue"] = 1024, 40
    cpu = replace(published, **batches, rounds=60, planned_rounds=60, model_steps=10, noise_batches=10, width=16)
    class_wise = {
        "published": published,
        "code": replace(published, **SIDE_EFFECTS[framework]),
        "gpu": replace(published, bfloat16=True),
        "cpu": replace(cpu, bfloat16=True),
        "smoke": replace(published, **few, rounds=2, planned_rounds=2),
    }
    shorter = {
        "cpu": {"rounds": 15, "planned_rounds": 15, "steps": 3},
        "smoke": few | {"rounds": 1, "planned_rounds": 1},
    }
    return {
        name: (start, _sample_wise(start, **SAMPLE_WISE[framework] | shorter.get(name, {})))
        for name, start in class_wise.items()
    }


def _sample_wise(start: CPSettings, **changes) -> CPSampleSettings:
    """The numbers of a sample-wise noise that starts from a class-wise one with the same encoder."""
    same = {entry.name: getattr(start, entry.name) for entry in fields(CPSettings)}
    for name in OF_EACH_NOISE:
        del same[name]
    return CPSampleSettings(**same | changes, start=start)


# "code" is for SimCLR, "code-byol" for BYOL, and "byol" its published numbers.
_ALL = {
    (name if framework == "simclr" else f"{name}-{framework}").removeprefix("published-"): pair
    for framework in FRAMEWORKS
    for name, pair in _presets(framework).items()
}
CLASS_PRESETS = {name: pair[0] for name, pair in _ALL.items()}
SAMPLE_PRESETS = {name: pair[1] for name, pair in _ALL.items()}


def budget(settings: CPSettings, shape: tuple[int, int, int]) -> dict[str, float]:
    """See [`Poison`]."""
    return {"linf": settings.epsilon}


def perturb_classes(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: CPSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """Class-wise noise; see [`Poison`]."""
    kept = Checkpoint(checkpoint_dir, "cp-c", settings, seed, images, labels)
    draw = torch.Generator().manual_seed(seed)
    start = 2 * torch.rand(int(labels.max()) + 1, *images.shape[1:], generator=draw) - 1
    options = {"kept": kept, "seed": seed, "device": device, "name": "cp-c", "progress": progress}
    return in_turns(images, settings.epsilon / 255 * start, labels, settings, lower, **options)[labels]


def perturb_images(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: CPSampleSettings,
    *,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None,
    progress: bool,
) -> torch.Tensor:
    """Sample-wise noise; see [`Poison`]. The class-wise start has a state of its own in the folder."""
    common = {"seed": seed, "device": device, "progress": progress}
    start = perturb_classes(images, labels, settings.start, checkpoint_dir=checkpoint_dir, **common)
    kept = Checkpoint(checkpoint_dir, "cp-s", settings, seed, images, labels)
    rows = torch.arange(len(images))
    return in_turns(images, start, rows, settings, lower, kept=kept, name="cp-s", **common)


def lower(
    encoder: Encoder, clean: torch.Tensor, noise: torch.Tensor, which: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """
    Lower the contrastive loss of a batch by projected sign descent, from the noise that is there; see `in_turns`.

    Noise that leads out of [0, 1] has no effect there, and no gradient.
    """
    settings = encoder.settings
    for _ in range(settings.steps):
        noise = noise.detach().requires_grad_()
        loss = encoder.loss((clean + noise[which]).clamp(0, 1))
        (gradient,) = torch.autograd.grad(loss, noise)
        noise = sign_step(noise.detach(), gradient, settings.step / 255, settings.epsilon / 255)
        encoder.after_noise_step()
    return noise


POISONS = (
    Poison("cp-c", "CP-C", SOURCE, CLASS_PRESETS, budget, perturb_classes, surrogate="contrastive"),
    Poison("cp-s", "CP-S", SOURCE, SAMPLE_PRESETS, budget, perturb_images, surrogate="contrastive"),
)
