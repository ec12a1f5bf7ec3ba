"""
On several cores of a CPU: the purifier's training and the purification beside the victims that need neither.

The purifier takes half of the cores, as a power of two, and each other core trains one victim at a time. Victims of
the purified images come afterwards. Other victims that would fill the last turn of all cores are trained then, too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .. import engines
from ..data import LabelledImages
from ..devices import available_cores, cpu_threads
from ..purify.dataset_card import SUMMARY_NAME
from ..trials import Trial, measure, results_by_trial
from .purifier import AuditPurifier, opened, purify, trained
from .settings import AuditSettings


# Victims of fewer images end in seconds, and the cores that they had would wait for the purifier.
LEAST_IMAGES = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Preparation:
    """
    Training of the purifier and purification, as a task of `engines`.

    Args:
        used (`AuditPurifier`): The purifier, without its pipeline.
        sets (`dict`): Images by role: `protected`, and `collected` where the purifier is trained.
        asked (`AuditSettings`): Of the audit.
        output_dir (`Path`): Of the audit.
        begin (`Callable`): Called before the first image is purified.
        threads (`int`): Of the process that runs it.
        squares (`Callable`, *optional*), deadline (`float`, *optional*): As for `purifier.trained`.
    """

    used: AuditPurifier
    sets: Mapping[str, LabelledImages]
    asked: AuditSettings
    output_dir: Path
    begin: Callable[[], None]
    threads: int
    squares: Callable[[], LabelledImages] | None = None
    deadline: float | None = None

    name = "purification"

    def is_done(self) -> bool:
        return (self.output_dir / "purified" / SUMMARY_NAME).exists()

    def run(self, worker: None) -> None:
        device, purified = torch.device("cpu"), self.output_dir / "purified"
        with cpu_threads(self.threads):
            if self.used.plan is None:
                used = opened(self.used, device, purified)
            else:
                records = self.output_dir / "records.jsonl"
                collected = self.sets["collected"]
                options = {"squares": self.squares, "deadline": self.deadline, "progress": False}
                used = trained(self.used, collected, self.asked, records, device, _quietly, **options)
            self.begin()
            purify(self.sets["protected"], used, purified, self.asked.seed, progress=False)


def _quietly(line: str) -> None:
    """The bar of the victims shows that work goes on; a second one would write over it."""


def prepare_beside(
    used: AuditPurifier,
    sets: Mapping[str, LabelledImages],
    asked: AuditSettings,
    output_dir: Path,
    trials: Sequence[Trial],
    *,
    waiting: int,
    begin: Callable[[], None],
    processes: int | None,
    say: Callable[[str], None],
    squares: Callable[[], LabelledImages] | None = None,
    deadline: float | None = None,
) -> None:
    """
    Train the purifier and purify beside victims. Does nothing with one core, with few images (`LEAST_IMAGES`), where
    one of the two is done, and where one turn of all cores is enough for all victims: then the stages of the audit do
    all of it in their order.

    Args:
        used, sets, asked, output_dir, begin: As for [`Preparation`].
        trials (`Sequence[Trial]`): Victims that need no purifier, in their order.
        waiting (`int`): How many victims need one.
        processes (`int`, *optional*): Cores to work on; all by default.
        say (`Callable`): Where a line about the stage goes.
        squares, deadline: As for [`Preparation`].
    """
    cores = processes or available_cores()
    records = output_dir / "records.jsonl"
    known = results_by_trial(records, what="accuracy")
    missing = [trial for trial in trials if trial.name not in known]
    if cores == 1 or not missing or len(sets["protected"]) < LEAST_IMAGES or engines.ranks()[1] > 1:
        return
    threads = 1 << (cores // 2).bit_length() - 1
    wanted = {role: sets[role] for role in ("protected", "collected") if role in sets}
    # A copy of the settings without what they have worked out, and a purifier without its pipeline: both are sent.
    without = dataclasses.replace(used, pipe=None)
    copied = dataclasses.replace(asked)
    task = Preparation(without, wanted, copied, output_dir, begin, threads, squares, deadline)
    first = missing[: max(0, len(missing) - -waiting % cores)]
    if task.is_done() or not first:
        return
    what = "Purification" if used.plan is None else f"A purifier of {used.plan.training.max_train_steps} steps"
    say(f"{what} on {threads} of {cores} cores, beside {len(first)} victims that need none")
    measure(first, records, device="cpu", processes=cores - threads + 1, beside=[task])
