"""What reuse of deep features saves and what it does to pixels.

    python eval/studies/feature_caching.py speed --output results/feature_reuse.jsonl
    python eval/studies/feature_caching.py pixels --purifier DIR --dataset DIR --output results/feature_reuse.jsonl

`speed`: seconds of one thread per image, of whole and of reused evaluations in turn. `pixels`: how far images that are
purified with reuse lie from those without, in levels of 255, and from each other those of two seeds, as a yardstick.
With `--sampler ddim`, which draws no noise on the way, `--reference 100` and several `--num_inference_steps`, it tells
whether reuse or fewer evaluations is the better saving.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from jcdp_diffusers import JointConditionalPurificationPipeline
from jcdp_diffusers.acceleration.feature_cache import FeatureCache
from jcdp_diffusers.acceleration.placement import PRECISIONS, place
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import load_images, to_uint8
from jcdp_diffusers.purification_config import SAMPLERS
from jcdp_diffusers.results import append_record
from jcdp_diffusers.train.unets import UNETS, named_unet
from jcdp_diffusers.trials import purifier_digest


@torch.no_grad()
def measure_speed(args: argparse.Namespace) -> None:
    for name in args.unets:
        start = time.perf_counter()
        unet = named_unet(name).eval()
        place(JointConditionalPurificationPipeline(unet, DDPMScheduler()), "cpu", precision=args.precision)
        x = torch.randn(args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(unet.dtype)
        timestep, seconds = torch.full((args.batch,), 50), {"whole": [], "reused": []}
        reuse = FeatureCache(unet, 2)
        for _ in range(args.repeats + 1):  # the first is for warming up
            for kind in seconds:
                before = time.process_time()  # one thread's, whatever else the machine does
                reuse(x, timestep)
                seconds[kind].append((time.process_time() - before) / args.batch)
        value = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
        append_record(
            args.output,
            what="seconds_per_evaluation_and_image",
            value=value,
            seed=0,
            protocol="one thread",
            settings={"unet": name, "batch": args.batch, "dtype": str(unet.dtype), "repeats": args.repeats},
            device="cpu",
            seconds=round(time.perf_counter() - start, 2),
        )
        print(name, unet.dtype, {kind: f"{1000 * each:.2f} ms" for kind, each in value.items()})


def measure_pixels(args: argparse.Namespace) -> None:
    data = load_images(args.dataset, split=args.split).subset(range(args.images))
    pipe = JointConditionalPurificationPipeline.from_pretrained(args.purifier)
    place(pipe, "cpu", precision=args.precision).set_progress_bar_config(disable=True)
    reference = args.reference or args.num_inference_steps[0]
    settings = {
        "purifier": purifier_digest(args.purifier),
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "images": args.images,
        "dtype": str(pipe.unet.dtype),
        "diffusion_steps": args.diffusion_steps,
        "sampler": args.sampler,
        "reference": {"num_inference_steps": reference, "feature_reuse": 1, "seed": 0},
    }

    def purified(seed: int, evaluations: int, interval: int) -> torch.Tensor:
        images = pipe(
            data.tensor(),
            diffusion_steps=args.diffusion_steps,
            num_inference_steps=evaluations,
            num_rounds=1,
            sampler=args.sampler,
            feature_reuse=interval,
            seed=seed,
            ids=list(data.ids),
            output_type="pt",
        ).images
        return torch.from_numpy(to_uint8(images)).float()

    expected = purified(0, reference, 1)
    grid = itertools.product([0], args.num_inference_steps, args.intervals)
    for seed, evaluations, interval in [(1, reference, 1), *grid]:
        start = time.perf_counter()
        difference = (purified(seed, evaluations, interval) - expected).abs()
        value = {"mean": difference.mean().item(), "largest": difference.max().item()}
        whole = -(-evaluations // interval)
        append_record(
            args.output,
            what="pixel_difference",
            value=value,
            seed=seed,
            protocol="levels of 255",
            settings=settings
            | {"num_inference_steps": evaluations, "feature_reuse": interval, "whole_evaluations": whole},
            device="cpu",
            seconds=round(time.perf_counter() - start, 2),
        )
        print(
            f"seed {seed}, {evaluations} evaluations, feature_reuse {interval}, {whole} of them whole: "
            f"mean {value['mean']:.3f}, largest {value['largest']:.0f}"
        )


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    both = Parser(add_help=False)
    both.add_argument("--output", required=True, help="JSON Lines file of records")
    both.add_argument("--precision", choices=PRECISIONS, default="auto")
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("speed", parents=[both], help="seconds per evaluation")
    speed.add_argument("--unets", nargs="+", choices=tuple(UNETS), default=("ddpm-cifar10", "mini32"))
    speed.add_argument("--batch", type=int, default=16)
    speed.add_argument("--repeats", type=int, default=5)
    speed.set_defaults(run=measure_speed)
    pixels = commands.add_parser("pixels", parents=[both], help="differences in levels of 255")
    pixels.add_argument("--purifier", required=True, help="folder or Hub id of a DDPM")
    pixels.add_argument("--dataset", required=True)
    pixels.add_argument("--split", default="train")
    pixels.add_argument("--images", type=int, default=128)
    pixels.add_argument("--diffusion_steps", type=int, default=100)
    pixels.add_argument("--num_inference_steps", type=int, nargs="+", default=(20,))
    pixels.add_argument("--sampler", choices=SAMPLERS, default="ddpm")
    pixels.add_argument("--intervals", type=int, nargs="+", default=(2, 3, 5), help="values of feature_reuse")
    pixels.add_argument(
        "--reference", type=int, help="evaluations of the images compared with; the first number above"
    )
    pixels.set_defaults(run=measure_pixels)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with ends_in_one_sentence("feature_caching"):
        args.run(args)


if __name__ == "__main__":
    main()
