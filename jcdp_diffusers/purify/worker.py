"""One worker: it opens purifier and row reader once, and makes shards, a few rows at a time."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..devices import check_seed, cpu_threads
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PurificationConfig
from ..storage import Folder
from .manifest import completed, describe_run, run_on_record, settle_run, settled_fit
from .reader import first_repeated, open_rows, with_content
from .shards import ShardStore, ShardWriter, explained
from .tiling import FITS, Blending, TiledImage, encode_all, prepare_all
from .worker_pool import IN_FLIGHT, in_order, open_device_thread, open_pool


ROWS_PER_PIECE = 16  # what a decoding or encoding process gets to do at a time


@dataclasses.dataclass(frozen=True)
class Job:
    """
    What is to be purified, and how. Workers in other processes get a copy, by pickle.

    Args:
        dataset (`Any`): A path, Hub id, `datasets.Dataset`, `IterableDataset` or what else `data.open_dataset` takes.
        pipe (`JointConditionalPurificationPipeline` or `Callable`): The purifier, or a function that opens it.
        output_dir (`str` or `os.PathLike`): Made if needed; a path, or a URL of fsspec. The settings of the run are in
            its `run.json`, images that cannot be used in `rejected/`.
        seed (`int`, defaults to 0): Of the noise.
        split, image_column, label_column, id_column (`str`, *optional*): As for `data.open_dataset`.
        streaming (`bool`): Read the source as it comes rather than through the cache of `datasets`.
        preset (`str` or `PurificationConfig`, *optional*): As for `pipe(...)`.
        image_size (`int`, *optional*): Side of the square that the purifier works on, the UNet's own by default.
        fit (`str`, *optional*): What happens to images of other sizes: `"exact"` sets them aside, and refuses a data
            set that begins with one; `"resize"` and `"tile"` see `tiling`. By default what the run was begun with,
            else `usual_fit`: `"exact"` where the first images have the purifier's size, `"tile"` where they are
            larger.
        tile_overlap (`int`, *optional*): Least overlap of tiles in pixels, a quarter of `image_size` by default.
        shards (`int`, *optional*): Number of files, not for streams. Instead of:
        rows_per_shard (`int`, *optional*): Rows of the source per file; eight micro-batches by default, of squares
            where images are cut into them: a photograph is a file of its own.
        micro_batch_size (`int`, *optional*): Images per call of the network. By default, and so for the next one: what
            the run was begun with, else what suits the device.
        threads (`int`, *optional*): Of a worker on a CPU, a power of two.
        num_workers (`int`, *optional*): Processes of each worker that decode and encode images; 0 is the worker
            itself, the default on a CPU; otherwise 4.
        settings (`Mapping`): Further options of `pipe(...)`.
    """

    dataset: Any
    pipe: JointConditionalPurificationPipeline | Callable[[], JointConditionalPurificationPipeline]
    output_dir: Any
    seed: int = 0
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None
    streaming: bool = False
    preset: str | PurificationConfig | None = None
    image_size: int | None = None
    fit: str | None = None
    tile_overlap: int | None = None
    shards: int | None = None
    rows_per_shard: int | None = None
    micro_batch_size: int | None = None
    threads: int | None = None
    num_workers: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Refuse what no purifier and no data set could make right."""
        check_seed(self.seed, bits=64)
        if self.fit is not None and self.fit not in FITS:
            raise ValueError(f"fit is {self.fit!r}, but must be one of {FITS}.")
        if self.threads is not None and (self.threads < 1 or self.threads & (self.threads - 1)):
            raise ValueError(
                f"threads is {self.threads}, but must be a power of two: else an image's place would matter."
            )
        if self.shards is not None and self.rows_per_shard is not None:
            raise ValueError(
                f"shards is {self.shards} and rows_per_shard {self.rows_per_shard}, but only one of them can be given."
            )
        for name, least in (("rows_per_shard", 1), ("micro_batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}.")

    def size(self, pipe: JointConditionalPurificationPipeline) -> int:
        """Side of the square that the purifier works on, in pixels."""
        size = pipe.unet.config.sample_size if self.image_size is None else self.image_size
        if not isinstance(size, int) or size < 1:
            why = f": the sample_size of this purifier's unet is {size}" if self.image_size is None else ""
            raise ValueError(f"image_size is {self.image_size}, but must be the side of a square in pixels{why}.")
        multiple = 2 ** (len(pipe.unet.config.block_out_channels) - 1)
        if size % multiple:
            raise ValueError(f"image_size is {size}, but must be a multiple of {multiple} for this UNet.")
        if not 0 <= (self.tile_overlap or 0) < size:
            raise ValueError(
                f"tile_overlap is {self.tile_overlap}, but must lie between 0 and image_size ({size}), exclusive."
            )
        return size


class Worker(contextlib.ExitStack):
    """
    Opens a job's purifier and row reader; then, after `join`, makes its shards. Closing it restores torch's settings.

    Args:
        job (`Job`): What is to be purified; checked here against the purifier and the data set.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job, self.folder = job, Folder(job.output_dir)
        self.on_rows, self.on_squares = None, None
        opened = isinstance(job.pipe, JointConditionalPurificationPipeline)
        self.pipe = job.pipe if opened else job.pipe()
        size = job.size(self.pipe)
        config = self.pipe.resolve_config(job.preset, **job.settings)
        if config.perceptual_guidance_scale > 0:
            config = dataclasses.replace(config, perceptual_network=self.pipe.perceptual.name)  # the one that is used
        self.pipe.check_unet()
        if config.perceptual_guidance_scale > 0:
            self.pipe.perceptual.check_size(size, size)
        self.pipe.check_colour(config, size, size)
        self.pipe.check_protection(config, size, size)
        where = ("split", "image_column", "label_column", "id_column", "streaming")
        self.rows = open_rows(job.dataset, **{name: getattr(job, name) for name in where})
        length = self.rows.length
        if job.shards is not None and (length is None or not 1 <= job.shards <= length):
            raise ValueError(
                f"shards is {job.shards}, but the source has {length or 'an unknown number of'} rows: "
                f"{'rows_per_shard is what a stream takes' if length is None else 'one to that many are accepted'}."
            )
        fit, self.note = settled_fit(self.folder, self.rows, size, job.fit)
        if job.tile_overlap is not None and fit != "tile":
            raise ValueError(f"tile_overlap is {job.tile_overlap}, but must be left out where fit is {fit!r}.")
        self.config, self.asked = config, describe_run(self.pipe, config, self.rows, job, size, fit)

    def plan(self, processes: int | None = None) -> tuple[dict, dict, str | None]:
        """
        The run as asked for; as it would begin with so many workers on this machine; and what to say when it does.

        Raises:
            ValueError: If it would begin, and two rows have one id: they would share their noise.
        """
        own_ids = None if run_on_record(self.folder) else self.rows.own_ids
        if own_ids is not None and (repeated := first_repeated(own_ids)) is not None:
            raise ValueError(
                f"dataset {self.rows.name!r} has the id {repeated!r} more than once, but must have it once."
            )
        return self.asked, completed(self.asked, self.rows, processes), self.note

    def join(self) -> "Worker":
        """Get ready for the run that the folder holds, which must be the one that this worker would begin."""
        run, rows, device = settle_run(self.folder, self.asked), self.rows, self.pipe._execution_device
        arithmetic, sizes = run["arithmetic"], run["sizes"]
        self.micro_batch_size, self.tiles = arithmetic["micro_batch_size"], sizes["fit"] == "tile"
        overlap = sizes["tile_overlap"] or 0
        self.preparation = (self.pipe.unet.config.in_channels, sizes["image_size"], sizes["fit"], overlap)
        options = {"preset": self.config, "seed": run["seed"], "micro_batch_size": self.micro_batch_size}
        self.purify = functools.partial(purify_tiles, self.pipe, **options)
        self.device = device_name(device)
        self.other_images = [
            name for name, kind in rows.features.items() if name != "image" and isinstance(kind, datasets.Image)
        ]
        features = {**rows.features, **dict.fromkeys(self.other_images, datasets.Image())}
        kept = datasets.Features({**features, "image": datasets.Image()})
        rejected = datasets.Features({**features, "rejection_reason": datasets.Value("string")})
        self.schemas = kept.arrow_schema, rejected.arrow_schema
        num_workers = self.job.num_workers
        if num_workers is None:
            num_workers = 0 if device.type == "cpu" else 4
        self.in_flight = 2 * max(1, num_workers) if self.tiles else IN_FLIGHT
        self.enter_context(steady_arithmetic(self.pipe, arithmetic["threads"]))
        self.pool = open_pool(num_workers) if num_workers else None
        if self.pool is not None:
            self.callback(self.pool.shutdown, cancel_futures=True)
        self.device_thread = self.enter_context(open_device_thread(device.type))
        return self

    def make(self, store: ShardStore, index: int) -> dict | None:
        """Make a shard and return its record; in a stream, it may turn out to lie behind the end."""
        start, stop = store.range(index)
        began, rows_in, resized, reasons, changes = time.perf_counter(), 0, 0, Counter(), Counter()
        with explained(self.folder), ShardWriter(store, index, *self.schemas) as writer:
            images = in_order(self.pool, encode_all, self.purified(start, stop), self.in_flight)
            for (table, prepared), files in images:
                self.write(writer, table, prepared, files)
                rows_in += len(table)
                for image in prepared:
                    if isinstance(image, TiledImage):
                        resized += image.resized
                        changes.update(image.changes)
                    else:
                        reasons[image] += 1
                if self.on_rows is not None:
                    self.on_rows(len(table), len(table) - len(files))
            if rows_in < stop - start:
                end = index + (rows_in > 0)
                known = self.rows.length is not None or store.count not in (None, end)
                if known or max(store.recorded(), default=-1) >= end:
                    raise ValueError(
                        f"dataset {self.rows.name!r} ends at row {start + rows_in}, but has had more rows before: it "
                        "must not change while it is purified."
                    )
                if store.count is None:
                    store.end_at(end)
                if rows_in == 0:
                    return None
            about = {"seconds": time.perf_counter() - began, "device": self.device}
            counted = {"resized": resized, "reasons": dict(reasons), "changes": dict(changes)}
            return writer.commit(rows_in=rows_in, **counted, **about)

    def purified(self, start: int, stop: int) -> Iterator[tuple[tuple[pa.Table, list[TiledImage | str]], tuple]]:
        """
        Pieces of the source's rows, each image prepared or the reason why not, and the purified images.

        Whole micro-batches are purified, however many squares the images of a piece have.
        """
        rows = 1 if self.tiles else ROWS_PER_PIECE  # photographs in memory, not sixteen times as many
        pieces = (
            table[first : first + rows]
            for table in self.rows.read(start, stop)
            for first in range(0, len(table), rows)
        )
        work = ((piece, (piece["image"].to_pylist(), *self.preparation)) for piece in pieces)
        waiting, unfinished = deque(), deque()

        def squares():
            for piece, prepared in in_order(self.pool, prepare_all, work, self.in_flight):
                ids = piece["id"].to_pylist()
                images = [(ids[row], Blending(one)) for row, one in enumerate(prepared) if isinstance(one, TiledImage)]
                waiting.append(((piece, prepared), [blending for _, blending in images]))
                unfinished.extend(images)
                for image_id, blending in images:
                    yield from zip(blending.tiled.squares(), blending.tiled.names(image_id))

        def complete():
            while waiting and all(blending.finished for blending in waiting[0][1]):
                piece, blendings = waiting.popleft()
                yield piece, ([blending.whole for blending in blendings],)

        stream = squares()
        micro_batches = iter(lambda: list(itertools.islice(stream, self.micro_batch_size)), [])
        batches = ((None, tuple(zip(*batch))) for batch in micro_batches)
        for _, purified in in_order(self.device_thread, self.purify, batches, in_flight=2):
            for square in purified:
                image_id, blending = unfinished[0]
                blending.add(square)
                if blending.finished:
                    unfinished.popleft()
            if self.on_squares is not None:
                self.on_squares(image_id, blending.done, len(blending.tiled.places))
            yield from complete()
        yield from complete()

    def write(
        self, writer: ShardWriter, table: pa.Table, prepared: list[TiledImage | str], files: list[bytes]
    ) -> None:
        """The rows that are kept, with the purified images; those refused as they were, with the reason."""
        is_kept = pa.array([isinstance(image, TiledImage) for image in prepared])
        kept, rejected = table.filter(is_kept), table.filter(pc.invert(is_kept))
        images = pa.array([{"bytes": file, "path": None} for file in files], datasets.Image().pa_type)
        reasons = pa.array([image for image in prepared if isinstance(image, str)], pa.string())
        writer.write(
            with_content(kept, self.other_images, image=images),
            with_content(rejected, ["image", *self.other_images], rejection_reason=reasons),
        )


def purify_tiles(
    pipe: JointConditionalPurificationPipeline, tiles: Sequence[np.ndarray], ids: Sequence[str], **options
) -> np.ndarray:
    """uint8 (H, W, C) each in, purified float32 (N, H, W, C) in [0, 1] out, not rounded."""
    batch = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float().div_(255)
    purified = pipe(batch, ids=ids, output_type="pt", **options).images
    return purified.permute(0, 2, 3, 1).float().cpu().numpy()


def device_name(device: torch.device) -> str:
    """Kind of machine, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


@contextlib.contextmanager
def steady_arithmetic(pipe: JointConditionalPurificationPipeline, threads: int | None) -> Iterator[None]:
    """What the bits of a result depend on, held fixed, and the pipeline's own progress bar out of sight."""
    bar_before, cudnn = getattr(pipe, "_progress_bar_config", {}), torch.backends.cudnn
    # The defaults of `flags` are not cuDNN's own: left out, `enabled` would turn it off.
    flags = {"enabled": cudnn.enabled, "benchmark": False, "deterministic": True, "allow_tf32": cudnn.allow_tf32}
    pipe.set_progress_bar_config(disable=True)
    try:
        with cpu_threads(threads), cudnn.flags(**flags):
            yield
    finally:
        pipe.set_progress_bar_config(**bar_before)
