"""`jcdp poison`: a data set in, the protected data set out, with a card that says what was done to it.

The folder holds Parquet files with lossless images, ids and labels, and `README.md`, which is written last: a folder
with it is complete. Until then the state of a costly poison lies beside it in a hidden folder, and the same command
goes on from there.
"""

import argparse
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from .. import poisons
from ..data import LabelledImages, load_images, open_dataset, write_dataset
from ..data.perturbations import apply_perturbation, measured_norms
from ..results import package_versions
from .published import read_perturbation


CARD = "README.md"
_STATE = ".poison-state"


def protect_dataset(
    data: LabelledImages,
    output_dir: str | Path,
    *,
    method: str,
    preset: Any = "published",
    seed: int = 0,
    split: str = "train",
    device: str | torch.device = "cpu",
    columns: Mapping[str, Any] | None = None,
    source: str | None = None,
    progress: bool = False,
) -> LabelledImages:
    """Poisons a labelled data set and writes it to a folder; goes on where an earlier call was cut off.

    Args:
        data: images, labels and ids.
        output_dir: folder, empty or of an earlier call with the same arguments.
        method: one of `poisons.NAMES`.
        preset: see `poisons.settings`.
        seed: of the poison.
        split: name of the split that is written.
        device: where surrogates run.
        columns: further columns to write, one value per image.
        source: what the card calls the data set.
        progress: whether to show a bar.

    Returns:
        The protected images, as written.

    Raises:
        ValueError: if there are no labels, an argument is unknown, or the folder holds something else.
    """
    if data.labels is None:
        raise ValueError("dataset has no labels, but a poison needs one for every image.")
    request = {
        "method": method,
        "preset": preset if isinstance(preset, str) else "custom",
        "settings": asdict(poisons.settings(method, preset)),
        "seed": seed,
        "source": source,
        "images": len(data),
    }
    output_dir = Path(output_dir)
    if (done := _finished(output_dir, request)) is not None:
        return load_images(output_dir, split=done["split"], channels=data.images.shape[3])

    start = time.monotonic()
    perturbation = poisons.get(method)(
        data.tensor(),
        torch.from_numpy(data.labels),
        seed=seed,
        preset=preset,
        device=device,
        checkpoint_dir=output_dir / _STATE,
        progress=progress,
    )
    facts = request | {"reference": poisons.method(method).SOURCE, "device": str(device)}
    facts |= {"promised": poisons.budget(method, preset, tuple(perturbation.shape[1:]))}
    return _write(output_dir, data, perturbation, split, columns, facts, start)


def protect_with_file(
    data: LabelledImages,
    output_dir: str | Path,
    *,
    perturbation: str | Path,
    kind: str | None = None,
    budget: Mapping[str, float] | None = None,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> LabelledImages:
    """Adds a published perturbation, or takes published poisoned images, and writes the result to a folder.

    Args:
        data: the clean images, in the order that the perturbation was made for.
        output_dir: folder, empty or of an earlier call with the same arguments.
        perturbation, kind, budget: see `read_perturbation`.
        split, columns, source: see `protect_dataset`.

    Returns:
        The protected images, as written.
    """
    request = {
        "perturbation": Path(perturbation).name,
        "promised": dict(budget or {}),
        "source": source,
        "images": len(data),
    }
    output_dir = Path(output_dir)
    if (done := _finished(output_dir, request)) is not None:
        return load_images(output_dir, split=done["split"], channels=data.images.shape[3])
    start = time.monotonic()
    delta, recognised = read_perturbation(perturbation, data, kind=kind, budget=budget)
    return _write(output_dir, data, delta, split, columns, request | {"recognised": recognised}, start)


def read_card(output_dir: str | Path) -> dict[str, Any]:
    """What the card of a protected data set says of its poison.

    Raises:
        ValueError: if the folder has no such card.
    """
    path = Path(output_dir) / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    facts = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    if not isinstance(facts, dict) or "poison" not in facts:
        raise ValueError(f"output_dir is {str(output_dir)!r}, but its {CARD} is not the card of a protected data set.")
    return facts["poison"]


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
    parser.add_argument("--image_size", type=int, help="side in pixels to which images are brought first")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--output", required=True, help="folder for the protected data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="published", help="published, cpu, smoke or one of the method's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--kind", choices=("sample-wise", "class-wise"), help="of --perturbation, where its length does not tell"
    )
    for norm, unit in (("linf", "in 1/255"), ("l2", "images in [0, 1]"), ("l0", "pixels")):
        parser.add_argument(f"--{norm}", type=float, help=f"declared budget of --perturbation, {unit}")


def run(args: argparse.Namespace) -> None:
    """`jcdp poison`, from parsed options to a line that says what was written."""
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_images(args.dataset, split=args.split, image_size=args.image_size, channels=args.channels, **columns)
    others = _other_columns(args.dataset, args.split, columns)
    split = args.split or "train"
    if args.method is not None:
        protect_dataset(
            data,
            args.output,
            method=args.method,
            preset=args.preset,
            seed=args.seed,
            split=split,
            device=args.device,
            columns=others,
            source=str(args.dataset),
            progress=True,
        )
    else:
        declared = {norm: getattr(args, norm) for norm in ("linf", "l2", "l0") if getattr(args, norm) is not None}
        protect_with_file(
            data,
            args.output,
            perturbation=args.perturbation,
            kind=args.kind,
            budget=declared,
            split=split,
            columns=others,
            source=str(args.dataset),
        )
    card = read_card(args.output)
    if "recognised" in card:
        print("; ".join(f"{name}: {value}" for name, value in card["recognised"].items()))
    norms = ", ".join(f"{name} {value:.4g}" for name, value in card["measured"].items())
    print(f"{len(data)} protected images in {args.output}; after 8-bit rounding: {norms}")


def _finished(output_dir: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The card of an earlier call with the same request; None if the folder waits to be filled."""
    if not (output_dir / CARD).exists():
        return None
    facts = read_card(output_dir)
    for name, wanted in yaml.safe_load(yaml.safe_dump(_plain(request))).items():
        if facts.get(name) != wanted:
            raise ValueError(
                f"output is {str(output_dir)!r}, which holds a data set of {name} {facts.get(name)!r} instead of "
                f"{wanted!r}; give an empty folder."
            )
    return facts


def _write(
    output_dir: Path,
    data: LabelledImages,
    perturbation: torch.Tensor,
    split: str,
    columns: Mapping[str, Any] | None,
    facts: dict[str, Any],
    start: float,
) -> LabelledImages:
    protected = data.with_images(apply_perturbation(data.images, perturbation))
    write_dataset(output_dir, protected, split=split, columns=columns)
    facts |= {
        "split": split,
        "measured": measured_norms(data.images, protected.images),
        "seconds": round(time.monotonic() - start, 1),
        "packages": package_versions(),
    }
    path = output_dir / CARD
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_card(_plain(facts)), encoding="utf-8")
    os.replace(temporary, path)
    shutil.rmtree(output_dir / _STATE, ignore_errors=True)
    return protected


def _card(facts: dict[str, Any]) -> str:
    front = yaml.safe_dump({"tags": ["unlearnable-examples"], "poison": facts}, sort_keys=False, allow_unicode=True)
    name = facts.get("method", facts.get("perturbation"))
    lines = [
        f"---\n{front}---\n",
        f"# Protected by {name}\n",
        "The images carry a perturbation that is meant to keep classifiers from learning anything useful of them. "
        "A row's `id` is that of the clean image that it was made from; `label` is unchanged.\n",
        "| | |",
        "|---|---|",
        f"| poison | {name} |",
    ]
    for title, key in (("preset", "preset"), ("source", "reference"), ("seed", "seed"), ("clean images", "source")):
        if facts.get(key) is not None:
            lines.append(f"| {title} | {facts[key]} |")
    published = asdict(poisons.settings(facts["method"])) if "method" in facts else {}
    for key, value in (facts.get("settings") or facts.get("recognised") or {}).items():
        scaled = "" if value == _plain(published.get(key, value)) else f" (published: {published[key]})"
        lines.append(f"| `{key}` | {value}{scaled} |")
    for key, value in facts["promised"].items():
        lines.append(f"| declared {key} | {value:g} |")
    for key, value in facts["measured"].items():
        lines.append(f"| measured {key}, after rounding to 8 bits | {value:.4g} |")
    lines.append("\nL-infinity is in 1/255, L2 for images in [0, 1], L0 in pixels; L2 and L0 are per image.\n")
    return "\n".join(lines)


def _other_columns(source: str, split: str | None, columns: Mapping[str, str | None]) -> dict[str, list]:
    """Whatever the source has beside id, image and label."""
    rows = open_dataset(source, split=split, streaming=True, **columns)
    names = [name for name in rows.features if name not in ("id", "image", "label")]
    if not names:
        return {}
    found = {name: [] for name in names}
    for row in rows.select_columns(names):
        for name in names:
            found[name].append(row[name])
    return found


def _plain(value: Any) -> Any:
    """`value` in YAML's own types."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
