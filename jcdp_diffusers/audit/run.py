"""
`jcdp audit`: does a protection survive? Images, a purifier and victims in; a verdict and a report to forward out.

    jcdp audit --protected DIR
    jcdp audit --protected DIR --collected DIR --test DIR --output DIR [--clean DIR] [--purifier REPO]

Roles that are not given are divided off from those that are (`division`). Photographs of assorted sizes are brought to
one for the comparison; the purifier is trained on squares of them at their own size, too.
Each stage leaves its result in the output folder: the purifier, the purified images, a record per victim. The same
command, given again after an interruption, goes on from there; given with more seeds or countermeasures, it measures
only what is new.
"""

import dataclasses
import json
import os
import time
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
from ..trials import describe_images, purifier_digest
from .draws import FOLDER, draw_again, figures_of_draws, over_draws, trials_of_draws
from .extent import BEGUN_NAME, measure_in_time, plan_purifier, plan_time
from .limits import limits
from .purifier import AuditPurifier, choose_purifier, purify, trained
from .reading import Found, read
from .report import write_report
from .rows import TITLES, control_images, figures, trials_of
from .sets import check_together, few, separate, shortcut_in_words
from .settings import AuditSettings
from .unlabelled import audit_unlabelled, check_unlabelled
from .verdict import verdict, without_clean_images


OWN_NAMES = (
    "attacks",
    FOLDER,
    "pictures",
    "purified",
    "purified_test",
    "purifier",
    "records.jsonl",
    "report.html",
    "report.json",
    "report.md",
)


def audit(
    *,
    protected: Any,
    test: Any = None,
    collected: Any = None,
    purifier: str | os.PathLike | None = None,
    clean: Any = None,
    output_dir: str | os.PathLike = "runs/audit",
    image_size: int | None = None,
    channels: int = 3,
    skip_unusable_images: bool = False,
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
        test (*optional*): Clean labelled images of the same classes, none of which is protected. Without them, other
            sets are divided: see `division`.
        collected (*optional*): Unprotected images like the protected ones, without need of labels, that train the
            purifier. Where a purifier is given, what that was trained on is looked up in its repository
            (`train.provenance.check_trained_on`), or unknown and among the report's limits.
        purifier (`str` or `os.PathLike`, *optional*): Folder or Hub id; trained on `collected` if not given.
        clean (*optional*): The originals of the protected images, under the same ids. Without them nobody can say how
            much the protection takes away.
        output_dir (`str` or `os.PathLike`): An empty folder, or that of an audit to go on with. It gets `report.html`,
            `report.md`, `report.json`, `pictures/`, `records.jsonl`, the purified images in `purified/` and the
            purifier, if it is trained, in `purifier/`. More seeds, attacks and protocols may follow in it. Another
            purifier or purification, a smoke run's among them, needs another folder.
        image_size, channels: As for `data.load_images`, for all sets. Without `image_size`, images of assorted sizes
            are brought to that of a given purifier, or to what the device can work on (`data.photographs`).
        skip_unusable_images (`bool`): Leave out images that cannot be used, and list them in the report.
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
    check_output_folder(
        output_dir, marks=(BEGUN_NAME,), own=OWN_NAMES, sources=sources | {"purifier": purifier}, name="output_dir"
    )
    return carry_out(
        asked,
        sources,
        purifier,
        Path(output_dir),
        reading={
            "image_size": image_size,
            "channels": channels,
            "options": load_options or {},
            "skip_unusable_images": skip_unusable_images,
        },
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
    began = time.monotonic()
    _check_asked(asked, sources, purifier)
    found = read(sources, purifier, asked, reading, device, say)
    if found.without_labels:
        return _without_labels(asked, found, sources, purifier, output_dir, reading, device, command, say)
    sets = check_together(found.sets)
    used = choose_purifier(purifier, sets, asked, output_dir, device)
    separation = separate(sets, asked)
    say("; ".join(f"{role}: {len(data)} images" for role, data in sets.items()))
    sets = few(sets) if asked.recipe.smoke else sets
    asked, used, budget = plan_time(sets, used, asked, found.division, device, processes, output_dir, say)
    begun = _begun(asked, found.sets, used) | ({} if budget is None else {"budget": budget})
    _check_begun(output_dir, begun)
    data = None if found.division.stand_in else found.described(sets, separation, used, asked.seed)
    if data is not None:
        say(shortcut_in_words(data["shortcut"]))

    # 2. The purifier
    output_dir.mkdir(parents=True, exist_ok=True)
    records = output_dir / "records.jsonl"
    deadline = None if budget is None else began + 60 * budget["minutes"]
    if used.plan is not None:
        _write_begun(output_dir, {what: value for what, value in begun.items() if what != "preset"})
        squares = found.squares(sources, reading, asked.seed)
        stop = None if deadline is None else lambda: time.monotonic() > deadline
        used = trained(used, sets["collected"], asked, records, device, say, squares=squares, stop=stop)

    # 3. Purification
    _write_begun(output_dir, begun)
    said = f"T_p {used.config.diffusion_steps}, {used.config.evaluations_per_image} evaluations"
    say(f"Purifying {len(sets['protected'])} images: {said}")
    sets["purified"] = purify(sets["protected"], used, output_dir / "purified", asked.seed)
    if data is None:
        sets["test"] = purify(sets["test"], used, output_dir / "purified_test", asked.seed)
        data = found.described(sets, separation, used, asked.seed)
    drawn = draw_again(sets["protected"], used, output_dir, draws=asked.draws, seed=asked.seed)
    if asked.control:
        sets["control"] = control_images(sets["clean"], sets["protected"], asked.seed)

    # 4. Victims, the first seed of every row first
    trials = trials_of(sets, used, asked, output_dir / "attacks")
    more = trials_of_draws(trials["purified"], drawn)
    how = {"device": device, "processes": processes, "deadline": deadline, "say": say}
    trials, more = measure_in_time(trials, more, records, **how)
    asked = dataclasses.replace(asked, seeds=[trial.seed for trial in trials["protected"]])

    # 5. The report
    rows = figures(trials, records, sets["purified"], output_dir / "purified")
    draws = figures_of_draws(trials["purified"], more, records)
    if more:
        rows = [over_draws(entry, draws) if entry["row"] == "purified" else entry for entry in rows]
    report = _report(rows, draws, sets, data, used, asked, trials["protected"][0].settings, command)
    write_report(output_dir, report, sets)
    say(report["verdict"]["sentence"])
    return report


def _without_labels(
    asked: AuditSettings,
    found: Found,
    sources: Mapping[str, Any],
    purifier: str | os.PathLike | None,
    output_dir: Path,
    reading: Mapping[str, Any],
    device: torch.device,
    command: str,
    say: Callable[[str], None],
) -> dict:
    """The stages that need no labels: a purifier, purified images, and what can be said of them."""
    began, sets = time.monotonic(), dict(found.sets)
    used = choose_purifier(purifier, sets, asked, output_dir, device)
    check_unlabelled(sets, asked)
    used, minutes = plan_purifier(sets, used, asked, device, output_dir, say)
    begun = _begun(asked, sets, used) | ({} if minutes is None else {"budget": minutes})
    _check_begun(output_dir, begun)
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_begun(output_dir, begun)
    if used.plan is not None:
        squares = found.squares(sources, reading, asked.seed)
        stop = None if minutes is None else lambda: time.monotonic() > began + 60 * minutes["minutes"]
        records = output_dir / "records.jsonl"
        used = trained(used, sets["collected"], asked, records, device, say, squares=squares, stop=stop)
    return audit_unlabelled(sets, used, asked, found.division, found.facts(sets), output_dir, command, say)


def _check_asked(asked: AuditSettings, sources: Mapping[str, Any], purifier: str | os.PathLike | None) -> None:
    """Refuse what does not go together, before anything is read."""
    if asked.roles == "paper" and (sources["test"] is None or (purifier is None and sources["collected"] is None)):
        raise ValueError("roles is 'paper', but must be 'disjoint' unless test, and collected or purifier, are given.")
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
    changed = [name for name in before if before[name] != asked.get(name)]
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
            "budget": "another budget_minutes",
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
    judged = verdict(accuracies, TITLES, test_images=len(test), smoke=recipe["smoke"], draws=several)
    if data["division"]["stand_in"]:
        judged = without_clean_images(judged, accuracies)
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
    )
    said = [*data["division"]["said"], *data["unusable_said"], *said]
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
