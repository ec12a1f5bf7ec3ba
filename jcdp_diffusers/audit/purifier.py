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
from ..purification_config import ADAPTIVE, PurificationConfig
from ..purify.adaptive import adaptive_config
from ..purify.dataset import open_purifier, purify_dataset
from ..results import append_record, as_settings, plain, read_records
from ..train.default_purifier import MANY_IMAGES, Plan, plan_for, purifier_to_be, shortened, train_planned
from ..train.provenance import check_trained_on
from ..train.record import RECORD_NAME, read_record
from ..trials import describe_images
from .attacks import in_seconds
from .begun import read_begun
from .sets import kept_from_purifiers
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
        wanted = asked.plan or _plan(sets["collected"], asked, device)
        plan = asked.plan or _plan(sets["collected"], asked, device, read_begun(output_dir).get("plan"))
        network = None if asked.perceptual is None else load_perceptual(asked.perceptual)
        pipe = purifier_to_be(plan, sets["collected"], network)
        check_purifier(pipe, sets["protected"])
        try:
            config = _purification(pipe, asked.preset or plan.purification, asked, sets)
        except ValueError as error:
            fresh = purifier_to_be(wanted, sets["collected"], network)
            _purification(fresh, asked.preset or wanted.purification, asked, sets)  # what this cannot do, it says
            raise ValueError(
                f"output_dir is {str(output_dir)!r}, where an audit was begun whose purifier cannot do what is asked "
                f"for now: {error} Take another --output, for another purifier."
            ) from error
        return AuditPurifier(str(output_dir / "purifier"), pipe, config, len(sets["collected"]), plan, network)
    listed = check_trained_on(purifier, kept_from_purifiers(sets), roles=asked.roles)
    pipe = open_purifier(purifier, device, output_dir=output_dir / "purified")
    check_purifier(pipe, sets["protected"])
    return AuditPurifier(str(purifier), pipe, _purification(pipe, asked.preset, asked, sets), listed)


def _plan(collected: LabelledImages, asked: AuditSettings, device: torch.device, begun: Mapping | None = None) -> Plan:
    """
    The purifier to train. On a CPU and with many images it is a short one, unless a preset or an attack purifies with
    settings of its own, which may need more timesteps; or the one with which the folder's audit was begun, whatever
    is asked for now.
    """
    plan = plan_for(collected, device, asked.smoke)
    if device.type != "cpu" or asked.smoke or len(collected) < MANY_IMAGES:
        return plan
    short = shortened(plan)
    if begun is not None:  # a budget may have lessened its steps
        return short if tuple(begun["training"]["trained_timesteps"]) == short.training.trained_timesteps else plan
    own = [one for one in asked.tried if one.countermeasure.needs_purifier and not one.purifies_as_the_audit]
    return short if asked.preset is None and not own else plan


def _purification(
    pipe: JointConditionalPurificationPipeline,
    preset: str | PurificationConfig | None,
    asked: AuditSettings,
    sets: Mapping[str, LabelledImages],
) -> PurificationConfig:
    """The settings of the audit's purification; refuse them, and attacks, if they are beyond the purifier."""
    if preset == ADAPTIVE:
        if "collected" not in sets:
            raise ValueError(f"collected is None, but preset {ADAPTIVE!r} reads the protection's spectrum against it.")
        preset = adaptive_config(sets["protected"], sets["collected"], pipe)
    config = pipe.resolve_config(preset)
    if asked.smoke:
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
    deadline: float | None = None,
    progress: bool = True,
) -> AuditPurifier:
    """
    Train the purifier, unless it is on record with these settings, and open it.

    Args:
        used (`AuditPurifier`), collected (`LabelledImages`), asked (`AuditSettings`): As for the audit.
        records (`Path`): File that has, or gets, the record of the training.
        device (`torch.device`), say (`Callable`): As for the audit.
        squares (`Callable`, *optional*): Cuts the images to train on from the collected photographs; these themselves
            by default.
        deadline (`float`, *optional*): On `time.monotonic`'s clock, when the training ends at the latest.
        progress (`bool`): Whether to show a bar.
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
        plan = dataclasses.replace(used.plan, training=training)
        stop = None if deadline is None else lambda: time.monotonic() > deadline
        train_planned(plan, images, folder, used.perceptual, progress=progress, stop=stop)
        purification = dataclasses.replace(used.plan.purification, **training.facts_of_the_network())
        purification.save_pretrained(folder)
        seconds = used.record["seconds"]  # those before an interruption included
        append_record(
            records,
            what="seconds",
            value=seconds,
            seed=asked.seed,
            protocol="smoke" if asked.smoke else "audit",
            settings=settings,
            device=device.type,
            seconds=seconds,
        )
    return opened(used, device, folder.with_name("purified"))


def opened(used: AuditPurifier, device: torch.device, purified_dir: Path) -> AuditPurifier:
    """The purifier with its pipeline, placed for images that lie or will lie in a folder."""
    return dataclasses.replace(used, pipe=open_purifier(used.name, device, output_dir=purified_dir))


def purify(
    protected: LabelledImages, used: AuditPurifier, folder: Path, seed: int, *, progress: bool = True
) -> LabelledImages:
    """
    The purified images, made where they do not lie in the folder yet.

    Raises:
        ValueError: If the folder holds those of another data set.
    """
    purify_dataset(protected, used.pipe, output_dir=folder, seed=seed, preset=used.config, progress=progress)
    purified = load_images(folder, channels=protected.images.shape[3])
    if purified.ids != protected.ids:
        raise ValueError(
            f"output_dir is {str(folder.parent)!r}, but must not hold the purified images of another data set."
        )
    return protected.with_images(purified.images)
