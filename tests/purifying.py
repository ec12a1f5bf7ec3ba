"""A purifier that takes about a millisecond per image, images for it, and a worker that runs in a process of its own."""

from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel

from jcdp_diffusers.data import LabelledImages, open_dataset, write_dataset
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purify.dataset import purify_to_folder


SIZE = 8
SETTINGS = {"diffusion_steps": 3, "progress": False}


def quick_pipe(seed: int = 0, channels: int = 3) -> JointConditionalPurificationPipeline:
    """A real UNet, random and tiny, on images of 8x8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=SIZE,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
        )
    return JointConditionalPurificationPipeline(unet.eval(), DDPMScheduler(variance_type="fixed_large"))


def some_images(count: int, size: int = SIZE, seed: int = 0) -> LabelledImages:
    """Smooth random images with labels 0 to 2 and ids that are not in order."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (count, 2, 2, 3))
    images = np.kron(coarse, np.ones((1, size // 2, size // 2, 1))) + draw.integers(-8, 9, (count, size, size, 3))
    ids = tuple(f"image-{number * 7919 % 100_003}" for number in range(count))
    return LabelledImages(images.clip(0, 255).astype(np.uint8), np.arange(count) % 3, ids, ("a", "b", "c"))


def source_folder(folder: Path, count: int, **options) -> Path:
    """A folder of Parquet files."""
    write_dataset(folder, some_images(count, **options), shards=min(3, count))
    return folder


def read_back(folder: Path) -> dict[str, np.ndarray]:
    """Pixels by id, of a purified data set as a user would load it; an id must not come twice."""
    dataset = datasets.load_dataset("parquet", data_files=sorted(map(str, folder.glob("*.parquet"))), split="train")
    images = {row["id"]: np.asarray(row["image"]) for row in dataset}
    assert len(images) == len(dataset)
    return images


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Same ids in the same order, same pixels."""
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def work(source: Path, output_dir: Path, as_stream: bool = False, **options) -> None:
    """What a worker process does."""
    torch.set_num_threads(1)
    given = open_dataset(source, streaming=True) if as_stream else source
    purify_to_folder(given, quick_pipe(), output_dir=output_dir, **{**SETTINGS, **options})
