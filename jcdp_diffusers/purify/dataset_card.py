"""Summary and card of a purified data set, made from its run's record and its shards' records alone."""

from collections import Counter
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from ..noise import colour_in_words
from ..purification_config import PurificationConfig
from .manifest import PACKAGES_OF_PIXELS


SUMMARY_NAME = "summary.json"
COUNTED = ("rows_in", "rows_out", "rejected", "resized", "seconds", "bytes")  # of a shard's record

TEMPLATE = Path(__file__).with_name("dataset_card.md")  # for Jinja, as huggingface_hub fills it
# Stands for the card until all is there. `load_dataset` refuses the folder, because it looks for that file.
UNFINISHED_CARD = """---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: this-purification-is-not-finished.parquet
---
# Not finished

This data set is being purified, or was stopped meanwhile: `summary.json` is missing. Give the same command again.
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
    total, reasons, changes = Counter(), Counter(), Counter()
    for record in records.values():
        reasons.update(record["reasons"])
        changes.update(record.get("changes", {}))  # neither this nor `resized` is in the first shards' records
        total.update({name: number for name, number in record.items() if name in COUNTED})
    return {
        **{name: total[name] for name in COUNTED[:3]},
        "reasons": dict(reasons.most_common()),
        "resized": total["resized"],
        "changes": dict(changes.most_common()),
        "seconds_of_work": round(total["seconds"], 3),
        "images_per_second_per_worker": round(total["rows_in"] / total["seconds"], 4),
        "bytes": total["bytes"],
        "devices": sorted({record["device"] for record in records.values()}),
        "files": {name: record["sha256"] for name, record in records.items()},
    }


def dataset_card(run: dict, summary: dict, title: str) -> DatasetCard:
    """README.md of the folder, with the metadata that `load_dataset` and the Hub read."""
    split, sizes, config = run["source"]["split"], run["sizes"], PurificationConfig(**run["settings"])
    data = DatasetCardData(
        pretty_name=title,
        task_categories=["image-classification"],
        tags=["purified", "unlearnable-examples", "jcdp-diffusers"],
        configs=[{"config_name": "default", "data_files": [{"split": split, "path": f"{split}-*.parquet"}]}],
    )
    scale, packages = config.protection_guidance_scale, run["packages"]
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        run=run,
        summary=summary,
        config=config,
        reasons="; ".join(f"{count:,} {reason}" for reason, count in summary["reasons"].items()),
        changes="; ".join(f"{what} in {count:,}" for what, count in summary["changes"].items()),
        arithmetic=", ".join(f"{name} {value}" for name, value in run["arithmetic"].items() if value is not None),
        versions=", ".join(f"{name} {packages[name]}" for name in PACKAGES_OF_PIXELS if packages[name]),
        spectrum=f", of the spectrum's guide {scale:g}" if scale else "",
        colour=colour_in_words(config.noise_corner),
        rule=_RULES[sizes["fit"]].format(size=sizes["image_size"], overlap=sizes["tile_overlap"]),
    )
