"""How long an audit takes: said before it starts, and kept within a budget while it runs."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import LabelledImages
from ..trials import Trial, measure, results_by_trial
from .begun import read_begun
from .costs import Costs, Extent, asked_extent, fitted, measure_costs, within_budget
from .division import Division
from .purifier import AuditPurifier
from .rows import in_turn
from .settings import DIVIDED_MINUTES, AuditSettings, Learner
from .words import seconds_in_words


@dataclasses.dataclass(frozen=True)
class Planned:
    """
    An audit as it is carried out.

    Args:
        asked (`AuditSettings`), used (`AuditPurifier`): With what a budget has changed.
        minutes (`float`, *optional*): The budget.
        said (`list[str]`): What the budget has changed, for the report.
        begun (`dict`): What is added to the folder's `begun.BEGUN_NAME`.
    """

    asked: AuditSettings
    used: AuditPurifier
    minutes: float | None = None
    said: list[str] = dataclasses.field(default_factory=list)
    begun: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def plan_time(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    learners: Sequence[Learner],
    division: Division,
    device: torch.device,
    processes: int | None,
    output_dir: Path,
    say: Callable[[str], None],
) -> Planned:
    """
    Estimate the time that an audit takes, say it, and lessen what is trained where a budget asks for that.

    A folder in which the audit was begun keeps the purifier that was planned then, and the width of the victims as
    long as the same width is asked for.

    Args:
        sets (`dict`): Images by role.
        learners (`Sequence[Learner]`): Of the victims; none in an audit without labels.
        division (`Division`): A divided audit has a budget of `DIVIDED_MINUTES` unless another is given, and so has
            one without victims.
        used, asked, device, processes, output_dir, say: As for `run.carry_out`.

    Raises:
        ValueError: If the budget is too small for the smallest audit.
    """
    if asked.smoke:
        return Planned(asked, used)
    minutes = asked.budget_minutes or (DIVIDED_MINUTES if division.of or not learners else None)
    wanted, before = asked_extent(asked, learners, used), read_begun(output_dir)
    lessened = {"minutes": minutes, "asked_width": asked.width}
    if before:
        own = before["plan"] if wanted.steps and asked.plan is None else None
        steps, width = wanted.steps if own is None else own["training"]["max_train_steps"], wanted.width
        if (then := before.get("lessened")) is not None:
            lessened["minutes"] = then["minutes"]
            width = then["width"] if then["asked_width"] == asked.width else width
        extent = Extent(steps, width, wanted.seeds)
    else:
        to_purify = asked.draws * len(sets["protected"]) + (len(sets["test"]) if division.stand_in else 0)
        costs = measure_costs(sets, used, asked, learners, device, processes, to_purify=to_purify)
        extent = wanted if minutes is None else within_budget(costs, wanted, minutes)
        _say_costs(costs, wanted, extent, minutes, to_purify, say)
    if extent == wanted:
        return Planned(asked, used, minutes)
    said, begun = _lessened(wanted, extent, lessened["minutes"]), {"lessened": lessened | {"width": extent.width}}
    return Planned(*fitted(asked, used, wanted, extent), minutes, said, begun)


def _lessened(wanted: Extent, extent: Extent, minutes: float | None) -> list[str]:
    """What is less than it would be without a budget, in a sentence."""
    if minutes is None:  # the folder's purifier was begun with a plan of its own
        return []
    parts = []
    if extent.steps != wanted.steps:
        parts.append(f"{extent.steps:,} training steps of the purifier in place of {wanted.steps:,}")
    if extent.width != wanted.width:
        parts.append(f"victims of width {extent.width} in place of {wanted.width}")
    if extent.seeds != wanted.seeds:
        parts.append(f"{extent.seeds} victims per row in place of {wanted.seeds}")
    return [f"The audit was kept within {minutes:g} minutes: {', '.join(parts)}."]


def _say_costs(
    costs: Costs, wanted: Extent, extent: Extent, minutes: float | None, to_purify: int, say: Callable[[str], None]
) -> None:
    parts = {
        f"{extent.steps:,} steps of the purifier": costs.training * extent.steps,
        f"purification of {to_purify:,} images": costs.purification,
        f"{costs.rows * extent.seeds} victims of width {extent.width}": costs.victims(extent.width, extent.seeds),
    }
    named = ", ".join(f"{what} {seconds_in_words(seconds)}" for what, seconds in parts.items() if seconds)
    limit = "" if minutes is None else f", within the {minutes:g} minutes of --budget_minutes"
    say(f"About {seconds_in_words(sum(parts.values()))} on this machine{limit}: {named}.")
    if extent != wanted:
        without = f"{wanted.steps:,} steps" + (f", width {wanted.width}, {wanted.seeds} seeds" if wanted.seeds else "")
        total = seconds_in_words(costs.total(wanted.steps, wanted.width, wanted.seeds))
        say(f"Without a budget: {without}, about {total}.")


def measure_in_time(
    rows: Sequence[Sequence[Trial]],
    records: Path,
    *,
    device: torch.device,
    processes: int | None,
    deadline: float | None,
    say: Callable[[str], None],
) -> int:
    """
    Measure all victims, one seed of every row after the other; with a deadline, only seeds that end before it.

    Args:
        rows (`Sequence`): The trials of each row, one for each seed.
        deadline (`float`, *optional*): On `time.monotonic`'s clock.
        records, device, processes, say: As for the audit.

    Returns:
        `int`: Of how many seeds all victims were measured; one at least.
    """
    seeds = max(map(len, rows))
    if deadline is None:
        measure(in_turn(rows), records, device=device, processes=processes)
        return seeds
    for place in range(seeds):
        turn, began = in_turn([row[place : place + 1] for row in rows]), time.monotonic()
        known = results_by_trial(records, what="accuracy") if records.exists() else {}
        is_new = any(trial.name not in known for trial in turn)
        measure(turn, records, device=device, processes=processes)
        took = time.monotonic() - began
        if is_new and place + 1 < seeds and time.monotonic() + took > deadline:
            say(f"The time is up: {place + 1} of {seeds} seeds. The same command, given again, measures the others.")
            return place + 1
    return seeds
