"""
`jcdp audit`: does a protection survive? Images, a purifier and victims in; a verdict and a report to forward out.

    jcdp audit --protected DIR
    jcdp audit --protected DIR --collected DIR --test DIR --output DIR [--clean DIR] [--purifier REPO]

Roles that are not given are divided off from those that are (`division`). Photographs of assorted sizes are brought to
one for the comparison; the purifier is trained on squares of them at their own size, too.
Each stage leaves its result in the output folder: the purifier, the purified images, a record per victim. The same
command, given again after an interruption, continues; given with more seeds or countermeasures, it measures
only what is new. A countermeasure that needs timesteps which the purifier has not learned needs another folder.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import engines
from ..countermeasures import Pairs
from ..data import LabelledImages
from ..devices import default_device, usable_device
from ..outputs import check_output_folder, public_name
from ..purification_config import ADAPTIVE
from ..results import as_settings, package_versions, plain
from ..trials import Trial, purifier_digest
from ..victims.choice import check_whitening
from .begun import BEGUN_NAME, begun_for, check_begun, write_begun
from .beside import prepare_beside
from .division import Division
from .draws import FOLDER, draw_again, figures_of_draws, over_draws, trials_of_draws
from .extent import measure_in_time, plan_time
from .fractions import check_fractions, figures_of_fractions
from .learners import in_words, side_by_side
from .limits import limits
from .pairs import assumptions_of, check_labels, check_pairs_asked, pairs_of
from .purifier import AuditPurifier, choose_purifier, purify, trained
from .reading import Found, read
from .report import write_report
from .rows import LearnerTrials, control_images, figures, in_turn, trials_by_learner
from .sets import check_learners, check_together, few, separate
from .settings import AuditSettings, Learner
from .unlabelled import audit_unlabelled, check_unlabelled
from .verdict import assumed_std, verdict, without_clean_images


OWN_NAMES = (
    "attacks",
    FOLDER,
    "pairs",
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
    collected_protected: Any = None,
    purifier: str | os.PathLike | None = None,
    clean: Any = None,
    probe_images: Any = None,
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
        reading={
            "image_size": image_size,
            "channels": channels,
            "options": load_options or {},
            "skip_unusable_images": skip_unusable_images,
        },
        device=usable_device(device or default_device()),
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
    engines.check("local", processes, device=device)
    _check_asked(asked, sources, purifier)
    tool = check_pairs_asked(asked, sources)
    found = read(sources, purifier, asked, reading, device, say)
    if found.without_labels:
        return _without_labels(asked, found, sources, purifier, output_dir, reading, device, command, say)
    sets = check_together(found.sets, asked.methods)
    check_labels(tool, sets)
    used = choose_purifier(purifier, sets, asked, output_dir, device)
    learners = asked.learners(device, sets["protected"].images.shape[1:])
    whitening = sets.get("collected") if asked.whitening == "collected" else None
    check_whitening(asked.whitening, whitening, *(learner.victim for learner in learners))
    separation = separate(sets, asked)
    say("; ".join(f"{role}: {len(data)} images" for role, data in sets.items()))
    sets = few(sets) if asked.smoke else sets
    check_learners(sets, asked, learners)
    check_fractions(sets, asked, learners)
    planned = plan_time(sets, used, asked, learners, found.division, device, processes, output_dir, say)
    asked, used = planned.asked, planned.used
    begun = begun_for(asked, found.sets, used)
    check_begun(output_dir, begun)
    begun |= planned.begun
    data = None if found.division.stand_in else found.described(sets, separation, used, asked.seed, say)

    # 2. The purifier; on several cores with victims that need none beside it
    output_dir.mkdir(parents=True, exist_ok=True)
    records = output_dir / "records.jsonl"
    if asked.control:
        sets["control"] = control_images(sets["clean"], sets["protected"], asked.seed)
    write_begun(output_dir, {what: value for what, value in begun.items() if what != "preset"})
    pairs = pairs_of(tool, asked, sets, output_dir / "pairs", device)
    deadline = None if planned.minutes is None else began + 60 * planned.minutes
    limited = {"squares": found.squares(sources, reading, asked.seed), "deadline": deadline}
    if device.type == "cpu" and not found.division.stand_in:
        _prepare_beside(used, sets, asked, learners, output_dir, pairs, begun, processes, say, limited)
    if used.plan is not None:
        used = trained(used, sets["collected"], asked, records, device, say, **limited)

    # 3. Purification
    write_begun(output_dir, begun)
    said = f"T_p {used.config.diffusion_steps}, {used.config.evaluations_per_image} evaluations"
    say(f"Purifying {len(sets['protected'])} images: {said}")
    sets["purified"] = purify(sets["protected"], used, output_dir / "purified", asked.seed)
    if data is None:
        sets["test"] = purify(sets["test"], used, output_dir / "purified_test", asked.seed)
        data = found.described(sets, separation, used, asked.seed, say)
    drawn = draw_again(sets["protected"], used, output_dir, draws=asked.draws, seed=asked.seed)

    # 4. Victims
    by_learner = trials_by_learner(sets, used, asked, learners, output_dir / "attacks", pairs)
    more = trials_of_draws(by_learner[0].rows["purified"], drawn)
    rows = [*more, *(own for one in by_learner for own in one.all)]
    say(f"Victims: {len(in_turn(rows))}; {in_words(learners, len(sets['protected']))}")
    count = measure_in_time(rows, records, device=device, processes=processes, deadline=deadline, say=say)
    by_learner, more = [one.of_seeds(count) for one in by_learner], [own[:count] for own in more]
    planned_seeds, asked = len(asked.victim_seeds), dataclasses.replace(asked, seeds=asked.victim_seeds[:count])

    # 5. The report
    draws = figures_of_draws(by_learner[0].rows["purified"], more, records)
    learned = _learned_by_all(by_learner, more, sets, asked, output_dir, draws, found.division)
    report = _report(learned, draws, sets, data, used, asked, planned_seeds, command, planned.said)
    write_report(output_dir, report, sets)
    for sentence in (report["verdict"]["sentence"], *report["side_by_side"]):
        say(sentence)
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
    planned = plan_time(sets, used, asked, (), found.division, device, None, output_dir, say)
    asked, used = planned.asked, planned.used
    begun = begun_for(asked, sets, used)
    check_begun(output_dir, begun)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_begun(output_dir, begun)
    if used.plan is not None:
        deadline = None if planned.minutes is None else began + 60 * planned.minutes
        limited = {"squares": found.squares(sources, reading, asked.seed), "deadline": deadline}
        used = trained(used, sets["collected"], asked, output_dir / "records.jsonl", device, say, **limited)
    facts = found.facts(sets) | {"lessened": planned.said}
    return audit_unlabelled(sets, used, asked, found.division, facts, output_dir, command, say)


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
    limited: Mapping[str, Any],
) -> None:
    """See `beside`."""
    by_learner = trials_by_learner(sets, used, asked, learners, output_dir / "attacks", pairs)
    waiting = 1 + sum(one.takes_purified or one.countermeasure.needs_purifier for one in asked.tried)
    prepare_beside(
        used,
        sets,
        asked,
        output_dir,
        in_turn([own for one in by_learner for own in one.all]),
        waiting=len(asked.victim_seeds) * (waiting * len(learners) + asked.draws - 1),
        begin=functools.partial(write_begun, output_dir, begun),
        processes=processes,
        say=say,
        **limited,
    )


def _learned_by_all(
    by_learner: Sequence[LearnerTrials],
    more: Sequence[Sequence[Trial]],
    sets: Mapping[str, LabelledImages],
    asked: AuditSettings,
    output_dir: Path,
    draws: dict,
    division: Division,
) -> list[dict]:
    """What a report says of each way of learning; the first one has all draws of the purified images."""
    first, *others = by_learner
    every = [trial for draw in (first.rows["purified"], *more) for trial in draw]
    options = sets, asked, output_dir / "records.jsonl", output_dir
    learned = [_learned(first.with_row("purified", every), *options, draws, division.stand_in)]
    return learned + [_learned(one, *options, None, division.stand_in) for one in others]


def _learned(
    trials: LearnerTrials,
    sets: Mapping[str, LabelledImages],
    asked: AuditSettings,
    records: Path,
    output_dir: Path,
    draws: dict | None,
    stand_in: bool,
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
    beside = {
        "draws": several,
        "assuming": frozenset(assumptions_of(asked)),
        "single_victim_std": assumed_std(len(sets["protected"]), first.method),
    }
    titles = {entry["row"]: entry["title"] for entry in rows}
    judged = verdict(accuracies, titles, test_images=len(sets["test"]), smoke=recipe["smoke"], **beside)
    return {
        "verdict": without_clean_images(judged, accuracies) if stand_in else judged,
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
    if asked.roles == "paper" and (sources["test"] is None or (purifier is None and sources["collected"] is None)):
        raise ValueError("roles is 'paper', but must be 'disjoint' unless test, and collected or purifier, are given.")
    using = [
        f"attack {one.name!r}" for one in asked.tried if one.finetune is not None or one.countermeasure.needs_collected
    ]
    using += ["whitening 'collected'"] * (asked.whitening == "collected")
    using += [f"preset {ADAPTIVE!r}"] * (asked.preset == ADAPTIVE)
    divided = purifier is None and (sources["clean"] is not None or sources["test"] is not None)
    if sources["collected"] is None and using and not divided:
        raise ValueError(f"collected is None, but must be a set of unprotected images for {using[0]}.")
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


def _report(
    learned: Sequence[dict],
    draws: dict,
    sets: Mapping[str, LabelledImages],
    data: dict,
    used: AuditPurifier,
    asked: AuditSettings,
    planned_seeds: int,
    command: str,
    lessened: Sequence[str],
) -> dict:
    """
    What `report.json` holds, in JSON's types; `learned` is what victims got, by way of learning, and `planned_seeds`
    how many victims of each row there were to be.
    """
    test, trains, smoke = sets["test"], used.plan is not None, asked.smoke
    tried = {one.name: one.as_done(used.config, smoke=smoke) for one in asked.tried}
    said = limits(
        learned[0]["verdict"]["status"],
        victim=" and ".join(dict.fromkeys(one["victims"]["victim"] for one in learned)),
        seeds=len(asked.victim_seeds),
        planned_seeds=planned_seeds,
        test_images=len(test),
        clean_known="clean" in sets,
        roles=asked.roles,
        listed=used.listed,
        training=used.record if trains else None,
        attacks=[one.name for one in asked.tried],
        assumptions=assumptions_of(asked),
    )
    said = [*data["division"]["said"], *data["unusable_said"], *lessened, *said]
    report = {
        "smoke": smoke,
        "roles": asked.roles,
        "planned_seeds": planned_seeds,
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
