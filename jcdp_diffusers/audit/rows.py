"""The rows of an audit: which victims are trained on what, and their figures from the records."""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import countermeasures
from ..countermeasures import Pairs, assumed
from ..data import LabelledImages
from ..data.perturbations import apply_perturbation
from ..poisons.control import shuffled
from ..purify.dataset_card import SUMMARY_NAME
from ..results import as_settings
from ..trials import Trial, describe_images, purifier_digest, results_by_trial, spread_over_seeds
from ..victims.finetuning import InitFrom, pretraining_recipe
from .fractions import trials_of_fractions
from .purifier import AuditPurifier
from .settings import AuditSettings, Learner


TITLES = {
    "clean": "clean images",
    "control": "clean images with noise of the same size",
    "protected": "protected images",
    "purified": "purification",
}

EARLY_STOPPING = "early-stopping"
TITLES_OF_OTHERS = {EARLY_STOPPING: "early stopping (best epoch on record, chosen by the test images)"}


def control_images(clean: LabelledImages, protected: LabelledImages, seed: int) -> LabelledImages:
    """The clean images with the protection's own noise, of other images and shuffled; see `poisons.control`."""
    noise = shuffled(protected.tensor() - clean.tensor(), seed=seed)
    return clean.with_images(apply_perturbation(clean.images, noise))


def trials_of(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    learner: Learner,
    work_dir: Path,
    pairs: Pairs | None = None,
) -> dict[str, list[Trial]]:
    """
    The trials by row, one for each seed.

    Args:
        sets (`dict`): Images by role, where asked for with `control`. Without `purified` among them, the rows that
            need the purifier are left out.
        used (`AuditPurifier`): For attacks that purify.
        asked (`AuditSettings`): Attacks and seeds.
        learner (`Learner`): Of the victims.
        work_dir (`Path`): Where attacks keep what they have purified.
        pairs ([`Pairs`], *optional*): For attacks that learn from them.
    """
    rows = {row: (sets[row], "none", None, None) for row in TITLES if row in sets}
    tuned = {one.finetune for one in asked.tried} - {None}
    starts = {how: InitFrom(sets["collected"], how, pretraining_recipe(learner.recipe)) for how in tuned}
    for one in asked.tried:
        if one.countermeasure.needs_pairs and pairs is None:
            raise ValueError(f"pairs is None, but attack {one.name!r} needs them.")
        if "purified" not in sets and (one.takes_purified or one.countermeasure.needs_purifier):
            continue
        # In a smoke run every attack that purifies does so in seconds.
        replaced = one.countermeasure.needs_purifier and (asked.smoke or one.purifies_as_the_audit)
        images = sets["purified" if one.takes_purified else "protected"]
        rows[one.name] = (images, one.countermeasure.name, used.config if replaced else None, starts.get(one.finetune))
    whitens = asked.whitening == "collected" and learner.whitens
    facts = {"audit": describe_images(sets["protected"])["content"], "roles": asked.roles}
    purification = {}
    if "purified" in sets:
        purification = {"purifier": purifier_digest(used.name), "purification": as_settings(used.config)}
    return {
        row: [
            Trial(
                images,
                sets["test"],
                learner.recipe,
                seed,
                victim=learner.victim,
                method=learner.method,
                probe=None if learner.method == "supervised" else sets.get("probe", sets.get("clean")),
                whitening=sets["collected"] if whitens and start is None else None,
                width=asked.width,
                countermeasure=name,
                purifier=used.name,
                purification=config,
                pairs=pairs if countermeasures.get(name).needs_pairs else None,
                collected=sets["collected"] if countermeasures.get(name).needs_collected else None,
                init_from=start,
                work_dir=work_dir,
                about=facts | {"row": row} | (purification if images is sets.get("purified") else {}),
            )
            for seed in asked.victim_seeds
        ]
        for row, (images, name, config, start) in rows.items()
    }


@dataclasses.dataclass(frozen=True)
class LearnerTrials:
    """The trials of one way of learning: by row, and by fraction those of all images and of the clean rest."""

    rows: dict[str, list[Trial]]
    fractions: dict[float, tuple[list[Trial], list[Trial]]]

    def with_row(self, row: str, trials: list[Trial]) -> "LearnerTrials":
        """The same with other trials in a row."""
        return dataclasses.replace(self, rows=self.rows | {row: trials})

    def of_seeds(self, count: int) -> "LearnerTrials":
        """Those of the first seeds."""
        rows = {row: own[:count] for row, own in self.rows.items()}
        pairs = {fraction: (both[:count], rest[:count]) for fraction, (both, rest) in self.fractions.items()}
        return LearnerTrials(rows, pairs)

    @property
    def all(self) -> list[list[Trial]]:
        """Each row and each of the rows of fractions."""
        return [*self.rows.values(), *(own for pair in self.fractions.values() for own in pair)]


def trials_by_learner(
    sets: Mapping[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    learners: Sequence[Learner],
    work_dir: Path,
    pairs: Pairs | None,
) -> list[LearnerTrials]:
    """The trials of each way of learning; arguments as for `trials_of`."""
    found = []
    for learner in learners:
        rows = trials_of(sets, used, asked, learner, work_dir, pairs)
        fractions = trials_of_fractions(sets, asked, rows["protected"]) if asked.fractions else {}
        found.append(LearnerTrials(rows, fractions))
    return found


def in_turn(rows: Sequence[Sequence[Trial]]) -> list[Trial]:
    """The first seed of every row, then the second seed of every row, and so on; each trial once."""
    order = (trial for turn in itertools.zip_longest(*rows) for trial in turn if trial is not None)
    return list({trial.name: trial for trial in order}.values())


def figures(
    trials: Mapping[str, list[Trial]], records: Path, purified: LabelledImages, purified_dir: Path
) -> list[dict]:
    """
    Title and figures of each row, from the records.

    Args:
        trials (`dict`): From `trials_of`.
        records (`Path`): The file that has their results.
        purified (`LabelledImages`): What works on them has the seconds of the purification among its own.
        purified_dir (`Path`): Their folder.
    """
    seconds = json.loads((purified_dir / SUMMARY_NAME).read_text())["seconds_of_work"]
    rows = []
    for row, own in trials.items():
        rows.append({"row": row, "title": _title(row, own)} | _figures(own, records))
        rows[-1]["prepare_seconds"] += seconds if own[0].train is purified else 0
        if row == "protected" and own[0].method == "supervised":
            rows.append(early_stopping(rows[-1]))
    return rows


def early_stopping(protected: Mapping) -> dict:
    """
    A row for whoever stops the training of the protected images in time. It costs nothing, for the test accuracy after
    each epoch is on record. The epoch is chosen by the test images, so nobody gets more, and the row is not judged.

    Args:
        protected (`dict`): The row of protected images.
    """
    unknown = {"train_accuracy": None, "per_class_accuracy": None, "curves": [], "curve_epochs": []}
    changes = {
        "row": EARLY_STOPPING,
        "title": TITLES_OF_OTHERS[EARLY_STOPPING],
        "accuracy": protected["best_accuracy"],
    }
    return dict(protected) | changes | unknown


def _title(row: str, trials: list[Trial]) -> str:
    """What a row is called, with what it assumes of the attacker."""
    return TITLES.get(row, row) + assumed(countermeasures.get(trials[0].countermeasure).assumes)


def _figures(trials: list[Trial], records: Path) -> dict:
    """Figures of one row over its seeds."""
    details, spreads = results_by_trial(records, what="victim"), spread_over_seeds(trials, records)
    own = [details[trial.name]["value"] for trial in trials]
    # What learns without labels is followed by the nearest neighbours of its features.
    figure = "test_accuracy" if trials[0].method == "supervised" else "knn_accuracy"
    return {
        **{name: spreads.get(name) for name in ("accuracy", "best_accuracy", "train_accuracy")},
        "per_class_accuracy": np.mean([entry["per_class_accuracy"] for entry in own], axis=0).round(4).tolist(),
        "curves": [[epoch[figure] for epoch in entry["history"] if figure in epoch] for entry in own],
        "curve_epochs": [epoch["epoch"] for epoch in own[0]["history"] if figure in epoch],
        "train_seconds": statistics.fmean(entry["train_seconds"] for entry in own),
        "prepare_seconds": max(entry["prepare_seconds"] for entry in own),
        "device": details[trials[0].name]["device"],
        "threads": own[0]["threads"],
    }
