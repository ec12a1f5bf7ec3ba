"""
`jcdp audit`: does a protection survive? Images, a purifier and victims in; a verdict and a report to forward out.

    jcdp audit --protected DIR --collected DIR --test DIR --output DIR [--clean DIR] [--purifier REPO]

Each stage leaves its result in the output folder: the purifier, the purified images, a record per victim. The same
command, given again after an interruption, goes on from there; given with more seeds or countermeasures, it measures
only what is new.
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import LabelledImages
from ..outputs import check_output_folder, public_name, write_atomically
from ..purification_config import PurificationConfig
from ..results import as_settings, package_versions, plain
from ..trials import describe_images, measure, purifier_digest
from .draws import FOLDER, draw_again, figures_of_draws, over_draws, trials_of_draws
from .limits import limits
from .pairs import check_labels, check_pairs_asked, pairs_of
from .purifier import AuditPurifier, choose_purifier, purify, trained
from .report import write_report
from .rows import control_images, figures, trials_of
from .sets import describe, few, read_sets, separate, shortcut_in_words
from .settings import AuditSettings
from .verdict import verdict


# What an output folder's purifier and purified images were made for.
BEGUN_NAME = "audit.json"
OWN_NAMES = (
    "attacks",
    FOLDER,
    "pairs",
    "pictures",
    "purified",
    "purifier",
    "records.jsonl",
    "report.html",
    "report.json",
    "report.md",
)


def audit(
    *,
    protected: Any,
    test: Any,
    collected: Any = None,
    collected_protected: Any = None,
    purifier: str | os.PathLike | None = None,
    clean: Any = None,
    output_dir: str | os.PathLike = "runs/audit",
    image_size: int | None = None,
    channels: int = 3,
    load_options: Mapping[str, dict] | None = None,
    device: str | torch.device | None = None,
    processes: int | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
    **settings,
) -> dict:
    """
    Find out whether a protection survives, and write down how.

    Args:
        protected: The protected images with their labels; like the next three, whatever `data.load_images` takes.
        test: Clean labelled images of the same classes, none of which is protected.
        collected: Unprotected images like the protected ones, without need of labels, that train the purifier. May be
            left out where a purifier is given; what that was trained on is looked up in its repository
            (`train.provenance.check_trained_on`), or unknown and among the report's limits.
        collected_protected (*optional*): Collected images as the protection tool leaves them, under their ids, for an
            attack that learns from pairs. Without them the card of `protected` must name a poison of this package.
        purifier (`str` or `os.PathLike`, *optional*): Folder or Hub id; trained on `collected` if not given.
        clean (*optional*): The originals of the protected images, under the same ids. Without them nobody can say how
            much the protection takes away.
        output_dir (`str` or `os.PathLike`): An empty folder, or that of an audit to go on with. It gets `report.html`,
            `report.md`, `report.json`, `pictures/`, `records.jsonl`, the purified images in `purified/` and the
            purifier, if it is trained, in `purifier/`. More seeds, attacks and protocols may follow in it. Another
            purifier or purification, a smoke run's among them, needs another folder.
        image_size, channels: As for `data.load_images`, for all sets.
        load_options (`dict`, *optional*): Further options of `data.load_images` by role, such as `{"test": {"split":
            "test"}}`.
        device (`str` or `torch.device`, *optional*): An accelerator if there is one.
        processes (`int`, *optional*): Victims at a time on a CPU, by default one per processor.
        command (`str`, *optional*): What the report gives as the way to repeat it.
        say (`Callable`): Where a line about each stage goes.
        settings: Fields of `AuditSettings`.

    Returns:
        `dict`: What `report.json` holds.

    Raises:
        ValueError: If the sets, the purifier and the settings do not fit together, in one sentence.
    """
    asked = AuditSettings(**settings)
    sources = {"protected": protected, "collected": collected, "test": test, "clean": clean}
    sources["collected_protected"] = collected_protected
    check_output_folder(
        output_dir, marks=(BEGUN_NAME,), own=OWN_NAMES, sources=sources | {"purifier": purifier}, name="output_dir"
    )
    return carry_out(
        asked,
        sources,
        purifier,
        Path(output_dir),
        reading={"image_size": image_size, "channels": channels, "options": load_options or {}},
        device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        processes=processes,
        command=command or "jcdp_diffusers.audit.audit(...) with the settings above",
        say=say,
    )


def carry_out(
    asked: AuditSettings,
    sources: Mapping[str, Any],
    purifier: str | os.PathLike | None,
    output_dir: Path,
    *,
    reading: Mapping[str, Any],
    device: torch.device,
    processes: int | None,
    command: str,
    say: Callable[[str], None],
) -> dict:
    """
    The stages of an audit, in a folder that may be written to; arguments as for `audit`.

    Args:
        sources (`dict`): Images by role, None for a role that is not given.
        reading (`dict`): Options of `read_sets`.
    """
    # 1. The images, and what is used on them: all that can be refused is refused here
    _check_asked(asked, sources, purifier)
    tool = check_pairs_asked(asked, sources)
    sets = read_sets(sources, **reading)
    check_labels(tool, sets)
    used = choose_purifier(purifier, sets, asked, output_dir, device)
    begun = _begun(asked, sets, used)
    _check_begun(output_dir, begun)
    separation = separate(sets, asked)
    say("; ".join(f"{role}: {len(data)} images" for role, data in sets.items()))
    sets = few(sets) if asked.recipe.smoke else sets
    data = describe(sets, separation, used.pipe.perceptual, seed=asked.seed)
    say(shortcut_in_words(data["shortcut"]))

    # 2. The purifier
    output_dir.mkdir(parents=True, exist_ok=True)
    records = output_dir / "records.jsonl"
    if used.plan is not None:
        _write_begun(output_dir, {what: value for what, value in begun.items() if what != "preset"})
        used = trained(used, sets["collected"], asked, records, device, say)

    # 3. Purification
    _write_begun(output_dir, begun)
    said = f"T_p {used.config.diffusion_steps}, {used.config.evaluations_per_image} evaluations"
    say(f"Purifying {len(sets['protected'])} images: {said}")
    sets["purified"] = purify(sets["protected"], used, output_dir / "purified", asked.seed)
    drawn = draw_again(sets["protected"], used, output_dir, draws=asked.draws, seed=asked.seed)
    if asked.control:
        sets["control"] = control_images(sets["clean"], sets["protected"], asked.seed)

    # 4. Victims, the first seed of every row first
    pairs = pairs_of(tool, asked, sets, output_dir / "pairs", device)
    trials = trials_of(sets, used, asked, output_dir / "attacks", pairs)
    more = trials_of_draws(trials["purified"], drawn)
    order = [trial for turn in zip(*trials.values(), *more) for trial in turn]
    say(f"Victims: {len(order)} of {asked.recipe.epochs} epochs")
    measure(order, records, device=device, processes=processes)

    # 5. The report
    rows = figures(trials, records, sets["purified"], output_dir / "purified")
    draws = figures_of_draws(trials["purified"], more, records)
    if more:
        rows = [over_draws(entry, draws) if entry["row"] == "purified" else entry for entry in rows]
    report = _report(rows, draws, sets, data, used, asked, trials["protected"][0].settings, command)
    write_report(output_dir, report, sets)
    say(report["verdict"]["sentence"])
    return report


def _check_asked(asked: AuditSettings, sources: Mapping[str, Any], purifier: str | os.PathLike | None) -> None:
    """Refuse what does not go together, before anything is read."""
    if purifier is None and sources["collected"] is None:
        raise ValueError("collected is None, but without a purifier images are needed to train one.")
    if sources["collected"] is None and (started := [one.name for one in asked.tried if one.finetune is not None]):
        raise ValueError(f"collected is None, but must be a set of images for attack {started[0]!r}.")
    if asked.control and sources["clean"] is None:
        raise ValueError("control is True, but without clean images there is nothing to add its noise to.")
    if purifier is not None and asked.perceptual is not None:
        raise ValueError(
            f"perceptual is {str(asked.perceptual)!r}, but goes with a purifier that is trained here: that of "
            f"{str(purifier)!r} lies in its folder, where save_pretrained of a pipeline with one puts it."
        )
    if purifier is not None and asked.plan is not None:
        raise ValueError(
            f"plan has the network {asked.plan.unet!r}, but goes with a purifier that is trained here, not with "
            f"{str(purifier)!r}: preset says how to purify."
        )


def _begun(asked: AuditSettings, sets: Mapping[str, LabelledImages], used: AuditPurifier) -> dict:
    """What an output folder's purifier and purified images are made for, in JSON's types."""
    trains = used.plan is not None
    begun = {
        "smoke": asked.recipe.smoke,
        "seed": asked.seed,
        "protected": describe_images(sets["protected"])["content"],
        "purifier": None if trains else purifier_digest(used.name),
        "collected": describe_images(sets["collected"])["content"] if trains else None,
        "plan": as_settings(used.plan) if trains else None,
        "preset": as_settings(asked.preset) if isinstance(asked.preset, PurificationConfig) else asked.preset,
        "perceptual": None if asked.perceptual is None else str(asked.perceptual),
    }
    return plain(begun, "settings")


def _check_begun(output_dir: Path, asked: dict) -> None:
    """Refuse a folder in which another audit was begun, one whose purifier or purified images cannot serve this."""
    path = output_dir / BEGUN_NAME
    before = json.loads(path.read_text()) if path.exists() else {}
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
    write_atomically(output_dir / BEGUN_NAME, json.dumps(begun, indent=2) + "\n")


def _report(
    rows: list[dict],
    draws: dict,
    sets: Mapping[str, LabelledImages],
    data: dict,
    used: AuditPurifier,
    asked: AuditSettings,
    settings: Mapping[str, Any],
    command: str,
) -> dict:
    """What `report.json` holds, in JSON's types; `settings` are those of a victim."""
    recipe, test, trains = settings["recipe"], sets["test"], used.plan is not None
    accuracies = {entry["row"]: entry["accuracy"]["values"] for entry in rows}
    several = {"purified": draws["values"]} if draws["count"] > 1 else {}
    assumptions = {one.name: one.countermeasure.assumes for one in asked.tried if one.countermeasure.assumes}
    titles = {entry["row"]: entry["title"] for entry in rows}
    beside = {"draws": several, "assuming": frozenset(assumptions)}
    judged = verdict(accuracies, titles, test_images=len(test), smoke=recipe["smoke"], **beside)
    tried = {one.name: one.as_done(used.config, smoke=recipe["smoke"]) for one in asked.tried}
    said = limits(
        judged["status"],
        victim=settings["victim"],
        seeds=len(asked.victim_seeds),
        test_images=len(test),
        clean_known="clean" in sets,
        roles=asked.roles,
        listed=used.listed,
        training=used.record if trains else None,
        attacks=[one.name for one in asked.tried],
        assumptions=assumptions,
    )
    report = {
        "verdict": judged,
        "smoke": recipe["smoke"],
        "roles": asked.roles,
        "rows": rows,
        "draws": draws,
        "chance": float(np.bincount(test.labels).max() / len(test)),
        "data": data,
        "purifier": _purifier_facts(used),
        "purification": as_settings(used.config) | {"evaluations_per_image": used.config.evaluations_per_image},
        "victims": {
            "victim": settings["victim"],
            "width": settings["width"],
            "seeds": list(asked.victim_seeds),
            "recipe": recipe,
        },
        "attacks": {
            name: {"source": one.source, "cost": one.cost, "settings": dict(one.settings)}
            for name, one in tried.items()
        },
        "limits": said,
        "command": command,
        "device": rows[0]["device"],
        "packages": package_versions(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return plain(report, "report")


def _purifier_facts(used: AuditPurifier) -> dict:
    """What a report says of the purifier and its training."""
    training, facts = used.record, None
    if training is not None:
        names = (
            "steps",
            "total_batch_size",
            "trained_timesteps",
            "device",
            "seconds",
            "images_per_second",
            "settings",
        )
        facts = {name: training.get(name) for name in names}
        facts["losses"] = [[entry["step"], entry["loss"]] for entry in training.get("history", [])]
    trains = used.plan is not None
    return {
        "name": "trained for this audit" if trains else public_name(used.name),
        "digest": purifier_digest(used.name),
        "parameters": used.pipe.unet.num_parameters(),
        "unet": used.plan.unet if trains else None,
        "perceptual": None if used.pipe.perceptual is None else used.pipe.perceptual.name,
        "training": facts,
        "train_seconds": training["seconds"] if training else None,
        "trained_here": trains,
        "trained_on": used.listed,
    }
