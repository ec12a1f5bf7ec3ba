"""
Does a purifier start better from another domain's network, and from fewer timesteps? One command, on a CPU.

    python eval/studies/finetune_versus_scratch.py --source ../shared/data/cifar100 --target ../shared/data/cifar10

A network is trained on the source; then, for equally many steps on the target, four more: from scratch and from the
source's network, each on every timestep and on the first ones only. The denoising loss of the averaged weights on
held-out target images, at the first timesteps, goes to `results/finetune_versus_scratch.jsonl`, and from there into a
plot. The same command goes on with a run that was interrupted.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDPMPipeline


sys.path.append(str(Path(__file__).parents[2]))
from eval.tables import markdown_table
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import load_images
from jcdp_diffusers.devices import default_device
from jcdp_diffusers.results import append_record, read_records
from jcdp_diffusers.train.config import MIXED_PRECISIONS
from jcdp_diffusers.train.loop import TrainingConfig, train_purifier
from jcdp_diffusers.train.record import read_record
from jcdp_diffusers.train.unets import UNETS, ddpm_scheduler, named_unet


ROOT = Path(__file__).resolve().parents[2]
WHAT = "held-out denoising loss"
SOURCE = "the source itself"
SHOWN = (0, 50, 100, 200, 400)  # steps in the table
ARMS = {
    "scratch, all timesteps": (False, False),
    "scratch, first timesteps": (False, True),
    "fine-tuned, all timesteps": (True, False),
    "fine-tuned, first timesteps": (True, True),
}


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.strip().split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", required=True, help="images of another domain: Hub id or folder")
    parser.add_argument("--target", required=True, help="images of the domain to purify: Hub id or folder")
    parser.add_argument("--source_split", default="test")
    parser.add_argument("--target_split", default="test")
    parser.add_argument("--unet", default="mini32", choices=sorted(UNETS))
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--num_held_out", type=int, default=256, help="target images that no network is trained on")
    parser.add_argument("--source_steps", type=int, default=1000)
    parser.add_argument("--target_steps", type=int, default=400)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument(
        "--first_timesteps", type=int, default=100, help="end of the restricted range, and of the loss's"
    )
    parser.add_argument("--validation_steps", type=int, default=50)
    parser.add_argument("--mixed_precision", default="auto", choices=MIXED_PRECISIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/finetune_versus_scratch"))
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "finetune_versus_scratch.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "results" / "figures" / "finetune_versus_scratch.png")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    def config(steps, trained_timesteps=None):
        return TrainingConfig(
            max_train_steps=steps,
            train_batch_size=args.train_batch_size,
            learning_rate=args.learning_rate,
            lr_warmup_steps=50,
            trained_timesteps=trained_timesteps,
            validation_steps=args.validation_steps,
            num_grid_images=0,
            validation_timesteps=(0, args.first_timesteps),
            mixed_precision=args.mixed_precision,
            checkpointing_steps=500,
            resume_from_checkpoint="latest",
            seed=args.seed,
        )

    def network():
        return named_unet(args.unet, sample_size=args.resolution, seed=args.seed)

    source = load_images(args.source, split=args.source_split, image_size=args.resolution)
    target = load_images(args.target, split=args.target_split, image_size=args.resolution)
    held_out = target.subset(range(args.num_held_out))
    collected = target.subset(range(args.num_held_out, len(target)))

    pending = {arm: kind for arm, kind in ARMS.items() if not on_record(args, arm, args.target_steps)}
    output_dir = args.output_dir / f"seed-{args.seed}"
    source_dir = output_dir / "source"
    source_done = on_record(args, SOURCE, args.source_steps)
    if not source_done or any(finetuned for finetuned, _ in pending.values()):
        train_purifier(  # or only loads it, if it was trained before
            source,
            unet=network(),
            scheduler=ddpm_scheduler(),
            output_dir=source_dir,
            config=config(args.source_steps),
            validation_images=held_out,
        )
        if not source_done:
            write_records(args, SOURCE, read_record(source_dir))
    for arm, (finetuned, restricted) in pending.items():
        arm_dir = output_dir / arm.replace(", ", "-").replace(" ", "-")
        train_purifier(
            collected,
            unet=DDPMPipeline.from_pretrained(source_dir).unet if finetuned else network(),
            scheduler=ddpm_scheduler(),
            output_dir=arm_dir,
            config=config(args.target_steps, (0, args.first_timesteps) if restricted else None),
            validation_images=held_out,
            base_model=str(source_dir) if finetuned else None,
        )
        write_records(args, arm, read_record(arm_dir))
    plot(args)


def described(args: argparse.Namespace) -> dict:
    """The settings that records of one comparison share; with the seed they decide each of its curves."""
    shared = (
        "unet", "resolution", "num_held_out", "train_batch_size", "learning_rate", "first_timesteps", "source_steps",
    )  # fmt: skip
    precision = TrainingConfig(mixed_precision=args.mixed_precision).precision_on(torch.device(default_device()))
    return {name: getattr(args, name) for name in shared} | {
        "mixed_precision": precision,
        "source": f"{Path(args.source).name} {args.source_split}",
        "target": f"{Path(args.target).name} {args.target_split}",
    }


def curve(args: argparse.Namespace, arm: str) -> dict[int, float]:
    """Loss by step of an arm, from the records with these settings and this seed; the last of equal steps counts."""
    if not args.results.exists():
        return {}
    wanted = args.seed, described(args)
    records = [record for record in read_records(args.results) if record["what"] == WHAT]
    return _curves([record for record in records if _compared(record) == wanted]).get(arm, {})


def on_record(args: argparse.Namespace, arm: str, steps: int) -> bool:
    """Whether an arm's curve reaches its last step, which is written last."""
    return steps in curve(args, arm)


def write_records(args: argparse.Namespace, arm: str, record: dict) -> None:
    """One record per point of an arm's curve."""
    for point in record["validation"]:
        append_record(
            args.results,
            what=WHAT,
            value=point["loss"],
            seed=args.seed,
            protocol="finetune_versus_scratch",
            settings=described(args) | {"arm": arm, "step": point["step"]},
            device=record["device"],
            seconds=record["seconds"],
        )


def curves(records: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    """
    Loss by step of each arm, of the last whole comparison; of equal steps the last counts.

    Args:
        records (`list[dict]`): See `last_comparison`.
    """
    return _curves(last_comparison(records))


def _curves(records: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for record in records:
        found.setdefault(record["settings"]["arm"], {})[record["settings"]["step"]] = record["value"]
    return {arm: dict(sorted(points.items())) for arm, points in found.items()}


def table(records: Sequence[Mapping]) -> str:
    """The losses at some steps in Markdown, for training/README.md; an arm in each row."""
    found = curves(records)
    steps = [step for step in SHOWN if all(step in found[arm] for arm in ARMS)]
    first = last_comparison(records)[-1]["settings"]["first_timesteps"]
    rows = [
        [
            "fine-tuned" if finetuned else "scratch",
            f"the first {first}" if restricted else "all",
            *(f"{found[arm][step]:.3f}" for step in steps),
        ]
        for arm, (finetuned, restricted) in ARMS.items()
    ]
    return markdown_table(["start", "timesteps trained", *(f"{step} steps" for step in steps)], rows)


def last_comparison(records: Sequence[Mapping]) -> list[Mapping]:
    """
    The records of the comparison that was recorded last and is whole: all five curves have the last step of an arm.

    Args:
        records (`list[dict]`): Of `results/finetune_versus_scratch.jsonl`.

    Raises:
        ValueError: If none is whole.
    """
    for last in reversed(records):
        comparison = [record for record in records if _compared(record) == _compared(last)]
        found = _curves(comparison)
        end = max(step for arm in ARMS for step in found.get(arm, {0: 0.0}))
        if end and all(end in found.get(arm, {}) for arm in (*ARMS, SOURCE)):
            return comparison
    raise ValueError(f"records hold no comparison in which {', '.join((*ARMS, SOURCE))} have the same last step.")


def _compared(record: Mapping) -> tuple[int, dict]:
    """What the records of one comparison share: the seed, and the settings as `described` has them."""
    settings = {"resolution": 32} | record["settings"]  # the first records do not name it
    return record["seed"], {name: value for name, value in settings.items() if name not in ("arm", "step")}


def plot(args: argparse.Namespace) -> None:
    """Loss against steps, one line per arm, from the records alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for arm, (finetuned, restricted) in ARMS.items():
        points = curve(args, arm)
        axes.plot(
            points.keys(),
            points.values(),
            label=arm,
            color="tab:blue" if finetuned else "tab:orange",
            linestyle="-" if restricted else "--",
            marker=".",
        )
    points = {step: loss for step, loss in curve(args, SOURCE).items() if step <= args.target_steps}
    label = "scratch, all timesteps, on the source's images"
    axes.plot(points.keys(), points.values(), label=label, color="grey", linestyle=":")
    settings = described(args)
    axes.set(
        xlabel=f"steps on {settings['target']} (batch {settings['train_batch_size']})",
        ylabel=f"held-out loss, t < {settings['first_timesteps']}",
        yscale="log",
        title=f"{settings['unet']}, source: {settings['source']} for {settings['source_steps']} steps",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.plot, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    with ends_in_one_sentence("finetune_versus_scratch"):
        main(parse_args())
