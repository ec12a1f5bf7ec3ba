"""
`jcdp quickstart`: protect real images, then audit the protection, end to end.

There are three presets. `digits` protects the handwritten digits that ship with scikit-learn, in minutes on two cores.
`cifar10-mini` does the same with a part of CIFAR-10. `smoke` shows in seconds that an installation works, and its
figures mean nothing. Each stage leaves its result in the output folder. The same command, given again after an
interruption, continues.
"""

import argparse
import dataclasses
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from .audit.run import BEGUN_NAME, OWN_NAMES, carry_out
from .audit.settings import AuditSettings
from .data import LabelledImages, write_dataset
from .data.examples import cifar10, digits
from .devices import check_seed
from .outputs import check_output_folder, public_name, write_atomically
from .poisons.protect import protect_dataset, read_card
from .purification_config import PurificationConfig
from .results import as_settings, plain
from .train.config import TrainingConfig
from .train.default_purifier import Plan
from .victims import RECIPES


# What an output folder was begun for.
BEGUN = "quickstart.json"
ROLES = ("clean", "protected", "collected", "test")
POISON = "lsp"


@dataclasses.dataclass(frozen=True)
class Preset:
    """
    What a quickstart uses.

    Args:
        title (`str`): Of the data, for people.
        sizes (`tuple[int, int, int]`): Images of the three roles: protected, collected, test.
        plan (`Plan`): Of the purifier, its training and the purification.
        recipe (`str`): Of the victims, the same in all rows.
        seeds (`int`): Victims per row.
    """

    title: str
    sizes: tuple[int, int, int]
    plan: Plan
    recipe: str
    seeds: int = 3


PRESETS = {
    "digits": Preset(
        title="Handwritten digits (scikit-learn), 32x32",
        sizes=(900, 500, 397),
        plan=Plan(
            "tiny32",
            TrainingConfig(
                max_train_steps=600,
                train_batch_size=32,
                learning_rate=1e-3,
                trained_timesteps=(0, 200),
                checkpointing_steps=200,
                checkpoints_total_limit=1,
            ),
            PurificationConfig(diffusion_steps=60, num_inference_steps=6, variance_type="fixed_small"),
        ),
        recipe="digits",
    ),
    "cifar10-mini": Preset(
        title="CIFAR-10, a part that a CPU can take, 32x32",
        sizes=(10_000, 10_000, 5_000),
        plan=Plan(
            "mini32",
            TrainingConfig(
                max_train_steps=2400,
                train_batch_size=64,
                learning_rate=1e-3,
                lr_scheduler="cosine",
                trained_timesteps=(0, 50),
                noise_corner=8.0,
                random_flip=True,
                checkpointing_steps=600,
                checkpoints_total_limit=1,
                mixed_precision="auto",
            ),
            PurificationConfig(diffusion_steps=30, num_inference_steps=2, variance_type="fixed_small"),
        ),
        recipe="mini",
    ),
    "smoke": Preset(
        title="Handwritten digits (scikit-learn), too few for figures that mean anything",
        sizes=(60, 40, 60),
        plan=Plan(
            "tiny32",
            TrainingConfig(
                max_train_steps=2,
                train_batch_size=4,
                trained_timesteps=(0, 50),
                checkpointing_steps=2,
                checkpoints_total_limit=1,
            ),
            PurificationConfig(diffusion_steps=10, num_inference_steps=2),
        ),
        recipe="smoke",
    ),
}


def run_quickstart(
    output_dir: str | os.PathLike = "runs/quickstart",
    *,
    preset: str | Preset = "digits",
    data: str | os.PathLike | None = None,
    seed: int = 0,
    processes: int | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """
    Protect images with LSP, train a purifier on others, purify, train victims, and write the audit's report.

    A script that calls this on a CPU needs an `if __name__ == "__main__":` around the call, because victims are
    trained in processes of their own.

    Args:
        output_dir (`str` or `os.PathLike`): Gets `clean/`, `protected/`, `collected/`, `test/` and whatever an audit
            writes: `purifier/`, `purified/`, `report.html`, `report.md`, `report.json`, `pictures/`, `records.jsonl`.
        preset (`str` or `Preset`): A key of `PRESETS`, or settings of one's own for the digits.
        data (`str` or `os.PathLike`, *optional*): CIFAR-10's folder, for `cifar10-mini`.
        seed (`int`): Of the poison, the purifier and the purification; the victims take seed, seed + 1, ...
        processes (`int`, *optional*): Victims at a time on a CPU, by default one per processor.
        command (`str`, *optional*): What the report gives as the way to repeat it.
        say (`Callable`): Where a line about each stage goes.

    Returns:
        `dict`: What `report.json` holds.

    Raises:
        ValueError: If arguments do not go together, or the folder holds anything else, in one sentence.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")
    if (preset == "cifar10-mini") != (data is not None):
        raise ValueError(f"data is {data!r}, but must be CIFAR-10's folder for 'cifar10-mini' and absent for others.")
    chosen, output_dir = PRESETS[preset] if isinstance(preset, str) else preset, Path(output_dir)
    check_output_folder(
        output_dir,
        marks=(BEGUN,),
        own=(*OWN_NAMES, BEGUN_NAME, *ROLES),
        sources={"data": data},
        name="output_dir",
    )
    for one in (seed, seed + chosen.seeds - 1):
        check_seed(one)
    _begin(output_dir, chosen, seed)
    say(f"{chosen.title}: images to protect, collected, for the test: {', '.join(map(str, chosen.sizes))}")
    clean, collected, test = digits(chosen.sizes) if data is None else cifar10(data, chosen.sizes)
    _protect(output_dir, clean, collected, test, seed, say)
    settings = AuditSettings(
        protocol=chosen.recipe,
        seeds=range(seed, seed + chosen.seeds),
        seed=seed,
        plan=chosen.plan,
        control=True,
    )
    return carry_out(
        settings,
        {role: output_dir / role for role in ROLES},
        None,
        output_dir,
        reading={"image_size": None, "channels": 3, "options": {}},
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        processes=processes,
        command=command or "jcdp_diffusers.quickstart.run_quickstart(...)",
        say=say,
    )


def _begin(output_dir: Path, preset: Preset, seed: int) -> None:
    """Refuse a folder in which a quickstart with other settings was begun; write down which one this is."""
    begun = as_settings(preset) | {"recipe": dataclasses.asdict(RECIPES[preset.recipe]), "seed": seed}
    begun = plain(begun, "preset")
    path = output_dir / BEGUN
    if path.exists():
        before = json.loads(path.read_text())
        if changed := [name for name in begun if before.get(name) != begun[name]]:
            raise ValueError(
                f"output_dir is {str(output_dir)!r}, where a quickstart with another {changed[0]} was begun, but must "
                f"be an empty folder, or the settings those of its {BEGUN}."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(begun, indent=2) + "\n")


def _protect(
    output_dir: Path,
    clean: LabelledImages,
    collected: LabelledImages,
    test: LabelledImages,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Write the images of the four roles, the protected ones with their card."""
    for role, images in {"clean": clean, "collected": collected, "test": test}.items():
        write_dataset(output_dir / role, images, split="test" if role == "test" else "train")
    protect_dataset(clean, output_dir / "protected", method=POISON, seed=seed, source="clean")
    norms = read_card(output_dir / "protected")["measured"]
    say(f"LSP: mean L2 norm {norms['l2_mean']:.3f} after rounding, largest change {norms['linf']:.0f}/255")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `jcdp quickstart`."""
    parser.add_argument("--output", default="runs/quickstart", help="folder for images, purifier, records and report")
    parser.add_argument("--preset", default="digits", choices=tuple(PRESETS))
    parser.add_argument("--data", help="CIFAR-10 with splits train and test, for --preset cifar10-mini")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """`jcdp quickstart`: protect and audit, then print the report and where it lies."""
    words = ["jcdp", "quickstart", "--preset", args.preset]
    words += [] if args.data is None else ["--data", public_name(args.data)]
    words += ["--seed", str(args.seed)] if args.seed else []
    run_quickstart(args.output, preset=args.preset, data=args.data, seed=args.seed, command=shlex.join(words))
    report = Path(args.output) / "report"
    print()
    print(report.with_suffix(".md").read_text())
    print(f"Report: {report.with_suffix('.html')} (and report.md, report.json)")
