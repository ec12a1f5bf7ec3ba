"""
`jcdp audit`: does a protection survive? Images, a purifier and victims in; a verdict and a report to forward out.

    jcdp audit --protected DIR --collected DIR --test DIR --output DIR [--clean DIR] [--purifier REPO]

Each stage leaves its result in the output folder: the purifier, the purified images, a record per victim. The same
command, given again after an interruption, continues; given with more seeds or countermeasures, it measures
only what is new.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..countermeasures import Pairs
from ..data import LabelledImages
from ..outputs import check_output_folder, public_name, write_atomically
from ..purification_config import PurificationConfig
from ..results import as_settings, package_versions, plain
from ..trials import Trial, describe_images, measure, purifier_digest
from ..victims.choice import check_whitening
from .beside import prepare_beside
from .draws import FOLDER, draw_again, figures_of_draws, over_draws, trials_of_draws
from .fractions import check_fractions, figures_of_fractions, trials_of_fractions
from .learners import in_words, side_by_side
from .limits import limits
from .pairs import assumptions_of, check_labels, check_pairs_asked, pairs_of
from .purifier import AuditPurifier, choose_purifier, purify, trained
from .report import write_report
from .rows import control_images, figures, trials_of
from .sets import describe, few, read_sets, separate, shortcut_in_words
from .settings import AuditSettings, Learner
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
    probe_images: Any = None,
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
        probe_images (*optional*): For a method without labels, the clean labelled images that a linear probe of the
            victims' features is trained on; by default `clean`.
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
    sources["probe_images"] = probe_images
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
    sets = read_sets(sources, asked.methods, **reading)
    check_labels(tool, sets)
    used = choose_purifier(purifier, sets, asked, output_dir, device)
    begun = _begun(asked, sets, used)
    _check_begun(output_dir, begun)
    learners = asked.learners(device, sets["protected"].images.shape[1:])
    whitening = sets.get("collected") if asked.whitening == "collected" else None
    check_whitening(asked.whitening, whitening, *(learner.victim for learner in learners))
    separation = separate(sets, asked)
    say("; ".join(f"{role}: {len(data)} images" for role, data in sets.items()))
    sets = few(sets) if asked.smoke else sets
    check_fractions(sets, asked, learners)
    data = describe(sets, separation, used.pipe.perceptual, seed=asked.seed)
    if data["shortcut"] is not None:
        say(shortcut_in_words(data["shortcut"]))

    # 2. The purifier; on several cores with victims that need none beside it
    output_dir.mkdir(parents=True, exist_ok=True)
    records = output_dir / "records.jsonl"
    if asked.control:
        sets["control"] = control_images(sets["clean"], sets["protected"], asked.seed)
    _write_begun(output_dir, {what: value for what, value in begun.items() if what != "preset"})
    pairs = pairs_of(tool, asked, sets, output_dir / "pairs", device)
    if device.type == "cpu":
        _prepare_beside(used, sets, asked, learners, output_dir, pairs, begun, processes, say)
    if used.plan is not None:
        used = trained(used, sets["collected"], asked, records, device, say)

    # 3. Purification
    _write_begun(output_dir, begun)
    said = f"T_p {used.config.diffusion_steps}, {used.config.evaluations_per_image} evaluations"
    say(f"Purifying {len(sets['protected'])} images: {said}")
    sets["purified"] = purify(sets["protected"], used, output_dir / "purified", asked.seed)
    drawn = draw_again(sets["protected"], used, output_dir, draws=asked.draws, seed=asked.seed)

    # 4. Victims, the first seed of every row first
    by_learner = _trials(sets, used, asked, learners, output_dir, pairs)
    more = trials_of_draws(by_learner[0].rows["purified"], drawn)
    order = in_turn([*more, *(own for one in by_learner for own in one.all)])
    say(f"Victims: {len(order)}; {in_words(learners, len(sets['protected']))}")
    measure(order, records, device=device, processes=processes)

    # 5. The report
    first, *others = by_learner
    draws = figures_of_draws(first.rows["purified"], more, records)
    every = [trial for draw in (first.rows["purified"], *more) for trial in draw]
    learned = [_learned(first.with_row("purified", every), sets, asked, records, output_dir, draws)]
    learned += [_learned(one, sets, asked, records, output_dir, None) for one in others]
    report = _report(learned, draws, sets, data, used, asked, command)
    write_report(output_dir, report, sets)
    for sentence in (report["verdict"]["sentence"], *report["side_by_side"]):
        say(sentence)
    return report


@dataclasses.dataclass(frozen=True)
class _Trials:
    """The trials of one way of learning: by row, and by fraction those of all images and of the clean rest."""

    rows: dict[str, list[Trial]]
    fractions: dict[float, tuple[list[Trial], list[Trial]]]

    def with_row(self, row: str, trials: list[Trial]) -> "_Trials":
        """The same with other trials in a row."""
        return dataclasses.replace(self, rows=self.rows | {row: trials})

    @property
    def all(self) -> list[list[Trial]]:
        """Each row and each of the rows of fractions."""
        return [*self.rows.values(), *(own for pair in self.fractions.values() for own in pair)]


def _trials(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    learners: Sequence[Learner],
    output_dir: Path,
    pairs: Pairs | None,
) -> list[_Trials]:
    """The trials of each way of learning; without `purified` among the sets, those that need no purifier."""
    found = []
    for learner in learners:
        rows = trials_of(sets, used, asked, learner, output_dir / "attacks", pairs)
        found.append(_Trials(rows, trials_of_fractions(sets, asked, rows["protected"]) if asked.fractions else {}))
    return found


def in_turn(rows: Sequence[Sequence[Trial]]) -> list[Trial]:
    """The first seed of every row, then the second seed of every row, and so on; each trial once."""
    order = (trial for turn in itertools.zip_longest(*rows) for trial in turn if trial is not None)
    return list({trial.name: trial for trial in order}.values())


def _prepare_beside(
    used: AuditPurifier,
    sets: Mapping[str, LabelledImages],
    asked: AuditSettings,
    learners: Sequence[Learner],
    output_dir: Path,
    pairs: Pairs | None,
    begun: dict,
    processes: int | None,
    say: Callable[[str], None],
) -> None:
    """See `beside`."""
    trials = in_turn([own for one in _trials(sets, used, asked, learners, output_dir, pairs) for own in one.all])
    waiting = 1 + sum(one.takes_purified or one.countermeasure.needs_purifier for one in asked.tried)
    prepare_beside(
        used,
        sets,
        asked,
        output_dir,
        trials,
        waiting=len(asked.victim_seeds) * (waiting * len(learners) + asked.draws - 1),
        begin=functools.partial(_write_begun, output_dir, begun),
        processes=processes,
        say=say,
    )


def _learned(
    trials: _Trials,
    sets: Mapping[str, LabelledImages],
    asked: AuditSettings,
    records: Path,
    output_dir: Path,
    draws: dict | None,
) -> dict:
    """What a report says of one way of learning."""
    rows = figures(trials.rows, records, sets["purified"], output_dir / "purified")
    several = {}
    if draws is not None and draws["count"] > 1:
        rows = [over_draws(entry, draws) if entry["row"] == "purified" else entry for entry in rows]
        several["purified"] = draws["values"]
    accuracies = {entry["row"]: entry["accuracy"]["values"] for entry in rows}
    first = trials.rows["protected"][0]
    recipe = first.settings["recipe"]
    beside = {"draws": several, "assuming": frozenset(assumptions_of(asked))}
    titles = {entry["row"]: entry["title"] for entry in rows}
    return {
        "verdict": verdict(accuracies, titles, test_images=len(sets["test"]), smoke=recipe["smoke"], **beside),
        "rows": rows,
        "fractions": figures_of_fractions(trials.fractions, records),
        "victims": {
            "victim": first.victim,
            "method": first.method,
            "width": first.settings["width"],
            "seeds": list(asked.victim_seeds),
            "recipe": recipe,
            "probe_images": None if first.probe is None else len(first.probe),
            "whitening": None if first.whitening is None else len(first.whitening),
        },
    }


def _check_asked(asked: AuditSettings, sources: Mapping[str, Any], purifier: str | os.PathLike | None) -> None:
    """Refuse what does not go together, before anything is read."""
    if purifier is None and sources["collected"] is None:
        raise ValueError("collected is None, but without a purifier images are needed to train one.")
    using = [one.name for one in asked.tried if one.finetune is not None or one.countermeasure.needs_collected]
    if sources["collected"] is None and using:
        raise ValueError(f"collected is None, but must be a set of images for attack {using[0]!r}.")
    if asked.control and sources["clean"] is None:
        raise ValueError("control is True, but without clean images there is nothing to add its noise to.")
    if asked.fractions and sources["clean"] is None:
        raise ValueError(
            f"fractions is {list(asked.fractions)}, but without clean images there is nothing beside protected ones."
        )
    _check_probe_asked(asked, sources)
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


def _check_probe_asked(asked: AuditSettings, sources: Mapping[str, Any]) -> None:
    probed = [method for method in asked.methods if method != "supervised"]
    if probed and sources.get("probe_images") is None and sources["clean"] is None:
        raise ValueError(
            f"probe_images is None, but must be clean labelled images for method {probed[0]!r} where no clean "
            "originals are given."
        )
    if not probed and sources.get("probe_images") is not None:
        raise ValueError(
            f"probe_images is {str(sources['probe_images'])!r}, but must be None for method 'supervised'."
        )


def _begun(asked: AuditSettings, sets: Mapping[str, LabelledImages], used: AuditPurifier) -> dict:
    """What an output folder's purifier and purified images are made for, in JSON's types."""
    trains = used.plan is not None
    begun = {
        "smoke": asked.smoke,
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
    learned: Sequence[dict],
    draws: dict,
    sets: Mapping[str, LabelledImages],
    data: dict,
    used: AuditPurifier,
    asked: AuditSettings,
    command: str,
) -> dict:
    """What `report.json` holds, in JSON's types; `learned` is what victims got, by way of learning."""
    test, trains, smoke = sets["test"], used.plan is not None, asked.smoke
    tried = {one.name: one.as_done(used.config, smoke=smoke) for one in asked.tried}
    said = limits(
        learned[0]["verdict"]["status"],
        victim=" and ".join(dict.fromkeys(one["victims"]["victim"] for one in learned)),
        seeds=len(asked.victim_seeds),
        test_images=len(test),
        clean_known="clean" in sets,
        roles=asked.roles,
        listed=used.listed,
        training=used.record if trains else None,
        attacks=[one.name for one in asked.tried],
        assumptions=assumptions_of(asked),
    )
    report = {
        "smoke": smoke,
        "roles": asked.roles,
        **learned[0],
        "others": list(learned[1:]),
        "side_by_side": side_by_side(learned),
        "draws": draws,
        "chance": float(np.bincount(test.labels).max() / len(test)),
        "data": data,
        "purifier": _purifier_facts(used),
        "purification": as_settings(used.config) | {"evaluations_per_image": used.config.evaluations_per_image},
        "attacks": {
            name: {"source": one.source, "cost": one.cost, "settings": dict(one.settings)}
            for name, one in tried.items()
        },
        "limits": said,
        "command": command,
        "device": learned[0]["rows"][0]["device"],
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
