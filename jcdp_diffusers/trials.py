"""
The unit of every comparison: one victim, measured once and kept on record.

A trial is named by the content of everything that decides its figure. So a comparison that is given again, was cut
off, or has grown measures only what is missing. `score`, `audit`, `quickstart` and `eval/benchmark.py` build trials,
call `measure` and read the records.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from . import countermeasures, engines
from .countermeasures import Pairs
from .data import LabelledImages
from .devices import available_cores, check_seed, cpu_threads, device_in_words, usable_device
from .pipeline_jcdp import JointConditionalPurificationPipeline
from .purification_config import PurificationConfig
from .purifier_digest import noise_corner, purifier_digest
from .purify.manifest import RUN_NAME
from .results import append_record, as_settings, plain, read_records, summarise, without_later
from .victims import Recipe, VictimResult, get_recipe, train_victim
from .victims.finetuning import (
    LEARNING_RATE_FACTOR,
    PLAIN,
    InitFrom,
    Pretraining,
    Weights,
    check_start,
    facts_of,
    normalisation_facts,
    read_weights,
    save_weights,
)


# Countermeasures are prepared once for all victims, as the papers do it.
PREPARATION_SEED = 0
# Images that a victim sees in all its epochs. A victim that sees fewer takes minutes, also on a slow CPU.
MANY_IMAGES = 100_000
# Facts that a record keeps and that decide nothing: what a comparison is called, what a poison took and measures.
PROVENANCE = ("grid", "poison_seconds", "poison_norms", "assumes")
# Fields of a trial that came after the first records: left out at the value that was meant before, as in `results`.
LATER = {"draws": 1, "method": "supervised"}
FIGURES = ("accuracy", "best_accuracy", "train_accuracy", "knn_accuracy")


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """
    One victim: what it is trained on, how, and what is done against the protection.

    Args:
        train, test (`LabelledImages`): Training images, and clean test images of the same classes.
        recipe (`Recipe`): Of the victim.
        seed (`int`): Of the victim.
        victim (`str`): One of `victims.NAMES`.
        method (`str`): How the victim learns, one of `victims.METHODS`.
        probe (`LabelledImages`, *optional*): For a method without labels, the images that its features are probed
            with.
        width (`int`, *optional*): Of the network; the recipe's by default.
        countermeasure (`str`): A name of `countermeasures`, or several joined by `+`.
        purifier (`str`, `os.PathLike` or `JointConditionalPurificationPipeline`, *optional*): Folder, Hub id or
            pipeline, for countermeasures that purify.
        purification (`PurificationConfig` or `str`, *optional*): Replaces the countermeasure's own settings.
        draws (`int`): Purifications of each image, of which the victim sees one per epoch in turn.
        pairs (`Pairs`, *optional*): For countermeasures that need them.
        init_from (`InitFrom`, *optional*): What the victim starts from instead of random weights.
        collected (`LabelledImages`, *optional*): Unprotected images, for countermeasures that need them.
        whitening (`LabelledImages`, *optional*): Images whose patches the first layer of `"convnet94"` whitens, in
            place of the training images.
        work_dir (`Path`, *optional*): Where purified images and pretrained networks are kept for all seeds, and
            victims that take long between their epochs.
        model_path (`Path`, *optional*): Safetensors file in which the trained network is kept.
        about (`dict`): What the images are, for the record: poison, roles and the like. Part of the trial's name, but
            for `PROVENANCE`.
    """

    train: LabelledImages
    test: LabelledImages
    recipe: Recipe
    seed: int
    victim: str = "resnet18"
    method: str = "supervised"
    probe: LabelledImages | None = None
    width: int | None = None
    countermeasure: str = "none"
    purifier: str | os.PathLike | JointConditionalPurificationPipeline | None = None
    purification: PurificationConfig | str | None = None
    draws: int = 1
    pairs: Pairs | None = None
    init_from: InitFrom | None = None
    collected: LabelledImages | None = None
    whitening: LabelledImages | None = None
    work_dir: Path | None = None
    model_path: Path | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        get_recipe(self.recipe, self.method)
        if (self.probe is None) != (self.method == "supervised"):
            given, needed = ("None", "labelled images") if self.probe is None else ("a set of images", "None")
            raise ValueError(f"probe is {given}, but must be {needed} for method {self.method!r}.")
        self.chosen_countermeasure.require_learning(self.method)
        self.chosen_countermeasure.require_collected(self.collected)
        if self.init_from is not None:
            if self.method != "supervised":
                raise ValueError(f"init_from is given, but must be None for method {self.method!r}.")
            if self.work_dir is None and not isinstance(self.init_from.source, Weights):
                raise ValueError("work_dir is None, but must be a folder for a network that is pretrained.")
            check_start(self.init_from, self.victim, self.width or self.recipe.width, self.train.images.shape[1:])

    @property
    def chosen_countermeasure(self) -> countermeasures.Countermeasure:
        """What is done against the protection."""
        return countermeasures.get(self.countermeasure, smoke=self.recipe.smoke)

    @functools.cached_property
    def settings(self) -> dict:
        """Everything that decides the figure but the seed, in JSON's types, and `trial`, its name."""
        countermeasure = self.chosen_countermeasure
        purification = self.purification
        if isinstance(purification, PurificationConfig):
            purification = as_settings(purification)
        settings = dict(self.about) | {
            "victim": self.victim,
            "width": self.recipe.width if self.width is None else self.width,
            "recipe": dataclasses.asdict(self.recipe.for_images(len(self.train))),
            "countermeasure": countermeasure.name,
            "countermeasure_settings": deciding_settings(countermeasure, purification),
            "train": describe_images(self.train),
            "test": describe_images(self.test),
        }
        if self.probe is not None:
            settings["probe"] = describe_images(self.probe)
        if self.init_from is not None:
            settings["init_from"] = self._start
        if countermeasure.needs_pairs and self.pairs is not None:
            settings["pairs"] = {role: describe_images(data) for role, data in self.pairs._asdict().items()}
            settings["assumes"] = countermeasure.assumes
        if countermeasure.needs_collected:
            settings["collected_images"] = describe_images(self.collected)
        if self.whitening is not None:
            settings["whitening"] = describe_images(self.whitening)
        if countermeasure.needs_purifier:
            settings |= {"purifier": None, "purification": purification}
            if self.purifier is not None:
                settings["purifier"] = purifier_digest(self.purifier)
                settings["noise_corner"] = noise_corner(self.purifier)
        settings |= {name: getattr(self, name) for name, before in LATER.items() if getattr(self, name) != before}
        settings = without_later(plain(settings, "settings"))
        return settings | {"trial": trial_name(settings, self.seed)}

    @property
    def _start(self) -> dict:
        """What decides the victim's first weights and how they are fine-tuned."""
        start, source = {"pretraining": self.pretraining}, self.init_from.source
        if isinstance(source, Weights):
            start = {"weights": source.digest, "replaced_classes": source.classes} | normalisation_facts(source)
        return start | {"finetune": self.init_from.finetune, "learning_rate_factor": LEARNING_RATE_FACTOR}

    @functools.cached_property
    def pretraining(self) -> dict | None:
        """All that decides the network that is pretrained for this trial; None where none is."""
        if self.init_from is None or isinstance(self.init_from.source, Weights):
            return None
        return {
            "collected": describe_images(self.init_from.source),
            "method": "simclr",
            "recipe": dataclasses.asdict(self.init_from.recipe),
            "victim": self.victim,
            "width": self.width or self.recipe.width,
            "seed": PREPARATION_SEED,
        }

    @property
    def pretrained_path(self) -> Path | None:
        """Where the network that is pretrained for this trial is kept, under the name of what decides it."""
        if self.pretraining is None:
            return None
        name = f"{self.victim}-{_hash(plain(self.pretraining, 'pretraining'))}.safetensors"
        return self.work_dir / "pretrained" / name

    @property
    def name(self) -> str:
        """32 hexadecimal digits."""
        return self.settings["trial"]

    @property
    def title(self) -> str:
        """Row or poison, column and seed, as people know them."""
        row = self.about.get("row") or self.about.get("poison")
        return " ".join(filter(None, (row, self.about.get("column", self.countermeasure), f"seed {self.seed}")))


def trial_name(settings: Mapping[str, Any], seed: int) -> str:
    """32 hexadecimal digits from all that decides a figure, images that nobody uses and `PROVENANCE` excepted."""
    nothing = (*PROVENANCE, "trial") + (() if "purifier" in settings else ("collected",))
    deciding = {name: value for name, value in settings.items() if name not in nothing}
    return _hash([deciding, seed])


def deciding_settings(countermeasure: countermeasures.Countermeasure, purification: Any) -> dict:
    """A countermeasure's settings, without those of purifying parts where `purification` replaces them."""
    if purification is None:
        return dict(countermeasure.settings)
    if not countermeasure.parts:
        return {}
    return {part.name: {} if part.needs_purifier else dict(part.settings) for part in countermeasure.parts}


def measure(
    trials: Sequence[Trial],
    records: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    processes: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    progress: bool = True,
    beside: Sequence[engines.Task] = (),
) -> None:
    """
    Measure what is not on record, and return when all is.

    On a CPU a victim has one thread: small networks gain little from a second one, and a victim's weights depend on
    the number of threads.

    Args:
        trials (`Sequence[Trial]`): In the order in which they are begun.
        records (`str` or `os.PathLike`): JSON Lines file. A trial adds two: `victim`, with best and training accuracy,
            accuracy per class, confusion, learning curve and seconds; then `accuracy`, which says that it is done.
        device (`str` or `torch.device`): Where networks run.
        processes (`int`, *optional*): Victims at a time on this machine, each on a GPU of its own where there are
            several; None for one per processor on a CPU, and one on a GPU. On Ray, victims at a time on the cluster;
            None for as many as fit.
        engine (`str`), address (`str`, *optional*): See `engines.run`. The ranks of a launcher take turns.
        progress (`bool`): Show a bar.
        beside (`Sequence[engines.Task]`): Other tasks, which are begun first and run as victims do.

    Raises:
        ValueError: If another command writes these records, or an option cannot be used.
        RuntimeError: If a trial fails; the sentence begins with its row or poison, column and seed.
    """
    engines.check(engine, processes, address, device)
    # On Ray, devices are those of other machines.
    records, device = Path(records), torch.device(device) if engine == "ray" else usable_device(device)
    rank, world = engines.ranks()
    if engine == "local" and processes is None:
        processes = min(available_cores(), max(1, len(trials))) if device.type == "cpu" and world == 1 else 1
    shown = progress and rank == 0 and processes == 1
    tasks = [*beside, *(_Task(trial, records, device, shown) for trial in trials)]
    records.parent.mkdir(parents=True, exist_ok=True)
    lock = engines.folder_lock(records.with_name(f".{records.name}.lock"))
    with (
        contextlib.ExitStack() as stack,
        tqdm(total=len(tasks), unit="victim", desc="victims", disable=not progress or rank > 0) as bar,
    ):
        engines.first_rank_decides(lambda: stack.enter_context(lock))
        missing = engines.first_rank_decides(lambda: [row for row, task in enumerate(tasks) if not task.is_done()])
        bar.update(len(tasks) - len(missing))
        how = {"open_worker": _no_worker, "engine": engine, "address": address, "gpus": int(device.type == "cuda")}
        starts = [tasks[row].trial for row in missing if isinstance(tasks[row], _Task)]
        _pretrain(starts, processes, device, progress and rank == 0, how)
        engines.run(tasks, processes=processes, on_done=lambda task, result: _show(bar, task, result), **how)


def _pretrain(trials: Sequence[Trial], processes: int | None, device: torch.device, progress: bool, how: dict) -> None:
    """Train each network once that trials start from, in the same way as victims are run."""
    starts = {trial.pretrained_path: trial for trial in trials if trial.pretrained_path is not None}
    few = processes if how["engine"] == "ray" else min(processes, max(1, len(starts)))
    shown, pretrainings = progress and few == 1, []
    for path, one in starts.items():
        decided = {name: one.pretraining[name] for name in ("victim", "width", "seed")}
        pretrainings.append(Pretraining(path, one.init_from, **decided, device=device, progress=shown))
    if pretrainings:
        engines.run(pretrainings, processes=few, **how)


def results_by_trial(records: str | os.PathLike, *, what: str) -> dict[str, dict]:
    """The last record of each trial, by its name."""
    if not Path(records).exists():
        return {}
    found = (record for record in read_records(records) if record["what"] == what)
    return {record["settings"]["trial"]: record for record in found if "trial" in record["settings"]}


def spread_over_seeds(trials: Sequence[Trial], records: str | os.PathLike) -> dict[str, dict]:
    """
    The `FIGURES` of trials that differ in their seed alone, from the records.

    Returns:
        `dict`: By figure `mean`, `std` (sample standard deviation, None for one seed) and `values`, all fractions in
        [0, 1]. A figure that a way of learning does not know is left out.
    """
    accuracy, details = (results_by_trial(records, what=what) for what in ("accuracy", "victim"))
    values = [{"accuracy": accuracy[one.name]["value"]} | details[one.name]["value"] for one in trials]
    rows = summarise(
        (
            {"what": figure, "value": value[figure], "seed": trial.seed}
            for figure in FIGURES
            for trial, value in zip(trials, values)
            if value.get(figure) is not None
        ),
        by=("what",),
    )
    return {row["what"]: {name: row[name] for name in ("mean", "std", "values")} for row in rows}


def given_seeds(seeds: int | Sequence[int]) -> list[int]:
    """
    Seeds of victims: 0, 1, ... for a number of them, or the seeds themselves.

    Raises:
        ValueError: If there is none, one is there twice, or one is no seed.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds is {seeds}, but at least one victim, each with a seed of its own, is needed.")
    for seed in chosen:
        check_seed(seed)
    return chosen


def describe_images(data: LabelledImages) -> dict:
    """What tells one labelled set from another: number, shape, and a hash of pixels and labels in order."""
    if data not in _DESCRIBED:
        _DESCRIBED[data] = _describe(data)
    return dict(_DESCRIBED[data])


# As long as the sets themselves are there: trials share them, and one of CIFAR-10's size takes a second.
_DESCRIBED: MutableMapping[LabelledImages, dict] = weakref.WeakKeyDictionary()


def _describe(data: LabelledImages) -> dict:
    digest = hashlib.blake2b(np.ascontiguousarray(data.images), digest_size=16)
    if data.labels is not None:
        digest.update(data.labels.tobytes())
    return {"images": len(data), "shape": list(data.images.shape[1:]), "content": digest.hexdigest()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """A trial, as an engine runs it."""

    trial: Trial
    records: Path
    device: torch.device
    progress: bool  # whether preparations show a bar of their own

    @property
    def name(self) -> str:
        return f"trial {self.trial.title}"

    def is_done(self) -> bool:
        if not self.records.exists() or self.trial.name not in _names_on_record(self.records, self.records.stat()):
            return False
        return self.trial.model_path is None or is_model_of(self.trial)

    def run(self, worker: None) -> float:
        try:
            return _train(self.trial, self.records, self.device, self.progress)
        except engines.FAILURES as error:
            raise RuntimeError(f"{self.trial.title}: {error}") from error


def is_model_of(trial: Trial) -> bool:
    """Whether `model_path` has the network that this trial trains, rather than none or that of another trial."""
    if not trial.model_path.exists():
        return False
    with safe_open(trial.model_path, framework="pt") as file:
        return (file.metadata() or {}).get("trial") == trial.name


@functools.lru_cache(maxsize=4)
def _names_on_record(records: Path, state: os.stat_result) -> frozenset[str]:
    """Trials with an accuracy; the file is read again when it has grown."""
    return frozenset(results_by_trial(records, what="accuracy"))


def _no_worker() -> None:
    """What a trial needs it opens itself: trials have purifiers of their own, and most have none."""


def _train(trial: Trial, records: Path, device: torch.device, progress: bool) -> float:
    """Train one victim, append its records, and return its accuracy."""
    num_classes = max((trial.train if trial.probe is None else trial.probe).num_classes, trial.test.num_classes)
    work_dir = None if trial.work_dir is None else trial.work_dir / _preparation(trial)
    keeps = trial.work_dir is not None and _is_long(trial)
    checkpoint_dir = trial.work_dir / "victims" / trial.name if keeps else None
    with cpu_threads(1 if device.type == "cpu" else None):
        prepared = trial.chosen_countermeasure.prepare(
            trial.train,
            seed=PREPARATION_SEED,
            device=device,
            num_classes=num_classes,
            purifier=trial.purifier,
            purification=trial.purification,
            pairs=trial.pairs,
            checkpoint_dir=work_dir,
            draws=trial.draws,
            progress=progress,
            collected=trial.collected,
        )
        result = train_victim(
            prepared.data,
            trial.test,
            victim=trial.victim,
            method=trial.method,
            probe=trial.probe,
            width=trial.width,
            recipe=trial.recipe,
            seed=trial.seed,
            device=device,
            num_classes=num_classes,
            hooks=prepared.hooks,
            **_start_of(trial),
            whitening=trial.whitening,
            checkpoint_dir=checkpoint_dir,
        )
    if trial.model_path is not None:
        _keep_model(result, trial)
    common = {
        "seed": trial.seed,
        "protocol": trial.recipe.name,
        "settings": trial.settings,
        "device": device_in_words(device),
        "seconds": round(result.seconds, 2),
    }
    details = _details(result) | {
        "prepare_seconds": round(prepared.seconds, 2),
        "purified_in": _precision_of_purification(work_dir),
    }
    append_record(records, what="victim", value=details, **common)
    append_record(records, what="accuracy", value=result.accuracy, **common)
    if checkpoint_dir is not None:
        shutil.rmtree(checkpoint_dir)
    return result.accuracy


def _is_long(trial: Trial) -> bool:
    """Whether a victim can take so long that it should go on where it was cut off; others begin again."""
    epochs = trial.recipe.for_images(len(trial.train)).epochs
    return trial.method != "supervised" or epochs * len(trial.train) >= MANY_IMAGES


def _start_of(trial: Trial) -> dict[str, Any]:
    """What a victim starts from, for `train_victim`."""
    if trial.init_from is None:
        return {}
    path = trial.pretrained_path
    weights = trial.init_from.source if path is None else read_weights(path)
    return {"init_from": weights, "finetune": trial.init_from.finetune}


def _details(result: VictimResult) -> dict[str, Any]:
    """What a record says of a victim beside its accuracy."""
    return {
        "best_accuracy": result.best_accuracy,
        "train_accuracy": result.train_accuracy,
        "knn_accuracy": result.knn_accuracy,
        "per_class_accuracy": [
            None if np.isnan(accuracy) else round(accuracy, 4) for accuracy in result.per_class_accuracy
        ],
        "confusion": result.confusion.tolist(),
        "history": [{name: round(value, 5) for name, value in entry.items()} for entry in result.history],
        "train_seconds": round(result.seconds, 2),
        "precision": result.settings["precision"],
        "threads": result.settings["threads"],
    }


def _keep_model(result: VictimResult, trial: Trial) -> None:
    height, width, channels = trial.train.images.shape[1:]
    source = None if trial.init_from is None else trial.init_from.source
    known = source.normalisation if isinstance(source, Weights) else None
    facts = facts_of(trial.victim, (channels, height, width), known or PLAIN)
    save_weights(trial.model_path, result.model, facts | {"trial": trial.name})


def _show(bar: tqdm, task: engines.Task, result: Any) -> None:
    if isinstance(task, _Task) and result is not None:  # else a process died after it had put the trial on record
        bar.set_postfix_str(f"{task.trial.title}: {result:.1%}")
    bar.update()


def _preparation(trial: Trial) -> str:
    """
    Name of the folder for what a countermeasure does before training, which has nothing to do with the victim: trials
    that differ only in what is done while training, or in the number of draws, share it.
    """
    parts = trial.chosen_countermeasure.parts or (trial.chosen_countermeasure,)
    before = [[part.name, dict(part.settings)] for part in parts if part.kind != "hook"]
    decided = [trial.settings["train"], before, *map(trial.settings.get, ("purifier", "purification"))]
    return _hash([*decided, trial.settings["pairs"]] if "pairs" in trial.settings else decided)


def _precision_of_purification(work_dir: Path | None) -> str | None:
    """The type that the purifier ran in; None where nothing was purified, or the images were not kept."""
    runs = [] if work_dir is None else sorted(work_dir.glob(f"*/{RUN_NAME}"))
    return json.loads(runs[0].read_text())["arithmetic"]["dtype"] if runs else None


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
