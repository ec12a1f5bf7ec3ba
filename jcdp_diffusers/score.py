"""`jcdp score`: train victims on one data set, test them on another, and say how much was learned.

The figure is the test accuracy after the last epoch, its mean and spread over seeds. The peak over the epochs is kept
beside it and never in its place.
"""

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from . import countermeasures, victims
from .countermeasures.purifiers import check_purifier_suits
from .data import LabelledImages, find_overlap, load_images
from .data.checks import check_sets
from .devices import device_in_words
from .pipeline_jcdp import JointConditionalPurificationPipeline
from .results import as_settings, code_version, package_versions
from .train.provenance import check_trained_on
from .victims import RECIPES, Recipe, VictimResult, train_victim


FIGURES = ("accuracy", "best_accuracy", "train_accuracy")


def score(
    train: LabelledImages,
    test: LabelledImages,
    *,
    victim: str = "resnet18",
    width: int | None = None,
    protocol: str | Recipe = "fast",
    seeds: int | Sequence[int] = 3,
    countermeasure: str | None = None,
    purifier: Any = None,
    purification: Any = None,
    draws: int = 1,
    device: str | torch.device = "cpu",
    overlap_budget: float | None = 16 / 255,
    output: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    model_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores a training set by the victims that learn from it.

    Args:
        train: the training set: clean, protected or purified.
        test: clean images of the same classes and size, none of which is in `train`; they are never altered.
        victim: one of `victims.NAMES`.
        width: the network's width; by default the recipe's.
        protocol: name of the victim's recipe, one of `RECIPES`, or a recipe.
        seeds: how many victims, with seeds 0, 1, ..., or the seeds themselves.
        countermeasure: one of `countermeasures.NAMES`, or several joined by `"+"`. What it does before training is
            done once, with the first seed.
        purifier, purification: for a countermeasure that purifies; see `countermeasures.Context`.
        draws: how often a countermeasure that purifies does it; victims train on one draw per epoch in turn.
        device: where everything runs.
        overlap_budget: a training image within this distance of a test image, as `data.check_roles` measures it, is
            refused as the same image under a perturbation, images in [0, 1]; None does not compare.
        output: JSON file for the result. Finished victims are kept beside it until all are done, so that the same call
            goes on where it was cut off.
        checkpoint_dir: folder for a countermeasure's costly work.
        model_dir: folder for the trained networks, as `<victim>-<seed>.safetensors`.
        progress: whether to show a bar.

    Returns:
        What `output` holds: `request`, everything that decides the figures; `accuracy`, `best_accuracy` and
        `train_accuracy`, each with `mean`, `std` (over seeds, None for one) and `values`; `per_class_accuracy`, mean
        over seeds by class; `confusion`, test images of class row called class column, summed over seeds; `runs`, one
        entry per seed with its own figures, confusion, history and seconds; `prepare_seconds`, what the countermeasure
        took before training; `smoke`, whether the figures mean nothing. Accuracies are shares in [0, 1].

    Raises:
        ValueError: if the sets do not suit each other, overlap, or a name is unknown.
    """
    seeds = _seeds(seeds)
    recipe = (protocol if isinstance(protocol, Recipe) else _recipe(protocol)).for_images(len(train))
    victims.get(victim)
    measure = countermeasures.get(countermeasure or "none")
    measure.require(purifier)
    train, test, names = check_pair(train, test, overlap_budget)
    if measure.needs_purifier:
        given = isinstance(purifier, JointConditionalPurificationPipeline)
        pipe = purifier if given else JointConditionalPurificationPipeline.from_pretrained(purifier)
        check_purifier_suits(measure, pipe, purification, train)
        if not given:
            check_trained_on(purifier, {"train": train, "test": test}, roles="disjoint")
    width = recipe.width if width is None else width
    request = {
        "victim": victim,
        "width": width,
        "recipe": asdict(recipe),
        "seeds": seeds,
        "countermeasure": measure.name,
        "countermeasure_settings": dict(measure.settings),
        "purification": purification
        if purification is None or isinstance(purification, str)
        else as_settings(purification),
        "purifier": _purifier_name(purifier),
        "draws": draws,
        "class_names": names,
        "train": _description(train, len(names)),
        "test": _description(test, len(names)),
    }
    request = json.loads(json.dumps(request))
    kept = _Kept(output, request)
    models = {seed: None if model_dir is None else Path(model_dir) / f"{victim}-{seed}.safetensors" for seed in seeds}
    for run in kept.runs:
        if (path := models[run["seed"]]) is not None and not path.exists():
            raise ValueError(
                f"model_dir is {str(model_dir)!r}, but {str(output)!r} has the figures of the victim with seed "
                f"{run['seed']}, whose model was not kept: another output trains it again."
            )
    if kept.result is not None:
        return kept.result

    prepared = None
    with tqdm(total=recipe.epochs * len(seeds), unit="epoch", desc="score", disable=not progress) as bar:
        bar.update(recipe.epochs * len(kept.runs))
        for seed in seeds[len(kept.runs) :]:
            if prepared is None:
                prepared = measure.prepare(
                    train,
                    seed=seeds[0],
                    device=device,
                    num_classes=len(names),
                    purifier=purifier,
                    purification=purification,
                    checkpoint_dir=checkpoint_dir,
                    draws=draws,
                    progress=progress,
                )
            result = train_victim(
                prepared.data,
                test,
                victim=victim,
                width=width,
                recipe=recipe,
                seed=seed,
                device=device,
                num_classes=len(names),
                hooks=prepared.hooks,
                progress=lambda entry: (bar.set_postfix_str(f"test {entry['test_accuracy']:.1%}"), bar.update()),
            )
            if models[seed] is not None:
                _save_model(result, models[seed])
            kept.add(_run(result, seed) | {"prepare_seconds": round(prepared.seconds, 3)})
    return kept.finish(_summary(request, kept.runs, names, device))


def check_pair(
    train: LabelledImages, test: LabelledImages, overlap_budget: float | None = 16 / 255
) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """Makes sure, before any costly work, that a victim can learn from one set and be tested on the other.

    Args:
        train, test: the two roles.
        overlap_budget: see `score`.

    Returns:
        The two sets with their labels in one space, and the names of the classes; their numbers where neither set has
        names.

    Raises:
        ValueError: in one sentence that names the set, the class or the images concerned.
    """
    train, test = check_sets({"train": train, "test": test}, {}).values()
    if overlap_budget is not None:
        pairs = find_overlap(train, test, budget=overlap_budget)
        if len(pairs):
            first, second = pairs[0]
            raise ValueError(
                f"train and test have {len(np.unique(pairs[:, 1]))} images in common (same id, same pixels or within "
                f"{255 * overlap_budget:.0f}/255), the first {train.ids[first]!r} and {test.ids[second]!r}; a test "
                "image must not be trained on."
            )
    return train, test, list(train.class_names or map(str, range(train.num_classes)))


class _Kept:
    """Finished victims, kept in a file beside the output until all are done."""

    def __init__(self, output: str | Path | None, request: dict):
        self.output = None if output is None else Path(output)
        self.request = request
        self.runs: list[dict] = []
        self.result = None
        if self.output is None:
            return
        self.part = self.output.with_name(f"{self.output.name}.part")
        for path in (self.output, self.part):
            if not path.exists():
                continue
            found = json.loads(path.read_text())
            for name, wanted in request.items():
                if found.get("request", {}).get(name) != wanted:
                    raise ValueError(
                        f"output is {str(self.output)!r}, but {path.name} holds a score with another {name}; give "
                        "another file."
                    )
            self.runs = found["runs"]
            if path == self.output:
                self.result = found
                return

    def add(self, run: dict) -> None:
        self.runs.append(run)
        if self.output is not None:
            _write(self.part, {"request": self.request, "runs": self.runs})

    def finish(self, result: dict) -> dict:
        if self.output is not None:
            _write(self.output, result)
            self.part.unlink(missing_ok=True)
        return result


def _write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _run(result: VictimResult, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        **{name: getattr(result, name) for name in FIGURES},
        "per_class_accuracy": result.per_class_accuracy.tolist(),
        "confusion": result.confusion.tolist(),
        "history": list(result.history),
        "seconds": round(result.seconds, 3),
        "precision": result.settings["precision"],
        "threads": result.settings["threads"],
    }


def _summary(request: dict, runs: list[dict], names: list[str], device: str | torch.device) -> dict[str, Any]:
    figures = {}
    for name in FIGURES:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        figures[name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    per_class = zip(names, zip(*(run["per_class_accuracy"] for run in runs)))
    device = torch.device(device)
    return {
        "request": request,
        "smoke": request["recipe"]["smoke"],
        **figures,
        "per_class_accuracy": {name: statistics.fmean(values) for name, values in per_class},
        "confusion": np.sum([run["confusion"] for run in runs], axis=0).tolist(),
        "runs": runs,
        "prepare_seconds": runs[0]["prepare_seconds"],
        "train_seconds": sum(run["seconds"] for run in runs),
        "device": device_in_words(device),
        "packages": package_versions(),
        "commit": code_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _description(data: LabelledImages, num_classes: int) -> dict[str, Any]:
    content = hashlib.blake2b(np.ascontiguousarray(data.images), digest_size=16)
    content.update(data.labels.tobytes())
    return {
        "images": len(data),
        "shape": list(data.images.shape[1:]),
        "images_per_class": np.bincount(data.labels, minlength=num_classes).tolist(),
        "content": content.hexdigest(),
    }


def _save_model(result: VictimResult, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}, path)


def _purifier_name(purifier: Any) -> str | None:
    if purifier is None or isinstance(purifier, (str, os.PathLike)):
        return None if purifier is None else str(purifier)
    return str(purifier.config.get("_name_or_path"))


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds is {seeds}, but at least one victim, each with a seed of its own, is needed.")
    return chosen


def _recipe(protocol: str) -> Recipe:
    if protocol not in RECIPES:
        raise ValueError(f"protocol is {protocol!r}, but accepted are {', '.join(RECIPES)}.")
    return RECIPES[protocol]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `jcdp score`."""
    what = parser.add_argument_group("what to score")
    what.add_argument("--train", required=True, help="training set: folder, file or Hub id")
    what.add_argument("--test", required=True, help="clean test set of the same classes")
    what.add_argument("--train_split", help="the only one if not given, and so the next")
    what.add_argument("--test_split")
    what.add_argument("--image_column", help="found by its usual names if not given, and so the next")
    what.add_argument("--label_column")
    what.add_argument("--image_size", type=int, help="side in pixels to which images are brought first")
    what.add_argument("--channels", type=int, choices=(1, 3), default=3)
    what.add_argument("--output", required=True, metavar="FILE.json")

    how = parser.add_argument_group("how")
    how.add_argument("--victim", default="resnet18", choices=victims.NAMES)
    how.add_argument("--width", type=int, help="of the network; the recipe's if not given")
    how.add_argument("--protocol", default="fast", choices=tuple(RECIPES), help="the victim's recipe")
    how.add_argument("--seeds", type=int, default=3, help="number of victims")
    how.add_argument(
        "--countermeasure", default="none", help=f"{', '.join(countermeasures.NAMES)}, or several joined by '+'"
    )
    how.add_argument(
        "--purifier",
        help="folder or Hub id of a DDPM, for countermeasures that purify; jcdp needs its perceptual/ in it as well",
    )
    how.add_argument("--preset", help="purification settings in place of the countermeasure's own")
    how.add_argument("--draws", type=int, default=1, help="purifications of each image, one per epoch in turn")
    near = "a training image this near a test one is refused, in 1/255"
    how.add_argument("--budget", type=int, default=16, metavar="N", help=near)
    how.add_argument("--checkpoint_dir", help="folder in which purified images are kept")
    how.add_argument("--model_dir", help="folder for the trained victims")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> None:
    """`jcdp score`, from parsed options to a line with the figure."""
    train, test = (_load(args, role) for role in ("train", "test"))
    result = score(
        train,
        test,
        victim=args.victim,
        width=args.width,
        protocol=args.protocol,
        seeds=args.seeds,
        countermeasure=args.countermeasure,
        purifier=args.purifier,
        purification=args.preset,
        draws=args.draws,
        device=args.device,
        overlap_budget=args.budget / 255,
        output=args.output,
        checkpoint_dir=args.checkpoint_dir,
        model_dir=args.model_dir,
        progress=True,
    )
    print(sentence(result))
    print(f"Record: {args.output}")


def sentence(result: dict[str, Any]) -> str:
    """The figure in words."""
    accuracy, peak, request = result["accuracy"], result["best_accuracy"], result["request"]
    count = len(accuracy["values"])
    victims_said = "1 victim" if count == 1 else f"{count} victims"
    spread = "" if accuracy["std"] is None else f" (standard deviation {100 * accuracy['std']:.1f})"
    with_measure = "" if request["countermeasure"] == "none" else f" with {request['countermeasure']}"
    smoke = " This was a smoke run: the figures mean nothing." if result["smoke"] else ""
    return (
        f"{victims_said} ({request['victim']}, width {request['width']}, protocol {request['recipe']['name']})"
        f"{with_measure} got {100 * accuracy['mean']:.1f} %{spread} of {request['test']['images']} test images right "
        f"after the last epoch; the peak over epochs was {100 * peak['mean']:.1f} %.{smoke}"
    )


def _load(args: argparse.Namespace, role: str) -> LabelledImages:
    try:
        return load_images(
            getattr(args, role),
            split=getattr(args, f"{role}_split"),
            image_column=args.image_column,
            label_column=args.label_column,
            image_size=args.image_size,
            channels=args.channels,
        )
    except ValueError as error:  # says what is wrong, but not which of the two options it is about
        raise ValueError(f"--{role} (with --{role}_split): {error}") from error
