"""How purification scales on this machine: several processes against one on the same cores, and memory against rows.

    python eval/purify_scaling.py --output results/purify_scaling.jsonl speed --cores 0 1         # three minutes
    python eval/purify_scaling.py --output results/purify_scaling.jsonl memory --rows 1000 100000  # five minutes
    python eval/purify_scaling.py --output results/purify_scaling.jsonl codec                     # seconds

Images and networks are random, for only their sizes matter here. Every worker is a process of its own, pinned to its
cores, and begins when all are ready; the time runs until the last one has left, checks of the finished data set
included.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch


sys.path.append(str(Path(__file__).parents[1]))
from eval.tables import markdown_table
from jcdp_diffusers.data import LabelledImages, open_dataset, write_dataset
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purify.dataset import purify_to_folder
from jcdp_diffusers.purify.tiling import encode_all, prepare_all
from jcdp_diffusers.results import append_record
from jcdp_diffusers.train.unets import ddpm_scheduler, named_unet


SPEED = {"unet": "small32", "size": 32, "rows": 384, "options": {"diffusion_steps": 2, "rows_per_shard": 32}}
MEMORY = {
    "unet": "tiny32",
    "size": 8,
    "options": {"diffusion_steps": 1, "micro_batch_size": 256, "rows_per_shard": 2048, "threads": 1},
}
# Spawned, because a fork would inherit the memory that is to be measured.
CONTEXT = multiprocessing.get_context("spawn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    what = parser.add_subparsers(dest="what", required=True)
    speed = what.add_parser("speed")
    speed.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    speed.add_argument("--repeats", type=int, default=3)
    memory = what.add_parser("memory")
    memory.add_argument("--rows", type=int, nargs="+", default=(1_000, 100_000))
    memory.add_argument("--kinds", nargs="+", default=("folder", "stream"), choices=("folder", "stream", "dataset"))
    codec = what.add_parser("codec")
    codec.add_argument("--sizes", type=int, nargs="+", default=(32, 64, 256))
    args = parser.parse_args()
    if args.what == "speed":
        measure_speed(args.cores, args.repeats, args.output)
    elif args.what == "codec":
        measure_codec(args.sizes, args.output)
    else:
        measure_memory(args.rows, args.kinds, args.output)


def measure_speed(cores: list[int], repeats: int, output: str) -> None:
    """Images per second of one process on one core, one on all, one per core; efficiency: the last over the others."""
    arrangements = {
        "one process, one core": [cores[:1]],
        "one process, all cores": [cores],
        "one process per core": [[core] for core in cores],
    }
    with tempfile.TemporaryDirectory() as folder:
        source = write_images(Path(folder) / "source", SPEED["rows"], SPEED["size"])
        rates: dict[str, list[float]] = {name: [] for name in arrangements}
        for repeat in range(repeats):
            for name, workers in arrangements.items():
                seconds, _ = run(source, Path(folder) / f"{name} {repeat}", "folder", SPEED, workers)
                rates[name].append(SPEED["rows"] / seconds)
                # Other work on the same cores makes all rates lower, that of several threads most of all.
                settings = {"arrangement": name, "cores": len(cores), "load average": os.getloadavg()[0], **SPEED}
                record(output, "purification images per second", rates[name][-1], repeat, settings, seconds)
        one, together, apart = (float(np.median(rates[name])) for name in arrangements)
        settings = {"cores": len(cores), "repeats": repeats, **SPEED}
        value = {"against one core": apart / one / len(cores), "against one process on all cores": apart / together}
        record(output, "purification efficiency of one process per core", value, None, settings, 0.0)


def measure_memory(counts: list[int], kinds: list[str], output: str) -> None:
    """Largest resident memory of a process, in MiB."""
    for kind in kinds:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                source = write_images(Path(folder) / "source", count, MEMORY["size"])
                os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
                seconds, memory = run(source, Path(folder) / "out", kind, MEMORY, [[min(os.sched_getaffinity(0))]])
            settings = {"source": kind, "rows": count, **MEMORY}
            record(output, "purification peak memory (MiB)", memory, None, settings, seconds)


def measure_codec(sizes: list[int], output: str) -> None:
    """Milliseconds of one core for decoding and resizing a photograph, and for encoding the result; and its bytes."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    photographs = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    for size in sizes:
        start = time.perf_counter()
        for _ in range(20):
            images = prepare_all(photographs, 3, size, "resize", 0)
        decoded = time.perf_counter()
        for _ in range(20):
            files = encode_all([image.tiles[0] for image in images])
        encoded = time.perf_counter()
        count = 20 * len(photographs)
        value = {
            "decode and resize (ms)": (decoded - start) / count * 1000,
            "encode (ms)": (encoded - decoded) / count * 1000,
            "bytes": sum(map(len, files)) / len(files),
        }
        settings = {"image_size": size, "photographs": "scikit-learn's two, 640x427 JPEG"}
        record(output, "cost of reading and writing an image", value, None, settings, encoded - start)


def table(records: Sequence[Mapping]) -> str:
    """What was measured, in Markdown, for docs/scaling.md; of a figure that was measured again, the last counts."""

    def values(what: str, **settings) -> list:
        return [r["value"] for r in records if r["what"] == what and settings.items() <= r["settings"].items()]

    def memory(source: str) -> str:
        used = (values("purification peak memory (MiB)", source=source, rows=rows)[-1] for rows in (1000, 100_000))
        return "{:,.0f} and {:,.0f} MiB".format(*used)

    def speed(arrangement: str) -> float:
        return statistics.median(values("purification images per second", arrangement=arrangement)[-3:])

    kills = values("random kills survived by a purification")[-1]
    small, large = (values("cost of reading and writing an image", image_size=size)[-1] for size in (64, 256))
    reading = f"{small['decode and resize (ms)']:.1f} and {large['decode and resize (ms)']:.1f} ms"
    writing = " and ".join(f"{cost['encode (ms)']:.1f} ms, {cost['bytes'] / 1e3:.1f} kB" for cost in (small, large))
    efficiency = values("purification efficiency of one process per core")[-1]["against one core"]
    done = "{rows lost} rows lost, {rows duplicated} repeated, {rows altered} altered".format(**kills)
    rows = [
        ["Memory of a process, at its peak", "1,000 and 100,000 rows of Parquet, 8x8", memory("folder")],
        ["", "the same as a stream of unknown length", memory("stream")],
        ["Random `kill -9`", f"{kills['kills']} in {kills['runs']} runs of {kills['rows per run']} rows", done],
        ["Reading 640x427 JPEG, one core", "decode and resize, to 64x64 and 256x256", reading],
        ["Writing PNG, one core", "64x64 and 256x256", writing],
        ["One process, one core", "`small32`, 32x32, median of 3", f"{speed('one process, one core'):.0f} images/s"],
        [
            "One process per core, two cores",
            "the same",
            f"{speed('one process per core'):.0f} images/s: efficiency {efficiency:.2f}",
        ],
        ["One process, two cores", "the same", f"{speed('one process, all cores'):.0f} images/s"],
    ]
    return markdown_table(["What", "Where", "Result"], rows)


def run(source: Path, out: Path, kind: str, what: dict, workers: list[list[int]]) -> tuple[float, float]:
    """Wall-clock seconds from the moment when all workers are ready, and the largest memory of one of them."""
    ready, memory = CONTEXT.Barrier(len(workers) + 1), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=work, args=(source, out, kind, what, own, ready, memory)) for own in workers]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - start
    if any(process.exitcode for process in processes):
        raise RuntimeError("a worker failed: see above.")
    return seconds, max(memory.get() for _ in processes)


def work(source: Path, out: Path, kind: str, what: dict, cores: list[int], ready, memory) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    unet = named_unet(what["unet"], sample_size=what["size"]).eval()
    pipe = JointConditionalPurificationPipeline(unet.to(memory_format=torch.channels_last), ddpm_scheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe(torch.rand(2, 3, what["size"], what["size"]), diffusion_steps=1, output_type="pt")  # first calls are slow
    ready.wait()
    given = source if kind == "folder" else open_dataset(source, streaming=kind == "stream")
    purify_to_folder(given, pipe, output_dir=out, progress=False, **what["options"])
    memory.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def write_images(folder: Path, count: int, size: int) -> Path:
    """A folder of random images, smooth enough to compress as photographs do."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    images += draw.integers(0, 8, images.shape, dtype=np.uint8)
    data = LabelledImages(images, np.arange(count) % 10, tuple(map(str, range(count))))
    write_dataset(folder, data, shards=min(count, 10))
    return folder


def record(output: str, what: str, value, seed: int | None, settings: dict, seconds: float) -> None:
    device = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    append_record(
        output,
        what=what,
        value=value,
        seed=seed,
        protocol="scaling",
        settings=settings,
        device=device,
        seconds=seconds,
    )
    print(what, value, settings, flush=True)


if __name__ == "__main__":
    main()
