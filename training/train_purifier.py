"""
Train a purifier: from scratch, or fine-tuned from any DDPM repository, on raw images without labels.

On a CPU, from a folder of photographs:
    python training/train_purifier.py --unet mini32 --dataset photos --output_dir my-purifier --max_train_steps 2000
On eight GPUs, fine-tuned as in the paper (a total batch of 256), and published:
    accelerate launch --num_processes 8 training/train_purifier.py --pretrained google/ddpm-cifar10-32 \\
        --dataset photos --output_dir my-purifier --max_train_steps 10000 --train_batch_size 32 \\
        --mixed_precision auto --trained_timesteps 0 100 --resume_from_checkpoint latest --push_to_hub
`torchrun --nproc_per_node 8` in place of `accelerate launch` does the same, and gives several processes on a CPU, too.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DModel

from jcdp_diffusers.acceleration.allocation import keep_freed_memory
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import LabelledImages, find_overlap, load_images, open_dataset
from jcdp_diffusers.hub import create_repository, push_purifier
from jcdp_diffusers.outputs import check_apart
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.results import read_records
from jcdp_diffusers.scheduling_guided_ddpm import settings_of
from jcdp_diffusers.train.images import ImageFiles, training_images, usable
from jcdp_diffusers.train.loop import TrainingConfig, on_cpu, train_purifier
from jcdp_diffusers.train.model_card import write_card
from jcdp_diffusers.train.unets import UNETS, ddpm_scheduler, named_unet, usual_size


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the description's lines as they are."""


# Options that say something of another one, and nothing without it.
GO_WITH = {
    "channels": "unet",
    "revision": "pretrained",
    "validation_split": "validation_dataset",
    "hub_private_repo": "push_to_hub",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.strip(), formatter_class=_Help)
    start = parser.add_argument_group("where to start").add_mutually_exclusive_group(required=True)
    start.add_argument("--unet", choices=sorted(UNETS), help="from scratch, with this network")
    start.add_argument("--pretrained", metavar="REPO", help="fine-tune this DDPM repository, and keep its schedule")
    parser.add_argument("--revision", help="of --pretrained")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="of --unet: greyscale or colour; 3 if not given")

    images = parser.add_argument_group("images")
    images.add_argument("--dataset", required=True, help="Hub id, folder of Parquet, folder of images, or .npz")
    images.add_argument("--split", help="needed where there are several")
    images.add_argument("--image_column", help="found by its usual names if not given")
    images.add_argument("--resolution", type=int, help="side of the square in pixels; the network's own if not given")
    images.add_argument(
        "--center_crop", action="store_true", help="cut the square from the middle rather than at random"
    )
    images.add_argument(
        "--skip_unusable_images", action="store_true", help="leave out what cannot be decoded as it is"
    )
    images.add_argument("--max_train_samples", type=int, help="use the first so many images only")
    images.add_argument("--validation_dataset", help="held-out images; if not given, they are taken from --dataset")
    images.add_argument("--validation_split", help="of --validation_dataset")
    images.add_argument(
        "--num_validation_images",
        type=int,
        default=256,
        help="held-out images, at most a tenth of --dataset; 0 for none",
    )

    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the repository, and beside it checkpoints and grids"
    )
    parser.add_argument("--push_to_hub", action="store_true", help="publish weights, card and settings, in one commit")
    parser.add_argument("--hub_model_id", help="name on the Hub; the folder's name if not given")
    parser.add_argument("--hub_private_repo", action="store_true", help="if the repository is made now")
    parser.add_argument("--license", help="for the card, as the Hub spells it")
    parser.add_argument(
        "--card_results", type=Path, metavar="JSONL", help="records of measurements to quote in the card"
    )
    TrainingConfig.add_arguments(parser.add_argument_group("training"))
    parser.set_defaults(noise_corner=None)  # that of --pretrained, where there is one
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    asked = argparse.Namespace(**vars(args) | {"noise_corner": args.noise_corner or 0.0})
    config = TrainingConfig.from_arguments(asked)
    check_options(args)
    sources = {f"--{name}": getattr(args, name) for name in ("dataset", "validation_dataset", "pretrained")}
    check_apart(args.output_dir, sources=sources, name="--output_dir")
    state = PartialState(cpu=on_cpu(args.cpu))
    repo_id = args.hub_model_id or args.output_dir.resolve().name
    if args.push_to_hub and state.is_main_process:
        # Whoever may not push learns it before the training rather than after.
        repo_id = create_repository(repo_id, private=args.hub_private_repo or None)

    with state.main_process_first():  # the others find what the first has put into the cache
        unet, scheduler, corner = load_model(args)
        config = dataclasses.replace(config, noise_corner=corner)
        images, held_out, description = load_data(args, unet)
    train_purifier(
        images,
        unet=unet,
        scheduler=scheduler,
        output_dir=args.output_dir,
        config=config,
        validation_images=held_out,
        base_model=args.pretrained,
        base_revision=args.revision,
        data_description=description,
    )
    if state.is_main_process:
        results = read_records(args.card_results) if args.card_results else ()
        write_card(args.output_dir, repo_id=repo_id, license=args.license, results=results)
        if args.push_to_hub:
            print(push_purifier(args.output_dir, repo_id, private=args.hub_private_repo or None))
    state.destroy_process_group()


def check_options(args: argparse.Namespace) -> None:
    """Refuse numbers that are too small, and options that nothing would read."""
    for name, least in (("num_validation_images", 0), ("max_train_samples", 1), ("resolution", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}.")
    for name, other in GO_WITH.items():
        if getattr(args, name) and not getattr(args, other):
            raise ValueError(f"{name} is {getattr(args, name)!r}, but must be left out without {other}.")


def load_model(args: argparse.Namespace) -> tuple[UNet2DModel, DDPMScheduler, float]:
    """Network, forward process and corner frequency of its noise."""
    if args.pretrained:
        options = {"revision": args.revision, "perceptual": None}
        try:
            pipe = JointConditionalPurificationPipeline.from_pretrained(args.pretrained, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"pretrained is {args.pretrained!r}, but must be a DDPM repository on the Hub or in a folder: "
                f"{_first_line(error)}"
            ) from error
        config = pipe.purification_config
        corner = 0.0 if config is None else config.noise_corner
        return pipe.unet, DDPMScheduler.from_config(settings_of(pipe.scheduler)), settle_noise_corner(args, corner)
    size = args.resolution or usual_size(args.unet)
    unet = named_unet(args.unet, in_channels=args.channels or 3, sample_size=size, seed=args.seed)
    return unet, ddpm_scheduler(), settle_noise_corner(args, 0.0)


def settle_noise_corner(args: argparse.Namespace, known: float) -> float:
    """That of the purifier to be fine-tuned, which another would undo; what is asked for if its noise was white."""
    if known and args.noise_corner not in (None, known):
        raise ValueError(
            f"noise_corner is {args.noise_corner:g}, but {args.pretrained!r} was trained with {known:g}: only that is "
            "accepted."
        )
    return known or args.noise_corner or 0.0


def load_data(
    args: argparse.Namespace, unet: UNet2DModel
) -> tuple[LabelledImages | ImageFiles, LabelledImages | None, dict]:
    """Images to train on, held-out ones, and what record and card say about them."""
    resolution, channels = args.resolution or unet.config.sample_size, unet.config.in_channels
    if not isinstance(resolution, int):
        raise ValueError(f"resolution is None, but the network's own is {resolution}: give the side of a square.")
    dataset = read(args.dataset, args.split, args, channels)
    if args.max_train_samples is not None:
        dataset = dataset.select(range(min(args.max_train_samples, len(dataset))))
    if args.validation_dataset:
        held_out = read(args.validation_dataset, args.validation_split, args, channels)
        held_out = held_out.select(range(min(args.num_validation_images, len(held_out))))
    else:
        order = np.random.default_rng(args.seed).permutation(len(dataset))
        count = min(args.num_validation_images, len(dataset) // 10)
        held_out = dataset.select(np.sort(order[:count]))
        dataset = dataset.select(np.sort(order[count:]))
    images = training_images(
        dataset, resolution=resolution, channels=channels, center_crop=args.center_crop, seed=args.seed
    )
    local = Path(args.dataset).exists()
    description = {
        "source": Path(args.dataset).name if local else args.dataset,  # a record is published: no paths of one's own
        "split": args.split,
        "hub_id": None if local else args.dataset.split(":")[0],
        "resolution": resolution,
        "crop": "center" if args.center_crop else "random",
    }
    if len(held_out) == 0:
        return images, None, description
    loaded = load_images(held_out, image_size=resolution, channels=channels)
    if args.validation_dataset and isinstance(images, LabelledImages):
        # Ids do not count: those of two sources may be mere row numbers.
        pairs = find_overlap(dataclasses.replace(images, id_space=None), loaded)
        check_held_out(args, [(images.ids[first], loaded.ids[second]) for first, second in pairs], len(loaded))
    elif args.validation_dataset:
        check_held_out(args, images.shared_with(held_out), len(loaded))
    return images, loaded, description


def check_held_out(args: argparse.Namespace, shared: list[tuple[str, str]], count: int) -> None:
    """Refuse held-out images that are trained on, given the ids of such images in both."""
    if shared:
        here, there = shared[0]
        raise ValueError(
            f"validation_dataset is {args.validation_dataset!r}, which shares {len({other for _, other in shared})} "
            f"of {count} images with dataset (the first is {there!r} there and {here!r} here), but must hold others."
        )


def read(source: str, split: str | None, args: argparse.Namespace, channels: int) -> datasets.Dataset:
    """Ids and images of a source; labels stay unread."""
    dataset = open_dataset(source, split=split, image_column=args.image_column).select_columns(["id", "image"])
    if args.skip_unusable_images:
        found = len(dataset)
        dataset = dataset.filter(usable, fn_kwargs={"channels": channels})
        if len(dataset) < found:
            print(
                f"{found - len(dataset)} of {found} images of {source} cannot be used and are left out",
                file=sys.stderr,
            )
    return dataset


def _first_line(error: Exception) -> str:
    """Libraries explain at length; the first line says what happened."""
    return str(error).strip().split("\n")[0]


if __name__ == "__main__":
    with ends_in_one_sentence("train_purifier", "--resume_from_checkpoint latest goes on from the last checkpoint"):
        main(parse_args())
