"""A whole data set in, a sharded learnable data set out."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from .data import decode_image, open_dataset, to_uint8, write_table
from .pipeline_jcdp import JointConditionalPurificationPipeline


def purify_dataset(
    dataset,
    pipe: JointConditionalPurificationPipeline,
    *,
    output_dir: str | os.PathLike,
    seed: int = 0,
    split: str | None = None,
    rows_per_shard: int = 1024,
    **settings,
) -> datasets.Dataset:
    """
    Purify a data set into a folder that `datasets.load_dataset(output_dir)` opens; every column of the source survives.

    Args:
        dataset: What `open_dataset` takes.
        pipe (`JointConditionalPurificationPipeline`): The purifier.
        output_dir (`str` or `os.PathLike`): Made if needed; shards that it holds already are kept.
        seed (`int`): Of the noise.
        split (`str`, *optional*): The split to take, the only one by default.
        rows_per_shard (`int`): Rows of one file.
        settings: `preset` and the settings of `pipe(...)`.
    """
    source = open_dataset(dataset, split=split)
    split = split or str(source.split or "train")
    features = datasets.Features({**source.features, "image": datasets.Image()})
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(source), rows_per_shard)
    paths = [output_dir / f"{split}-{index:05d}-of-{len(starts):05d}.parquet" for index in range(len(starts))]
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    for path, start in zip(paths, starts):
        if path.exists():
            continue
        table = source.with_format("arrow")[start : start + rows_per_shard]
        images = np.stack([decode_image(value, channels, size) for value in table["image"].to_pylist()])
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
        purified = to_uint8(pipe(batch, seed=seed, ids=table["id"].to_pylist(), output_type="pt", **settings).images)
        column = [{"bytes": encode_png(image), "path": None} for image in purified]
        column = datasets.Image().cast_storage(pa.array(column))
        table = table.set_column(table.column_names.index("image"), "image", column)
        write_table(path, table.replace_schema_metadata(features.arrow_schema.metadata))
    return datasets.load_dataset("parquet", data_files={split: [str(path) for path in paths]}, split=split)


def encode_png(image: np.ndarray) -> bytes:
    """PNG of a uint8 array (H, W, 1 or 3): lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
