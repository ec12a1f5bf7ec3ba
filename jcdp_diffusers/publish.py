"""
`jcdp publish`: a purifier, or protected data sets, with all that the Hub reads, in one commit.

A purifier's repository gets its card anew under its name on the Hub, and `.eval_results/jcdp.yaml` from the report of
an audit. Protected sets become one data set with a configuration per poison and, where clean test images come along,
an `eval.yaml` that declares it a benchmark. Formats: https://huggingface.co/docs/hub/eval-results.
"""

import argparse
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import DatasetCardData, EvalResultEntry, eval_result_entries_to_yaml
from PIL import Image

from .data import USUAL_BUDGET, LabelledImages, find_overlap, load_images, open_dataset, parquet_files, write_dataset
from .data.checks import check_sets
from .data.photographs import sizes_in_words, stored_sizes
from .engines import say
from .hub import EVAL_RESULTS, files_of_dataset, files_of_purifier, push_files
from .outputs import printable, public_name
from .poisons.protect import read_card
from .purify.dataset_card import SUMMARY_NAME
from .purify.manifest import RUN_NAME
from .repository import check_folder
from .train.model_card import purifier_card
from .train.provenance import TRAINED_ON_NAME, trained_on
from .train.reading import read_json
from .train.record import RECORD_NAME, read_record
from .trials import purifier_digest


CARD, EVAL = "README.md", "eval.yaml"
ARXIV = "https://arxiv.org/abs/2305.09241"
KINDS = ("purifier", "dataset")
TEST = "test"  # folder and split of the clean test images
_REPORT = {
    "rows": list,
    "purifier.digest": str,
    "victims": dict,
    "smoke": bool,
    "data.division.stand_in": bool,
    "time": str,
}
_BODY = """
# {title}

Images that carry a perturbation which is meant to keep classifiers from learning anything useful of them
("unlearnable examples", "availability poisons"). Each configuration has another method's perturbation. Made with
jcdp-diffusers, to find out which protection survives a countermeasure, such as the purification of
[*Unlearnable Examples Give a False Sense of Security: Piercing through Unexploitable Data with Learnable
Examples*]({arxiv}).

```python
from datasets import load_dataset

protected = load_dataset("{repo_id}", "{first}", split="{split}")
```

| configuration | poison | source | preset | seed | protected images | largest change, of 255 | mean L2 norm |
|---|---|---|---|---|---|---|---|
{rows}

L2 norms are per image, for images in [0, 1]. Both are measured after rounding to 8 bits. A row's `id` is that of the
clean image that it was made from. Labels are unchanged.
{test}
## Intended use

To measure protections and countermeasures against each other, and to teach what such noise looks like.

## Not to be used

As a training set: models that are trained on it fail on clean images. As evidence that a protection is safe: one that
survives the known countermeasures may fall to the next. To train on images against the will of those they belong to or
show. The licence of the clean images goes on to apply.
"""
_TEST = """
Each configuration has the same clean images as split `test`. Train on the protected ones, after any countermeasure
that never saw the clean originals or the test images, and report the accuracy on `test`.
"""


def purifier_files(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    report: str | os.PathLike | None = None,
    benchmark: str | None = None,
    task: str | None = None,
) -> dict[str, Path | bytes]:
    """
    All files of a purifier's repository on the Hub.

    Args:
        folder (`str` or `os.PathLike`): What `train_purifier` or an audit wrote. Without `training_record.json` its
            `README.md` is taken as it is.
        repo_id (`str`): Its name on the Hub.
        license (`str`, *optional*): Identifier of the licence, as the Hub spells it.
        report (`str` or `os.PathLike`, *optional*): `report.json` of an audit that used this purifier.
        benchmark, task (`str`, *optional*): Data set on the Hub that was audited, and its task; given with `report`.

    Returns:
        `dict`: Path in the repository -> file, or its content.

    Raises:
        OSError: If the folder is no purifier.
        ValueError: If there is neither card nor record, or the report is of another purifier.
    """
    folder = Path(folder)
    check_folder(folder)
    files: dict[str, Path | bytes] = dict(files_of_purifier(folder))
    if (folder / RECORD_NAME).is_file():
        files[CARD] = str(purifier_card(read_record(folder), repo_id=repo_id, license=license)).encode()
    elif license is not None or CARD not in files:
        raise ValueError(
            f"source is {str(folder)!r}, but must hold a {RECORD_NAME}, from which a card is made, or a {CARD}; with "
            "a license, the former."
        )
    if len({report is None, benchmark is None, task is None}) > 1:
        raise ValueError(
            f"report is {report!r}, benchmark {benchmark!r} and task {task!r}, but all three must be given or none."
        )
    if report is not None:
        entry = _result(Path(report), folder, repo_id, benchmark, task)
        files[EVAL_RESULTS] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()
    return files


def _result(report: Path, folder: Path, repo_id: str, benchmark: str, task: str) -> EvalResultEntry:
    """What an audit measured of victims that were trained on purified images, in %."""
    facts = read_json(report, _REPORT)
    if facts["smoke"]:
        raise ValueError(f"report is {str(report)!r}, which is of a smoke run, but must be of a whole audit.")
    if facts["data"]["division"]["stand_in"]:
        raise ValueError(
            f"report is {str(report)!r}, whose test images are purified ones, but must be of an audit with clean ones."
        )
    if facts["purifier"]["digest"] != purifier_digest(folder):
        raise ValueError(f"report is {str(report)!r}, which is of another purifier, but must be of {str(folder)!r}.")
    accuracy = {row["row"]: row["accuracy"] for row in facts["rows"]}
    victims = facts["victims"]
    others = [f"{row} {100 * accuracy[row]['mean']:.1f}" for row in ("clean", "protected") if row in accuracy]
    spread = accuracy["purified"]["std"]
    notes = [
        f"test accuracy in % of {victims['victim']} of width {victims['width']} after purification",
        f"recipe {victims['recipe']['name']}, seeds {', '.join(map(str, victims['seeds']))}",
        *([] if spread is None else [f"standard deviation {100 * spread:.1f}"]),
        f"without it: {', '.join(others)}",
    ]
    return EvalResultEntry(
        dataset_id=benchmark,
        task_id=task,
        value=round(100 * accuracy["purified"]["mean"], 2),
        date=facts["time"],
        source_url=f"https://huggingface.co/{repo_id}",
        source_name="jcdp audit",
        notes="; ".join(notes),
    )


def dataset_files(
    folders: Sequence[str | os.PathLike],
    repo_id: str,
    *,
    test: str | os.PathLike | None = None,
    test_split: str | None = None,
    title: str | None = None,
    license: str | None = None,
) -> dict[str, Path | bytes]:
    """
    All files of a protected data set on the Hub, with a configuration per poison.

    Args:
        folders (`Sequence`): What `jcdp poison` wrote, one for each poison; or one folder that `jcdp purify` wrote,
            which is published as it is.
        repo_id (`str`): Its name on the Hub.
        test (`str` or `os.PathLike`, *optional*): Clean test images with labels, anything that `load_images` opens.
            All configurations get them, as lossless Parquet, with the classes numbered as the protected images' are.
        test_split (`str`, *optional*): Of `test`, where it has several.
        title (`str`, *optional*): Of the card; the name on the Hub by default.
        license (`str`, *optional*): Of the images, as the Hub spells it.

    Returns:
        `dict`: Path in the repository -> file, or its content.

    Raises:
        ValueError: If a folder is none of the two, two are of one poison, or a test image is a protected one or does
            not suit them.
    """
    folders = [Path(folder) for folder in folders]
    if any((folder / SUMMARY_NAME).is_file() for folder in folders):
        if len(folders) > 1 or test is not None or license is not None or title is not None:
            raise ValueError(
                f"source is {', '.join(map(repr, map(str, folders)))}, but a purified data set must be published "
                "alone, without test, license or title: it has a card of its own."
            )
        return dict(files_of_dataset(folders[0]))
    files, configs, sets = {}, {}, {}
    for folder in folders:
        if (folder / RUN_NAME).is_file():
            raise ValueError(
                f"source is {str(folder)!r}, whose purification is not finished, but must be whole: give the command "
                "that began it again."
            )
        facts = read_card(folder, argument="source")
        name = _config_name(facts)
        if name in configs:
            raise ValueError(f"source is {str(folder)!r}, a second one of {name!r}, but must be of another poison.")
        configs[name] = facts
        files |= {f"{name}/{path.name}": path for path in _parquet(folder)}
        if test is not None:
            if TEST in (name, facts["split"]):
                named = "poison" if name == TEST else "split"
                raise ValueError(
                    f"source is {str(folder)!r}, whose {named} is called {TEST!r}, but must be called something else "
                    "where there are test images."
                )
            sets[name] = load_images(folder, split=facts["split"], channels=_channels(folder, facts["split"]))
    if test is not None:
        files |= _test_files(test, test_split, sets)
        files[EVAL] = yaml.safe_dump(_benchmark(configs, title or repo_id), sort_keys=False).encode()
    files[CARD] = _card(configs, repo_id, title or repo_id.split("/")[-1], license, test is not None).encode()
    return files


def _config_name(facts: Mapping[str, Any]) -> str:
    """A configuration's name: letters, digits, dots, dashes and underscores."""
    if "method" in facts:
        return facts["method"]
    return re.sub(r"[^\w.-]+", "-", Path(facts["perturbation"]).stem)


def _parquet(folder: Path) -> list[Path]:
    if not (found := parquet_files(folder)):
        raise ValueError(f"source is {str(folder)!r}, but must hold Parquet files, as this package writes them.")
    return found


def _channels(folder: Path, split: str) -> int:
    """Of the images that `jcdp poison` has written: all alike, 1 or 3."""
    first = next(iter(open_dataset(folder, split=split, streaming=True)))["image"]
    with Image.open(io.BytesIO(first["bytes"])) as picture:
        return len(picture.getbands())


def _test_files(
    test: str | os.PathLike, split: str | None, protected: Mapping[str, LabelledImages]
) -> dict[str, bytes]:
    """The clean test images as a split that all configurations share: path in the repository -> content."""
    first = next(iter(protected))
    height, width, channels = protected[first].images.shape[1:]
    try:
        sizes, side = stored_sizes(test, split=split), None
        if len(set(sizes)) > 1 and height == width:
            side = height
            say(f"--test: {sizes_in_words(sizes)}: their centres at {side}x{side} pixels, as the protected images.")
        tested = load_images(test, split=split, image_size=side, channels=channels)
    except ValueError as error:
        raise ValueError(f"--test, --test_split: {error}") from error
    numbered = {name: _numbered_as(name, data, tested) for name, data in protected.items()}
    for name, labels in numbered.items():
        if not np.array_equal(labels, numbered[first]):
            raise ValueError(
                f"source has {name!r}, whose classes have other numbers than those of {first!r}, but all must have "
                "the same: they share their test images."
            )
    names, texts = protected[first].class_names, protected[first].ranked_by_text
    joined = dataclasses.replace(tested, labels=numbered[first], class_names=names, ranked_by_text=texts)
    with tempfile.TemporaryDirectory() as folder:
        return {f"{TEST}/{path.name}": path.read_bytes() for path in write_dataset(folder, joined, split=TEST)}


def _numbered_as(name: str, data: LabelledImages, tested: LabelledImages) -> np.ndarray:
    """Labels of the test images, by the numbers that a protected set gives to the same classes."""
    ours, theirs = check_sets({name: data, "test": tested}, {}).values()
    if len(pairs := find_overlap(data, tested, budget=USUAL_BUDGET)):
        raise ValueError(
            f"test has the image {tested.ids[pairs[0, 1]]!r}, which is the protected one {data.ids[pairs[0, 0]]!r} "
            f"(same id, same pixels or within {255 * USUAL_BUDGET:.0f}/255), but must have others."
        )
    own = dict(zip(ours.labels.tolist(), data.labels.tolist()))
    return np.array([own[label] for label in theirs.labels.tolist()])


def _benchmark(configs: Mapping[str, Any], title: str) -> dict:
    """`eval.yaml`: a task for each poison."""
    return {
        "name": title,
        "description": "Test accuracy on clean images of a classifier that was trained on protected images after a "
        "countermeasure, which never saw the clean originals or the test images.",
        "evaluation_framework": "jcdp-diffusers",
        "tasks": [{"id": name, "config": name, "split": TEST} for name in configs],
    }


def _card(configs: Mapping[str, Mapping], repo_id: str, title: str, license: str | None, tested: bool) -> str:
    data = DatasetCardData(
        pretty_name=title,
        license=license,
        task_categories=["image-classification"],
        tags=["unlearnable-examples", "data-protection", "jcdp-diffusers"],
        configs=[
            {
                "config_name": name,
                "data_files": [{"split": facts["split"], "path": f"{name}/*.parquet"}]
                + ([{"split": TEST, "path": f"{TEST}/*.parquet"}] if tested else []),
            }
            for name, facts in configs.items()
        ],
    )
    first = next(iter(configs))
    rows = "\n".join(_row(name, facts) for name, facts in configs.items())
    body = _BODY.format(
        title=title,
        arxiv=ARXIV,
        repo_id=repo_id,
        first=first,
        split=configs[first]["split"],
        rows=rows,
        test=_TEST if tested else "",
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _row(name: str, facts: Mapping[str, Any]) -> str:
    measured = facts["measured"]
    cells = (
        f"`{name}`",
        facts.get("method", facts.get("perturbation")),
        facts.get("reference", "a published file"),
        facts.get("preset", ""),
        facts.get("seed", ""),
        f"{facts['protected_images']} of {facts['images']}",
        f"{measured['linf']:g}",
        f"{measured['l2_mean']:.3f}",
    )
    return "| " + " | ".join(printable(str(cell)).replace("|", r"\|").replace("<", r"\<") for cell in cells) + " |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jcdp publish`."""
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument(
        "--source", nargs="+", required=True, help="folder of the purifier; one per poison of a data set"
    )
    parser.add_argument("--repo_id", required=True, help="name on the Hub: NAMESPACE/NAME")
    parser.add_argument("--dry_run", action="store_true", help="list the files and push nothing")
    parser.add_argument("--private", action="store_true", default=None, help="for a repository that is made now")
    parser.add_argument(
        "--license", help="identifier as the Hub spells it, such as cc-by-4.0; it depends on the images"
    )
    parser.add_argument("--report", help="of a purifier: report.json of an audit that used it")
    parser.add_argument("--benchmark", help="of a purifier, with --report: data set on the Hub that was audited")
    parser.add_argument("--task", help="of a purifier, with --report: task of --benchmark, the poison's name")
    parser.add_argument("--test", help="of a data set: clean test images with labels, for a benchmark")
    parser.add_argument("--test_split", help="of --test; may be left out if there is only one")
    parser.add_argument("--title", help="of a data set's card; the name by default")


def run(args: argparse.Namespace) -> None:
    """`jcdp publish`: list the files, then push them unless it is a dry run."""
    others = {"purifier": ("test", "test_split", "title"), "dataset": ("report", "benchmark", "task")}[args.kind]
    if given := [name for name in others if getattr(args, name) is not None]:
        raise ValueError(f"{given[0]} is {getattr(args, given[0])!r}, but must be left out for a {args.kind}.")
    if args.kind == "purifier":
        if len(args.source) > 1:
            raise ValueError(f"source is {args.source!r}, but must be one folder for a purifier.")
        (folder,) = args.source
        options = {name: getattr(args, name) for name in ("license", "report", "benchmark", "task")}
        files = purifier_files(folder, args.repo_id, **options)
        if trained_on(folder) is None:
            print(f"There is no {TRAINED_ON_NAME} of these weights: an audit cannot tell which images trained them.")
    else:
        options = {name: getattr(args, name) for name in ("test", "test_split", "title", "license")}
        files = dataset_files(args.source, args.repo_id, **options)
        if EVAL not in files and CARD in files and isinstance(files[CARD], bytes):
            print(f"There are no test images, so there is no {EVAL}: --test names some.")
    repo_type = "model" if args.kind == "purifier" else "dataset"
    sizes = {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in files.items()}
    for name, size in sorted(sizes.items()):
        print(f"{size:>14,}  {name}")
    print(f"{sum(sizes.values()):>14,}  bytes in {len(files)} files for the {repo_type} {args.repo_id}")
    if args.dry_run:
        print("Nothing was pushed: this was a dry run.")
        return
    message = f"Upload {', '.join(public_name(source) for source in args.source)}"
    options = {"repo_type": repo_type, "private": args.private, "commit_message": message}
    print(push_files(files, args.repo_id, **options))
