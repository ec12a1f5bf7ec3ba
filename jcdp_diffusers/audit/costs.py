"""
What an audit will cost on this machine, by one step of each of its networks, and how to stay within a budget.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

from .. import victims
from ..data import LabelledImages
from ..devices import available_cores, cpu_threads, has_bfloat16, seeded
from ..pipeline_jcdp import usual_micro_batch
from ..train.default_purifier import with_steps
from ..train.unets import named_unet
from ..victims.linear_probe import CP
from .purifier import AuditPurifier
from .settings import AuditSettings, Learner


MEASURED_IMAGES = 8  # of a step that is timed; a batch's time is in proportion
REPEATS = 3
USED = 0.85  # fraction of a budget that is planned for: the machine may get slower
LEAST_WIDTH, LEAST_SEEDS = 16, 2
FORWARD = 1 / 3  # of a step, as it goes forward and backward
# Steps of one image in a step without labels: of both views, or of one; a second network goes forward alone.
STEPS_OF_VIEWS = {"simclr": 2, "moco-v2": 1 + FORWARD, "byol": 2 + 2 * FORWARD}
LEAST_STEPS = 0.25  # fraction of a plan's training steps, below which a purifier is of no use


@dataclasses.dataclass(frozen=True)
class Costs:
    """
    Seconds that the parts of an audit take.

    Args:
        training (`float`): Of one step of the purifier's training; 0 where none is trained.
        purification (`float`): Of all purification.
        victim (`dict`): Of one victim, by width; empty where there are none. The mean over ways of learning.
        rows (`int`): Victims of one seed.
        at_a_time (`int`): Victims that are trained at the same time.
    """

    training: float
    purification: float
    victim: Mapping[int, float]
    rows: int
    at_a_time: int

    def victims(self, width: int, seeds: int) -> float:
        """All victims."""
        return self.victim[width] * -(-self.rows * seeds // self.at_a_time) if seeds else 0.0

    def total(self, steps: int, width: int, seeds: int) -> float:
        """All parts together."""
        return self.training * steps + self.purification + self.victims(width, seeds)


@dataclasses.dataclass(frozen=True)
class Extent:
    """
    How much is trained.

    Args:
        steps (`int`): Of the purifier; 0 where none is trained.
        width (`int`): Of the victims; of several ways of learning, that of the widest.
        seeds (`int`): Victims per row; 0 where there are no victims.
    """

    steps: int
    width: int
    seeds: int


def asked_extent(asked: AuditSettings, learners: Sequence[Learner], used: AuditPurifier) -> Extent:
    """What is trained where there is no budget."""
    steps = 0 if used.plan is None else used.plan.training.max_train_steps
    if not learners:
        return Extent(steps, 0, 0)
    return Extent(steps, max(widths(asked, learners)), len(asked.victim_seeds))


def widths(asked: AuditSettings, learners: Sequence[Learner]) -> set[int]:
    """Those of the victims."""
    return {asked.width or learner.recipe.width for learner in learners}


def measure_costs(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    learners: Sequence[Learner],
    device: torch.device,
    processes: int | None,
    *,
    to_purify: int,
) -> Costs:
    """
    Time a step of each network, some times, and take the shortest.

    Countermeasures beside purification count as plain victims, though some take several times as long. The purifier's
    training counts as if it had all cores for itself: beside victims it takes longer, and they take as much less.

    Args:
        sets (`dict`): Images by role.
        used (`AuditPurifier`), asked (`AuditSettings`), learners, device, processes: As for the audit.
        to_purify (`int`): Images that are purified.
    """
    with seeded(0, device):
        height, side, channels = sets["protected"].images.shape[1:]
        pipe, training = used.pipe, 0.0
        if used.plan is not None:
            unet = named_unet(used.plan.unet, in_channels=channels, sample_size=height)
            bfloat16 = used.plan.training.precision_on(device) == "bf16"
            step = _step(unet, (channels, height, side), device, backward=True, bfloat16=bfloat16)
            training = step * used.plan.training.train_batch_size
        count = min(MEASURED_IMAGES, usual_micro_batch(device.type, height, side))
        evaluation = _step(pipe.unet, (channels, height, side), device, backward=False, bfloat16=False, count=count)
        rows = _victims_of_a_seed(sets, asked, learners)
        at_a_time = processes or (available_cores() if device.type == "cpu" else 1)
        return Costs(
            training=training,
            purification=evaluation * used.config.evaluations_per_image * to_purify,
            victim={
                width: statistics.fmean(_victim(sets, learner, device, width, asked) for learner in learners)
                for width in _narrower(widths(asked, learners))
            },
            rows=rows,
            at_a_time=max(1, min(at_a_time, rows * len(asked.victim_seeds))),
        )


def _victims_of_a_seed(sets: Mapping[str, LabelledImages], asked: AuditSettings, learners: Sequence[Learner]) -> int:
    own = sum(role in sets for role in ("clean", "protected")) + 1 + asked.control + len(asked.tried)
    mixed = sum(2 for fraction in asked.fractions if fraction < 1)
    return len(learners) * (own + mixed) + asked.draws - 1


def _narrower(asked: set[int]) -> list[int]:
    """The width of the victims and what it may be halved to; of several widths, none is changed."""
    found = [max(asked)] if asked else []
    while len(asked) == 1 and found[-1] // 2 >= LEAST_WIDTH:
        found.append(found[-1] // 2)
    return found


def within_budget(costs: Costs, wanted: Extent, minutes: float) -> Extent:
    """
    The largest extent that a budget allows. The purifier gets fewer steps first, down to `LEAST_STEPS` of them; where
    that is not enough, victims get narrower, and then there are fewer of them.

    Args:
        costs (`Costs`): Measured.
        wanted (`Extent`): What there would be without a budget.
        minutes (`float`): The budget.

    Raises:
        ValueError: If the smallest extent takes longer, with the minutes that it takes.
    """
    available, least = USED * 60 * minutes, max(1, round(LEAST_STEPS * wanted.steps)) if wanted.steps else 0
    smallest = min(costs.victim, default=0)
    choices = [(width, wanted.seeds) for width in sorted(costs.victim or {0}, reverse=True)]
    choices += [(smallest, seeds) for seeds in range(wanted.seeds - 1, LEAST_SEEDS - 1, -1)]
    for width, seeds in choices:
        left = available - costs.purification - costs.victims(width, seeds)
        steps = min(wanted.steps, int(left / costs.training)) if wanted.steps else 0
        if left >= 0 and steps >= least:
            return Extent(steps, width, seeds)
    width, seeds = choices[-1]
    needed = costs.total(least, width, seeds) / 60 / USED
    raise ValueError(
        f"budget_minutes is {minutes:g}, but must be at least {int(needed) + 1} on this machine for so many images of "
        "this size."
    )


def fitted(
    asked: AuditSettings, used: AuditPurifier, wanted: Extent, extent: Extent
) -> tuple[AuditSettings, AuditPurifier]:
    """Settings and purifier of an extent in place of the wanted one."""
    if extent.width != wanted.width:
        asked = dataclasses.replace(asked, width=extent.width)
    if extent.seeds != wanted.seeds:
        asked = dataclasses.replace(asked, seeds=asked.victim_seeds[: extent.seeds])
    if extent.steps != wanted.steps:
        used = dataclasses.replace(used, plan=with_steps(used.plan, extent.steps))
    return asked, used


def _victim(
    sets: Mapping[str, LabelledImages], learner: Learner, device: torch.device, width: int, asked: AuditSettings
) -> float:
    """Seconds of one victim, which is as wide as its recipe says where ways of learning differ in that."""
    train, test = sets["protected"], sets["test"]
    recipe, width = learner.recipe.for_images(len(train)), min(width, asked.width or learner.recipe.width)
    height, side, channels = train.images.shape[1:]
    options = {"in_channels": channels, "width": width, "image_size": min(height, side)}
    network = victims.build(learner.victim, test.num_classes, **options)
    # As `trials` runs them: on a CPU, each victim has a thread of its own.
    with cpu_threads(1 if device.type == "cpu" else None):
        options = {"backward": True, "bfloat16": recipe.bfloat16, "count": 2 * MEASURED_IMAGES}
        step = _step(network, (channels, height, side), device, **options)
    if learner.method == "supervised":
        return step * recipe.epochs * (len(train) + FORWARD * len(test))
    probe = sets.get("probe", sets.get("clean"))
    evaluated = min(recipe.knn_evaluations, recipe.epochs) * (len(probe) + len(test))
    evaluated += CP.epochs * len(probe) if recipe.probe == "cp" else 0
    return step * (recipe.epochs * STEPS_OF_VIEWS[learner.method] * len(train) + FORWARD * evaluated)


def _step(
    network: torch.nn.Module,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    backward: bool,
    bfloat16: bool,
    count: int = MEASURED_IMAGES,
) -> float:
    """Seconds of one image, forward and, if asked for, backward."""
    was_training = network.training
    network = network.to(device, memory_format=torch.channels_last).train(backward)
    images = torch.rand(count, *shape, device=device, dtype=next(network.parameters()).dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    is_unet = hasattr(network, "time_embedding")

    def once() -> None:
        output = network(images, torch.zeros(count, device=device)).sample if is_unet else network(images)
        if backward:
            loss = (
                output.float().square().mean()
                if is_unet
                else F.cross_entropy(output.float(), torch.zeros(count, dtype=torch.int64, device=device))
            )
            loss.backward()

    gradients = contextlib.nullcontext() if backward else torch.no_grad()
    with gradients, torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and has_bfloat16(device)):
        seconds = min(_timed(once, device) for _ in range(REPEATS))
    network.train(was_training).zero_grad(set_to_none=True)
    return seconds / count


def _timed(what: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
