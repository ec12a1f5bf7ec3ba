"""
`jcdp audit`: does a protection survive? Images, a purifier and victims in; a verdict and a report to forward out.

    jcdp audit --protected DIR --collected DIR --test DIR --output DIR [--clean DIR] [--purifier REPO]

Each stage leaves its result in the output folder: the purifier, the purified images, a record per victim. The same
command, given again after an interruption, goes on from there; given with more seeds or countermeasures, it measures
only what is new.
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import countermeasures, victims
from .cells import Cell, describe_images, measure_cells, purifier_digest, results_by_cell
from .countermeasures.purifiers import purifying
from .data import LabelledImages, load_images
from .data_checks import (
    ROLES,
    check_purifier,
    check_separation,
    check_sets,
    check_trained_on,
    describe_noise,
    describe_set,
    few_of_each_class,
    match_originals,
    shortcut_test,
)
from .dataset_card import SUMMARY_NAME
from .model_card import RECORD_NAME
from .perceptual import LPIPSModel, load_perceptual
from .pipeline_jcdp import JointConditionalPurificationPipeline
from .placement import open_purifier
from .purification_config import PRESETS, PurificationConfig
from .purify import purify_dataset
from .report import write_report
from .results import append_record, as_settings, package_versions, read_records
from .train import train_purifier
from .training_config import TrainingConfig
from .unets import ddpm_scheduler, named_unet
from .verdict import verdict
from .victims.supervised import RECIPES, Recipe


TITLES = {"clean": "clean images", "protected": "protected images", "purified": "purification"}
# What an attack calls the audit's own purification. In front of others, they are made on the purified images; behind
# others, images go through those first and are then purified in the same way.
PURIFIED = "purified"
SMOKE_IMAGES = 200
SMOKE_PURIFICATION = PurificationConfig(diffusion_steps=20, num_inference_steps=2)
# What an output folder's purifier and purified images were made for.
BEGUN_NAME = "audit.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    The purifier that an audit trains when none is given, and how it is used.

    Args:
        unet (`str`): Of `unets.UNETS`.
        training (`TrainingConfig`): Of the purifier.
        purification (`PurificationConfig`): Of the protected images.
    """

    unet: str
    training: TrainingConfig
    purification: PurificationConfig


def audit(
    *,
    protected: Any,
    test: Any,
    collected: Any = None,
    purifier: str | os.PathLike | None = None,
    perceptual: str | os.PathLike | None = None,
    clean: Any = None,
    output_dir: str | os.PathLike = "runs/audit",
    protocol: str | Recipe = "fast",
    roles: str = "disjoint",
    attacks: Sequence[str] = (),
    seeds: int | Sequence[int] = 3,
    seed: int = 0,
    victim: str = "resnet18",
    width: int | None = None,
    preset: str | PurificationConfig | None = None,
    plan: Plan | None = None,
    budget: float = 16 / 255,
    image_size: int | None = None,
    channels: int = 3,
    load_options: dict[str, dict] | None = None,
    device: str | torch.device | None = None,
    processes: int | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """
    Find out whether a protection survives, and write down how.

    Args:
        protected: The protected images with their labels; like the next three, whatever `data.load_images` takes.
        test: Clean labelled images of the same classes, none of which is protected.
        collected: Unprotected images like the protected ones, without need of labels, that train the purifier. May be
            left out where a purifier is given; what that was trained on is looked up in its repository
            (`data_checks.check_trained_on`), or unknown and among the report's limits.
        clean (*optional*): The originals of the protected images, under the same ids. Without them nobody can say how
            much the protection takes away.
        purifier (`str` or `os.PathLike`, *optional*): Folder or Hub id; trained on `collected` if not given.
        perceptual (`str` or `os.PathLike`, *optional*): The perceptual network that goes with a purifier trained here,
            see `perceptual.load_perceptual`; a given purifier has its own beside it, or none.
        output_dir (`str` or `os.PathLike`): Gets `report.html`, `report.md`, `report.json`, `pictures/`,
            `records.jsonl`, the purified images in `purified/` and the purifier, if it is trained, in `purifier/`.
            More seeds, attacks and protocols may follow in it, but for another purifier or purification, a smoke run's
            among them, it must be another.
        protocol (`str` or `Recipe`): Of the victims, one of `RECIPES`; `"smoke"` shows in seconds that everything
            works, with few images and few steps of every purification.
        roles (`str`): `"disjoint"`, or `"paper"` for a purifier that has been trained on the test images.
        attacks (`Sequence[str]`): Countermeasures to try beside purification; see `countermeasures.NAMES`. With
            `purified` among the names that are joined, this audit's purification takes its place in their order:
            `purified+corruption`, `impulse-filter+purified+corruption`.
        seeds (`int` or `Sequence[int]`): Victims per row, with seeds 0, 1, ..., or the seeds themselves.
        seed (`int`): Of the purifier and the purification.
        victim, width: As for `victims.supervised.train_victim`.
        preset (`str` or `PurificationConfig`, *optional*): How to purify; by default what the purifier's repository
            says, or the plan.
        plan (`Plan`, *optional*): The purifier to train; chosen by size of the images and device by default.
        budget (`float`): Largest change of a pixel by the protection, images in [0, 1], for telling a protected image
            or its clean original from one of another role; see `data.check_roles`.
        image_size, channels: As for `data.load_images`, for all sets.
        load_options (`dict`, *optional*): Further options of `data.load_images` by role, such as `{"test": {"split":
            "test"}}`.
        device (`str` or `torch.device`, *optional*): An accelerator if there is one.
        processes (`int`, *optional*): Victims at a time on a CPU, by default one per processor.
        command (`str`, *optional*): What the report gives as the way to repeat it.
        say (`Callable`): Where a line about each stage goes.

    Returns:
        `dict`: What `report.json` holds.

    Raises:
        ValueError: If the sets, the purifier and the settings do not fit together, in one sentence.
    """
    # 1. What is asked for, before anything is read
    recipe = _recipe(protocol)
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds}, but at least one victim, each with a seed of its own, is needed.")
    attacks = tuple(dict.fromkeys(name for name in attacks if name != "none"))
    measures = {name: _countermeasure(name) for name in attacks}
    victims.get(victim)
    if purifier is None and collected is None:
        raise ValueError("collected is None, but without a purifier images are needed to train one.")
    if purifier is not None and perceptual is not None:
        raise ValueError(
            f"perceptual is {str(perceptual)!r}, but goes with a purifier that is trained here: that of "
            f"{str(purifier)!r} lies in its folder, where save_pretrained of a pipeline with one puts it."
        )
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processes = len(os.sched_getaffinity(0)) if processes is None else processes
    output_dir = Path(output_dir)

    # 2. The data
    sources = {"protected": protected, "collected": collected, "test": test, "clean": clean}
    sets = {
        role: _load(role, source, image_size, channels, (load_options or {}).get(role, {}))
        for role, source in sources.items()
        if source is not None
    }
    protected, collected, test, clean = (sets.get(role) for role in sources)
    labelled = {role: sets[role] for role in ("protected", "test", "clean") if role in sets}
    check_sets(labelled, {} if collected is None else {"collected": collected})
    if clean is not None:
        clean = sets["clean"] = match_originals(clean, protected)
    if purifier is None:
        plan = plan or plan_for(collected, device, recipe.smoke)
        network = None if perceptual is None else load_perceptual(perceptual)
        pipe, listed = purifier_to_be(plan, collected, network), len(collected)
    else:
        pipe = open_purifier(purifier, device, output_dir=output_dir / "purified")
        listed = check_trained_on(purifier, labelled, roles=roles)
    check_purifier(pipe, protected)
    chosen = plan.purification if preset is None and plan is not None else preset
    config = _purification(pipe, chosen, measures, recipe)
    begun = {
        "smoke": recipe.smoke,
        "seed": seed,
        "protected": describe_images(protected)["content"],
        "purifier": None if purifier is None else purifier_digest(str(purifier)),
        "collected": None if purifier is not None else describe_images(collected)["content"],
        "plan": None if plan is None else as_settings(plan),
        "preset": as_settings(preset) if isinstance(preset, PurificationConfig) else preset,
        "perceptual": None if perceptual is None else str(perceptual),
    }
    begun = json.loads(json.dumps(begun))
    _check_output(output_dir, begun)
    separation = check_separation(protected, collected, test, clean, roles=roles, budget=budget)
    say("; ".join(f"{role}: {len(data)} images" for role, data in sets.items()))
    if recipe.smoke:
        protected, test = few_of_each_class(protected, SMOKE_IMAGES), few_of_each_class(test, SMOKE_IMAGES)
        clean = None if clean is None else match_originals(clean, protected)
        sets |= {"protected": protected, "test": test} | ({} if clean is None else {"clean": clean})
    output_dir.mkdir(parents=True, exist_ok=True)
    data = {
        "sets": {role: describe_set(images) for role, images in sets.items()},
        "separation": separation | {"budget": budget},
        "noise": None if clean is None else describe_noise(clean, protected),
        "shortcut": shortcut_test(protected, test, clean),
    }
    say(_shortcut_said(data["shortcut"]))

    # 3. The purifier
    records = output_dir / "records.jsonl"
    trained_here = purifier is None
    if trained_here:
        _write_begun(output_dir, {name: value for name, value in begun.items() if name != "preset"})
        purifier = output_dir / "purifier"
        _train(collected, plan, purifier, seed, device, records, recipe, say)
        if network is not None and not (purifier / "perceptual").exists():
            network.save_pretrained(purifier / "perceptual")
        pipe = open_purifier(purifier, device, output_dir=output_dir / "purified")

    # 4. Purification
    _write_begun(output_dir, begun)
    say(f"Purifying {len(protected)} images: T_p {config.diffusion_steps}, {config.evaluations_per_image} evaluations")
    purify_dataset(protected, pipe, output_dir=output_dir / "purified", seed=seed, preset=config)
    purified = load_images(output_dir / "purified", channels=channels)
    if purified.ids != protected.ids:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds the purified images of another data set: give another."
        )
    purified = sets["purified"] = protected.with_images(purified.images)

    # 5. Victims
    rows = {row: (sets[row], "none") for row in ("clean", "protected", "purified") if row in sets}
    for name, measure in measures.items():
        rows[name] = (purified if _is_on_purified(name) else protected, measure.name)
    facts = {"audit": describe_images(protected)["content"], "roles": roles}
    purification = {"purifier": purifier_digest(str(purifier)), "purification": as_settings(config)}
    cells = {
        row: [
            Cell(
                images,
                test,
                recipe,
                victim_seed,
                victim=victim,
                width=width,
                countermeasure=name,
                purifier=str(purifier),
                # In a smoke run every attack that purifies does so in seconds.
                purification=config
                if countermeasures.get(name).needs_purifier and (recipe.smoke or _purifies_as_the_audit(row))
                else None,
                work_dir=output_dir / "attacks",
                about=facts | {"row": row} | (purification if images is purified else {}),
            )
            for victim_seed in seeds
        ]
        for row, (images, name) in rows.items()
    }
    order = [cells[row][turn] for turn in range(len(seeds)) for row in cells]
    say(f"Victims: {len(order)} of {recipe.epochs} epochs")
    measure_cells(order, records, device=device, processes=processes)

    # 6. The report
    found = [{"row": row, "title": TITLES.get(row, row)} | _results(cells[row], records) for row in cells]
    by_row = {entry["row"]: entry for entry in found}
    purified_in = _read(output_dir / "purified" / SUMMARY_NAME)["seconds_of_work"]
    for row, (images, _) in rows.items():
        by_row[row]["prepare_seconds"] += purified_in if images is purified else 0
    training = _read(Path(purifier) / RECORD_NAME) if (Path(purifier) / RECORD_NAME).exists() else None
    judged = verdict({row: entry["accuracy"]["values"] for row, entry in by_row.items()}, TITLES, smoke=recipe.smoke)
    report = {
        "verdict": judged,
        "smoke": recipe.smoke,
        "roles": roles,
        "rows": found,
        "chance": float(np.bincount(test.labels).max() / len(test)),
        "data": data,
        "purifier": {
            "name": "trained for this audit" if trained_here else str(purifier),
            "digest": purification["purifier"],
            "parameters": pipe.unet.num_parameters(),
            "unet": plan.unet if plan is not None and trained_here else None,
            "perceptual": None if pipe.perceptual is None else pipe.perceptual.name,
            "training": training and _training_facts(training),
            "train_seconds": training["seconds"] if training else None,
            "trained_here": trained_here,
            "trained_on": listed,
        },
        "purification": as_settings(config) | {"evaluations_per_image": config.evaluations_per_image},
        "victims": {
            "victim": victim,
            "width": cells["protected"][0].settings["width"],
            "seeds": list(seeds),
            "recipe": dataclasses.asdict(recipe),
        },
        "attacks": {
            name: {"source": measure.source, "cost": measure.cost, "settings": dict(measure.settings)}
            for name, measure in (
                (name, _as_done(name, measure, config, recipe.smoke)) for name, measure in measures.items()
            )
        },
        "limits": _limits(judged, sets, roles, listed, trained_here, training, attacks, seeds, victim),
        "command": command or "jcdp_diffusers.audit.audit(...) with the settings above",
        "device": found[0]["device"],
        "packages": package_versions(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    report = json.loads(json.dumps(report))
    write_report(output_dir, report, sets)
    say(judged["sentence"])
    return report


def purifier_to_be(
    plan: Plan, images: LabelledImages, perceptual: LPIPSModel | None
) -> JointConditionalPurificationPipeline:
    """An untrained purifier of a plan, by which to find out before the training what the trained one cannot do."""
    height, _, channels = images.images.shape[1:]
    unet = named_unet(plan.unet, in_channels=channels, sample_size=height)
    pipe = JointConditionalPurificationPipeline(unet, ddpm_scheduler(), perceptual)
    facts = plan.training.facts_of_the_network()
    end = plan.training.timesteps(pipe.scheduler)[1]
    pipe.purification_config = PurificationConfig(diffusion_steps=min(100, end), **facts)
    return pipe


def plan_for(collected: LabelledImages, device: torch.device, smoke: bool) -> Plan:
    """
    A purifier that suits the images and the device: seconds for a smoke run, minutes on a CPU, the paper's network on
    an accelerator.

    Raises:
        ValueError: If the images are not square, too large, or of a side that the network cannot halve.
    """
    height, width, _ = collected.images.shape[1:]
    if height != width or height % 8 or height > 64:
        raise ValueError(
            f"collected has images of {height}x{width}, but without a purifier they must be squares with a side of 8, "
            "16, 24, ... or 64 pixels: image_size brings them to one, purifier names one for larger images."
        )
    common = {"seed": 0, "checkpoints_total_limit": 1}
    if smoke:
        training = TrainingConfig(
            max_train_steps=5,
            train_batch_size=8,
            learning_rate=1e-3,
            trained_timesteps=(0, 100),
            checkpointing_steps=5,
            **common,
        )
        return Plan("tiny32", training, SMOKE_PURIFICATION)
    if device.type == "cuda":
        training = TrainingConfig(
            max_train_steps=20_000,
            train_batch_size=128,
            trained_timesteps=(0, 200),
            checkpointing_steps=2000,
            mixed_precision="bf16",
            **common,
        )
        return Plan("ddpm-cifar10", training, PurificationConfig(diffusion_steps=100, num_inference_steps=20))
    if len(collected) < 4000:
        training = TrainingConfig(
            max_train_steps=1200,
            train_batch_size=32,
            learning_rate=1e-3,
            trained_timesteps=(0, 200),
            checkpointing_steps=300,
            **common,
        )
        return Plan("tiny32", training, PurificationConfig(diffusion_steps=60, num_inference_steps=6))
    training = TrainingConfig(
        max_train_steps=3600,
        train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        trained_timesteps=(0, 200),
        checkpointing_steps=600,
        mixed_precision="bf16",
        **common,
    )
    return Plan("mini32", training, PRESETS["tuned"])


def _countermeasure(attack: str) -> countermeasures.Countermeasure:
    """What an attack does beside, or with, this audit's purification."""
    names = attack.split("+")
    if PURIFIED not in names:
        return countermeasures.get(attack)
    others = countermeasures.get("+".join(name for name in names if name != PURIFIED) or "none")
    if names.count(PURIFIED) > 1 or others.needs_purifier:
        raise ValueError(
            f"attacks (--countermeasures) has {attack!r}, but images are purified once: name what comes beside it."
        )
    if attack == PURIFIED:
        raise ValueError(
            f"attacks (--countermeasures) has {attack!r}, but that is a row of every audit: name what comes beside it."
        )
    if _is_on_purified(attack):
        return others
    return countermeasures.get("+".join("unconditional" if name == PURIFIED else name for name in names))


def _as_done(attack: str, measure: countermeasures.Countermeasure, config: PurificationConfig, smoke: bool):
    """For the report: what `_countermeasure` gives, with the settings that purification had in it in this audit."""
    if not measure.needs_purifier or not (smoke or _purifies_as_the_audit(attack)):
        return measure

    def own(part):
        if not part.needs_purifier:
            return part
        if _purifies_as_the_audit(attack):
            return purifying(PURIFIED, "this audit's purification", config)
        return purifying(part.name, part.source, config)

    return countermeasures.join(attack, [own(part) for part in measure.parts or (measure,)])


def _is_on_purified(attack: str) -> bool:
    """Whether an attack takes the purified images as they are."""
    return attack.startswith(f"{PURIFIED}+")


def _purifies_as_the_audit(attack: str) -> bool:
    """Whether an attack purifies images of its own, with the settings of the audit."""
    return PURIFIED in attack.split("+")[1:]


def _purification(
    pipe: JointConditionalPurificationPipeline, preset, measures: dict, recipe: Recipe
) -> PurificationConfig:
    """The settings of the audit's purification; refuse them, and attacks, if they are beyond the purifier."""
    config = pipe.resolve_config(preset)
    if recipe.smoke:
        return pipe.resolve_config(_in_seconds(config))
    for name, measure in measures.items():
        for part in measure.parts or (measure,):
            if part.needs_purifier and not _purifies_as_the_audit(name):
                pipe.resolve_config(PurificationConfig(**part.settings))
    return config


def _in_seconds(config: PurificationConfig) -> PurificationConfig:
    """The same purification with as few steps as a smoke run has time for."""
    return dataclasses.replace(
        config,
        diffusion_steps=min(SMOKE_PURIFICATION.diffusion_steps, config.diffusion_steps),
        num_inference_steps=min(SMOKE_PURIFICATION.num_inference_steps, *config.evaluations_per_round),
        num_rounds=1,
    )


def _check_output(output_dir: Path, asked: dict) -> None:
    """Refuse a folder in which another audit was begun, one whose purifier or purified images cannot serve this."""
    path = output_dir / BEGUN_NAME
    before = _read(path) if path.exists() else {}
    changed = [name for name in before if before[name] != asked[name]]
    if changed:
        said = {
            "smoke": "protocol 'smoke'" if before.get("smoke") else "a protocol other than 'smoke'",
            "seed": f"seed {before.get('seed')}",
            "protected": "other protected images",
            "collected": "other collected images",
            "purifier": "another purifier" if before.get("purifier") else "a purifier of its own",
            "plan": "another plan for the purifier (it depends on the device)",
            "preset": "another preset",
            "perceptual": "another perceptual network" if before.get("perceptual") else "no perceptual network",
        }
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, where an audit with {said[changed[0]]} was begun, whose purifier and "
            "purified images cannot serve this one: take another --output."
        )


def _write_begun(output_dir: Path, begun: dict) -> None:
    (output_dir / BEGUN_NAME).write_text(json.dumps(begun, indent=2) + "\n")


def _train(collected, plan: Plan, purifier: Path, seed, device, records: Path, recipe: Recipe, say) -> None:
    """Train the purifier, or leave it as it is if it is on record with these settings."""
    training = dataclasses.replace(plan.training, seed=seed, resume_from_checkpoint="latest", cpu=device.type == "cpu")
    settings = {
        "stage": "train purifier",
        "unet": plan.unet,
        "training": as_settings(training),
        "collected": describe_images(collected)["content"],
    }
    settings = json.loads(json.dumps(settings))
    if records.exists() and any(record["settings"] == settings for record in read_records(records)):
        say("Purifier: trained before")
        return
    say(f"Training a purifier on {len(collected)} collected images: {training.max_train_steps} steps")
    height, _, channels = collected.images.shape[1:]
    start = time.perf_counter()
    train_purifier(
        collected,
        unet=named_unet(plan.unet, in_channels=channels, sample_size=height, seed=seed),
        scheduler=ddpm_scheduler(),
        output_dir=purifier,
        config=training,
    )
    dataclasses.replace(plan.purification, **training.facts_of_the_network()).save_pretrained(purifier)
    seconds = round(time.perf_counter() - start, 2)
    append_record(
        records,
        what="seconds",
        value=seconds,
        seed=seed,
        protocol=recipe.name,
        settings=settings,
        device=device.type,
        seconds=seconds,
    )


def _load(role: str, source: Any, image_size: int | None, channels: int, options: dict) -> LabelledImages:
    rejected: list[dict] = []
    try:
        data = load_images(source, image_size=image_size, channels=channels, rejected=rejected, **options)
    except (ValueError, OSError) as error:  # says what is wrong, but not with which of the sets
        if not rejected:
            raise ValueError(f"{role}: {error}") from error
    if rejected:
        first = rejected[0]
        raise ValueError(
            f"{role} has {len(rejected)} image(s) that cannot be used, the first {first['file'] or first['id']!r}: "
            f"{first['reason']}."
        )
    return data


def _recipe(protocol: str | Recipe) -> Recipe:
    if isinstance(protocol, Recipe):
        return protocol
    if protocol not in RECIPES:
        raise ValueError(f"protocol is {protocol!r}, but must be one of {', '.join(RECIPES)}.")
    return RECIPES[protocol]


def _results(cells: list[Cell], records: Path) -> dict:
    """Figures of one row over its seeds, from the records."""
    accuracy, details = (results_by_cell(records, what=what) for what in ("accuracy", "victim"))
    own = [details[cell.name]["value"] for cell in cells]
    return {
        "accuracy": _spread([accuracy[cell.name]["value"] for cell in cells]),
        "peak_accuracy": _spread([entry["peak_accuracy"] for entry in own]),
        "train_accuracy": _spread([entry["train_accuracy"] for entry in own]),
        "per_class_accuracy": np.mean([entry["per_class_accuracy"] for entry in own], axis=0).round(4).tolist(),
        "curves": [[epoch["test_accuracy"] for epoch in entry["history"]] for entry in own],
        "train_seconds": statistics.fmean(entry["train_seconds"] for entry in own),
        "prepare_seconds": max(entry["prepare_seconds"] for entry in own),
        "device": accuracy[cells[0].name]["device"],
        "threads": own[0]["threads"],
    }


def _spread(values: list[float]) -> dict:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _training_facts(training: dict) -> dict:
    """What a report says of a purifier's training."""
    names = ("steps", "total_batch_size", "trained_timesteps", "device", "seconds", "images_per_second", "settings")
    facts = {name: training.get(name) for name in names}
    return facts | {"losses": [[entry["step"], entry["loss"]] for entry in training.get("history", [])]}


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _shortcut_said(result: dict) -> str:
    figures = result["protected"]
    said = (
        f"Shortcut test: a linear model gets {100 * figures['held_out']:.0f} % of unseen protected images right and "
        f"{100 * figures['test']:.0f} % of test images"
    )
    if result["exchanged"]:
        return f"{said}; it sees a shortcut in the clean originals instead: are protected and clean exchanged?"
    return f"{said}: {'the protection is a shortcut' if result['found'] else 'no shortcut that it can see'}."


def _limits(judged, sets, roles, listed, trained_here, training, attacks, seeds, victim) -> list[str]:
    """What the figures do not say."""
    test = sets["test"]
    error = 100 * 1.96 * np.sqrt(0.25 / len(test))
    limits = [
        f"Victims were of one kind ({victim}), trained by one recipe. Another network or a longer training may learn "
        "more, from the protected images as well.",
        "An attack that fails proves nothing about a stronger one; an attack that succeeds settles the matter.",
        f"{len(test)} test images: a figure is uncertain by up to {error:.1f} points (95 %) for that reason alone, "
        "beside the spread over seeds.",
    ]
    if len(seeds) < 3:
        limits.append(f"{len(seeds)} victim(s) per row: too few to know the spread; three or more are usual.")
    if "clean" not in sets:
        limits.append(
            "No clean originals were given: what the protection took away, and so what share of it came back, is not "
            "known; neither is the size of the noise, nor whether originals of images whose protection changes much "
            "more than the budget are among the collected or test images."
        )
    if roles == "paper":
        limits.append(
            "Roles as in the paper: the purifier has been trained on the very test images that score the victims. "
            "Such figures are for comparison with the paper and not with those of disjoint roles."
        )
    if listed is None:
        limits.append(
            "The purifier's repository does not list the images that trained it (trained_on.json): whether it has "
            "seen originals of protected images or test images is not known."
        )
    elif not trained_here and "clean" not in sets:
        limits.append(
            f"The purifier was trained on none of the test images, by the list of {listed} images in its repository; "
            "whether originals of protected images are among them is not known without these originals."
        )
    if trained_here and training:
        limits.append(
            f"The purifier was trained here, on {len(sets['collected'])} images in {training['steps']} steps and "
            f"{training['seconds']:.0f} s; a larger one, trained longer on more images, purifies better."
        )
    if "eclipse" in attacks:
        limits.append(
            "The row eclipse purifies with the purifier of this audit, where its authors train one of few images."
        )
    if attacks and judged["status"] != "exchanged":
        limits.append(
            f"The verdict speaks of the strongest of {len(attacks) + 1} attacks, chosen by the same test images; with "
            "close figures that flatters it by a little."
        )
    if judged["status"] == "smoke":
        limits.insert(
            0, "This is a smoke run: purifier and victims were hardly trained, and no figure means anything."
        )
    return limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `jcdp audit`."""
    what = parser.add_argument_group("the images, each a folder, file or Hub id")
    what.add_argument("--protected", required=True, help="protected images with labels")
    what.add_argument("--collected", help="unprotected images that train the purifier; no labels needed")
    what.add_argument("--test", required=True, help="clean labelled images of the same classes")
    what.add_argument("--clean", help="originals of the protected images, under the same ids")
    for role in ("protected", "collected", "test", "clean"):
        what.add_argument(f"--{role}_split", help="the only one if not given" if role == "protected" else None)
    what.add_argument("--image_column", help="found by its usual names if not given, and so the next")
    what.add_argument("--label_column")
    what.add_argument("--image_size", type=int, help="side in pixels to which images are brought first")
    what.add_argument("--channels", type=int, choices=(1, 3), default=3)
    what.add_argument("--roles", choices=ROLES, default="disjoint", help="paper: collected are the test images")

    how = parser.add_argument_group("how")
    how.add_argument("--output", required=True, help="folder for report, records, purifier and purified images")
    how.add_argument("--purifier", help="folder or Hub id of a DDPM; trained on --collected if not given")
    how.add_argument(
        "--perceptual",
        metavar="NAME_OR_PATH",
        help="of a purifier trained here, for guides that need one: alex, vgg, squeeze, a folder or SqueezeNet's file",
    )
    how.add_argument("--preset", help="how to purify; what the purifier's repository says if not given")
    how.add_argument(
        "--countermeasures",
        default="",
        help=f"to try beside purification, commas between them: {', '.join(countermeasures.NAMES)}; several joined by "
        f"'+', such as impulse-filter+{PURIFIED}+corruption, where {PURIFIED} is the audit's purification",
    )
    how.add_argument("--victim", default="resnet18", choices=victims.NAMES)
    how.add_argument("--width", type=int, help="of the victims; the recipe's if not given")
    how.add_argument("--protocol", default="fast", choices=tuple(RECIPES), help="the victims' recipe")
    how.add_argument("--seeds", type=int, default=3, help="victims per row")
    how.add_argument("--seed", type=int, default=0, help="of purifier and purification")
    how.add_argument(
        "--budget",
        type=int,
        default=16,
        metavar="N",
        help="largest change of a value by the protection, in 1/255: images of two roles that are as near are refused",
    )
    how.add_argument("--device", help="an accelerator if there is one")
    how.add_argument("--processes", type=int, help="victims at a time on a CPU; one per processor if not given")


def run(args: argparse.Namespace) -> None:
    """`jcdp audit`: the report, and where it lies."""
    if not 0 <= args.budget <= 255:
        raise ValueError(f"--budget is {args.budget}, but must lie within 0 and 255, in 1/255.")
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    options = {role: {"split": getattr(args, f"{role}_split")} for role in ("protected", "collected", "test", "clean")}
    for role in ("protected", "test", "clean"):
        options[role] |= columns
    options["collected"]["image_column"] = args.image_column
    audit(
        protected=args.protected,
        collected=args.collected,
        test=args.test,
        clean=args.clean,
        purifier=args.purifier,
        perceptual=args.perceptual,
        output_dir=args.output,
        protocol=args.protocol,
        roles=args.roles,
        attacks=[name.strip() for name in args.countermeasures.split(",") if name.strip()],
        seeds=args.seeds,
        seed=args.seed,
        victim=args.victim,
        width=args.width,
        preset=args.preset,
        budget=args.budget / 255,
        image_size=args.image_size,
        channels=args.channels,
        load_options=options,
        device=args.device,
        processes=args.processes,
        command=command_of(args),
    )
    print(f"Report: {Path(args.output) / 'report.html'} (and report.md, report.json)")


def command_of(args: argparse.Namespace) -> str:
    """The command that was given, without the options that have their default values."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["jcdp", "audit"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value is not None and value != action.default:
            words += [f"--{action.dest}", str(value)]
    return shlex.join(words)
