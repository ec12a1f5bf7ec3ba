"""How long an audit takes: said before it starts, and kept within a budget while it runs."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..data import LabelledImages
from ..train.default_purifier import with_steps
from ..trials import Trial, measure, results_by_trial
from .costs import Costs, Extent, asked_extent, fitted, measure_costs, within_budget
from .division import Division
from .purifier import AuditPurifier
from .settings import DIVIDED_MINUTES, AuditSettings
from .words import seconds_in_words


BEGUN_NAME = "audit.json"  # what an output folder's purifier and purified images were made for


def plan_time(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    division: Division,
    device: torch.device,
    processes: int | None,
    output_dir: Path,
    say: Callable[[str], None],
) -> tuple[AuditSettings, AuditPurifier, dict | None]:
    """
    Estimate the time that an audit takes, say it, and lessen what is trained where a budget asks for that.

    A folder in which the audit was begun with the same budget keeps what was planned then, so that it goes on.

    Args:
        sets (`dict`): Images by role.
        division (`Division`): A divided audit has a budget of `DIVIDED_MINUTES` unless another is given.
        used, asked, device, processes, output_dir, say: As for `run.carry_out`.

    Returns:
        Settings and purifier as planned; and the budget, `minutes` with the fields of `Extent`, None without one.

    Raises:
        ValueError: If the budget is too small for the smallest audit.
    """
    minutes = asked.budget_minutes or (DIVIDED_MINUTES if division.of else None)
    if asked.recipe.smoke:
        return asked, used, None
    if (before := _begun_with(output_dir, minutes)) is not None:
        extent = Extent(**{name: before[name] for name in ("steps", "width", "seeds")})
        return *fitted(asked, used, extent), before
    to_purify = asked.draws * len(sets["protected"]) + division.stand_in * len(sets["test"])
    costs = measure_costs(sets, used, asked, device, processes, to_purify=to_purify)
    wanted = asked_extent(asked, used)
    extent = wanted if minutes is None else within_budget(costs, wanted, minutes)
    _say_costs(costs, wanted, extent, minutes, to_purify, say)
    budget = None if minutes is None else {"minutes": minutes} | dataclasses.asdict(extent)
    return *fitted(asked, used, extent), budget


def plan_purifier(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    device: torch.device,
    output_dir: Path,
    say: Callable[[str], None],
) -> tuple[AuditPurifier, dict | None]:
    """
    The same as `plan_time` for an audit without victims, because there are no labels.

    Returns:
        The purifier as planned, and the budget, None where the purifier was given.
    """
    if asked.recipe.smoke or used.plan is None:
        return used, None
    minutes = asked.budget_minutes or DIVIDED_MINUTES
    wanted = Extent(used.plan.training.max_train_steps, 0, 0)
    if (before := _begun_with(output_dir, minutes)) is not None:
        extent = Extent(before["steps"], 0, 0)
    else:
        costs = measure_costs(sets, used, asked, device, None, to_purify=len(sets["protected"]))
        extent = within_budget(costs, wanted, minutes)
        _say_costs(costs, wanted, extent, minutes, len(sets["protected"]), say)
    if extent.steps != wanted.steps:
        used = dataclasses.replace(used, plan=with_steps(used.plan, extent.steps))
    return used, {"minutes": minutes} | dataclasses.asdict(extent)


def _begun_with(output_dir: Path, minutes: float | None) -> dict | None:
    """What was planned for the same budget when the audit in a folder was begun."""
    path = output_dir / BEGUN_NAME
    before = json.loads(path.read_text()).get("budget") if path.exists() else None
    return before if before is not None and before["minutes"] == minutes else None


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
    trials: Mapping[str, list[Trial]],
    more: list[list[Trial]],
    records: Path,
    *,
    device: torch.device,
    processes: int | None,
    deadline: float | None,
    say: Callable[[str], None],
) -> tuple[dict[str, list[Trial]], list[list[Trial]]]:
    """
    Measure all victims, one seed of every row after the other; with a deadline, only seeds that end before it.

    Args:
        trials (`dict`): By row, one for each seed.
        more (`list`): Those of further draws, one for each seed.
        deadline (`float`, *optional*): On `time.monotonic`'s clock.
        records, device, processes, say: As for the audit.

    Returns:
        The trials that were measured, of both kinds, with the first seed at least.
    """
    turns = list(zip(*trials.values(), *more))
    epochs = turns[0][0].recipe.for_images(len(turns[0][0].train)).epochs
    say(f"Victims: {sum(map(len, turns))} of {epochs} epochs")
    if deadline is None:
        measure([trial for turn in turns for trial in turn], records, device=device, processes=processes)
        return dict(trials), more
    done = 0
    while done < len(turns):
        began = time.monotonic()
        known = results_by_trial(records, what="accuracy") if records.exists() else {}
        new = [trial for trial in turns[done] if trial.name not in known]
        measure(turns[done], records, device=device, processes=processes)
        done, took = done + 1, time.monotonic() - began
        if new and done < len(turns) and time.monotonic() + took > deadline:
            say(f"The time is up: {done} of {len(turns)} seeds. The same command with more minutes measures the rest.")
            break
    return {row: own[:done] for row, own in trials.items()}, [own[:done] for own in more]
