"""
The whole story on real images, told with the rooms of the house: protect, train a purifier, purify, score, report.

Two tellings: `digits`, the handwritten digits that ship with scikit-learn, in minutes on two cores; and
`cifar10-mini`, the same steps on a part of CIFAR-10. Each stage leaves its result in the output folder, so that an
interrupted run goes on from there when the same command is given again.
"""

import argparse
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from . import poisons
from .acceleration.allocation import keep_freed_memory
from .data import LabelledImages, check_roles, load_images, write_dataset
from .data.examples import cifar10, digits
from .data.perturbations import apply_perturbation, measured_norms
from .devices import available_cores
from .noise import colour_in_words
from .purification_config import PurificationConfig
from .purify.dataset import open_purifier, purify_dataset
from .purify.dataset_card import SUMMARY_NAME
from .results import append_record, as_settings, read_records, summarise
from .train.loop import TrainingConfig, train_purifier
from .train.unets import ddpm_scheduler, named_unet
from .victims import RECIPES, train_victim


ROWS = {
    "clean": "clean",
    "protected": "protected by LSP",
    "random_noise": "random noise of the same norm",
    "purified": "protected, then purified",
}


@dataclasses.dataclass(frozen=True)
class Telling:
    """
    What one telling of the story uses.

    Args:
        name (`str`): On the command line.
        title (`str`): In the report.
        sizes (`tuple[int, int, int]`): Images of the three roles: protected, collected, test.
        unet (`str`): Of `unets.UNETS`.
        training (`TrainingConfig`): Of the purifier.
        purification (`PurificationConfig`): How the protected images are purified.
        recipe (`str`): Of the victims, the same in all four rows.
        seeds (`int`): Victims per row.
    """

    name: str
    title: str
    sizes: tuple[int, int, int]
    unet: str
    training: TrainingConfig
    purification: PurificationConfig
    recipe: str
    seeds: int = 3


TELLINGS = {
    "digits": Telling(
        name="digits",
        title="Handwritten digits (scikit-learn), 32x32",
        sizes=(900, 500, 397),
        unet="tiny32",
        training=TrainingConfig(
            max_train_steps=600,
            train_batch_size=32,
            learning_rate=1e-3,
            trained_timesteps=(0, 200),
            checkpointing_steps=200,
            checkpoints_total_limit=1,
            mixed_precision="no",
        ),
        purification=PurificationConfig(diffusion_steps=60, num_inference_steps=6, variance_type="fixed_small"),
        recipe="digits",
    ),
    "cifar10-mini": Telling(
        name="cifar10-mini",
        title="CIFAR-10, a part that a CPU can take, 32x32",
        sizes=(10_000, 10_000, 5_000),
        unet="mini32",
        training=TrainingConfig(
            max_train_steps=2400,
            train_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            trained_timesteps=(0, 50),
            noise_corner=8.0,
            random_flip=True,
            checkpointing_steps=600,
            checkpoints_total_limit=1,
            mixed_precision="bf16",
        ),
        purification=PurificationConfig(diffusion_steps=30, num_inference_steps=2, variance_type="fixed_small"),
        recipe="mini",
    ),
}


def random_noise(clean: np.ndarray, protected: np.ndarray, seed: int) -> torch.Tensor:
    """Gaussian noise, each image's scaled to the Euclidean norm that its poison has after rounding: (N, C, H, W)."""
    norms = np.linalg.norm(((protected.astype(np.float64) - clean) / 255).reshape(len(clean), -1), axis=1)
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(clean.transpose(0, 3, 1, 2).shape))
    return (noise * torch.from_numpy(norms).view(-1, 1, 1, 1) / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).float()


def run_quickstart(
    output_dir: str | Path = "runs/quickstart",
    *,
    telling: str | Telling = "digits",
    data: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """
    Tell the story and write it down. A script that calls this on a CPU needs an `if __name__ == "__main__":` around
    the call, because victims are trained in processes of their own.

    Args:
        output_dir (`str` or `Path`): Gets `report.md`, `report.json`, `records.jsonl`, `pictures.png`, the data sets,
            the purifier.
        telling (`str` or `Telling`): A key of `TELLINGS`, or a telling of one's own.
        data (`str` or `Path`, *optional*): CIFAR-10's folder, for `cifar10-mini`.
        seed (`int`): Of the poison, the purifier and the purification; the victims take seed, seed + 1, ...
        say (`Callable`): Where a line about each stage goes.

    Returns:
        `dict`: What `report.json` holds.
    """
    if isinstance(telling, str) and telling not in TELLINGS:
        raise ValueError(f"telling is {telling!r}, but must be one of {tuple(TELLINGS)}.")
    story, output_dir = TELLINGS[telling] if isinstance(telling, str) else telling, Path(output_dir)
    if (story.name == "cifar10-mini") != (data is not None):
        raise ValueError(f"data is {data!r}, but 'cifar10-mini' needs CIFAR-10's folder and digits bring their own.")
    check_folder(output_dir, story, seed)
    records = output_dir / "records.jsonl"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    say(
        f"{story.title}: {story.sizes[0]} images to protect, {story.sizes[1]} collected, {story.sizes[2]} for the test"
    )
    clean, collected, test = digits(story.sizes) if data is None else cifar10(data, story.sizes)
    start = time.perf_counter()
    perturbation = poisons.get("lsp")(clean.tensor(), torch.from_numpy(clean.labels), seed=seed)
    protected = clean.with_images(apply_perturbation(clean.images, perturbation))
    noise = random_noise(clean.images, protected.images, seed)
    noisy = clean.with_images(apply_perturbation(clean.images, noise))
    norms = measured_norms(clean.images, protected.images)
    check_roles(protected, collected, test)
    for role, images in {"clean": clean, "protected": protected, "collected": collected, "test": test}.items():
        write_dataset(output_dir / role, images, split="test" if role == "test" else "train")
    say(f"LSP: mean L2 norm {norms['l2_mean']:.3f} after rounding, largest change {norms['linf']:.0f}/255")
    settings = {
        "telling": story.name,
        "sizes": list(story.sizes),
        "poison": "lsp",
        "poison_preset": "published",
        "seed": seed,
    }
    if not finished(records, "seconds", settings | {"stage": "poison"}):
        note(records, "seconds", time.perf_counter() - start, settings | {"stage": "poison", "norms": norms}, device)

    purifier = output_dir / "purifier"
    stage = settings | {"stage": "train", "unet": story.unet, "training": as_settings(story.training)}
    if not (finished(records, "seconds", stage) and (purifier / "training_record.json").exists()):
        say(f"Training a purifier on the {len(collected)} collected images: {story.training.max_train_steps} steps")
        train_purifier(
            collected,
            unet=named_unet(story.unet, seed=seed),
            scheduler=ddpm_scheduler(),
            output_dir=purifier,
            config=dataclasses.replace(story.training, seed=seed, resume_from_checkpoint="latest"),
        )
        # All of it, whichever process trained it.
        trained = json.loads((purifier / "training_record.json").read_text())
        note(records, "seconds", trained["seconds"], stage, device)
    # So that whoever opens the purifier alone purifies as this story does.
    dataclasses.replace(story.purification, **story.training.facts_of_the_network()).save_pretrained(purifier)

    calls = story.purification.evaluations_per_image
    say(f"Purifying: T_p {story.purification.diffusion_steps}, {calls} UNet evaluations per image")
    pipe = open_purifier(purifier, device, output_dir=output_dir / "purified")
    # The colour of the noise is the network's, and part of what was done.
    done = as_settings(dataclasses.replace(story.purification, noise_corner=story.training.noise_corner))
    stage = settings | {"stage": "purify", "purification": done}
    purify_dataset(
        output_dir / "protected", pipe, output_dir=output_dir / "purified", seed=seed, preset=story.purification
    )
    if not finished(records, "seconds", stage):
        summary = json.loads((output_dir / "purified" / SUMMARY_NAME).read_text())
        note(records, "seconds", summary["seconds_of_work"], stage, device)
    purified = load_images(output_dir / "purified")
    if purified.ids != clean.ids:
        raise ValueError(f"{output_dir / 'purified'} holds other ids than the images that were protected: remove it.")

    sets = {"clean": clean, "protected": protected, "random_noise": noisy, "purified": purified}
    cells = []
    for victim_seed in range(seed, seed + story.seeds):
        for row in sets:
            cell = settings | {"row": row, "recipe": story.recipe, "victim": "resnet18"}
            if row == "purified":
                cell["purification"] = done
            if not finished(records, "accuracy", cell, victim_seed):
                cells.append((cell, victim_seed))
    say(f"Training {len(cells)} victims")
    since = time.perf_counter()
    work = [(sets[cell["row"]], test, story.recipe, victim_seed, device) for cell, victim_seed in cells]
    for (cell, victim_seed), result in zip(cells, train_victims(work, device)):
        for what in ("accuracy", "best_accuracy", "train_accuracy"):
            note(records, what, result[what], cell, device, story.recipe, victim_seed, result["seconds"])
        # Victims run side by side: what counts is how much later this one was done than the one before.
        now = time.perf_counter()
        stage = settings | {"stage": "score", "row": cell["row"], "victim_seed": victim_seed}
        note(records, "seconds", now - since, stage, device)
        since = now
        say(
            f"Victim {victim_seed} on {ROWS[cell['row']]}: {100 * result['accuracy']:.1f} % of clean test images right"
        )
    draw_pictures(output_dir / "pictures.png", sets)
    return write_report(output_dir, story, norms, settings)


def guides_in_words(purification: PurificationConfig) -> str:
    """What pulls an image back to the protected one, if anything does."""
    guides = []
    if purification.pixel_guidance_scale:
        guides.append(f"pixel guide at scale {purification.pixel_guidance_scale:g}")
    if purification.perceptual_guidance_scale:
        network = purification.perceptual_network or "the repository's network"
        guides.append(f"perceptual guide ({network}) at scale {purification.perceptual_guidance_scale:g}")
    return " and ".join(guides) or "no guide"


def check_folder(output_dir: Path, story: Telling, seed: int) -> None:
    """Refuse a folder in which another story was begun; write down which one this is."""
    told = json.loads(
        json.dumps({**as_settings(story), "recipe": dataclasses.asdict(RECIPES[story.recipe]), "seed": seed})
    )
    path = output_dir / "telling.json"
    if path.exists():
        before = json.loads(path.read_text())
        if changed := [name for name in told if before.get(name) != told[name]]:
            raise ValueError(
                f"output is {str(output_dir)!r}, where a story with another {changed[0]} was begun: take an empty "
                "folder, or the settings of telling.json in it."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=2) + "\n")


def train_victims(work: list[tuple], device: str) -> Iterator[dict]:
    """
    Victims in order of `work`, as many at a time as there are processors, one thread each.

    Small networks gain little from a second thread, and a victim's weights depend on the number of threads, so one
    thread is both faster and the same on every machine. On an accelerator they are trained here, one after the other.
    """
    if device != "cpu" or not work:
        yield from map(one_victim, work)
        return
    cores = available_cores()
    spawn = multiprocessing.get_context("spawn")  # a forked copy of torch's thread pools may hang
    with ProcessPoolExecutor(min(len(work), cores), spawn, initializer=keep_freed_memory) as pool:
        yield from pool.map(one_victim, work)


def one_victim(work: tuple) -> dict:
    """Train and score one victim in a process of its own."""
    training_set, test, recipe, seed, device = work
    if device == "cpu":
        torch.set_num_threads(1)
    result = train_victim(training_set, test, recipe=recipe, seed=seed, device=device)
    return {name: getattr(result, name) for name in ("accuracy", "best_accuracy", "train_accuracy", "seconds")}


def finished(records: Path, what: str, settings: dict, seed: int | None = None) -> bool:
    """Whether this figure is on record with these settings, so that an interrupted run need not measure it again."""
    wanted = json.loads(json.dumps(settings))
    return records.exists() and any(
        r["what"] == what and r["seed"] == seed and wanted.items() <= r["settings"].items()
        for r in read_records(records)
    )


def note(records, what, value, settings, device, protocol="quickstart", seed=None, seconds=0.0) -> None:
    """One record."""
    append_record(
        records,
        what=what,
        value=value,
        seed=seed,
        protocol=protocol,
        settings=settings,
        device=device,
        seconds=seconds,
    )


def draw_pictures(path: Path, sets: dict[str, LabelledImages]) -> None:
    """The first image of each class, clean, protected, its noise magnified, and purified, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clean, protected, purified = (
        sets[row].images.astype(np.float64) / 255 for row in ("clean", "protected", "purified")
    )
    labels = sets["clean"].labels
    rows = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)][:10]
    noise = protected - clean
    gain = 0.5 / np.abs(noise[rows]).max()
    left = purified - clean
    lines = [
        ("clean", clean),
        ("protected", protected),
        (f"its noise, x{gain:.0f}", np.clip(0.5 + gain * noise, 0, 1)),
        ("purified", purified),
        (f"purified - clean, x{gain:.0f}", np.clip(0.5 + gain * left, 0, 1)),
    ]
    figure, axes = plt.subplots(len(lines), len(rows), figsize=(1.1 * len(rows) + 1.4, 1.15 * len(lines)))
    for line, (name, images) in zip(axes, lines):
        for axis, row in zip(line, rows):
            axis.imshow(images[row], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(output_dir: Path, story: Telling, norms: dict, settings: dict) -> dict:
    """`report.json` and `report.md` from the records alone; returns the former."""
    own = [r for r in read_records(output_dir / "records.jsonl") if settings.items() <= r["settings"].items()]
    own.sort(key=lambda record: record["seed"] or 0)  # a figure measured again stands where it stood
    accuracy, trained = (
        {row["settings.row"]: row for row in summarise([r for r in own if r["what"] == what], by=("settings.row",))}
        for what in ("accuracy", "train_accuracy")
    )
    seconds = sum(r["value"] for r in own if r["what"] == "seconds")
    mean = {row: accuracy[row]["mean"] for row in ROWS}
    lost, regained = mean["clean"] - mean["protected"], mean["purified"] - mean["protected"]
    verdict = (
        f"The protection costs a victim {100 * lost:.1f} points of accuracy on clean images; purification wins back "
        f"{100 * regained:.1f} of them ({100 * regained / lost:.0f} %)."
        if lost > 0.02
        else f"The protection did not work here (it costs {100 * lost:.1f} points), so purification proves nothing."
    )
    guide = guides_in_words(story.purification)
    report = {
        "telling": story.name,
        **{f"{row}_accuracy": accuracy[row]["values"] for row in ROWS},
        "regained_share": regained / lost if lost > 0 else None,
        "verdict": verdict,
        "guide": guide,
        "norms": norms,
        "seconds": seconds,
    }
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        f"# {story.title}",
        "",
        verdict,
        "",
        f"| victim trained on | test accuracy, mean of {story.seeds} | standard deviation | training accuracy |",
        "|---|---|---|---|",
        *(
            f"| {ROWS[row]} | {100 * mean[row]:.1f} % "
            f"| {'one victim' if accuracy[row]['std'] is None else format(100 * accuracy[row]['std'], '.1f')} "
            f"| {100 * trained[row]['mean']:.1f} % |"
            for row in ROWS
        ),
        "",
        "![Clean, protected, noise magnified, purified, and what purification changed, magnified](pictures.png)",
        "",
        f"Poison: LSP as published, mean L2 norm {norms['l2_mean']:.3f} after rounding to 8 bits, largest change "
        f"{norms['linf']:.0f}/255.",
        f"Purifier: `{story.unet}`, {story.training.max_train_steps} steps of {story.training.train_batch_size} on "
        f"{story.sizes[1]} collected images that are neither protected nor "
        f"tested{colour_in_words(story.training.noise_corner)}.",
        f"Purification: T_p {story.purification.diffusion_steps}, {story.purification.num_rounds} "
        f"round{'s' * (story.purification.num_rounds > 1)}, {story.purification.evaluations_per_image} UNet "
        f"evaluations per image, {guide}.",
        f"Victim: ResNet-18, recipe `{story.recipe}`, last epoch, the same in all rows.",
        f"Time: {seconds:.0f} s of computing. Records: `records.jsonl`; this report is made from them.",
        "",
    ]
    (output_dir / "report.md").write_text("\n".join(lines))
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `jcdp quickstart`."""
    parser.add_argument("--output", default="runs/quickstart", help="folder for report, records and pictures")
    parser.add_argument("--telling", default="digits", choices=tuple(TELLINGS))
    parser.add_argument("--data", help="CIFAR-10 with splits train and test, for --telling cifar10-mini")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """`jcdp quickstart`: tell the story, then print the table and where the report lies."""
    run_quickstart(args.output, telling=args.telling, data=args.data, seed=args.seed)
    print()
    print((Path(args.output) / "report.md").read_text())
    print(f"Report: {Path(args.output) / 'report.md'}, picture: {Path(args.output) / 'pictures.png'}")
