"""
The figures that sentences of README.md, docs/ and training/README.md quote: how each key is read from the records.

`eval/pages.py` writes them between `<!-- n:KEY -->` and `<!-- /n -->`. The words before a key's first dot name the
group, which is one function here: it returns the figures of one file of records.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

from eval.measured import Measured, spread
from eval.speed_tables import Machine, machines_of
from eval.studies import finetune_versus_scratch
from jcdp_diffusers.repository import read_json
from jcdp_diffusers.results import read_records, summarise


RESULTS = Path(__file__).parents[1] / "results"
# The network of the table in docs/speed.md, and the machines.
UNET, XEON, EPYC = "ddpm-cifar10", "Intel Xeon, AMX", "AMD EPYC, AVX-512 BF16"
# The estimates of docs/scaling.md: images, rows per file, and images per second of a GPU.
PHOTOGRAPHS, THUMBNAILS = 1.3e6, 1e9
ROWS_PER_FILE = {256: 2048, 64: 20_000}
DISK_BYTES_PER_SECOND = 2e9


def figure(key: str) -> str:
    """
    A figure as a sentence quotes it.

    Args:
        key (`str`): `"GROUP.NAME"`.

    Raises:
        ValueError: If there is no such figure.
    """
    group, _, name = key.partition(".")
    figures = GROUPS[group]() if group in GROUPS else {}
    if name not in figures:
        raise ValueError(f"the figure is {key!r}, but must be one of {', '.join(all_keys())}.")
    return figures[name]


def all_keys() -> list[str]:
    """Every key, in the order of this file."""
    return [f"{group}.{name}" for group, figures in GROUPS.items() for name in figures()]


def mini() -> dict[str, str]:
    """What `make cifar10-mini` measured: mean test accuracies over seeds, in points."""
    records = [r for r in read_records(RESULTS / "cifar10_mini/records.jsonl") if r["what"] == "accuracy"]
    points = {row["settings.row"]: 100 * row["mean"] for row in summarise(records, by=("settings.row",))}
    return {
        "lost": f"{points['clean'] - points['protected']:.1f}",
        "regained": f"{points['purified'] - points['protected']:.1f}",
    }


def photographs() -> dict[str, str]:
    """An owner's two commands on photographs of assorted sizes: minutes, and dB to the originals at full size."""
    record = read_records(RESULTS / "photographs.jsonl")[-1]
    seconds, decibels = record["value"]["seconds"], record["value"]["psnr"]
    return {
        "audit_minutes": f"{seconds['audit'] / 60:.0f}",
        "purify_minutes": f"{seconds['purify'] / 60:.0f}",
        "protected_psnr": f"{decibels['protected']:.1f}",
        "cleaned_psnr": f"{decibels['cleaned']:.1f}",
    }


def compensation() -> dict[str, str]:
    """What victims with corruption get on validation images, alone and after the best purification, in %."""
    records = [r for r in read_records(RESULTS / "compensation_cifar10_mini.jsonl") if r["what"] == "accuracy"]
    by_column = {record["settings"]["column"]: record["value"] for record in records}
    alone = by_column.pop("corruption alone")
    return {"alone": f"{100 * alone:.1f}", "purified": f"{100 * max(by_column.values()):.1f}"}


def made_anew() -> dict[str, str]:
    """What victims get from poisons that were made anew, by poison and countermeasure, in %."""
    found = Measured(read_records(RESULTS / "made_anew_cifar10_mini.jsonl"))
    keys = [(key.poison, key.column) for key in found.keys("cifar10")]
    return {f"{poison}_{column}": spread(found.accuracies("cifar10", poison, column)) for poison, column in keys}


def second_purifier() -> dict[str, str]:
    """How far victims' accuracies on purified images are from those of a second purifier, in points."""

    def accuracies(*names: str) -> dict[tuple, float]:
        records = [r for name in names for r in read_records(RESULTS / f"{name}_cifar10_mini.jsonl")]
        records = [r for r in records if r["what"] == "accuracy" and r["settings"]["column"] == "coloured noise"]
        recipes = [(r["settings"]["victim"], r["protocol"], r["settings"]["recipe"]["batch_size"]) for r in records]
        return {recipe: 100 * record["value"] for recipe, record in zip(recipes, records)}

    first, second = accuracies("protocols", "victims"), accuracies("other_purifier")
    apart = [abs(first[recipe] - accuracy) for recipe, accuracy in second.items()]
    return {"least": f"{min(apart):.1f}", "most": f"{max(apart):.1f}"}


def audits() -> dict[str, str]:
    """Audits on two cores by the defaults of a CPU: minutes and, of the large one, accuracies in %."""
    times = {name: read_json(RESULTS / name / "time.json") for name in ("audit_cifar10_fast", "audit_cifar10_50k")}
    report = read_json(RESULTS / "audit_cifar10_50k" / "report.json")
    rows = {row["row"]: row["accuracy"]["mean"] for row in report["rows"]}
    return {
        "fast_minutes": f"{times['audit_cifar10_fast']['seconds'] / 60:.0f}",
        "large_minutes": f"{times['audit_cifar10_50k']['seconds'] / 60:.0f}",
        **{f"large_{row}": f"{100 * rows[row]:.1f}" for row in ("clean", "protected", "purified")},
    }


def contrastive() -> dict[str, str]:
    """What SimCLR's linear probe makes of clean, protected and purified images, in %."""
    found = Measured(read_records(RESULTS / "contrastive.jsonl"), method="simclr")
    rows = {"clean": ("none", "none"), "cp_s": ("cp-s", "none"), "purified": ("none", "unconditional")}
    means = {name: statistics.fmean(found.accuracies("cifar10", *row)) for name, row in rows.items()}
    return {
        "clean": f"{means['clean']:.1f}",
        "cp_s_lost": f"{means['clean'] - means['cp_s']:.1f}",
        "purification_costs": f"{means['clean'] - means['purified']:.1f}",
    }


def speed() -> dict[str, str]:
    """What `eval/throughput.py` measured on two processors."""
    machines = machines_of(read_records(RESULTS / "throughput.jsonl"), UNET)
    xeon, epyc = machines[XEON], machines[EPYC]

    def times_float32(machine: Machine) -> float:
        peaks = (machine.find("peak", operation="convolution", dtype=dtype) for dtype in ("bfloat16", "float32"))
        return next(peaks) / next(peaks)

    def folded(more: str = "") -> float:
        return epyc.step(f"float32 channels_last folded{more}", batch=16)["images_per_second"]

    pixels = epyc.find("pixels", precision="float32")
    return {
        "guided_step": f"{100 * (epyc.step('float32 channels_last', 'guided')['one_plus_rest'] - 1):.1f}",
        "authors": f"{epyc.find('purifier', unet=UNET, run='float32')['times_the_authors']:.2f}",
        "amx_bfloat16": f"{times_float32(xeon):.1f}",
        "avx512_bfloat16": f"{times_float32(epyc):.1f}",
        "winograd": f"{folded(' winograd') / folded():.2f}",
        "one_value_in": f"{round(1 / pixels['share_changed'], -3):,.0f}",
        "levels": str(pixels["largest"]),
    }


def scaling() -> dict[str, str]:
    """What `eval/purify_scaling.py` measured, and what follows from it for docs/scaling.md's two estimates."""
    records = read_records(RESULTS / "purify_scaling.jsonl")
    codec = {
        record["settings"]["image_size"]: record["value"]
        for record in records
        if record["what"] == "cost of reading and writing an image"
    }
    bytes_of = {size: cost["bytes"] for size, cost in codec.items()}
    seconds = {size: (cost["decode and resize (ms)"] + cost["encode (ms)"]) / 1e3 for size, cost in codec.items()}
    return {
        "photograph_kilobytes": f"{bytes_of[256] / 1e3:.0f}",
        "photographs_gigabytes": f"{PHOTOGRAPHS * bytes_of[256] / 1e9:.0f}",
        "photograph_file_megabytes": f"{ROWS_PER_FILE[256] * bytes_of[256] / 1e6:.0f}",
        "photograph_milliseconds": f"{1e3 * seconds[256]:.0f}",
        "photograph_cores_at_7": f"{7 * seconds[256]:.1f}",
        "photograph_cores_at_28": f"{28 * seconds[256]:.1f}",
        "thumbnail_kilobytes": f"{bytes_of[64] / 1e3:.1f}",
        "thumbnails_terabytes": f"{THUMBNAILS * bytes_of[64] / 1e12:.1f}",
        "thumbnail_file_megabytes": f"{ROWS_PER_FILE[64] * bytes_of[64] / 1e6:.0f}",
        "thumbnails_minutes": f"{THUMBNAILS * bytes_of[64] / DISK_BYTES_PER_SECOND / 60:.0f}",
        "thumbnail_milliseconds": f"{1e3 * seconds[64]:.1f}",
        "thumbnail_cores_at_65": f"{65 * seconds[64]:.1f}",
        "thumbnail_cores_at_260": f"{260 * seconds[64]:.1f}",
    }


def finetune() -> dict[str, str]:
    """What `eval/studies/finetune_versus_scratch.py` measured."""
    records = finetune_versus_scratch.last_comparison(read_records(RESULTS / "finetune_versus_scratch.jsonl"))
    curves = finetune_versus_scratch.curves(records)
    end = max(curves["scratch, all timesteps"])

    def lower(start: str) -> str:
        every, first = (curves[f"{start}, {steps} timesteps"][end] for steps in ("all", "first"))
        return f"{100 * (1 - first / every):.0f}"

    def caught_up(start: str) -> str:
        target = curves[f"{start}, all timesteps"][end]
        reached = [step for step, loss in curves[f"{start}, first timesteps"].items() if loss <= target]
        return str(min(reached)) if reached else f"more than {end}"

    seconds = [record["seconds"] for record in records if record["settings"]["arm"] in finetune_versus_scratch.ARMS]
    return {
        "scratch_lower": lower("scratch"),
        "finetuned_lower": lower("fine-tuned"),
        "scratch_steps": caught_up("scratch"),
        "finetuned_steps": caught_up("fine-tuned"),
        "start_of_finetuned": f"{curves['fine-tuned, all timesteps'][0]:.3f}",
        "end_of_scratch": f"{curves['scratch, all timesteps'][end]:.3f}",
        "end_on_source": f"{curves[finetune_versus_scratch.SOURCE][end]:.3f}",
        "seconds_least": f"{min(seconds):.0f}",
        "seconds_most": f"{max(seconds):.0f}",
    }


GROUPS: dict[str, Callable[[], dict[str, str]]] = {
    "mini": mini,
    "compensation": compensation,
    "made_anew": made_anew,
    "second_purifier": second_purifier,
    "audits": audits,
    "contrastive": contrastive,
    "photographs": photographs,
    "speed": speed,
    "scaling": scaling,
    "finetune": finetune,
}
