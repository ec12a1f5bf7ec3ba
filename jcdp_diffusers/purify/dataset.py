"""
A whole data set in, a sharded learnable data set out, on any number of processes and machines.

    jcdp purify --purifier google/ddpm-cifar10-32 --dataset protected/ --output learnable/
    torchrun --nproc_per_node 8 -m jcdp_diffusers.purify --purifier ... --dataset ... --output learnable/

Workers share nothing but the output folder: any number of them, started at any time with the same command, divide what
is left of the work. A run that was stopped, in whatever way, goes on when the command is given again.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch

from ..acceleration.placement import PRECISIONS, place
from ..data import ImageRejected, decode_image
from ..hub import push_dataset
from ..outputs import check_output_folder
from ..perceptual import load_perceptual
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PRESETS, PurificationConfig
from .dataset_card import SUMMARY_NAME, dataset_card, summarise_shards
from .manifest import RUN_NAME, describe_run, settle_run
from .progress import Progress
from .reader import Rows, open_rows
from .shards import CLAIM_TIMEOUT, Claims, ShardStore, ShardTakenOver, write_atomically
from .tiling import FITS
from .worker import ShardMaker, purify_tiles
from .worker_pool import open_lane, open_pool


# What a run writes into its folder beside run.json and hidden state.
OWN_NAMES = ("*-*.parquet", "README.md", SUMMARY_NAME, "rejected")


def purify_dataset(
    dataset: Any,
    pipe: JointConditionalPurificationPipeline,
    *,
    output_dir: str | os.PathLike,
    seed: int = 0,
    **options,
) -> datasets.Dataset:
    """
    Purify a data set into a folder that `datasets.load_dataset(output_dir)` opens, and open it.

    Args:
        dataset, pipe, output_dir, seed, options: As for `purify_to_folder`.

    Returns:
        `datasets.Dataset`: The columns of the source, `image` purified; without the rows that were rejected.
    """
    summary = purify_to_folder(dataset, pipe, output_dir=output_dir, seed=seed, **options)
    files = [str(Path(output_dir) / name) for name in summary["files"]]
    return datasets.load_dataset("parquet", data_files={summary["split"]: files}, split=summary["split"])


def purify_to_folder(
    dataset: Any,
    pipe: JointConditionalPurificationPipeline,
    *,
    output_dir: str | os.PathLike,
    seed: int = 0,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    streaming: bool = False,
    preset: str | PurificationConfig | None = None,
    image_size: int | None = None,
    fit: str | None = None,
    tile_overlap: int | None = None,
    shards: int | None = None,
    rows_per_shard: int | None = None,
    micro_batch_size: int | None = None,
    threads: int | None = None,
    num_workers: int | None = None,
    claim_timeout: float = CLAIM_TIMEOUT,
    progress: bool = True,
    push_to_hub: str | None = None,
    **settings,
) -> dict:
    """
    Purify a data set into a folder, or whatever is left of it, alone or together with any number of other workers.

    Args:
        dataset: A path, Hub id, `datasets.Dataset`, `IterableDataset` or whatever else `data.open_dataset` takes.
        pipe (`JointConditionalPurificationPipeline`): The purifier.
        output_dir (`str` or `os.PathLike`): Made if needed; shared by the workers. The settings of the run are in its
            `run.json`, images that cannot be used in `rejected/`.
        seed (`int`): Of the noise.
        split, image_column, label_column, id_column (`str`, *optional*): As for `data.open_dataset`.
        streaming (`bool`): Read the source as it comes rather than through the cache of `datasets`.
        preset (`str` or `PurificationConfig`, *optional*), settings: As for `pipe(...)`.
        image_size (`int`, *optional*): Side of the square that the purifier works on, the UNet's own by default.
        fit (`str`, *optional*): What happens to images of other sizes: `"exact"` sets them aside, and refuses a data
            set that begins with one; `"resize"` and `"tile"` see `tiles`. By default what the run was begun with, else
            `"exact"`.
        tile_overlap (`int`, *optional*): Least overlap of tiles in pixels, a quarter of `image_size` by default.
        shards (`int`, *optional*): Number of files, not for streams. Instead of:
        rows_per_shard (`int`, *optional*): Rows of the source per file; eight micro-batches by default.
        micro_batch_size (`int`, *optional*): Images per call of the network. By default, and so for the next two: what
            the run was begun with, else what suits the device.
        threads (`int`, *optional*): Of a CPU, a power of two.
        num_workers (`int`, *optional*): Processes that decode and encode images; 0 is this process itself, the default
            on a CPU; otherwise 4.
        claim_timeout (`float`): Seconds after which the shard of a silent worker on another machine is taken over.
        progress (`bool`): Show a bar, or now and then a line where there is no terminal.
        push_to_hub (`str`, *optional*): Repository to publish the finished data set in.

    Returns:
        `dict`: Counts, times and checksums, as in `summary.json`, and the split.

    Raises:
        ValueError: For arguments that cannot be used, or a folder that holds another run, in one sentence.
        OSError: If the folder cannot be written to; what is finished stays finished.
    """
    # 1. What is to be done, as recorded or recorded now
    check_output_folder(output_dir, marks=(RUN_NAME,), own=OWN_NAMES, sources={"dataset": dataset})
    size = _image_size(pipe, image_size)
    overlap = size // 4 if tile_overlap is None else tile_overlap
    _check(fit, size, overlap, threads, shards, rows_per_shard, micro_batch_size)
    config = pipe.resolve_config(preset, **settings)
    if config.perceptual_guidance_scale > 0:
        config = dataclasses.replace(config, perceptual_network=pipe.perceptual.name)  # the one that is used
    pipe.check_colour(config, size, size)
    rows = open_rows(
        dataset,
        split=split,
        image_column=image_column,
        label_column=label_column,
        id_column=id_column,
        streaming=streaming,
    )
    if shards is not None and (rows.length is None or not 1 <= shards <= rows.length):
        raise ValueError(
            f"shards is {shards}, but the source has {rows.length or 'an unknown number of'} rows: "
            f"{'rows_per_shard is what a stream takes' if rows.length is None else 'one to that many are accepted'}."
        )
    output_dir = Path(output_dir)
    if fit is None and not (output_dir / RUN_NAME).exists():
        fit = "exact"
    if fit == "exact":
        _check_first_image(rows, pipe.unet.config.in_channels, size)
    asked = describe_run(
        pipe,
        config,
        rows,
        seed=seed,
        image_size=size,
        fit=fit,
        overlap=overlap,
        micro_batch_size=micro_batch_size,
        threads=threads,
        shards=shards,
        rows_per_shard=rows_per_shard,
    )
    with _explained(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        run = settle_run(output_dir, asked)
        store = ShardStore(output_dir, rows.split, rows=rows.length, **run["shards"])

    # 2. Shard by shard, as long as there is one that nobody has finished
    device, arithmetic = pipe._execution_device, run["arithmetic"]
    purify = functools.partial(
        purify_tiles, pipe, preset=config, seed=run["seed"], micro_batch_size=arithmetic["micro_batch_size"]
    )
    if num_workers is None:
        num_workers = 0 if device.type == "cpu" else 4
    summary_path = output_dir / SUMMARY_NAME
    summary_before = _changed_at(summary_path)
    with (
        _explained(output_dir),
        steady_arithmetic(pipe, arithmetic["threads"]),
        open_pool(num_workers) as pool,
        open_lane(device.type) as lane,
        Claims(store.state / "claims", claim_timeout) as claims,
        Progress(rows.length, show=progress) as bar,
    ):
        channels = pipe.unet.config.in_channels
        maker = ShardMaker(rows, store, claims.token, purify, run, channels, device, pool, lane, bar)
        while True:
            make_shards(maker, store, claims, bar)
            # 3. Whoever comes first checks everything; what is found damaged is made again
            if not claims.take("finish"):
                bar.say("all shards are there; another worker is checking them")
                time.sleep(min(1.0, claim_timeout / 10))
                continue
            try:
                if _changed_at(summary_path) != summary_before:
                    break  # that other worker has found everything in order
                if all_intact(store, bar):
                    finish(store, rows, run, push_to_hub)
                    break
            finally:
                claims.release("finish")
    return json.loads(summary_path.read_text()) | {"split": rows.split}


def open_purifier(
    purifier: str | os.PathLike,
    device: torch.device | str,
    *,
    output_dir: str | os.PathLike,
    precision: str = "auto",
    compiled: bool = False,
    **options,
) -> JointConditionalPurificationPipeline:
    """
    Load a purifier and place it, for a purification that may have been begun before.

    Args:
        purifier (`str` or `os.PathLike`): Folder or Hub id of a DDPM.
        device, compiled: As for `place`.
        output_dir (`str` or `os.PathLike`): Where the purified data set will be.
        precision (`str`): As for `place`; but `"auto"` is what the run in `output_dir` was begun in, if there is one.
        options: As for `from_pretrained`.
    """
    pipe = JointConditionalPurificationPipeline.from_pretrained(purifier, **options)
    begun = Path(output_dir) / RUN_NAME
    if precision == "auto" and begun.exists():
        precision = json.loads(begun.read_text())["arithmetic"]["dtype"]
    return place(pipe, device, precision=precision, compiled=compiled)


def make_shards(make: ShardMaker, store: ShardStore, claims: Claims, bar: Progress) -> None:
    """Make shards until all are finished, by whomever."""
    while True:
        index, claimed_by_others, made = 0, 0, 0
        finished = store.finished()
        bar.at(store.rows_of(finished))
        while (end := store.end()) is None or index < end:
            if index in finished:
                pass
            elif not claims.take(str(index)):
                claimed_by_others += 1
            else:
                try:
                    if not store.is_finished(index):  # it may have been since we looked
                        make(index)
                        made += 1
                except ShardTakenOver:
                    claimed_by_others += 1
                finally:
                    claims.release(str(index))
                finished = store.finished()
                bar.at(store.rows_of(finished))
            index += 1
        if claimed_by_others == 0:
            return
        if made == 0:
            bar.say(f"waiting for {claimed_by_others} shards that other workers have claimed")
            time.sleep(min(1.0, claims.timeout / 10))


def all_intact(store: ShardStore, bar: Progress) -> bool:
    """Compare every shard with its checksum; a damaged one becomes unfinished again."""
    with ThreadPoolExecutor(8) as pool:
        intact = list(pool.map(store.is_intact, range(store.end())))
    for index, good in enumerate(intact):
        if not good:
            bar.say(f"{store.path(index).name} is not what was written: it will be made again")
            store.discard(index)
    return all(intact)


def finish(store: ShardStore, rows: Rows, run: dict, push_to_hub: str | None) -> None:
    """Count everything, then write summary and card, and publish if asked."""
    count = store.end()
    if count == 0:
        raise ValueError(f"dataset {rows.name!r} has no rows in split {rows.split!r}: at least one is needed.")
    if rows.length is None:
        store.give_final_names()
    records = {store.path(index).name: store.record(index) for index in range(count)}
    summary = summarise_shards(records)
    written = sum(pq.read_metadata(store.output_dir / name).num_rows for name in records)
    # A stream's length is what its shards say, all of which must be full but the last.
    last = store.record(count - 1)["rows_in"]
    expected = rows.length or store.range(count - 1)[0] + last
    if summary["rows_in"] != expected or written + summary["rejected"] != expected:
        raise ValueError(
            f"dataset {rows.name!r} has {expected} rows; {summary['rows_in']} were read, {written} written, "
            f"{summary['rejected']} rejected: it must have changed meanwhile, so begin anew in another output_dir."
        )
    if written == 0:
        raise ValueError(f"dataset {rows.name!r} has no image that can be used: see {store.output_dir / 'rejected'}.")
    write_atomically(store.output_dir / "README.md", str(dataset_card(run, summary, store.output_dir.resolve().name)))
    store.remove_leftovers()
    write_atomically(store.output_dir / SUMMARY_NAME, json.dumps(summary, indent=2))
    if push_to_hub is not None:
        push_dataset(store.output_dir, push_to_hub)


@contextlib.contextmanager
def steady_arithmetic(pipe: JointConditionalPurificationPipeline, threads: int | None) -> Iterator[None]:
    """What the bits of a result depend on, held fixed, and the pipeline's own progress bar out of sight."""
    threads_before, bar_before = torch.get_num_threads(), getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        cudnn = torch.backends.cudnn
        with cudnn.flags(  # whose defaults are not cuDNN's own: left out, `enabled` would turn it off
            enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32
        ):
            yield
    finally:
        torch.set_num_threads(threads_before)
        pipe.set_progress_bar_config(**bar_before)


@contextlib.contextmanager
def _explained(output_dir: Path) -> Iterator[None]:
    """Trouble with the output in one sentence that says how to go on."""
    try:
        yield
    except OSError as error:
        within = str(error.filename or "").startswith(os.fspath(output_dir))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and not within:
            raise
        raise OSError(
            f"output_dir {os.fspath(output_dir)!r} cannot be written to ({os.strerror(error.errno).lower()}): mend "
            "that and give the same command again, finished shards stay."
        ) from error


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _image_size(pipe: JointConditionalPurificationPipeline, image_size: int | None) -> int:
    size = pipe.unet.config.sample_size if image_size is None else image_size
    if not isinstance(size, int) or size < 1:
        why = f": the sample_size of this purifier's unet is {size}" if image_size is None else ""
        raise ValueError(f"image_size is {image_size}, but must be the side of a square in pixels{why}.")
    multiple = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if size % multiple:
        raise ValueError(f"image_size is {size}, but must be a multiple of {multiple} for this UNet.")
    return size


def _check(fit, size, overlap, threads, shards, rows_per_shard, micro_batch_size) -> None:
    if fit is not None and fit not in FITS:
        raise ValueError(f"fit is {fit!r}, but must be one of {FITS}.")
    if not 0 <= overlap < size:
        raise ValueError(f"tile_overlap is {overlap}, but must lie between 0 and image_size ({size}), exclusive.")
    if threads is not None and (threads < 1 or threads & (threads - 1)):
        raise ValueError(f"threads is {threads}, but must be a power of two: else an image's place would matter.")
    if shards is not None and rows_per_shard is not None:
        raise ValueError(f"shards is {shards} and rows_per_shard {rows_per_shard}, but only one of them can be given.")
    for name, value in (("rows_per_shard", rows_per_shard), ("micro_batch_size", micro_batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")


def _check_first_image(rows: Rows, channels: int, size: int) -> None:
    """Refuse a data set whose images are not the purifier's size before all of them have been set aside one by one."""
    for table in rows.read(0, 1):
        with contextlib.suppress(ImageRejected):
            height, width = decode_image(table["image"][0].as_py(), channels).shape[:2]
            if (height, width) != (size, size):
                raise ValueError(
                    f"dataset has images of {width}x{height}, but the purifier works on {size}x{size}: fit (--fit) "
                    "must say what becomes of them, resize or tile."
                )


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
    what.add_argument("--output", required=True, help="folder; a run that it holds is gone on with")
    what.add_argument("--push_to_hub", metavar="REPO", help="publish the finished data set")

    how = parser.add_argument_group("how (not given: what the purifier's repository says)")
    how.add_argument("--preset", choices=tuple(PRESETS))
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
    how.add_argument("--fit", choices=FITS, help="images of other sizes: exact, if nothing is given, sets them aside")
    how.add_argument("--tile_overlap", type=int, help="least overlap of tiles, in pixels")

    work = parser.add_argument_group("work (not given: what the run was begun with)")
    work.add_argument("--shards", type=int, metavar="K", help="number of files")
    work.add_argument("--rows_per_shard", type=int, help="instead of --shards")
    work.add_argument("--micro_batch_size", type=int, help="images per call of the network")
    work.add_argument("--threads", type=int, help="of each process on a CPU, a power of two")
    work.add_argument("--num_workers", type=int, help="processes that decode and encode images")
    work.add_argument("--device", help="cuda if there is one")
    work.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="of the UNet; auto: bfloat16 where the device has it"
    )
    work.add_argument("--compile", action="store_true", help="compile the UNet, which takes minutes and pays on a GPU")


def run(args: argparse.Namespace) -> None:
    """Purify as the command line says."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    usual_device = "cpu"
    if args.device is None and torch.cuda.is_available():
        # Or each process would take memory on the first one, too.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        usual_device = f"cuda:{torch.cuda.current_device()}"
    evaluations = args.num_inference_steps
    if evaluations is not None and len(evaluations) == 1:
        (evaluations,) = evaluations
    options = {} if args.perceptual is None else {"perceptual": load_perceptual(args.perceptual)}
    try:
        pipe = open_purifier(
            args.purifier,
            args.device or usual_device,
            output_dir=args.output,
            precision=args.precision,
            compiled=args.compile,
            revision=args.revision,
            **options,
        )
        summary = purify_to_folder(
            args.dataset,
            pipe,
            output_dir=args.output,
            seed=args.seed,
            split=args.split,
            image_column=args.image_column,
            label_column=args.label_column,
            id_column=args.id_column,
            streaming=args.streaming,
            preset=args.preset,
            diffusion_steps=args.diffusion_steps,
            num_inference_steps=evaluations,
            num_rounds=args.num_rounds,
            pixel_guidance_scale=args.pixel_guidance_scale,
            perceptual_guidance_scale=args.perceptual_guidance_scale,
            image_size=args.image_size,
            fit=args.fit,
            tile_overlap=args.tile_overlap,
            shards=args.shards,
            rows_per_shard=args.rows_per_shard,
            micro_batch_size=args.micro_batch_size,
            threads=args.threads,
            num_workers=args.num_workers,
            push_to_hub=args.push_to_hub,
        )
    except KeyboardInterrupt:
        finished = len(list(Path(args.output).glob("*.parquet")))
        stays = f"{finished} finished shards stay in {args.output}"
        print(f"Stopped: {stays}. Give the same command again to go on.", file=sys.stderr)
        raise
    print(
        f"{summary['rows_in']:,} rows in, {summary['rows_out']:,} out, {summary['rejected']:,} rejected: {args.output}"
    )
    if summary["resized"]:
        kept = "" if args.fit == "tile" else "; --fit tile keeps an image's size"
        print(f"{summary['resized']:,} images were not of the purifier's size and have been resized{kept}.")


def _stop(*_) -> None:
    raise KeyboardInterrupt  # a shard in the making is dropped on the way out, as after Ctrl-C
