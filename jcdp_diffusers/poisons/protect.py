"""
`jcdp poison`: a data set in, the protected data set out, with a card that says what was done to it.

The folder holds Parquet files with lossless images, ids and labels, and `README.md`, which is written last: a folder
with it is complete. Until then the state of a costly poison lies beside it in a hidden folder, and the same command
continues.
"""

import argparse
import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml

from .. import poisons
from ..data import LabelledImages, load_images, open_dataset, present_columns, write_dataset
from ..data.export import FORMATS
from ..data.perturbations import apply_perturbation, measured_norms, visibility, visibility_in_words
from ..devices import check_seed, default_device
from ..engines import folder_lock, say
from ..outputs import check_output_folder, printable, public_name, write_atomically
from ..results import package_versions
from ..saved_state import kept_seconds
from ..victims.checkpoints import digest
from .photographs import export, places_of_export, size_to_read
from .pretrained import public_weights
from .published import NORMS, ORDERS, check_budget, read_perturbation


CARD = "README.md"
_STATE = ".poison-state"
# By which a folder of this command is known, and what else it writes.
MARKS, OWN_NAMES = (CARD, _STATE), ("*-*-of-*.parquet",)
# Digests of what a request was given, and what a sentence calls a difference in them.
_GIVEN = {
    "content": "other images, ids or labels",
    "perturbation_content": "another perturbation",
    "in_order_of": "another set for in_order_of",
}
_FLAG = "protected"  # column that says which images are protected, where not all are
_OWN_COLUMNS = ("id", "image", "label")
# Options of the command that go with --method, and those that go with --perturbation.
_OF_METHODS, _OF_FILES = ("preset", "set"), ("kind", "order", "in_order_of", *NORMS)


def protect_dataset(
    data: LabelledImages,
    output_dir: str | Path,
    *,
    method: str,
    preset: Any = "published",
    seed: int = 0,
    fraction: float = 1.0,
    split: str = "train",
    device: str | torch.device = "cpu",
    columns: Mapping[str, Any] | None = None,
    features: datasets.Features | None = None,
    source: str | None = None,
    progress: bool = False,
) -> LabelledImages:
    """
    Poison a data set and write it to a folder; continue where an earlier call was interrupted.

    Args:
        data (`LabelledImages`): Images and ids, and labels where the method needs them.
        output_dir (`str` or `Path`): Folder, empty or of an earlier call with the same arguments. Images, ids and
            labels are among them. The cards of earlier versions have no digest of these; there the number, the ids,
            the shape and the labels are compared.
        method (`str`): One of `poisons.NAMES`.
        preset (`str` or dataclass, *optional*, defaults to `"published"`): See [`~poisons.Poison.settings`].
        seed (`int`, *optional*, defaults to 0): Of the poison and of the choice of images.
        fraction (`float`, *optional*, defaults to 1.0): Fraction of the images that is protected, above 0 and at most
            1; see [`protected_rows`]. The method is given these images alone. Below 1 the written rows have a column
            `protected`.
        split (`str`, *optional*, defaults to `"train"`): Name of the split that is written.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where surrogates run.
        columns (`dict`, *optional*): Further columns to write, one value per image.
        features (`datasets.Features`, *optional*): Types of these, where the values do not tell them.
        source (`str`, *optional*): What the card calls the data set.
        progress (`bool`, *optional*, defaults to `False`): Show a bar.

    Returns:
        `LabelledImages`: All images, as written.

    Raises:
        ValueError: If labels are missing, an argument is not accepted, or the folder holds something else.
    """
    poison = poisons.get(method)
    if poison.uses_labels and data.labels is None:
        raise ValueError(f"dataset has no labels, but {method} needs one for every image.")
    rows = _rows_to_protect(data, fraction, seed, columns)
    request = {
        "method": method,
        "preset": preset if isinstance(preset, str) else "custom",
        "settings": _public(asdict(poison.settings(preset))),
        "seed": seed,
        "fraction": fraction,
        "source": source,
        "split": split,
        "images": len(data),
        "content": _content(data),
    }
    output_dir = Path(output_dir)
    with contextlib.ExitStack() as stack:
        if (done := _finished(output_dir, request, data, stack)) is not None:
            if read_card(output_dir).get("file_digest", poison.file_digest) != poison.file_digest:
                say(
                    f"{output_dir} was made by another version of the file of {method}, and is taken as it is: "
                    "remove it to make it anew."
                )
            return done

        start = time.monotonic() - kept_seconds(output_dir / _STATE)
        chosen = data.subset(rows)
        perturbation = poison(
            chosen.tensor(),
            torch.from_numpy(chosen.labels) if poison.uses_labels else None,
            seed=seed,
            preset=preset,
            device=device,
            checkpoint_dir=output_dir / _STATE,
            progress=progress,
        )
        facts = request | {"reference": poison.source, "device": str(device), "file_digest": poison.file_digest}
        facts |= {"promised": poisons.budget(method, preset, tuple(perturbation.shape[1:]))}
        return _write(output_dir, data, rows, perturbation, split, columns, features, facts, start)


def protect_with_file(
    data: LabelledImages,
    output_dir: str | Path,
    *,
    perturbation: str | Path,
    kind: str | None = None,
    budget: Mapping[str, float] | None = None,
    order: str = "checked",
    in_order_of: LabelledImages | None = None,
    image_size: int | None = None,
    seed: int = 0,
    fraction: float = 1.0,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    features: datasets.Features | None = None,
    source: str | None = None,
) -> LabelledImages:
    """
    Add a published perturbation, or take published poisoned images, and write the result to a folder.

    Args:
        data (`LabelledImages`): The clean images.
        output_dir (`str` or `Path`): See [`protect_dataset`]; the content of the perturbation is compared too.
        perturbation, kind, budget, order, in_order_of, image_size: See [`read_perturbation`].
        seed (`int`, *optional*, defaults to 0): Of the choice of images.
        fraction, split, columns, features, source: See [`protect_dataset`].

    Returns:
        `LabelledImages`: All images, as written.
    """
    check_budget(budget or {})
    rows = _rows_to_protect(data, fraction, seed, columns)
    request = {
        "perturbation": Path(perturbation).name,
        "promised": dict(budget or {}),
        "fraction": fraction,
        "source": source,
        "split": split,
        "images": len(data),
        "content": _content(data),
        "perturbation_content": _content_of_files(Path(perturbation)),
        "kind": kind,
        "order": order,
        "in_order_of": None if in_order_of is None else _content(in_order_of),
    }
    if fraction < 1:
        request["seed"] = seed
    output_dir = Path(output_dir)
    with contextlib.ExitStack() as stack:
        if (done := _finished(output_dir, request, data, stack)) is not None:
            return done
        start = time.monotonic()
        how = {"kind": kind, "budget": budget, "order": order, "in_order_of": in_order_of, "image_size": image_size}
        delta, recognised = read_perturbation(perturbation, data, **how)
        facts = request | {"recognised": recognised}
        return _write(output_dir, data, rows, delta[rows], split, columns, features, facts, start)


def protected_rows(count: int, fraction: float, seed: int) -> np.ndarray:
    """
    The rows of a data set that are protected, drawn at random whatever their class.

    Args:
        count (`int`): Rows of the data set.
        fraction (`float`): Fraction of them, above 0 and at most 1. Rounded to a whole number of rows, one at least.
        seed (`int`): Of the draw.

    Returns:
        `np.ndarray`: Row numbers, ascending; all of them for a fraction of 1.

    Raises:
        ValueError: If the fraction lies outside, or the seed is none.
    """
    check_seed(seed)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must be above 0 and at most 1.")
    chosen = max(1, round(fraction * count))
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:chosen])


def _rows_to_protect(
    data: LabelledImages, fraction: float, seed: int, columns: Mapping[str, Any] | None
) -> np.ndarray:
    """As `protected_rows`; a column in which these could not be told is refused."""
    rows = protected_rows(len(data), fraction, seed)
    if len(rows) < len(data) and _FLAG in (columns or {}):
        raise ValueError(f"dataset has a column {_FLAG!r}, but a fraction below 1 needs that name for its own.")
    return rows


def read_card(folder: str | Path, *, argument: str = "output_dir") -> dict[str, Any]:
    """
    What the card of a protected data set says of its poison.

    Args:
        folder (`str` or `Path`): What `jcdp poison` wrote.
        argument (`str`, *optional*, defaults to `"output_dir"`): What the folder is called where it is given.

    Raises:
        ValueError: If the folder has no such card.
    """
    if (facts := _card_of(folder)) is None:
        raise ValueError(f"{argument} is {str(folder)!r}, but its {CARD} must be the card of a protected data set.")
    return facts


def _card_of(folder: str | Path) -> dict[str, Any] | None:
    """As `read_card`, but None where there is no such card."""
    path = Path(folder) / CARD
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        facts = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (ValueError, yaml.YAMLError):  # somebody else's
        return None
    poison = facts.get("poison") if isinstance(facts, dict) else None
    if not isinstance(poison, dict) or not isinstance(poison.get("measured"), dict) or "images" not in poison:
        return None
    # The first cards are of sets that are protected as a whole, and do not say so.
    return {"fraction": 1.0, "protected_images": poison["images"]} | poison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jcdp poison`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=poisons.NAMES, help="poison to make")
    what.add_argument(
        "--perturbation",
        help="published perturbation (.pt, .npy, .npz, .safetensors) or folder of poisoned images to use instead",
    )
    parser.add_argument("--dataset", required=True, help="Hub id, folder or file of clean images with labels")
    parser.add_argument("--split", help="split to protect; may be left out if there is only one")
    parser.add_argument("--image_column")
    parser.add_argument("--label_column")
    parser.add_argument(
        "--image_size", type=int, help="side in pixels to which images are brought first; chosen for assorted ones"
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--output", required=True, help="folder for the protected data set")
    parser.add_argument(
        "--export",
        metavar="FOLDER",
        help="also write the protected pictures under their own file names, photographs at their own size",
    )
    parser.add_argument(
        "--export_format", choices=tuple(FORMATS), help="of --export, png if not given; jpg weakens a protection"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the images, drawn by --seed")
    parser.add_argument("--preset", help="published (the default), cpu, smoke or one of the method's own")
    parser.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        help="one of the preset's numbers, to be replaced; may be given several times: --set surrogate=squeezenet1_0",
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument(
        "--kind", choices=("sample-wise", "class-wise"), help="of --perturbation, where its length does not tell"
    )
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="of --perturbation's rows, checked by default: given takes noise that was never clipped, whose order "
        "cannot be checked",
    )
    parser.add_argument(
        "--in_order_of",
        help="the clean images in the order of --perturbation (torchvision's, say), where --dataset has another: "
        "folder, .npz or Hub id",
    )
    for norm, unit in (("linf", "in 1/255"), ("l2", "images in [0, 1]"), ("l0", "pixels")):
        parser.add_argument(f"--{norm}", type=float, help=f"declared budget of --perturbation, {unit}")


def run(args: argparse.Namespace) -> None:
    """`jcdp poison`, from parsed options to a line that says what was written."""
    what, others = ("method", _OF_FILES) if args.method is not None else ("perturbation", _OF_METHODS)
    if given := [name for name in others if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0]} is {getattr(args, given[0])!r}, but must be left out with --{what}.")
    sources = {"--dataset": args.dataset, "--perturbation": args.perturbation}
    check_output_folder(args.output, marks=MARKS, own=OWN_NAMES, sources=sources, name="--output")
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    where = {"split": args.split} | columns
    args.image_size = size_to_read(args, where)
    data = load_images(args.dataset, image_size=args.image_size, channels=args.channels, **where)
    places = places_of_export(args, data, fresh=not (Path(args.output) / CARD).exists())
    others, features = _other_columns(args.dataset, args.split, columns)
    before = _card_of(args.dataset) if args.fraction == 1 else None
    if before is not None and before["fraction"] < 1:  # its column says which part was protected, and now all are
        others[_FLAG] = [True] * len(data)
    split = args.split or "train"
    if args.method is not None:
        protect_dataset(
            data,
            args.output,
            method=args.method,
            preset=poisons.get(args.method).changed(
                args.preset or "published", _changes(args.set or []), name="--set"
            ),
            seed=args.seed,
            fraction=args.fraction,
            split=split,
            device=args.device,
            columns=others,
            features=features,
            source=public_name(args.dataset),
            progress=True,
        )
    else:
        declared = {norm: getattr(args, norm) for norm in NORMS if getattr(args, norm) is not None}
        sizes = {"image_size": args.image_size, "channels": args.channels}
        ordered = None
        if args.in_order_of is not None:
            named = present_columns(args.in_order_of, columns, split=args.split)
            ordered = load_images(args.in_order_of, split=args.split, **named, **sizes)
        protect_with_file(
            data,
            args.output,
            perturbation=args.perturbation,
            kind=args.kind,
            budget=declared,
            order=args.order or "checked",
            in_order_of=ordered,
            image_size=args.image_size,
            seed=args.seed,
            fraction=args.fraction,
            split=split,
            columns=others,
            features=features,
            source=public_name(args.dataset),
        )
    if args.export is not None:
        protected = load_images(args.output, split=read_card(args.output)["split"], channels=args.channels)
        export(args, data, protected, dict(zip(data.ids, places)), where)
    card = read_card(args.output)
    if "recognised" in card:
        print("; ".join(f"{name}: {value}" for name, value in card["recognised"].items()))
    norms = ", ".join(f"{name} {value:.4g}" for name, value in card["measured"].items())
    few = f"{card['protected_images']} protected images of {len(data)}"
    print(f"{few} in {args.output}; after 8-bit rounding: {norms}")


def _changes(entries: list[str]) -> dict[str, Any]:
    """What `--set` says, by field; values as YAML has them."""
    changes = {}
    for entry in entries:
        name, given, value = entry.partition("=")
        if not given:
            raise ValueError(f"--set is {entry!r}, but must be FIELD=VALUE.")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set is {entry!r}, but its value must be a number or a word.") from error
        if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", value, re.IGNORECASE):
            changes[name] = float(value)  # YAML takes 1e-3, without a point or a sign, for a word
    return changes


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a card has them: without where weights lie on this machine."""
    return settings | ({"weights": public_weights(settings["weights"])} if "weights" in settings else {})


def _content(data: LabelledImages) -> str:
    """32 hexadecimal digits of images, ids and labels, in order."""
    ids = torch.from_numpy(np.frombuffer("\n".join(data.ids).encode(), np.uint8).copy())
    labels = () if data.labels is None else (torch.from_numpy(data.labels),)
    return digest(torch.from_numpy(np.ascontiguousarray(data.images)), ids, *labels)


def _content_of_files(path: Path) -> str:
    """32 hexadecimal digits of a file, or of all files of a folder and their names in it."""
    if not path.exists():
        raise ValueError(f"perturbation is {str(path)!r}, but there is no such file.")
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            found.update(file.relative_to(path).as_posix().encode())
            found.update(hashlib.file_digest(opened, "blake2b").digest())
    return found.hexdigest()


def _finished(
    output_dir: Path, request: Mapping[str, Any], data: LabelledImages, stack: contextlib.ExitStack
) -> LabelledImages | None:
    """
    The images of an earlier call with the same request for `data`; None if the folder waits to be filled.

    A folder that waits gets the folder of the poison's state, by which the next call knows it, and is kept from other
    commands for as long as the stack is open. One that is finished is only read.
    """
    check_output_folder(output_dir, marks=MARKS, own=OWN_NAMES)
    if not (output_dir / CARD).exists():
        (output_dir / _STATE).mkdir(parents=True, exist_ok=True)
        stack.enter_context(folder_lock(output_dir / ".lock"))
    if not (output_dir / CARD).exists():  # whoever had the lock before may have written it
        return None
    facts = read_card(output_dir)
    known = "content" in facts  # cards of earlier versions have none of the digests
    if facts.get("order") not in ORDERS:  # and tell the order only where it is given
        facts["order"] = "checked"
    for name, wanted in yaml.safe_load(yaml.safe_dump(_plain(request))).items():
        if facts.get(name) == wanted or (not known and name in (*_GIVEN, "kind")):
            continue
        held = f"a data set of {name} {facts.get(name)!r} instead of {wanted!r}"
        if name in _GIVEN:
            held = f"a data set that was made with {_GIVEN[name]}"
        raise _another_request(output_dir, held)
    done = load_images(output_dir, split=facts["split"], channels=data.images.shape[3])
    if not known:
        _compare_stored(output_dir, done, data)
    return done


def _compare_stored(output_dir: Path, done: LabelledImages, data: LabelledImages) -> None:
    """Refuse a finished set, whose card has no digests, if its rows cannot be those of `data`."""
    pairs = {
        "ids": (done.ids, data.ids),
        "shape": (done.images.shape, data.images.shape),
        "labels": tuple(None if one.labels is None else one.labels.tolist() for one in (done, data)),
    }
    for name, (stored, wanted) in pairs.items():
        if stored != wanted:
            raise _another_request(output_dir, f"a data set of an earlier version with other {name}")


def _another_request(output_dir: Path, held: str) -> ValueError:
    return ValueError(
        f"output is {str(output_dir)!r}, which holds {held}, but must be an empty folder or one of the same request."
    )


def _write(
    output_dir: Path,
    data: LabelledImages,
    rows: np.ndarray,
    perturbation: torch.Tensor,
    split: str,
    columns: Mapping[str, Any] | None,
    features: datasets.Features | None,
    facts: dict[str, Any],
    start: float,
) -> LabelledImages:
    """Add the perturbation to the rows that it is of, and write all rows and the card."""
    from ..perceptual import lpips_at_hand  # loads diffusers, which nothing else here needs

    columns = dict(columns or {})
    images = data.images.copy()
    images[rows] = apply_perturbation(data.images[rows], perturbation)
    if np.array_equal(images, data.images):
        name = facts.get("method", facts.get("perturbation"))
        raise ValueError(
            f"The perturbation of {name} changes no image after rounding to 8 bits, but must change some: a larger "
            "bound or norm does."
        )
    protected = data.with_images(images)
    if len(rows) < len(data):
        columns[_FLAG] = np.isin(np.arange(len(data)), rows).tolist()
    write_dataset(output_dir, protected, split=split, columns=columns, features=features)
    facts |= {
        "split": split,
        "protected_images": len(rows),
        "measured": measured_norms(data.images[rows], images[rows]),
        "visibility": visibility(data.images[rows], images[rows], perceptual=lpips_at_hand()),
        "seconds": round(time.monotonic() - start, 1),
        "packages": package_versions(),
    }
    write_atomically(output_dir / CARD, _card(_plain(facts)))
    shutil.rmtree(output_dir / _STATE, ignore_errors=True)
    return protected


def _card(facts: dict[str, Any]) -> str:
    front = yaml.safe_dump({"tags": ["unlearnable-examples"], "poison": facts}, sort_keys=False, allow_unicode=True)
    name = facts.get("method", facts.get("perturbation"))
    lines = [
        f"---\n{front}---\n",
        f"# Protected by {_cell(name)}\n",
        "The images carry a perturbation that is meant to keep classifiers from learning anything useful of them. "
        "A row's `id` is that of the clean image that it was made from; `label` is unchanged.\n",
        "| | |",
        "|---|---|",
        f"| poison | {_cell(name)} |",
    ]
    for title, key in (("preset", "preset"), ("source", "reference"), ("seed", "seed"), ("clean images", "source")):
        if facts.get(key) is not None:
            lines.append(f"| {title} | {_cell(facts[key])} |")
    if facts["protected_images"] < facts["images"]:
        few = f"{facts['protected_images']} of {facts['images']} (fraction {facts['fraction']:g})"
        lines.append(f"| protected images | {few}; the column `{_FLAG}` says which |")
    settings = _flat(facts.get("settings") or facts.get("recognised") or {})
    published = _published(facts["method"], settings) if "method" in facts else {}
    for key, value in settings.items():
        known = published.get(key, [value])
        scaled = "" if value in known else f" (published: {' or '.join(map(str, known))})"
        lines.append(f"| `{_cell(key)}` | {_cell(value)}{scaled} |")
    for key, value in facts["promised"].items():
        lines.append(f"| declared {key} | {value:g} |")
    for key, value in facts["measured"].items():
        lines.append(f"| measured {key}, after rounding to 8 bits | {value:.4g} |")
    lines.append("\nL-infinity is in 1/255, L2 for images in [0, 1], L0 in pixels; L2 and L0 are per image.\n")
    lines += ["## How visible it is\n", f"Over the {facts['visibility']['images']} images that it changes.\n"]
    lines += ["| measure | mean, spread over images, and the most visible |", "|---|---|"]
    lines += [f"| {title} | {said} |" for title, said in visibility_in_words(facts["visibility"])]
    lines.append("")
    return "\n".join(lines)


def _published(method: str, settings: Mapping[str, Any]) -> dict[str, list]:
    """
    The published numbers that a card shows beside others, by name: those for the same framework where there are
    several, and the one for CIFAR-100 where it is another.
    """
    presets = poisons.get(method).presets
    usual = presets.get(settings.get("framework"), presets["published"])
    usual, other = (_flat(_plain(asdict(one))) for one in (usual, presets.get("cifar100", usual)))
    return {key: [value] if other[key] == value else [value, other[key]] for key, value in usual.items()}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by the names of both: `start.rounds`."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _cell(value: Any) -> str:
    """A value in a table of Markdown."""
    return printable(str(value)).replace("|", r"\|").replace("<", r"\<")


def _other_columns(
    source: str, split: str | None, columns: Mapping[str, str | None]
) -> tuple[dict[str, list], datasets.Features]:
    """Whatever the source has beside id, image and label, and its types."""
    rows = open_dataset(source, split=split, streaming=True, **columns)
    features = datasets.Features({name: one for name, one in rows.features.items() if name not in _OWN_COLUMNS})
    found = {name: [] for name in features}
    for row in rows.select_columns(list(features)) if features else ():
        for name in features:
            found[name].append(row[name])
    return found, features


def _plain(value: Any) -> Any:
    """`value` in YAML's own types."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
