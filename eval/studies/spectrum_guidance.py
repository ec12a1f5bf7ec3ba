"""
Does the guide by the protection's spectrum help? Victims on what it makes, beside no guide and the paper's guides.

    python eval/studies/spectrum_guidance.py validation --dataset DIR --purifier DIR --cache DIR --output FILE.jsonl
    python eval/studies/spectrum_guidance.py test --dataset DIR --purifier DIR --cache DIR --output FILE.jsonl
    python eval/studies/spectrum_guidance.py spectra --dataset DIR --purifier DIR --cache DIR --output FILE.jsonl
    python eval/studies/spectrum_guidance.py residues --dataset DIR --purifier DIR --cache DIR --output FILE.jsonl
    python eval/studies/spectrum_guidance.py table --output FILE.jsonl
    python eval/studies/spectrum_guidance.py picture --output FILE.jsonl --picture FILE.png

The purifier was trained on the last 10,000 training images of CIFAR-10, the collected ones. 5,000 training images are
protected. The spectra are of those that were not collected, and victims learn from 2,000 of them. Settings are chosen
on validation images, which are training images of neither set. All purifications have 5 evaluations per round, because
this is made for one core. A trial is a record and is skipped when it is on record already.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


sys.path.append(str(Path(__file__).parents[2]))
from eval.figures import line_style, pyplot
from eval.measured import NOT_MEASURED, POISONS, spread
from eval.studies.detection import halves
from eval.studies.residue import residue
from eval.tables import markdown_table
from jcdp_diffusers.acceleration.allocation import keep_freed_memory
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import LabelledImages, load_images, to_uint8
from jcdp_diffusers.perceptual import load_perceptual
from jcdp_diffusers.poisons.protect import protect_dataset
from jcdp_diffusers.purification_config import PRESETS, PurificationConfig, adaptive_settings
from jcdp_diffusers.purify.dataset import open_purifier
from jcdp_diffusers.results import append_record, as_settings, read_records, summarise
from jcdp_diffusers.spectrum import ProtectionSpectrum, protection_spectrum, radial_bins
from jcdp_diffusers.trials import Trial, describe_images, measure
from jcdp_diffusers.victims import RECIPES


COLLECTED = range(40_000, 50_000)
PROTECTED = 5000  # as in detection.py, whose folders are shared; those that are not collected are used
IMAGES, VALIDATION, TEST = 2000, 1500, 2000
RESIDUE_IMAGES = 200
EVALUATIONS = 5
NO_GUIDE, PAPER, ADAPTIVE, NOTHING = "no guide", "the paper's guides", "adaptive", "nothing"
# The victim of a small set, in a minute on one core.
RECIPE = dataclasses.replace(
    RECIPES["airbench"], name="airbench-2k", epochs=5, batch_size=64, learning_rate=1.5 * 64 / 1024
)


def settings_of(row: str, table, alpha_bars) -> PurificationConfig | None:
    """How a row purifies: `no guide T`, `adaptive SCALE`, `adaptive SCALE T` with another T_p, and the like."""
    name, *numbers = row.split(", ")
    numbers = dict(number.split(" ") for number in numbers)
    if name == NOTHING:
        return None
    if name == PAPER:
        return dataclasses.replace(
            PRESETS["paper"], num_inference_steps=EVALUATIONS, variance_type="fixed_small", perceptual_network=None
        )
    if name == NO_GUIDE:
        steps, rounds = int(numbers.get("T_p", 100)), int(numbers.get("rounds", 1))
        return PurificationConfig(
            diffusion_steps=steps,
            num_rounds=rounds,
            num_inference_steps=2 if rounds > 1 else EVALUATIONS,
            variance_type="fixed_small",
        )
    scale = {"scale": float(numbers["scale"])} if "scale" in numbers else {}
    config = adaptive_settings(table, alpha_bars, evaluations=EVALUATIONS, **scale)
    return dataclasses.replace(config, diffusion_steps=int(numbers.get("T_p", config.diffusion_steps)))


class Study:
    """The sets of the study, and its trials."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.part = args, args.question
        data = load_images(args.dataset, split="train")
        self.collected = data.subset(list(COLLECTED))
        suspicious, others = halves(data, PROTECTED, 0)
        away = set(self.collected.ids)
        others = others.subset([row for row, id_ in enumerate(others.ids) if id_ not in away])
        if self.part == "validation":
            self.test = others.subset(range(VALIDATION))
        else:
            self.test = load_images(args.dataset, split="test").subset(range(TEST))
        self.suspicious = suspicious
        self.rows = [row for row, id_ in enumerate(suspicious.ids) if id_ not in away]
        self.pipe = open_purifier(args.purifier, "cpu", output_dir=Path(args.cache) / "purified")
        self.pipe.set_progress_bar_config(disable=True)
        if args.perceptual is not None:
            self.pipe.register_modules(perceptual=load_perceptual(args.perceptual))

    def protected(self, poison: str) -> LabelledImages:
        """All images of a poison that are not among the collected ones."""
        if poison == "none":
            return self.suspicious.subset(self.rows)
        folder = Path(self.args.cache) / f"cifar10-{poison}-cpu-{PROTECTED}"
        found = protect_dataset(self.suspicious, folder, method=poison, preset="cpu", seed=0, progress=True)
        return found.subset(self.rows)

    @functools.lru_cache(maxsize=1)
    def estimate(self, poison: str) -> tuple[LabelledImages, ProtectionSpectrum]:
        """The protected images, and their protection's spectrum."""
        protected = self.protected(poison)
        return protected, protection_spectrum(protected.images, self.collected.images)

    def trials(self, poison: str, row: str) -> Iterator[Trial]:
        """One per seed."""
        protected, spectrum = self.estimate(poison)
        end = self.pipe.purification_config.trained_timesteps[1]
        config = settings_of(row, spectrum.table(), self.pipe.scheduler.alpha_bars[:end])
        about = {"dataset": "cifar10", "poison": poison, "poison_preset": "cpu", "row": row, "part": self.part}
        about["collected"] = describe_images(self.collected)
        for seed in self.args.seeds:
            yield Trial(
                train=protected.subset(range(IMAGES)),
                test=self.test,
                recipe=RECIPE,
                seed=seed,
                victim="convnet94",
                countermeasure="none" if config is None else "unconditional",
                purifier=None if config is None else self.pipe,
                purification=config,
                work_dir=Path(self.args.cache) / "purified",
                about=about,
            )


def accuracies(records: list[dict], part: str) -> dict[tuple[str, str], list[float]]:
    """Accuracies in points by poison and row."""
    mine = [r for r in records if r["what"] == "accuracy" and r["settings"]["part"] == part]
    rows = summarise(mine, by=("settings.poison", "settings.row"))
    return {(r["settings.poison"], r["settings.row"]): [100 * value for value in r["values"]] for r in rows}


def table(records: list[dict], part: str) -> str:
    """Test accuracies by poison and row."""
    found = accuracies(records, part)
    columns = list(dict.fromkeys(poison for poison, _ in found))
    lines = []
    for row in dict.fromkeys(row for _, row in found):
        lines.append([row, *(spread(found[p, row]) if (p, row) in found else NOT_MEASURED for p in columns)])
    return markdown_table(["what is done about it", *(POISONS.get(p, "clean images") for p in columns)], lines)


def spectra(study: Study, poisons: list[str]) -> None:
    """A record per poison: its spectrum as estimated, and the true one."""
    for poison in poisons:
        start = time.perf_counter()
        protected, found = study.estimate(poison)
        difference = protected.images - study.protected("none").images.astype(np.float64)
        bins, frequencies = radial_bins(*difference.shape[1:3])
        power = np.abs(np.fft.fft2(np.einsum("nhwc,ac->nahw", difference, found.axes))) ** 2 / bins.size
        true = [[float(axis[:, bins == k].mean()) for k in frequencies] for axis in power.transpose(1, 0, 2, 3)]
        value = {"true": true, "estimate": found.power, "error": found.error, "background": found.background}
        value["guide"] = found.table().power
        settings = {"dataset": "cifar10", "poison": poison, "poison_preset": "cpu", "images": list(found.images)}
        facts = {"seed": None, "protocol": "spectrum", "device": "cpu"}
        facts["seconds"] = round(time.perf_counter() - start, 2)
        append_record(study.args.output, what="spectrum", value=value, settings=settings | {"part": "none"}, **facts)


def residues(study: Study, poisons: list[str], rows: list[str]) -> None:
    """A record per poison and row: what a purification leaves of the protection and what else it changes."""
    clean = study.protected("none").images[:RESIDUE_IMAGES]
    for poison in poisons:
        for row in rows:
            trial = next(study.trials(poison, row))
            some = trial.train.subset(range(RESIDUE_IMAGES))
            start = time.perf_counter()
            options = {"seed": 0, "ids": list(some.ids), "output_type": "pt"}
            purified = to_uint8(study.pipe(some.tensor(), preset=trial.purification, **options).images)
            value = residue(clean, some.images, purified)
            about = dict(trial.about) | {"images": RESIDUE_IMAGES, "part": "none"}
            settings = about | {"purification": as_settings(trial.purification)}
            facts = {"seed": 0, "protocol": "residue", "device": "cpu"}
            seconds = round(time.perf_counter() - start, 2)
            append_record(study.args.output, what="residue", value=value, settings=settings, seconds=seconds, **facts)


def residue_table(records: list[dict]) -> str:
    """What is kept of the protection, and the root mean square of all other changes, by poison and row."""
    found = {(r["settings"]["poison"], r["settings"]["row"]): r["value"] for r in records if r["what"] == "residue"}
    columns = list(dict.fromkeys(poison for poison, _ in found))
    lines = []
    for row in dict.fromkeys(row for _, row in found):
        line = [row]
        for poison in columns:
            if (poison, row) not in found:
                line += [NOT_MEASURED, NOT_MEASURED]
                continue
            value = found[poison, row]
            kept = np.sqrt(np.sum(np.array(value["poison"]) * np.square(value["kept"])))
            line += [f"{100 * kept:.0f} %", f"{np.sqrt(np.square(value['change']).sum()):.1f}"]
        lines.append(line)
    head = [f"{POISONS[p]}, {what}" for p in columns for what in ("kept", "other change")]
    return markdown_table(["purification", *head], lines)


def draw(records: list[dict], path: Path) -> None:
    """Each poison's spectrum in the weakest colour axis and in brightness: estimated, true, and the images'."""
    found = {r["settings"]["poison"]: r["value"] for r in records if r["what"] == "spectrum"}
    size = {"figsize": (2.6 * len(found), 4.6), "layout": "constrained"}
    figure, axes = pyplot().subplots(2, len(found), sharex=True, squeeze=False, **size)
    for column, (poison, value) in enumerate(found.items()):
        for line, (axis, title) in enumerate(((0, "brightness"), (2, "weakest colour axis"))):
            here = axes[line, column]
            estimate, error = (np.array(value[name][axis][1:]) for name in ("estimate", "error"))
            frequencies = np.arange(1, len(estimate) + 1)
            here.plot(frequencies, value["background"][axis][1:], color="0.6", label="images")
            here.plot(frequencies, value["true"][axis][1:], label="protection", **line_style(0))
            here.plot(frequencies, value["guide"][axis][1:], label="what the guide takes", **line_style(1))
            seen = estimate > 3 * error
            here.errorbar(
                frequencies[seen], estimate[seen], 2 * error[seen], fmt=".", color="k", label="estimate, seen"
            )
            here.set(yscale="log", title=f"{POISONS[poison]}, {title}")
            here.title.set_fontsize(9)
            here.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_xlabel("cycles per image")
    axes[0, 0].set_ylabel("power (levels²)")
    axes[0, -1].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def main() -> None:
    parser = Parser(description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("question", choices=("validation", "test", "spectra", "residues", "table", "picture"))
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    parser.add_argument("--dataset", help="CIFAR-10")
    parser.add_argument("--purifier", help="folder of one that was trained on the last 10,000 training images")
    parser.add_argument("--perceptual", metavar="NAME_OR_PATH", help="for the paper's guides")
    parser.add_argument("--cache", help="folder in which protected and purified sets are kept")
    parser.add_argument("--poisons", nargs="+", default=["lsp", "ops", "ar", "emn"])
    parser.add_argument("--rows", nargs="+", default=[NOTHING, NO_GUIDE, ADAPTIVE, PAPER])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    for name in {"table": (), "picture": ("picture",)}.get(args.question, ("dataset", "purifier", "cache")):
        if getattr(args, name) is None:
            parser.error(f"--{name} is not given, but {args.question} needs it.")
    keep_freed_memory()
    torch.set_num_threads(1)
    with ends_in_one_sentence("spectrum_guidance"):
        if args.question == "table":
            for part in ("validation", "test"):
                print(part, table(read_records(args.output), part), sep="\n\n")
            print(residue_table(read_records(args.output)))
        elif args.question == "picture":
            draw(read_records(args.output), args.picture)
        else:
            study = Study(args)
            if args.question == "spectra":
                return spectra(study, args.poisons)
            if args.question == "residues":
                return residues(study, args.poisons, args.rows)
            for row in args.rows:
                for poison in args.poisons:
                    measure(list(study.trials(poison, row)), args.output, processes=1)


if __name__ == "__main__":
    main()
