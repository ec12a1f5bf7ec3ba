"""
`jcdp score`: train victims on one data set, test them on another, and say how much was learned.

The figure is the test accuracy after the last epoch, its mean and standard deviation over seeds. The best accuracy
over the epochs is kept beside it and never in its place.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import countermeasures, engines, victims
from .countermeasures import assumed
from .countermeasures.purifiers import check_purifier_suits
from .data import USUAL_BUDGET, LabelledImages, find_overlap, load_images, present_columns
from .data.checks import budget_of_levels, check_sets
from .devices import default_device, usable_device
from .outputs import check_output_file, write_atomically
from .pipeline_jcdp import JointConditionalPurificationPipeline
from .purification_config import PurificationConfig
from .results import code_version, package_versions
from .train.provenance import check_trained_on
from .trials import Trial, given_seeds, is_model_of, measure, results_by_trial, spread_over_seeds
from .victims import Recipe, check_victim, choice, choose, recipes_of
from .victims.finetuning import COLLECTED, FINETUNE, INIT_FROM_HELP, start_in_words, start_of


# Of a trial, what every victim of a score has in common. What the trial leaves out is None.
REQUESTED = (
    "victim",
    "method",
    "width",
    "recipe",
    "countermeasure",
    "countermeasure_settings",
    "purification",
    "purifier",
    "draws",
    "train",
    "test",
    "probe",
    "whitening",
    "init_from",
    "pairs",
    "collected_images",
)


def score(
    train: LabelledImages,
    test: LabelledImages,
    *,
    victim: str | None = None,
    method: str = "supervised",
    probe: LabelledImages | None = None,
    width: int | None = None,
    protocol: str | Recipe | None = None,
    whitening: str = "training",
    collected: LabelledImages | None = None,
    collected_protected: LabelledImages | None = None,
    init_from: str | os.PathLike | None = None,
    finetune: str = "all",
    seeds: int | Sequence[int] = 3,
    countermeasure: str | None = None,
    purifier: str | os.PathLike | JointConditionalPurificationPipeline | None = None,
    purification: PurificationConfig | str | None = None,
    draws: int = 1,
    device: str | torch.device = "cpu",
    processes: int | None = 1,
    overlap_budget: float | None = USUAL_BUDGET,
    output: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    model_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """
    Score a training set by the victims that learn from it.

    Args:
        train (`LabelledImages`): The training set: clean, protected or purified.
        test (`LabelledImages`): Clean images of the same classes and size, none of which is in `train`; they are never
            altered.
        victim (`str`, *optional*): One of `victims.NAMES`; by default what suits the device, the recipe and the
            method, see [`victims.choice.choose`].
        method (`str`, defaults to `"supervised"`): How victims learn, one of `victims.METHODS`.
        probe (`LabelledImages`, *optional*): For a method without labels, clean labelled images of the same classes
            and size, which a linear layer on the victim's features is trained on.
        width (`int`, *optional*): The network's width; by default the recipe's.
        protocol (`str` or `Recipe`, *optional*): The victims' recipe: a name of `recipes_of(method)`, or a recipe; by
            default what suits device, victim and method.
        whitening (`str`, defaults to `"training"`): Whose patches the first layer of `"convnet94"` whitens: those of
            the training images, or of the `"collected"` ones.
        collected (`LabelledImages`, *optional*): For whitening or `init_from` `"collected"`, or for a countermeasure
            that needs pairs: unprotected images of the same shape, none of which is in `test`; their labels are not
            used.
        collected_protected (`LabelledImages`, *optional*): For a countermeasure that needs pairs: what the protection
            tool makes of collected images, under their ids.
        init_from (`str` or `os.PathLike`, *optional*): What victims start from instead of random weights:
            `"collected"`, for a network that SimCLR trains on the collected images; or a file, a folder or a Hub id,
            see `victims.finetuning`. The last layer is always new.
        finetune (`str`, defaults to `"all"`): Of such a network, what is trained: `"all"`, or the `"upper"` stages.
        seeds (`int` or `Sequence[int]`, defaults to 3): How many victims, with seeds 0, 1, ..., or the seeds
            themselves.
        countermeasure (`str`, *optional*): One of `countermeasures.NAMES`, or several joined by `"+"`.
        purifier, purification (*optional*): For a countermeasure that purifies; see `trials.Trial`.
        draws (`int`, defaults to 1): How often a countermeasure that purifies does it; victims train on one draw per
            epoch in turn.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where networks run.
        processes (`int`, *optional*, defaults to 1): Victims at a time on a CPU; None for one per processor.
        overlap_budget (`float`, *optional*, defaults to 16/255): A training image within this distance of a test
            image, as `data.check_roles` measures it, is refused as the same image under a perturbation. Images are in
            [0, 1]; None does not compare.
        output (`str` or `Path`, *optional*): JSON file for the result. The records of finished victims are kept beside
            it until all are done, so that the same call goes on where it was cut off.
        checkpoint_dir (`str` or `Path`, *optional*): Folder for a countermeasure's costly work.
        model_dir (`str` or `Path`, *optional*): Folder for the trained networks, as `<victim>-<seed>.safetensors`.
        progress (`bool`, defaults to `False`): Show a bar.

    Returns:
        `dict`: What `output` holds. `request` has everything that decides the figures, a purifier by its content.
        `accuracy`, `best_accuracy` and `train_accuracy` each have `mean`, `std` (over seeds, None for one) and
        `values`, all fractions in [0, 1]. `per_class_accuracy` is the mean over seeds by class; `confusion` counts
        test images of class row that were called class column, summed over seeds. `runs` has one entry per seed:
        figures, confusion, history, seconds and the trial's name. `prepare_seconds` is what the countermeasure took
        before training; `smoke` says that the figures mean nothing.

    Raises:
        ValueError: If the sets do not suit each other, overlap, or a name is unknown.
    """
    seeds, device = given_seeds(seeds), usable_device(device)
    engines.check("local", processes, device=device)
    if isinstance(protocol, str) and protocol not in (known := recipes_of(method)):
        raise ValueError(f"protocol is {protocol!r}, but must be one of {', '.join(known)} for method {method!r}.")
    victim, recipe = choose(victim, protocol, method, device=device, shape=train.images.shape[1:])
    victims.check_width(victim, recipe.width if width is None else width)
    countermeasure = countermeasure or "none"
    chosen = countermeasures.get(countermeasure, smoke=recipe.smoke)
    chosen.require_learning(method)
    chosen.require_draws(draws)
    trial = {"recipe": recipe, "victim": victim, "method": method, "width": width, "countermeasure": countermeasure}
    trial |= {"purifier": purifier, "purification": purification, "draws": draws}
    trial["init_from"] = start_of(init_from, finetune, collected, recipe)
    trial["pairs"] = chosen.pairs_of(collected_protected, collected)
    trial["collected"] = collected if chosen.needs_collected else None
    trial["whitening"] = collected if whitening == "collected" else None
    others = trial["pairs"] is not None or init_from == COLLECTED or chosen.needs_collected
    choice.check_whitening(whitening, collected, victim, otherwise_used=others)
    if output is not None:
        check_output_file(output)
    train, probe, test, names = _check_sets(train, probe, test, collected, overlap_budget, method)
    trial |= {"train": train, "test": test, "probe": probe}
    chosen.require_images(train)
    options = {"victim": victim, "method": method, "probe": probe, "num_classes": len(names)}
    check_victim(train, test, recipe=recipe.for_images(len(train)), **options)
    _check_purifier(countermeasure, purifier, purification, train, test)
    with tempfile.TemporaryDirectory() as temporary:
        trial["work_dir"] = Path(temporary if checkpoint_dir is None else checkpoint_dir)
        trials = [Trial(**trial, seed=seed, model_path=_model_path(model_dir, victim, seed)) for seed in seeds]
        request = _request(trials, names)
        if output is not None and (finished := _finished(Path(output), request, trials)) is not None:
            return finished
        records = Path(temporary) / "records.jsonl" if output is None else _records_beside(Path(output))
        measure(trials, records, device=device, processes=processes, progress=progress)
        result = _result(request, trials, records, names, purifier)
    if output is not None:
        write_atomically(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
        records.unlink()
    return result


def _model_path(model_dir: str | Path | None, victim: str, seed: int) -> Path | None:
    return None if model_dir is None else Path(model_dir) / f"{victim}-{seed}.safetensors"


def check_pair(
    train: LabelledImages, test: LabelledImages, overlap_budget: float | None = USUAL_BUDGET
) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """
    Make sure, before any costly work, that a victim can learn from one set and be tested on the other.

    Args:
        train, test (`LabelledImages`): The two roles.
        overlap_budget (`float`, *optional*): See `score`.

    Returns:
        `tuple[LabelledImages, LabelledImages, list[str]]`: The two sets with their labels in one space, and the names
        of the classes; their numbers where neither set has names.

    Raises:
        ValueError: In one sentence that names the set, the class or the images concerned.
    """
    train, test = check_sets({"train": train, "test": test}, {}).values()
    _refuse_overlap("train", train, test, overlap_budget)
    return train, test, list(train.class_names or map(str, range(train.num_classes)))


def _check_sets(
    train: LabelledImages,
    probe: LabelledImages | None,
    test: LabelledImages,
    collected: LabelledImages | None,
    overlap_budget: float | None,
    method: str,
) -> tuple[LabelledImages, LabelledImages | None, LabelledImages, list[str]]:
    """Training, probe and test images, once they are known to suit each other, and the names of the classes."""
    if method == "supervised" and probe is None:
        train, test, names = check_pair(train, test, overlap_budget)
    else:
        probe, test, names = _check_probe(train, probe, test, overlap_budget, method)
    if collected is not None:
        check_sets({"test": test}, {"collected": collected})
        _refuse_overlap("collected", collected, test, overlap_budget)
        _refuse_overlap("collected", collected, train, overlap_budget, "train")
    return train, probe, test, names


def _check_probe(
    train: LabelledImages,
    probe: LabelledImages | None,
    test: LabelledImages,
    overlap_budget: float | None,
    method: str,
) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """As `check_pair`, where the labels are those of the probe, and training images need none."""
    if (probe is None) != (method == "supervised"):
        given, needed = ("None", "labelled images") if probe is None else (f"{len(probe)} images", "None")
        raise ValueError(f"probe is {given}, but must be {needed} for method {method!r}.")
    probe, test, _ = check_sets({"probe": probe, "test": test}, {"train": train}).values()
    for role, data in (("train", train), ("probe", probe)):
        _refuse_overlap(role, data, test, overlap_budget)
    return probe, test, list(probe.class_names or map(str, range(probe.num_classes)))


def _refuse_overlap(
    role: str, data: LabelledImages, other: LabelledImages, budget: float | None, other_role: str = "test"
) -> None:
    pairs = [] if budget is None else find_overlap(data, other, budget=budget)
    if len(pairs):
        first, second = pairs[0]
        why = "a test image must not be trained on" if other_role == "test" else "they must be different images"
        raise ValueError(
            f"{role} and {other_role} have {len(np.unique(pairs[:, 1]))} images in common (same id, same pixels or "
            f"within {255 * budget:.0f}/255), the first {data.ids[first]!r} and {other.ids[second]!r}; {why}."
        )


def _check_purifier(countermeasure: str, purifier, purification, train: LabelledImages, test: LabelledImages) -> None:
    """Refuse a purifier that does not suit the images or the settings, or has seen them, before any costly work."""
    chosen = countermeasures.get(countermeasure)
    chosen.require(purifier)
    if not chosen.needs_purifier:
        for name, given in (("purifier", purifier), ("purification", purification)):
            if given is not None:
                raise ValueError(
                    f"{name} is given, but must be None for countermeasure {countermeasure!r}, which does not purify."
                )
        return
    if isinstance(purifier, JointConditionalPurificationPipeline):
        check_purifier_suits(chosen, purifier, purification, train)
        return
    pipe = JointConditionalPurificationPipeline.from_pretrained(purifier)
    check_purifier_suits(chosen, pipe, purification, train)
    check_trained_on(purifier, {"train": train, "test": test}, roles="disjoint")


def _request(trials: list[Trial], names: list[str]) -> dict[str, Any]:
    """Everything that decides the figures."""
    settings = {"method": trials[0].method, "draws": trials[0].draws} | trials[0].settings
    request = {name: settings.get(name) for name in REQUESTED}
    learned = ("train", trials[0].train) if trials[0].probe is None else ("probe", trials[0].probe)
    for role, data in (learned, ("test", trials[0].test)):
        counts = np.bincount(data.labels, minlength=len(names)).tolist()
        request[role] = request[role] | {"images_per_class": counts}
    return request | {"seeds": [trial.seed for trial in trials], "class_names": names}


def _records_beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.records.jsonl")


def _finished(output: Path, request: dict, trials: list[Trial]) -> dict[str, Any] | None:
    """The result in the output if it is that of the same request; None if there is none yet."""
    if not output.exists():
        return None
    try:
        found = json.loads(output.read_bytes())
        held = dict(found["request"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"output is {str(output)!r}, which holds something else, but must be an earlier score or a path where "
            "there is nothing yet."
        ) from error
    for name, wanted in request.items():
        if held.get(name) != wanted:
            raise ValueError(
                f"output is {str(output)!r}, but that file holds a score with another {name}; give another file."
            )
    for trial in trials:
        if trial.model_path is not None and not is_model_of(trial):
            raise ValueError(
                f"model_dir is {str(trial.model_path.parent)!r}, but {str(output)!r} has the figures of the victim "
                f"with seed {trial.seed}, whose model was not kept: another output trains it again."
            )
    return found


def _result(request: dict, trials: list[Trial], records: Path, names: list[str], purifier: Any) -> dict[str, Any]:
    """What `output` holds, from the records alone."""
    accuracy, details = (results_by_trial(records, what=what) for what in ("accuracy", "victim"))
    runs = [_run(trial, accuracy[trial.name]["value"], details[trial.name]["value"]) for trial in trials]
    per_class = zip(names, np.mean([run["per_class_accuracy"] for run in runs], axis=0).tolist())
    return {
        "request": request,
        "purifier": None if purifier is None else _title(purifier),
        "smoke": request["recipe"]["smoke"],
        **spread_over_seeds(trials, records),
        "per_class_accuracy": dict(per_class),
        "confusion": np.sum([run["confusion"] for run in runs], axis=0).tolist(),
        "runs": runs,
        "prepare_seconds": runs[0]["prepare_seconds"],
        "train_seconds": sum(run["seconds"] for run in runs),
        "device": accuracy[trials[0].name]["device"],
        "packages": package_versions(),
        "commit": code_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _run(trial: Trial, accuracy: float, details: dict) -> dict[str, Any]:
    confusion = np.array(details["confusion"])
    return {
        "seed": trial.seed,
        "trial": trial.name,
        "accuracy": accuracy,
        "best_accuracy": details["best_accuracy"],
        "train_accuracy": details["train_accuracy"],
        "knn_accuracy": details["knn_accuracy"],
        "per_class_accuracy": (confusion.diagonal() / confusion.sum(axis=1)).tolist(),
        "confusion": details["confusion"],
        "history": details["history"],
        "seconds": details["train_seconds"],
        "prepare_seconds": details["prepare_seconds"],
        "precision": details["precision"],
        "threads": details["threads"],
    }


def _title(purifier: Any) -> str:
    """What the caller calls the purifier, which its digest in the request does not say."""
    pipeline = isinstance(purifier, JointConditionalPurificationPipeline)
    return str(purifier.config.get("_name_or_path") if pipeline else purifier)


COLLECTED_HELP = "unprotected images for --whitening or --init_from collected, or for pairs; no labels needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `jcdp score`."""
    what = parser.add_argument_group("what to score")
    what.add_argument("--train", required=True, help="training set: folder, file or Hub id")
    what.add_argument("--test", required=True, help="clean test set of the same classes")
    what.add_argument("--train_split", help="the only one if not given, and so the next")
    what.add_argument("--test_split")
    what.add_argument("--probe", help="clean labelled images for a method without labels")
    what.add_argument("--probe_split")
    what.add_argument("--collected", help=COLLECTED_HELP)
    what.add_argument("--collected_split")
    what.add_argument("--collected_protected", help="of --collected what the protection tool makes, for pairs")
    what.add_argument("--collected_protected_split")
    what.add_argument("--image_column", help="found by its usual names if not given, and so the next")
    what.add_argument("--label_column", help="of images whose labels are used, and of others where they have it")
    what.add_argument("--image_size", type=int, help="side in pixels to which images are brought first")
    what.add_argument("--channels", type=int, choices=(1, 3), default=3)
    what.add_argument("--output", required=True, metavar="FILE.json")

    how = parser.add_argument_group("how")
    choice.add_arguments(how, default="supervised", help="how victims learn")
    how.add_argument("--init_from", help=INIT_FROM_HELP)
    how.add_argument("--finetune", default="all", choices=FINETUNE, help="with --init_from: all, or the upper stages")
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
    how.add_argument("--device", default=default_device())
    how.add_argument("--processes", type=int, help="victims at a time on a CPU; one per processor if not given")


def run(args: argparse.Namespace) -> None:
    """`jcdp score`, from parsed options to a line with the figure."""
    check_output_file(args.output, sources={"train": args.train, "test": args.test})
    budget = budget_of_levels(args.budget)
    roles = ("train", "test", "probe", "collected", "collected_protected")
    train, test, probe, collected, collected_protected = (_load(args, role) for role in roles)
    result = score(
        train,
        test,
        victim=args.victim,
        method=args.method,
        probe=probe,
        width=args.width,
        protocol=args.protocol,
        whitening=args.whitening,
        collected=collected,
        collected_protected=collected_protected,
        init_from=args.init_from,
        finetune=args.finetune,
        seeds=args.seeds,
        countermeasure=args.countermeasure,
        purifier=args.purifier,
        purification=args.preset,
        draws=args.draws,
        device=args.device,
        processes=args.processes,
        overlap_budget=budget,
        output=args.output,
        checkpoint_dir=args.checkpoint_dir,
        model_dir=args.model_dir,
        progress=True,
    )
    print(sentence(result))
    print(f"Record: {args.output}")


def sentence(result: dict[str, Any]) -> str:
    """The figure in words."""
    accuracy, request = result["accuracy"], result["request"]
    count = len(accuracy["values"])
    learner = request["victim"] if request["method"] == "supervised" else f"{request['victim']} by {request['method']}"
    victims_said = "1 victim" if count == 1 else f"{count} victims"
    spread = "" if accuracy["std"] is None else f" (standard deviation {100 * accuracy['std']:.1f})"
    with_measure = "" if request["countermeasure"] == "none" else f" with {request['countermeasure']}"
    with_measure += assumed(countermeasures.get(request["countermeasure"]).assumes)
    start = "" if request["init_from"] is None else f", {start_in_words(request['init_from'])},"
    other = "".join(
        f"; {words} {100 * result[figure]['mean']:.1f} %"
        for figure, words in (
            ("best_accuracy", "the best accuracy over epochs was"),
            ("knn_accuracy", "the nearest neighbours of their features got"),
        )
        if figure in result
    )
    smoke = " This was a smoke run: the figures mean nothing." if result["smoke"] else ""
    return (
        f"{victims_said} ({learner}, width {request['width']}, recipe {request['recipe']['name']})"
        f"{with_measure}{start} got {100 * accuracy['mean']:.1f} %{spread} of {request['test']['images']} test images "
        f"right after the last epoch{other}.{smoke}"
    )


def _load(args: argparse.Namespace, role: str) -> LabelledImages | None:
    if getattr(args, role) is None:
        return None
    source, split = getattr(args, role), getattr(args, f"{role}_split")
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    labels_used = role in ("test", "probe") or (role == "train" and args.method == "supervised")
    try:
        if not labels_used:
            columns = present_columns(source, columns, split=split)
        return load_images(source, split=split, image_size=args.image_size, channels=args.channels, **columns)
    except ValueError as error:  # says what is wrong, but not which option it is about
        raise ValueError(f"--{role} (with --{role}_split): {error}") from error
