"""How purification scales on this machine: two workers against one on the same cores, and memory against rows.

    python eval/purify_scaling.py --output results/purify_scaling.jsonl speed --cores 0 1        # a quarter of an hour
    python eval/purify_scaling.py --output results/purify_scaling.jsonl memory --rows 1000 100000  # five minutes
    python eval/purify_scaling.py --output results/purify_scaling.jsonl codec                     # seconds

Images and networks are random, for only their sizes matter here. Every run is a process of its own, pinned to its
cores with all that it starts. Speed counts from the moment when the first shard is begun to the moment when the last
one is on record, so that the start of Python and of Ray is left out. Nothing else may run on the machine meanwhile.
"""

import functools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch


sys.path.append(str(Path(__file__).parents[1]))
from eval.tables import markdown_table
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import LabelledImages, open_dataset, write_dataset
from jcdp_diffusers.engines import ENGINES
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purify.dataset import open_purifier, purify_to_folder
from jcdp_diffusers.purify.tiling import encode_all, prepare_all
from jcdp_diffusers.results import append_record
from jcdp_diffusers.train.unets import ddpm_scheduler, named_unet


SPEED = {"unet": "small32", "size": 32, "rows": 1536, "options": {"diffusion_steps": 2, "rows_per_shard": 32}}
MEMORY = {
    "unet": "tiny32",
    "size": 8,
    "options": {"diffusion_steps": 1, "micro_batch_size": 256, "rows_per_shard": 2048, "threads": 1},
}
# Spawned, because a fork would inherit the memory that is to be measured.
CONTEXT = multiprocessing.get_context("spawn")


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    what = parser.add_subparsers(dest="what", required=True)
    speed = what.add_parser("speed")
    speed.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
    speed.add_argument("--repeats", type=int, default=3)
    speed.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    memory = what.add_parser("memory")
    memory.add_argument("--rows", type=int, nargs="+", default=(1_000, 100_000))
    memory.add_argument("--kinds", nargs="+", default=("folder", "stream"), choices=("folder", "stream", "dataset"))
    codec = what.add_parser("codec")
    codec.add_argument("--sizes", type=int, nargs="+", default=(32, 64, 256))
    args = parser.parse_args()
    with ends_in_one_sentence("purify_scaling"):
        if args.what == "speed":
            measure_speed(args.cores, args.repeats, args.engines, args.output)
        elif args.what == "codec":
            measure_codec(args.sizes, args.output)
        else:
            measure_memory(args.rows, args.kinds, args.output)


def measure_speed(cores: list[int], repeats: int, engine_names: list[str], output: str) -> None:
    """Images per second of a worker on one core, on all, and of one per core; efficiency: the last over the others."""
    count = len(cores)
    arrangements = {"one worker, one core": (cores[:1], 1), "one worker, all cores": (cores, 1)}
    arrangements["one worker per core"] = (cores, count)
    with tempfile.TemporaryDirectory() as folder:
        source = write_images(Path(folder) / "source", SPEED["rows"], SPEED["size"])
        purifier = Path(folder) / "purifier"
        pipe_of(SPEED).save_pretrained(purifier)
        for engine in engine_names:
            rates: dict[str, list[float]] = {name: [] for name in arrangements}
            for repeat in range(repeats):
                for name, (own, workers) in arrangements.items():
                    out, load = Path(folder) / f"{engine} {name} {repeat}", os.getloadavg()[0]
                    how = {"engine": engine, "processes": workers, "threads": len(own) // workers}
                    run_pinned(own, purify_with_workers, source, purifier, out, how)
                    rates[name].append(SPEED["rows"] / (seconds := seconds_of_shards(out)))
                    settings = {"arrangement": name, "cores": count, "load average before": load, **how, **SPEED}
                    record(
                        output, "purification images per second of workers", rates[name][-1], repeat, settings, seconds
                    )
            one, together, apart = (float(np.median(rates[name])) for name in arrangements)
            settings = {"engine": engine, "cores": count, "repeats": repeats, **SPEED}
            value = {"against one core": apart / one / count, "against one worker on all cores": apart / together}
            record(output, "purification efficiency of one worker per core", value, None, settings, 0.0)


def purify_with_workers(source: Path, purifier: Path, out: Path, how: dict) -> None:
    pipe = functools.partial(open_purifier, purifier, "cpu", output_dir=out, precision="float32")
    purify_to_folder(source, pipe, output_dir=out, progress=False, **how, **SPEED["options"])


def seconds_of_shards(out: Path) -> float:
    """From the moment when the first shard was begun to the moment when the last one was on record."""
    records = list((out / ".purify" / "shards").iterdir())
    ends = [path.stat().st_mtime for path in records]
    return max(ends) - min(end - json.loads(path.read_text())["seconds"] for end, path in zip(ends, records))


def measure_memory(counts: list[int], kinds: list[str], output: str) -> None:
    """Largest resident memory of a process, in MiB."""
    for kind in kinds:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                source = write_images(Path(folder) / "source", count, MEMORY["size"])
                os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
                memory, seconds = CONTEXT.Queue(), time.perf_counter()
                run_pinned([min(os.sched_getaffinity(0))], purify_measured, source, Path(folder) / "out", kind, memory)
                memory, seconds = memory.get(), time.perf_counter() - seconds
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

    small, large = (values("cost of reading and writing an image", image_size=size)[-1] for size in (64, 256))
    reading = f"{small['decode and resize (ms)']:.1f} and {large['decode and resize (ms)']:.1f} ms"
    writing = " and ".join(f"{cost['encode (ms)']:.1f} ms, {cost['bytes'] / 1e3:.1f} kB" for cost in (small, large))
    rows = [
        ["Memory of a process, at its peak", "1,000 and 100,000 rows of Parquet, 8x8", memory("folder")],
        ["", "the same as a stream of unknown length", memory("stream")],
        ["Reading 640x427 JPEG, one core", "decode and resize, to 64x64 and 256x256", reading],
        ["Writing PNG, one core", "64x64 and 256x256", writing],
    ]
    for kills in values("random kills survived by a purification"):
        done = "{rows lost} rows lost, {rows duplicated} repeated, {rows altered} altered".format(**kills)
        where = f"{kills.get('of', 'of workers with claim files')}: {kills['kills']} in {kills['runs']} runs"
        rows.append(["Random `kill -9`", f"{where} of {kills['rows per run']} rows", done])
    for engine in ENGINES:
        for arrangement in ("one worker, one core", "one worker, all cores", "one worker per core"):
            rates = values("purification images per second of workers", arrangement=arrangement, engine=engine)
            if rates:
                where = f"{arrangement}, `small32` at 32x32, median of {min(len(rates), 3)}"
                rows.append([f"Engine `{engine}`", where, f"{statistics.median(rates[-3:]):.0f} images/s"])
        for efficiency in values("purification efficiency of one worker per core", engine=engine)[-1:]:
            rows.append(["", "efficiency of one worker per core", f"{efficiency['against one core']:.2f}"])
    return markdown_table(["What", "Where", "Result"], rows)


def run_pinned(cores: list[int], function: Callable, *args) -> None:
    """Call a function in a process of its own that has, with all that it starts, only these cores."""
    process = CONTEXT.Process(target=pinned, args=(cores, function, *args))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("a run failed: see above.")


def pinned(cores: list[int], function: Callable, *args) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        function(*args)
    except KeyboardInterrupt:  # Ctrl-C reaches the parent, too, which says so
        raise SystemExit(130) from None


def purify_measured(source: Path, out: Path, kind: str, memory) -> None:
    given = source if kind == "folder" else open_dataset(source, streaming=kind == "stream")
    purify_to_folder(given, pipe_of(MEMORY), output_dir=out, progress=False, **MEMORY["options"])
    memory.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def pipe_of(what: dict) -> JointConditionalPurificationPipeline:
    unet = named_unet(what["unet"], sample_size=what["size"]).eval()
    return JointConditionalPurificationPipeline(unet.to(memory_format=torch.channels_last), ddpm_scheduler())


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
