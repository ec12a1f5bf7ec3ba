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
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import countermeasures, victims
from ..countermeasures.purifiers import check_purifier
from ..data import LabelledImages, load_images
from ..data.checks import (
    ROLES,
    check_separation,
    check_sets,
    describe_noise,
    describe_set,
    few_of_each_class,
    match_originals,
)
from ..perceptual import LPIPSModel, load_perceptual
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PRESETS, PurificationConfig
from ..purify.dataset import open_purifier, purify_dataset
from ..purify.dataset_card import SUMMARY_NAME
from ..results import append_record, as_settings, package_versions, read_records
from ..train.default_purifier import Plan, plan_for, purifier_to_be, train_planned
from ..train.model_card import RECORD_NAME
from ..train.provenance import check_trained_on
from ..trials import Trial, describe_images, measure, purifier_digest, results_by_trial
from ..victims import RECIPES, Recipe
from .attacks import PURIFIED, Attack, attack, in_seconds
from .report import write_report
from .shortcut import shortcut_test
from .verdict import limits, verdict


TITLES = {"clean": "clean images", "protected": "protected images", "purified": "purification"}
SMOKE_IMAGES = 200
# What an output folder's purifier and purified images were made for.
BEGUN_NAME = "audit.json"


@dataclasses.dataclass(frozen=True)
class _Purifier:
    """The purifier of an audit: its folder or Hub id, what is known of its training, and how it is used."""

    name: str
    plan: Plan | None  # None if it was given
    listed: int | None  # how many images trained it, where that is known
    pipe: JointConditionalPurificationPipeline
    config: PurificationConfig

    @property
    def record(self) -> dict | None:
        """What its training left in its folder."""
        path = Path(self.name) / RECORD_NAME
        return _read(path) if path.exists() else None


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
            (`train.provenance.check_trained_on`), or unknown and among the report's limits.
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
        victim, width: As for `victims.train_victim`.
        preset (`str` or `PurificationConfig`, *optional*): How to purify; by default what the purifier's repository
            says, or the plan.
        plan (`Plan`, *optional*): The purifier to train where none is given; chosen by size of the images and device
            by default.
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
    seeds = _seeds(seeds)
    tried = [attack(name) for name in dict.fromkeys(attacks) if name != "none"]
    victims.get(victim)
    _check_asked(purifier, collected, perceptual, plan, preset)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output_dir = Path(output_dir)

    # 2. The images, and what is used on them: all that can be refused is refused here
    sources = {"protected": protected, "collected": collected, "test": test, "clean": clean}
    sets = _load_sets(sources, image_size, channels, load_options or {})
    network = None if perceptual is None else load_perceptual(perceptual)
    if purifier is None:
        plan = plan or plan_for(sets["collected"], device, recipe.smoke)
        name, listed = str(output_dir / "purifier"), len(sets["collected"])
        pipe = purifier_to_be(plan, sets["collected"], network)
    else:
        name, listed = str(purifier), check_trained_on(purifier, _labelled(sets), roles=roles)
        pipe = open_purifier(purifier, device, output_dir=output_dir / "purified")
    check_purifier(pipe, sets["protected"])
    config = _purification(pipe, preset if plan is None else preset or plan.purification, tried, recipe)
    begun = {
        "smoke": recipe.smoke,
        "seed": seed,
        "protected": describe_images(sets["protected"])["content"],
        "purifier": None if purifier is None else purifier_digest(name),
        "collected": None if purifier is not None else describe_images(sets["collected"])["content"],
        "plan": None if plan is None else as_settings(plan),
        "preset": as_settings(preset) if isinstance(preset, PurificationConfig) else preset,
        "perceptual": None if perceptual is None else str(perceptual),
    }
    begun = json.loads(json.dumps(begun))
    _check_output(output_dir, begun)
    separation = check_separation(*(sets.get(role) for role in sources), roles=roles, budget=budget)
    say("; ".join(f"{role}: {len(data)} images" for role, data in sets.items()))
    if recipe.smoke:
        sets = _few(sets)
    data = _describe(sets) | {"separation": separation | {"budget": budget}}
    say(_shortcut_said(data["shortcut"]))

    # 3. The purifier
    output_dir.mkdir(parents=True, exist_ok=True)
    records = output_dir / "records.jsonl"
    if purifier is None:
        _write_begun(output_dir, {what: value for what, value in begun.items() if what != "preset"})
        _train(sets["collected"], plan, Path(name), network, seed, device, records, recipe, say)
        pipe = open_purifier(name, device, output_dir=output_dir / "purified")
    used = _Purifier(name, plan, listed, pipe, config)

    # 4. Purification
    _write_begun(output_dir, begun)
    said = f"T_p {config.diffusion_steps}, {config.evaluations_per_image} evaluations"
    say(f"Purifying {len(sets['protected'])} images: {said}")
    sets["purified"] = _purify(sets["protected"], used, output_dir / "purified", seed)

    # 5. Victims
    trials = _trials(sets, tried, used, recipe, seeds, victim, width, roles, output_dir / "attacks")
    order = [trials[row][turn] for turn in range(len(seeds)) for row in trials]
    say(f"Victims: {len(order)} of {recipe.epochs} epochs")
    measure(order, records, device=device, processes=processes)

    # 6. The report
    rows = _rows(trials, records, sets, output_dir / "purified")
    report = _report(rows, sets, data, used, tried, trials["protected"][0].settings, seeds, roles)
    report["command"] = command or "jcdp_diffusers.audit.audit(...) with the settings above"
    report = json.loads(json.dumps(report))
    write_report(output_dir, report, sets)
    say(report["verdict"]["sentence"])
    return report


def _check_asked(purifier, collected, perceptual, plan: Plan | None, preset) -> None:
    """Refuse what does not go together, before anything is read."""
    if purifier is None and collected is None:
        raise ValueError("collected is None, but without a purifier images are needed to train one.")
    if purifier is not None and perceptual is not None:
        raise ValueError(
            f"perceptual is {str(perceptual)!r}, but goes with a purifier that is trained here: that of "
            f"{str(purifier)!r} lies in its folder, where save_pretrained of a pipeline with one puts it."
        )
    if purifier is not None and plan is not None:
        raise ValueError(
            f"plan has the network {plan.unet!r}, but goes with a purifier that is trained here, not with "
            f"{str(purifier)!r}: preset says how to purify."
        )
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")


def _recipe(protocol: str | Recipe) -> Recipe:
    if isinstance(protocol, Recipe):
        return protocol
    if protocol not in RECIPES:
        raise ValueError(f"protocol is {protocol!r}, but must be one of {', '.join(RECIPES)}.")
    return RECIPES[protocol]


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {seeds}, but at least one victim, each with a seed of its own, is needed.")
    return seeds


def _load_sets(
    sources: Mapping[str, Any], image_size: int | None, channels: int, options: Mapping[str, dict]
) -> dict[str, LabelledImages]:
    """The images of each role that is given, checked, the originals in the order of the protected ones."""
    sets = {
        role: _load(role, source, image_size, channels, options.get(role, {}))
        for role, source in sources.items()
        if source is not None
    }
    check_sets(_labelled(sets), {role: data for role, data in sets.items() if role == "collected"})
    if "clean" in sets:
        sets["clean"] = match_originals(sets["clean"], sets["protected"])
    return sets


def _labelled(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """The roles that have labels, none of which may have trained a purifier."""
    return {role: data for role, data in sets.items() if role != "collected"}


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


def _few(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """What a smoke run has time for."""
    few = {role: few_of_each_class(sets[role], SMOKE_IMAGES) for role in ("protected", "test")}
    if "clean" in sets:
        few["clean"] = match_originals(sets["clean"], few["protected"])
    return dict(sets) | few


def _describe(sets: Mapping[str, LabelledImages]) -> dict:
    """What a report says of the images."""
    protected, test, clean = sets["protected"], sets["test"], sets.get("clean")
    return {
        "sets": {role: describe_set(images) for role, images in sets.items()},
        "noise": None if clean is None else describe_noise(clean, protected),
        "shortcut": shortcut_test(protected, test, clean),
    }


def _purification(
    pipe: JointConditionalPurificationPipeline, preset, tried: Sequence[Attack], recipe: Recipe
) -> PurificationConfig:
    """The settings of the audit's purification; refuse them, and attacks, if they are beyond the purifier."""
    config = pipe.resolve_config(preset)
    if recipe.smoke:
        return pipe.resolve_config(in_seconds(config))
    for one in tried:
        one.check(pipe)
    return config


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


def _train(
    collected,
    plan: Plan,
    folder: Path,
    perceptual: LPIPSModel | None,
    seed,
    device,
    records: Path,
    recipe: Recipe,
    say,
) -> None:
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
    start = time.perf_counter()
    train_planned(dataclasses.replace(plan, training=training), collected, folder, perceptual)
    dataclasses.replace(plan.purification, **training.facts_of_the_network()).save_pretrained(folder)
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


def _purify(protected: LabelledImages, used: _Purifier, folder: Path, seed: int) -> LabelledImages:
    """The purified images, made where they do not lie in the folder yet."""
    purify_dataset(protected, used.pipe, output_dir=folder, seed=seed, preset=used.config)
    purified = load_images(folder, channels=protected.images.shape[3])
    if purified.ids != protected.ids:
        raise ValueError(
            f"output_dir {str(folder.parent)!r} holds the purified images of another data set: give another."
        )
    return protected.with_images(purified.images)


def _trials(
    sets: Mapping[str, LabelledImages],
    tried: Sequence[Attack],
    used: _Purifier,
    recipe: Recipe,
    seeds: Sequence[int],
    victim: str,
    width: int | None,
    roles: str,
    work_dir: Path,
) -> dict[str, list[Trial]]:
    """The victims by row, one for each seed."""
    rows = {row: (sets[row], "none", None) for row in ("clean", "protected", "purified") if row in sets}
    for one in tried:
        # In a smoke run every attack that purifies does so in seconds.
        replaced = one.measure.needs_purifier and (recipe.smoke or one.purifies_as_the_audit)
        images = sets["purified" if one.takes_purified else "protected"]
        rows[one.name] = (images, one.measure.name, used.config if replaced else None)
    facts = {"audit": describe_images(sets["protected"])["content"], "roles": roles}
    purification = {"purifier": purifier_digest(used.name), "purification": as_settings(used.config)}
    return {
        row: [
            Trial(
                images,
                sets["test"],
                recipe,
                seed,
                victim=victim,
                width=width,
                countermeasure=name,
                purifier=used.name,
                purification=config,
                work_dir=work_dir,
                about=facts | {"row": row} | (purification if images is sets["purified"] else {}),
            )
            for seed in seeds
        ]
        for row, (images, name, config) in rows.items()
    }


def _rows(
    trials: Mapping[str, list[Trial]], records: Path, sets: Mapping[str, LabelledImages], purified: Path
) -> list[dict]:
    """Title and figures of each row; what works on the purified images has their seconds among its own."""
    seconds = _read(purified / SUMMARY_NAME)["seconds_of_work"]
    rows = [{"row": row, "title": TITLES.get(row, row)} | _results(own, records) for row, own in trials.items()]
    for entry in rows:
        entry["prepare_seconds"] += seconds if trials[entry["row"]][0].train is sets["purified"] else 0
    return rows


def _results(trials: list[Trial], records: Path) -> dict:
    """Figures of one row over its seeds, from the records."""
    accuracy, details = (results_by_trial(records, what=what) for what in ("accuracy", "victim"))
    own = [details[trial.name]["value"] for trial in trials]
    return {
        "accuracy": _spread([accuracy[trial.name]["value"] for trial in trials]),
        "best_accuracy": _spread([entry["best_accuracy"] for entry in own]),
        "train_accuracy": _spread([entry["train_accuracy"] for entry in own]),
        "per_class_accuracy": np.mean([entry["per_class_accuracy"] for entry in own], axis=0).round(4).tolist(),
        "curves": [[epoch["test_accuracy"] for epoch in entry["history"]] for entry in own],
        "train_seconds": statistics.fmean(entry["train_seconds"] for entry in own),
        "prepare_seconds": max(entry["prepare_seconds"] for entry in own),
        "device": accuracy[trials[0].name]["device"],
        "threads": own[0]["threads"],
    }


def _spread(values: list[float]) -> dict:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _report(
    rows: list[dict],
    sets: Mapping[str, LabelledImages],
    data: dict,
    used: _Purifier,
    tried: Sequence[Attack],
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    roles: str,
) -> dict:
    """What `report.json` holds but for the command; `settings` are those of a victim."""
    recipe, test, training = settings["recipe"], sets["test"], used.record
    judged = verdict({entry["row"]: entry["accuracy"]["values"] for entry in rows}, TITLES, smoke=recipe["smoke"])
    measures = {one.name: one.as_done(used.config, smoke=recipe["smoke"]) for one in tried}
    trained_here = used.plan is not None
    return {
        "verdict": judged,
        "smoke": recipe["smoke"],
        "roles": roles,
        "rows": rows,
        "chance": float(np.bincount(test.labels).max() / len(test)),
        "data": data,
        "purifier": {
            "name": "trained for this audit" if trained_here else used.name,
            "digest": purifier_digest(used.name),
            "parameters": used.pipe.unet.num_parameters(),
            "unet": used.plan.unet if trained_here else None,
            "perceptual": None if used.pipe.perceptual is None else used.pipe.perceptual.name,
            "training": training and _training_facts(training),
            "train_seconds": training["seconds"] if training else None,
            "trained_here": trained_here,
            "trained_on": used.listed,
        },
        "purification": as_settings(used.config) | {"evaluations_per_image": used.config.evaluations_per_image},
        "victims": {
            "victim": settings["victim"],
            "width": settings["width"],
            "seeds": list(seeds),
            "recipe": recipe,
        },
        "attacks": {
            name: {"source": measure.source, "cost": measure.cost, "settings": dict(measure.settings)}
            for name, measure in measures.items()
        },
        "limits": limits(
            judged["status"],
            victim=settings["victim"],
            seeds=len(seeds),
            test_images=len(test),
            clean_known="clean" in sets,
            roles=roles,
            listed=used.listed,
            training=training if trained_here else None,
            attacks=[one.name for one in tried],
        ),
        "device": rows[0]["device"],
        "packages": package_versions(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
