"""
Trials of a comparison: one victim each, measured once, kept as records, shared out among any number of processes.

A trial is named by the content of everything that decides its figure, so a comparison that is given again, or was cut
off, or grew, measures only what is missing. Processes that work on one file of records claim their trials beside it.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import countermeasures
from .acceleration.allocation import keep_freed_memory
from .data import LabelledImages
from .devices import device_in_words
from .purification_config import PurificationConfig
from .purify.manifest import RUN_NAME
from .purify.shards import Claims
from .results import append_record, as_settings, read_records
from .victims import Recipe, train_victim


# Countermeasures are prepared once for all victims, as the papers do it.
PREPARATION_SEED = 0
# Facts that a record keeps and that decide nothing: what a comparison is called, what a poison took and measures.
PROVENANCE = ("grid", "poison_seconds", "poison_norms")
ATTEMPTS_SECONDS = 1.0  # between looks at trials that other processes have claimed


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """
    One victim: what it is trained on, how, and what is done against the protection.

    Args:
        train, test (`LabelledImages`): Training images, and clean test images of the same classes.
        recipe (`Recipe`): Of the victim.
        seed (`int`): Of the victim.
        victim (`str`): One of `victims.NAMES`.
        width (`int`, *optional*): Of the network; the recipe's by default.
        countermeasure (`str`): A name of `countermeasures`, or several joined by `+`.
        purifier (`str`, *optional*): Folder or Hub id, for countermeasures that purify.
        purification (`PurificationConfig` or `str`, *optional*): Replaces the countermeasure's own settings.
        draws (`int`): Purifications of each image, of which the victim sees one per epoch in turn.
        work_dir (`Path`, *optional*): Where purified images are kept, so that the victims of all seeds share them.
        about (`dict`): What the images are, for the record: poison, roles and the like. Part of the trial's name, but
            for `PROVENANCE`.
    """

    train: LabelledImages
    test: LabelledImages
    recipe: Recipe
    seed: int
    victim: str = "resnet18"
    width: int | None = None
    countermeasure: str = "none"
    purifier: str | None = None
    purification: PurificationConfig | str | None = None
    draws: int = 1
    work_dir: Path | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def settings(self) -> dict:
        """Everything that decides the figure but the seed, in JSON's types, and `trial`, its name."""
        countermeasure = countermeasures.get(self.countermeasure)
        purification = self.purification
        if isinstance(purification, PurificationConfig):
            purification = as_settings(purification)
        settings = dict(self.about) | {
            "victim": self.victim,
            "width": self.recipe.width if self.width is None else self.width,
            "recipe": dataclasses.asdict(self.recipe.for_images(len(self.train))),
            "countermeasure": countermeasure.name,
            "countermeasure_settings": dict(countermeasure.settings),
            "train": describe_images(self.train),
            "test": describe_images(self.test),
        }
        if countermeasure.needs_purifier:
            settings |= {"purifier": self.purifier and purifier_digest(self.purifier), "purification": purification}
            if self.purifier and (corner := _noise_corner(self.purifier)):
                settings["noise_corner"] = corner
        if self.draws > 1:
            settings["draws"] = self.draws
        settings = json.loads(json.dumps(settings))
        return settings | {"trial": trial_name(settings, self.seed)}

    @property
    def name(self) -> str:
        """32 hexadecimal digits."""
        return self.settings["trial"]


def trial_name(settings: Mapping[str, Any], seed: int) -> str:
    """32 hexadecimal digits from all that decides a figure, images that nobody uses and `PROVENANCE` excepted."""
    nothing = (*PROVENANCE, "trial") + (() if "purifier" in settings else ("collected",))
    deciding = {name: value for name, value in settings.items() if name not in nothing}
    return _hash(json.dumps([deciding, seed], sort_keys=True).encode())


def measure(
    trials: Sequence[Trial],
    records: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    processes: int = 1,
    progress: bool = True,
) -> None:
    """
    Measure what is not on record, alone or together with any number of other processes, and return when all is.

    On a CPU a victim has one thread: small networks gain little from a second one, and a victim's weights depend on
    the number of threads.

    Args:
        trials (`Sequence[Trial]`): In the order in which they are begun.
        records (`str` or `os.PathLike`): JSON Lines file. A trial adds two: `victim`, with peak and training accuracy,
            accuracy per class, confusion, learning curve and seconds; then `accuracy`, which says that it is done.
        device (`str` or `torch.device`): Where networks run.
        processes (`int`): On a CPU, how many victims at a time.
        progress (`bool`): Show a bar.

    Raises:
        RuntimeError: If a trial fails; the sentence begins with its row or poison, column and seed.
    """
    records, device = Path(records), torch.device(device)
    if processes < 1:
        raise ValueError(f"processes is {processes}, but must be at least 1.")
    claims_folder(records).mkdir(parents=True, exist_ok=True)
    with (
        Claims(claims_folder(records)) as claims,
        tqdm(total=len(trials), unit="victim", desc="victims", disable=not progress) as bar,
    ):
        while missing := missing_trials(trials, records):
            bar.update(len(trials) - len(missing) - bar.n)
            if device.type == "cpu" and processes > 1:
                begun = _in_a_pool(missing, records, processes, bar)
            else:
                begun = 0
                for trial in missing:
                    if (measured := _measure_claimed(trial, records, device, claims)) is not None:
                        begun += 1
                        _tell(bar, trial, measured)
            if not begun:
                time.sleep(ATTEMPTS_SECONDS)
        bar.update(len(trials) - bar.n)


def claims_folder(records: Path) -> Path:
    """Where processes that write into a file of records claim their trials."""
    return records.with_name(f".{records.name}.claims") / "trials"


def missing_trials(trials: Iterable[Trial], records: str | os.PathLike) -> list[Trial]:
    """Those without an accuracy on record."""
    done = results_by_trial(records, what="accuracy")
    return [trial for trial in trials if trial.name not in done]


def results_by_trial(records: str | os.PathLike, *, what: str) -> dict[str, dict]:
    """The last record of each trial, by its name."""
    if not Path(records).exists():
        return {}
    found = (record for record in read_records(records) if record["what"] == what)
    return {record["settings"]["trial"]: record for record in found if "trial" in record["settings"]}


def measure_trial(trial: Trial, records: Path, device: torch.device) -> float:
    """Train one victim, append its records, and return its accuracy."""
    countermeasure = countermeasures.get(trial.countermeasure)
    num_classes = _num_classes(trial)
    work_dir = None if trial.work_dir is None else trial.work_dir / _preparation(trial)
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        prepared = countermeasure.prepare(
            trial.train,
            seed=PREPARATION_SEED,
            device=device,
            num_classes=num_classes,
            purifier=trial.purifier,
            purification=trial.purification,
            checkpoint_dir=work_dir,
            draws=trial.draws,
        )
        result = train_victim(
            prepared.data,
            trial.test,
            victim=trial.victim,
            width=trial.width,
            recipe=trial.recipe,
            seed=trial.seed,
            device=device,
            num_classes=num_classes,
            hooks=prepared.hooks,
        )
    finally:
        torch.set_num_threads(threads)
    common = {
        "seed": trial.seed,
        "protocol": trial.recipe.name,
        "settings": trial.settings,
        "device": device_in_words(device),
        "seconds": round(result.seconds, 2),
    }
    details = {
        "best_accuracy": result.best_accuracy,
        "train_accuracy": result.train_accuracy,
        "per_class_accuracy": [None if np.isnan(share) else round(share, 4) for share in result.per_class_accuracy],
        "confusion": result.confusion.tolist(),
        "history": [{name: round(value, 5) for name, value in entry.items()} for entry in result.history],
        "train_seconds": round(result.seconds, 2),
        "prepare_seconds": round(_seconds_of_work(work_dir, trial.draws, prepared.seconds), 2),
        "precision": result.settings["precision"],
        "threads": result.settings["threads"],
        "purified_in": _precision_of_purification(work_dir),
    }
    append_record(records, what="victim", value=details, **common)
    append_record(records, what="accuracy", value=result.accuracy, **common)
    return result.accuracy


@functools.lru_cache(maxsize=64)
def describe_images(data: LabelledImages) -> dict:
    """What tells one labelled set from another: number, shape, and a hash of pixels and labels in order."""
    digest = hashlib.blake2b(np.ascontiguousarray(data.images), digest_size=16)
    if data.labels is not None:
        digest.update(data.labels.tobytes())
    return {"images": len(data), "shape": list(data.images.shape[1:]), "content": digest.hexdigest()}


@functools.cache
def purifier_digest(purifier: str) -> str:
    """A Hub id as it is, or a hash of networks, scheduler and colour of the noise in a folder, whatever its name."""
    folder = Path(purifier)
    if not folder.is_dir():
        return purifier
    digest = hashlib.blake2b(digest_size=16)
    for part in ("unet", "scheduler", "perceptual"):
        for path in sorted((folder / part).glob("*")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    if corner := _noise_corner(purifier):
        digest.update(f"noise_corner {corner}".encode())
    return digest.hexdigest()


def _noise_corner(purifier: str) -> float:
    """What the folder of a purifier says; a Hub repository says it when it is opened, and its id stands for it."""
    config = PurificationConfig.from_pretrained(purifier) if Path(purifier).is_dir() else None
    return 0.0 if config is None else config.noise_corner


def _measure_claimed(trial: Trial, records: Path, device: torch.device, claims: Claims) -> float | None:
    """The accuracy, or None if another process has claimed or finished the trial."""
    if not claims.take(trial.name):
        return None
    try:
        return measure_trial(trial, records, device) if missing_trials([trial], records) else None
    except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError) as error:
        raise RuntimeError(f"{_title(trial)}: {error}") from error
    finally:
        claims.release(trial.name)


def _in_a_pool(trials: Sequence[Trial], records: Path, processes: int, bar: tqdm) -> int:
    """Measure trials in processes of their own; how many of them this command measured."""
    spawn = multiprocessing.get_context("spawn")  # a forked copy of torch's thread pools may hang
    begun = 0
    pool = ProcessPoolExecutor(min(processes, len(trials)), spawn, initializer=_begin_process)
    try:
        futures = {pool.submit(_measure_in_a_process, trial, records): trial for trial in trials}
        for future in as_completed(futures):
            if (measured := future.result()) is not None:
                begun += 1
                _tell(bar, futures[future], measured)
    finally:
        pool.shutdown(cancel_futures=True)
    return begun


def _measure_in_a_process(trial: Trial, records: Path) -> float | None:
    with Claims(claims_folder(records)) as claims:
        return _measure_claimed(trial, records, torch.device("cpu"), claims)


def _begin_process() -> None:
    """Of a pool: it ends with its owner, where it would otherwise wait for work for ever."""
    keep_freed_memory()
    parent = multiprocessing.parent_process().sentinel

    def watch():
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tell(bar: tqdm, trial: Trial, accuracy: float) -> None:
    bar.set_postfix_str(f"{_title(trial)}: {accuracy:.1%}")
    bar.update()


def _title(trial: Trial) -> str:
    """A trial's row or poison, column and seed, as people know them."""
    row = trial.about.get("row") or trial.about.get("poison")
    return " ".join(filter(None, (row, trial.about.get("column", trial.countermeasure), f"seed {trial.seed}")))


def _num_classes(trial: Trial) -> int:
    names = trial.train.class_names or trial.test.class_names
    return len(names) if names else int(max(trial.train.labels.max(), trial.test.labels.max())) + 1


def _preparation(trial: Trial) -> str:
    """
    Name of the folder for what a countermeasure does before training, which has nothing to do with the victim: trials
    that differ only in what is done while training, or in the number of draws, share it.
    """
    countermeasure = countermeasures.get(trial.countermeasure)
    before = [
        [part.name, dict(part.settings)] for part in countermeasure.parts or (countermeasure,) if part.kind != "hook"
    ]
    deciding = [trial.settings["train"], before, trial.settings.get("purifier"), trial.settings.get("purification")]
    return _hash(json.dumps(deciding, sort_keys=True).encode())


def _seconds_of_work(work_dir: Path | None, draws: int, seconds: float) -> float:
    """What purification took when it was done, which may have been long ago or in several processes."""
    seeds = range(PREPARATION_SEED, PREPARATION_SEED + draws)
    summaries = [path for seed in seeds if work_dir is not None for path in work_dir.glob(f"*-{seed}/summary.json")]
    if not summaries:
        return seconds
    return sum(json.loads(path.read_text())["seconds_of_work"] for path in summaries)


def _precision_of_purification(work_dir: Path | None) -> str | None:
    """The type that the purifier ran in; None where nothing was purified, or the images were not kept."""
    runs = [] if work_dir is None else sorted(work_dir.glob(f"*/{RUN_NAME}"))
    return json.loads(runs[0].read_text())["arithmetic"]["dtype"] if runs else None


def _hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()
