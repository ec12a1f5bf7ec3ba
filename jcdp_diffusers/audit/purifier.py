"""The purifier of an audit: given, or trained on the collected images; and what it makes of the protected ones."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..countermeasures.purifiers import check_purifier
from ..data import LabelledImages, load_images
from ..perceptual import LPIPSModel, load_perceptual
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PurificationConfig
from ..purify.dataset import open_purifier, purify_dataset
from ..results import append_record, as_settings, plain, read_records
from ..train.default_purifier import Plan, plan_for, purifier_to_be, train_planned
from ..train.provenance import check_trained_on
from ..train.record import RECORD_NAME, read_record
from ..trials import describe_images
from .attacks import in_seconds
from .sets import labelled
from .settings import AuditSettings


@dataclasses.dataclass(frozen=True)
class AuditPurifier:
    """
    The purifier of an audit.

    Args:
        name (`str`): Its folder or Hub id.
        pipe (`JointConditionalPurificationPipeline`): The purifier; one that is still to be trained has the weights of
            none.
        config (`PurificationConfig`): How it is used.
        listed (`int`, *optional*): How many images trained it, where that is known.
        plan (`Plan`, *optional*): How it is trained; None for a purifier that was given.
        perceptual (`LPIPSModel`, *optional*): The network to put beside it once it is trained.
    """

    name: str
    pipe: JointConditionalPurificationPipeline
    config: PurificationConfig
    listed: int | None
    plan: Plan | None = None
    perceptual: LPIPSModel | None = None

    @property
    def record(self) -> dict | None:
        """What its training left in its folder; None where there is nothing."""
        folder = Path(self.name)
        return read_record(folder) if (folder / RECORD_NAME).exists() else None


def choose_purifier(
    purifier: str | os.PathLike | None,
    sets: Mapping[str, LabelledImages],
    asked: AuditSettings,
    output_dir: Path,
    device: torch.device,
) -> AuditPurifier:
    """
    The purifier that was given, opened; or the one to train, as far as it is known before the training.

    Raises:
        ValueError: If it does not suit the images, has seen what it must not have seen, or cannot do what is asked.
    """
    if purifier is None:
        plan = asked.plan or plan_for(sets["collected"], device, asked.recipe.smoke)
        network = None if asked.perceptual is None else load_perceptual(asked.perceptual)
        pipe = purifier_to_be(plan, sets["collected"], network)
        check_purifier(pipe, sets["protected"])
        config = _purification(pipe, asked.preset or plan.purification, asked)
        return AuditPurifier(str(output_dir / "purifier"), pipe, config, len(sets["collected"]), plan, network)
    listed = check_trained_on(purifier, labelled(sets), roles=asked.roles)
    pipe = open_purifier(purifier, device, output_dir=output_dir / "purified")
    check_purifier(pipe, sets["protected"])
    return AuditPurifier(str(purifier), pipe, _purification(pipe, asked.preset, asked), listed)


def _purification(
    pipe: JointConditionalPurificationPipeline, preset: str | PurificationConfig | None, asked: AuditSettings
) -> PurificationConfig:
    """The settings of the audit's purification; refuse them, and attacks, if they are beyond the purifier."""
    config = pipe.resolve_config(preset)
    if asked.recipe.smoke:
        return pipe.resolve_config(in_seconds(config))
    for one in asked.tried:
        one.check(pipe)
    return config


def trained(
    used: AuditPurifier,
    collected: LabelledImages,
    asked: AuditSettings,
    records: Path,
    device: torch.device,
    say: Callable[[str], None],
    *,
    squares: Callable[[], LabelledImages] | None = None,
    stop: Callable[[], bool] | None = None,
) -> AuditPurifier:
    """
    Train the purifier, unless it is on record with these settings, and open it.

    Args:
        used (`AuditPurifier`), collected (`LabelledImages`), asked (`AuditSettings`): As for the audit.
        records (`Path`): File that has, or gets, the record of the training.
        device (`torch.device`), say (`Callable`): As for the audit.
        squares (`Callable`, *optional*): Cuts the images to train on from the collected photographs; these themselves
            by default.
        stop (`Callable`, *optional*): As for `train_purifier`.
    """
    folder = Path(used.name)
    training = dataclasses.replace(
        used.plan.training, seed=asked.seed, resume_from_checkpoint="latest", cpu=device.type == "cpu"
    )
    settings = {
        "stage": "train purifier",
        "unet": used.plan.unet,
        "training": as_settings(training),
        "collected": describe_images(collected)["content"],
    }
    if squares is not None:
        settings["squares"] = True  # of the photographs, at their own size
    settings = plain(settings, "settings")
    if records.exists() and any(record["settings"] == settings for record in read_records(records)):
        say("Purifier: trained before")
    else:
        images = collected if squares is None else squares()
        cut = "" if squares is None else f", {len(images)} squares of them"
        say(f"Training a purifier on {len(collected)} collected images{cut}: {training.max_train_steps} steps")
        start = time.perf_counter()
        plan = dataclasses.replace(used.plan, training=training)
        train_planned(plan, images, folder, used.perceptual, stop)
        purification = dataclasses.replace(used.plan.purification, **training.facts_of_the_network())
        purification.save_pretrained(folder)
        seconds = round(time.perf_counter() - start, 2)
        append_record(
            records,
            what="seconds",
            value=seconds,
            seed=asked.seed,
            protocol=asked.recipe.name,
            settings=settings,
            device=device.type,
            seconds=seconds,
        )
    pipe = open_purifier(used.name, device, output_dir=folder.with_name("purified"))
    return dataclasses.replace(used, pipe=pipe)


def purify(protected: LabelledImages, used: AuditPurifier, folder: Path, seed: int) -> LabelledImages:
    """
    The purified images, made where they do not lie in the folder yet.

    Raises:
        ValueError: If the folder holds those of another data set.
    """
    purify_dataset(protected, used.pipe, output_dir=folder, seed=seed, preset=used.config)
    purified = load_images(folder, channels=protected.images.shape[3])
    if purified.ids != protected.ids:
        raise ValueError(
            f"output_dir is {str(folder.parent)!r}, but must not hold the purified images of another data set."
        )
    return protected.with_images(purified.images)
