"""Summary and card of a purified data set, made from its run's record and its shards' records alone."""

from collections import Counter

from huggingface_hub import DatasetCard, DatasetCardData

from ..noise import colour_in_words
from ..purification_config import PurificationConfig
from .manifest import PACKAGES_OF_PIXELS


SUMMARY_NAME = "summary.json"

_BODY = """
# {title}

Every image of `{source}` (split `{split}`), purified with diffusion: what a protection (an "unlearnable example", an
availability poison) added to the pixels is drowned in a little noise and denoised away by a model of natural images.
Labels, ids and all other columns are the source's own.

| | |
|---|---|
| Source | `{source}`, split `{split}` |
| Rows in | {rows_in:,} |
| Rows out | {rows_out:,} |
| Rejected | {rejected:,}{reasons} |
| Resized | {resized:,} |
| Also changed | {changes} |
| Purifier | `{purifier}`{revision} |
| Content of purifier | `{purifier_content}` |
| Seed | {seed} |
| Size | {size} |
| Purification | {hours:.2f} hours of work in {shards:,} shards, {rate:.3g} images/s per worker |
| Made on | {devices} |
| Arithmetic | {arithmetic} |
| Versions | {versions} |

## Method

Joint conditional diffusion purification
([*Unlearnable Examples Give a False Sense of Security: Piercing through Unexploitable Data with Learnable
Examples*](https://arxiv.org/abs/2305.09241), ACM MM 2023) by `jcdp-diffusers`.
T_p = {diffusion_steps} forward steps, {evaluations} network evaluations per image in {num_rounds} round(s); scale of
the pixel guide {pixel_guidance_scale:g}, of the perceptual guide {perceptual_guidance_scale:g}{colour}. All settings
are in `run.json`. The noise of an image depends on the seed and its id alone, so each row can be made again by itself.

{sizes_rule}

Images are stored as PNG, without loss. `summary.json` holds a SHA-256 for every file.

## Intended use

To find out whether a protection of images against training holds, and to study purification. Purified images are
altered images: fine detail may differ from the original. Purification gives nobody a right to images that they do not
have already; the source's licence and its owners' wishes go on to apply.
"""

_RULES = {
    "exact": "All images have {size}x{size} pixels, as they had before; others were set aside.",
    "resize": "Images of another size than {size}x{size} had their shorter side brought to {size} (Lanczos filter) "
    "and their centre cropped.",
    "tile": "Images keep their size: larger ones than {size}x{size} were purified in squares of {size} pixels that "
    "overlap by at least {overlap} and are blended there; where the shorter side was below {size}, it was enlarged.",
}


def summarise_shards(records: dict[str, dict]) -> dict:
    """Counts, time, devices and checksums over all shards, given their records by name of file."""
    reasons, changes = Counter(), Counter()
    for record in records.values():
        reasons.update(record["reasons"])
        changes.update(record.get("changes", {}))  # shards written before this was counted do not say
    seconds = sum(record["seconds"] for record in records.values())
    rows_in = sum(record["rows_in"] for record in records.values())
    return {
        "rows_in": rows_in,
        "rows_out": sum(record["rows_out"] for record in records.values()),
        "rejected": sum(record["rejected"] for record in records.values()),
        "reasons": dict(reasons.most_common()),
        # Shards written before this was counted do not say.
        "resized": sum(record.get("resized", 0) for record in records.values()),
        "changes": dict(changes.most_common()),
        "seconds_of_work": round(seconds, 3),
        "images_per_second_per_worker": round(rows_in / seconds, 4),
        "bytes": sum(record["bytes"] for record in records.values()),
        "devices": sorted({record["device"] for record in records.values()}),
        "files": {name: record["sha256"] for name, record in records.items()},
    }


def dataset_card(run: dict, summary: dict, title: str) -> DatasetCard:
    """README.md of the folder, with the metadata that `load_dataset` and the Hub read."""
    settings, sizes, purifier = run["settings"], run["sizes"], run["purifier"]
    split = run["source"]["split"]
    data = DatasetCardData(
        pretty_name=title,
        task_categories=["image-classification"],
        tags=["purified", "unlearnable-examples", "jcdp-diffusers"],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"{split}-*.parquet"}]}],
    )
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in summary["reasons"].items())
    body = _BODY.format(
        title=title,
        source=run["source"]["name"],
        split=split,
        rows_in=summary["rows_in"],
        rows_out=summary["rows_out"],
        rejected=summary["rejected"],
        reasons=f" ({reasons})" if reasons else "",
        resized=summary["resized"],
        changes="; ".join(f"{what} in {count:,}" for what, count in summary["changes"].items()) or "nothing",
        purifier=purifier["name"] or "(in memory)",
        revision=f", revision `{purifier['revision']}`" if purifier["revision"] else "",
        purifier_content=purifier["content"],
        seed=run["seed"],
        size=f"{sizes['image_size']}x{sizes['image_size']}, {sizes['fit']}",
        hours=summary["seconds_of_work"] / 3600,
        shards=len(summary["files"]),
        rate=summary["images_per_second_per_worker"],
        devices=", ".join(summary["devices"]),
        arithmetic=", ".join(f"{name} {value}" for name, value in run["arithmetic"].items() if value is not None),
        versions=", ".join(f"{name} {run['packages'][name]}" for name in PACKAGES_OF_PIXELS if run["packages"][name]),
        diffusion_steps=settings["diffusion_steps"],
        evaluations=PurificationConfig(**settings).evaluations_per_image,
        num_rounds=settings["num_rounds"],
        pixel_guidance_scale=settings["pixel_guidance_scale"],
        perceptual_guidance_scale=settings["perceptual_guidance_scale"],
        colour=colour_in_words(settings.get("noise_corner")),
        sizes_rule=_RULES[sizes["fit"]].format(size=sizes["image_size"], overlap=sizes["tile_overlap"]),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{body}")
