"""The options of `jcdp purify` and `python -m jcdp_diffusers.purify`, and what they do."""

import argparse
import functools
import os
import signal
import sys
import threading

from .. import engines
from ..acceleration.placement import PRECISIONS
from ..data import is_url, present_columns
from ..data.export import FORMATS
from ..data.photographs import detailed_side, stored_sizes
from ..devices import default_device
from ..outputs import check_apart
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import ADAPTIVE, PRESETS, PurificationConfig
from ..storage import Folder
from .adaptive import adaptive_config_of_rows
from .dataset import open_purifier, purify_to_folder
from .export import check_places, export_purified
from .manifest import settled_fit
from .reader import open_rows
from .tiling import FITS
from .worker import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jcdp purify` and `python -m jcdp_diffusers.purify`."""
    what = parser.add_argument_group("what to purify, and where to put it")
    what.add_argument("--purifier", required=True, help="folder or Hub id of a DDPM")
    what.add_argument("--revision", help="of the purifier on the Hub")
    what.add_argument("--dataset", required=True, help="folder, file or Hub id")
    what.add_argument("--split", help="the only one if not given")
    what.add_argument("--image_column", help="found by its usual names if not given, and so the next two")
    what.add_argument("--label_column")
    what.add_argument("--id_column")
    what.add_argument("--streaming", action="store_true", help="read a Hub data set as it comes, without a copy")
    what.add_argument("--output", required=True, help="folder; an interrupted run in it is resumed")
    what.add_argument("--export", metavar="FOLDER", help="also write the pictures under their own file names")
    what.add_argument("--export_format", choices=tuple(FORMATS), help="of --export, png if not given")
    what.add_argument("--push_to_hub", metavar="REPO", help="publish the finished data set")

    how = parser.add_argument_group("how (not given: what the purifier's repository says)")
    how.add_argument(
        "--preset",
        choices=(*PRESETS, ADAPTIVE),
        help=f"{ADAPTIVE}: made from the data set's spectrum and --collected's",
    )
    how.add_argument("--collected", help=f"other, unprotected images of the same kind, for preset {ADAPTIVE}")
    how.add_argument("--collected_split", help="the only one if not given")
    how.add_argument("--diffusion_steps", type=int, help="T_p")
    how.add_argument(
        "--num_inference_steps",
        type=int,
        nargs="+",
        metavar="E",
        help="network evaluations per round, at most T_p; or one number for each round",
    )
    how.add_argument("--num_rounds", type=int, help="N")
    how.add_argument("--pixel_guidance_scale", type=float)
    how.add_argument("--perceptual_guidance_scale", type=float)
    how.add_argument("--perceptual", metavar="NAME_OR_PATH", help="alex, vgg, squeeze, a folder or SqueezeNet's file")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--image_size", type=int, help="side of the square that the purifier works on")
    how.add_argument(
        "--fit", choices=FITS, help="images of other sizes: exact sets them aside, tile is the default for larger ones"
    )
    how.add_argument("--tile_overlap", type=int, help="least overlap of tiles, in pixels")

    work = parser.add_argument_group("work (not given: what the run was begun with)")
    work.add_argument("--shards", type=int, metavar="K", help="number of files")
    work.add_argument("--rows_per_shard", type=int, help="instead of --shards")
    work.add_argument("--micro_batch_size", type=int, help="images per call of the network")
    work.add_argument("--threads", type=int, help="of each worker on a CPU, a power of two")
    work.add_argument("--num_workers", type=int, help="processes of each worker that decode and encode images")
    work.add_argument("--engine", choices=engines.ENGINES, default="local", help="ray: workers on a Ray cluster")
    work.add_argument("--processes", type=int, help="workers; ray: by default as many as fit")
    work.add_argument("--address", help="of a running Ray cluster, auto for this machine's; else one is started here")
    work.add_argument("--device", help="cuda if there is one")
    work.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the UNet; auto: bfloat16 where the device has it"
    )
    work.add_argument("--compile", action="store_true", help="compile the UNet, which takes minutes and pays on a GPU")


def run(args: argparse.Namespace) -> None:
    """Purify as the command line says."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    options = vars(args).copy()
    for name in ("command", "collected", "collected_split"):
        options.pop(name, None)
    if args.engine == "ray":  # its workers may have another working directory
        for name in ("purifier", "dataset", "perceptual", "output"):
            path = options[name]
            if path and not is_url(path) and (name == "output" or os.path.exists(path)):
                options[name] = os.path.abspath(path)
    device = args.device or default_device()
    engines.check(args.engine, args.processes, args.address, device)
    dataset, output = options.pop("dataset"), options.pop("output")
    export, suffix = options.pop("export"), options.pop("export_format") or "png"
    if export is not None and engines.ranks()[0] == 0:
        where = {name: options[name] for name in ("split", "image_column", "label_column", "id_column")}
        check_places(export, dataset, output, suffix, **where)
    opening = {name: options.pop(name) for name in ("device", "perceptual", "precision", "revision")}
    opening |= {"compiled": options.pop("compile"), "output_dir": output}
    if options["num_inference_steps"] is not None and len(options["num_inference_steps"]) == 1:
        (options["num_inference_steps"],) = options["num_inference_steps"]
    if (args.preset == ADAPTIVE) != (args.collected is not None):
        raise ValueError(
            f"--collected is {args.collected!r} and --preset is {args.preset!r}, but {ADAPTIVE!r} and --collected "
            "must be given together."
        )
    if args.preset == ADAPTIVE:
        for name, path in (("--output", output), ("--export", export)):
            if path is not None and not is_url(path):
                check_apart(path, sources={"--collected": args.collected}, name=name)
        options["preset"] = _adaptive(args)
    if args.perceptual is not None:
        _check_perceptual_guide(args, options["preset"])
    pipe = functools.partial(open_purifier, options.pop("purifier"), **opening)
    gpus = int(str(device).startswith("cuda"))  # of an actor on Ray
    try:
        summary = purify_to_folder(dataset, pipe, output_dir=output, gpus=gpus, **options)
    except KeyboardInterrupt:
        stays = f"{len(Folder(output).names('', '*.parquet'))} finished shards stay in {output}"
        print(f"Stopped: {stays}. Give the same command again to go on.", file=sys.stderr)
        raise
    if engines.ranks()[0] > 0:
        return
    print(f"{summary['rows_in']:,} rows in, {summary['rows_out']:,} out, {summary['rejected']:,} rejected: {output}")
    for what, count in summary["changes"].items():
        print(f"{what[0].upper()}{what[1:]} in {count:,} image(s).")
    if export is not None:
        print(f"{export_purified(export, Folder(output), summary, suffix):,} pictures in {export}")
    if summary["resized"]:
        kept = "" if summary["fit"] == "tile" else "; --fit tile keeps an image's size"
        print(f"{summary['resized']:,} images were not of the purifier's size and have been resized{kept}.")


def _adaptive(args: argparse.Namespace) -> PurificationConfig:
    """Preset `"adaptive"`, of what the network will see: squares of both sets, or both brought to its size."""
    pipe = JointConditionalPurificationPipeline.from_pretrained(args.purifier, revision=args.revision)
    size = Job(args.dataset, pipe, args.output, image_size=args.image_size, tile_overlap=args.tile_overlap).size(pipe)
    protected = {name: getattr(args, name) for name in ("split", "image_column", "label_column", "id_column")}
    collected = {"split": args.collected_split}
    collected |= present_columns(args.collected, {"image_column": args.image_column}, **collected)
    sides = [
        detailed_side({"": stored_sizes(source, **where)})
        for source, where in ((args.dataset, protected), (args.collected, collected))
    ]
    if None not in sides and sides[1] < (least := min(size, sides[0])):
        raise ValueError(
            f"--collected has images with a side of {sides[1]} pixels, but must have at least {least}: enlarged ones "
            "have no fine detail, beside which that of --dataset would be taken for a protection."
        )
    rows = open_rows(args.dataset, **protected)
    fit, _ = settled_fit(Folder(args.output), rows, size, args.fit)
    return adaptive_config_of_rows(rows, open_rows(args.collected, **collected), size, pipe, tiled=fit == "tile")


def _check_perceptual_guide(args: argparse.Namespace, preset: str | PurificationConfig | None) -> None:
    """Refuse a perceptual network that no guide would use."""
    own = PurificationConfig.from_pretrained(args.purifier, revision=args.revision) if preset is None else None
    asked = {"perceptual_guidance_scale": args.perceptual_guidance_scale}
    if PurificationConfig.resolve(preset, repository=own, **asked).perceptual_guidance_scale == 0:
        raise ValueError(
            f"--perceptual is {args.perceptual!r}, but must be left out where the perceptual guide is off: "
            "--perceptual_guidance_scale or a preset turns it on."
        )


def _stop(*_) -> None:
    raise KeyboardInterrupt  # a shard in the making is dropped on the way out, as after Ctrl-C
