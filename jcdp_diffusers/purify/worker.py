"""The way of the rows of one shard: read, decoded, purified, encoded and written, a few at a time."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from ..data import to_uint8
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from .progress import Progress
from .reader import Rows
from .shards import ShardStore, ShardWriter
from .tiling import TiledImage, blend, encode_all, prepare_all
from .worker_pool import in_order


ROWS_PER_PIECE = 16  # what a decoding or encoding process gets to do at a time


class ShardMaker:
    """Makes one shard after another: read, decode, purify, encode and write, a few rows at a time."""

    def __init__(
        self,
        rows: Rows,
        store: ShardStore,
        token: str,
        purify: Callable[[np.ndarray, list[str]], np.ndarray],
        run: dict,
        channels: int,
        device: torch.device,
        pool: Executor | None,
        lane: Executor | None,
        bar: Progress,
    ):
        self.rows, self.store, self.token, self.purify, self.bar = rows, store, token, purify, bar
        self.pool, self.lane = pool, lane
        self.micro_batch_size = run["arithmetic"]["micro_batch_size"]
        self.overlap = run["sizes"]["tile_overlap"] or 0
        self.preparation = (channels, run["sizes"]["image_size"], run["sizes"]["fit"], self.overlap)
        self.device = device_name(device)
        self.other_images = [
            name for name, kind in rows.features.items() if name != "image" and isinstance(kind, datasets.Image)
        ]
        features = {**rows.features, **dict.fromkeys(self.other_images, datasets.Image())}
        self.kept = datasets.Features({**features, "image": datasets.Image()})
        self.rejected = datasets.Features({**features, "rejection_reason": datasets.Value("string")})

    def __call__(self, index: int) -> None:
        """Make a shard; in a stream, it may turn out to lie behind the end."""
        start, stop = self.store.range(index)
        began, rows_in, resized, reasons = time.perf_counter(), 0, 0, Counter()
        schemas = self.kept.arrow_schema, self.rejected.arrow_schema
        with ShardWriter(self.store, index, self.token, *schemas) as writer:
            for (table, refused, brought), files in in_order(self.pool, encode_all, self.purified(start, stop)):
                writer.write(self.kept_rows(table, refused, files), self.rejected_rows(table, refused))
                rows_in += len(table)
                resized += brought
                reasons.update(reason for reason in refused if reason is not None)
                self.bar.add(len(table), len(table) - len(files))
            if rows_in < stop - start:
                end = index + (rows_in > 0)
                if self.rows.length is not None or max(self.store.recorded(), default=-1) >= end:
                    raise ValueError(
                        f"dataset {self.rows.name!r} ends at row {start + rows_in}, but has had more rows before: it "
                        "must not change while it is purified."
                    )
                self.store.note_end(end)
                if rows_in == 0:
                    return
            seconds = time.perf_counter() - began
            writer.commit(rows_in=rows_in, resized=resized, reasons=dict(reasons), seconds=seconds, device=self.device)

    def purified(self, start: int, stop: int) -> Iterator[tuple[tuple[pa.Table, list[str | None], int], tuple]]:
        """
        Pieces of the source's rows with the reason of each that was refused and how many were resized, and purified
        images of the others.
        """
        pieces = (
            table[first : first + ROWS_PER_PIECE]
            for table in self.rows.read(start, stop)
            for first in range(0, len(table), ROWS_PER_PIECE)
        )
        work = ((piece, (piece["image"].to_pylist(), *self.preparation)) for piece in pieces)
        for piece, prepared, tiles in self.in_micro_batches(in_order(self.pool, prepare_all, work)):
            images = []
            for image in prepared:
                if isinstance(image, TiledImage):
                    own = np.stack([tiles.popleft() for _ in image.places])
                    whole = blend(own, image.places, image.shape, self.overlap)
                    images += list(to_uint8(torch.from_numpy(whole).permute(2, 0, 1)[None]))
            refused = [image if isinstance(image, str) else None for image in prepared]
            resized = sum(image.resized for image in prepared if isinstance(image, TiledImage))
            yield (piece, refused, resized), (images,)

    def in_micro_batches(
        self, pieces: Iterable[tuple[pa.Table, list[TiledImage | str]]]
    ) -> Iterator[tuple[pa.Table, list[TiledImage | str], deque]]:
        """Purify whole micro-batches, however many tiles the images of a piece have."""
        waiting, tiles, names, done = deque(), deque(), deque(), deque()

        def take(count):
            batch = np.stack([tiles.popleft() for _ in range(count)])
            return None, (batch, [names.popleft() for _ in range(count)])

        def micro_batches():
            for piece, prepared in pieces:
                before = len(tiles)
                for image_id, image in zip(piece["id"].to_pylist(), prepared):
                    if isinstance(image, TiledImage):
                        tiles.extend(image.tiles)
                        names.extend(image.names(image_id))
                waiting.append((piece, prepared, len(tiles) - before))
                while len(tiles) >= self.micro_batch_size:
                    yield take(self.micro_batch_size)
            if tiles:
                yield take(len(tiles))

        def complete():
            while waiting and waiting[0][2] <= len(done):
                piece, prepared, _ = waiting.popleft()
                yield piece, prepared, done

        for _, purified in in_order(self.lane, self.purify, micro_batches(), in_flight=2):
            done.extend(purified)
            yield from complete()
        yield from complete()

    def kept_rows(self, table: pa.Table, refused: list[str | None], files: list[bytes]) -> pa.Table:
        """The source's rows, without those refused, with other images."""
        table = table.filter(pa.array([reason is None for reason in refused]))
        table = _with_images(table, "image", [{"bytes": file, "path": None} for file in files])
        return self.portable(table).select(list(self.kept)).cast(self.kept.arrow_schema)

    def rejected_rows(self, table: pa.Table, refused: list[str | None]) -> pa.Table:
        """The rows refused, as they were, with the reason."""
        table = table.filter(pa.array([reason is not None for reason in refused]))
        if "rejection_reason" in table.column_names:
            table = table.drop_columns("rejection_reason")
        reasons = pa.array([reason for reason in refused if reason is not None], pa.string())
        table = self.portable(table, "image").append_column("rejection_reason", reasons)
        return table.select(list(self.rejected)).cast(self.rejected.arrow_schema)

    def portable(self, table: pa.Table, *columns: str) -> pa.Table:
        """With the content of image files instead of paths, which would mean nothing to whoever gets the data set."""
        for name in (*columns, *self.other_images):
            table = _with_images(table, name, list(map(_stored, table[name].to_pylist())))
        return table


def purify_tiles(
    pipe: JointConditionalPurificationPipeline, tiles: np.ndarray, ids: list[str], **options
) -> np.ndarray:
    """uint8 (N, H, W, C) in, purified float32 (N, H, W, C) in [0, 1] out, not rounded."""
    batch = torch.from_numpy(tiles).permute(0, 3, 1, 2).float().div_(255)
    purified = pipe(batch, ids=ids, output_type="pt", **options).images
    return purified.permute(0, 2, 3, 1).float().cpu().numpy()


def device_name(device: torch.device) -> str:
    """Kind of machine, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def _with_images(table: pa.Table, name: str, values: list[dict | None]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, datasets.Image().pa_type))


def _stored(value: dict | None) -> dict | None:
    """An image column's value that means the same elsewhere: the file itself, of its path no more than its name."""
    if value is None or value["path"] is None:
        return value
    path = Path(value["path"])
    content = path.read_bytes() if value["bytes"] is None and path.is_file() else value["bytes"]
    return {"bytes": content, "path": path.name}
