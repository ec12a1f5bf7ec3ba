"""
How fast everything runs, as ratios to plain loops timed in turn with it, and against what the machine can do at all.

    python eval/throughput.py --output results/throughput.jsonl                    # every section; about an hour
    python eval/throughput.py --output results/throughput.jsonl steps purifier     # some of them
    python eval/throughput.py --output results/throughput.jsonl pixels --purifier DIR --data DIR_OR_HUB_ID
    python eval/throughput.py --output results/throughput.jsonl plot

| section | what is measured |
|---|---|
| `peak` | the rate of a large convolution, and on an accelerator of a matrix product |
| `steps` | bare UNet, unguided and guided reverse step: by type and layout, and by batch |
| `operators` | what a forward spends its time on |
| `purifier` | a pipeline call against the authors' loop as shipped, per image at equal steps |
| `noise` | the noise function against `torch.randn` |
| `training` | a purifier's training step against a loop written by hand |
| `victim` | a victim's training step against a loop written by hand |
| `input` | the share of decoding, batches and augmentation in purification and in training |
| `pixels` | what folding and bfloat16 do to purified images, in levels of 255 |
| `accuracy` | on an accelerator: seconds until a clean victim has 94 % |
| `plot`, `table` | picture and table, from the records |

Every repetition runs each candidate once, in an order that rotates, and the ratio is that of one repetition; records
hold its median and quartiles. On a CPU the clock is that of the process by default, which does not count what other
work takes away, so give it one thread. A figure that is on record with the same settings is not measured again.
Networks and images are random, where only their sizes matter. What is said of accelerators is written and not yet run.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile


sys.path.append(str(Path(__file__).parents[1]))
from eval.plain_loops import authors_process, plain_classifier, plain_denoiser
from eval.speed_tables import draw_plot, speed_table
from eval.timing import (
    GUIDES,
    NO_GUIDES,
    TIMESTEP,
    Bench,
    Mode,
    Stub,
    against,
    guided_step,
    modes,
    placed_as,
    random_images,
    records_of,
)
from jcdp_diffusers import JointConditionalPurificationPipeline, LPIPSModel
from jcdp_diffusers.acceleration.allocation import keep_freed_memory
from jcdp_diffusers.acceleration.placement import compiled_normal_noise, place
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import LabelledImages, load_images, to_uint8
from jcdp_diffusers.devices import has_bfloat16, usable_device
from jcdp_diffusers.noise import image_keys, normal_noise
from jcdp_diffusers.pipeline_jcdp import usual_micro_batch
from jcdp_diffusers.purify.tiling import encode_all, prepare_all
from jcdp_diffusers.train.config import TrainingConfig
from jcdp_diffusers.train.images import BatchLayout, micro_batches, normalize
from jcdp_diffusers.train.loop import train_purifier
from jcdp_diffusers.train.unets import ddpm_scheduler, named_unet
from jcdp_diffusers.victims import RECIPES, random_crop_flip, train_model, train_victim
from jcdp_diffusers.victims import get as get_victim


# ------------------------------------------------------------------------------------------------------------ sections


def measure_peak(bench: Bench) -> None:
    """FLOP/s of a 3x3 convolution of 256 channels, the best of several, channels last; and of a matrix product."""
    for dtype, tf32 in dict.fromkeys((mode.dtype, mode.tf32) for mode in modes(bench.device, False)):
        Mode(dtype, tf32=tf32).arithmetic()
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        if bench.missing("peak", operation="convolution", dtype=name):
            began, rates = time.perf_counter(), []
            for side, count in ((8, 64), (16, 16)) if bench.device.type == "cpu" else ((32, 512), (16, 1024)):
                conv = nn.Conv2d(256, 256, 3, padding=1).to(bench.device, dtype).to(memory_format=torch.channels_last)
                x = torch.randn(count, 256, side, side, device=bench.device).to(dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.inference_mode():
                    fastest = min(bench.timed(lambda: conv(x)) for _ in range(3 if bench.quick else 60))
                rates.append(2 * 9 * 256 * 256 * count * side * side / fastest)
            bench.record("peak", max(rates), time.perf_counter() - began, operation="convolution", dtype=name)
        if bench.device.type == "cuda" and bench.missing("peak", operation="matrix product", dtype=name):
            began, size = time.perf_counter(), 8192
            a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
            rate = 2 * size**3 / min(bench.timed(lambda: a @ b) for _ in range(30))
            bench.record("peak", rate, time.perf_counter() - began, operation="matrix product", dtype=name)


def measure_steps(bench: Bench) -> None:
    """Bare UNet, unguided and guided step in every mode, by batch; and the rest of a step, around a stub."""
    kinds = {"bare": None, "unguided": NO_GUIDES, "guided": GUIDES}
    # A compilation is for one shape, and takes a minute: the one that the pipeline has.
    micro_batch = usual_micro_batch(bench.device.type, 32, 32)
    placed = {mode: mode.place(named_unet(bench.unet), bench.device) for mode in modes(bench.device, bench.compile)}
    for batch in bench.batches:
        base = {"unet": bench.unet, "batch": batch}
        suitable = [mode for mode in placed if batch == micro_batch or not mode.compiled]
        wanted = [mode for mode in suitable if bench.missing("step", kind="guided", mode=mode.name, **base)]
        if not wanted:
            continue
        runs, rests, began = {}, {}, time.perf_counter()
        for mode in wanted:
            x = mode.tensor(random_images(batch, bench.device))
            t = torch.full((batch,), TIMESTEP, device=bench.device)
            bare = functools.partial(placed[mode], timestep=t, return_dict=False)
            with torch.no_grad():
                stub = Stub(placed[mode], bare(x.contiguous())[0])  # as a step calls it, or it would be compiled twice
            for kind, guides in kinds.items():
                if guides is None:
                    runs[mode, kind] = bench.several(mode, bare, x.contiguous())
                else:
                    step = guided_step(placed[mode], x, TIMESTEP, compiled_noise=mode.compiled, **guides)
                    rest = guided_step(stub, x, TIMESTEP, compiled_noise=mode.compiled, **guides)
                    runs[mode, kind], rests[mode, kind] = (bench.several(mode, run, x) for run in (step, rest))
        seconds = bench.clocks_in_turn(runs)
        rest_seconds = dataclasses.replace(bench, repeats=3 * bench.repeats + 2).clocks_in_turn(rests)
        took = (time.perf_counter() - began) / len(runs)
        for (mode, kind), values in seconds.items():
            value = against(values, seconds[mode, "bare"])
            value["images_per_second"] = batch / value["seconds"]
            if kind != "bare":
                value["rest_seconds"] = statistics.median(rest_seconds[mode, kind])
                value["one_plus_rest"] = 1 + value["rest_seconds"] / statistics.median(seconds[mode, "bare"])
            bench.record("step", value, took, kind=kind, mode=mode.name, **base)


def measure_operators(bench: Bench) -> None:
    """Shares of the operators in a forward's time, those of one in a hundred or more."""
    batch = bench.batches[-1] if bench.quick else 16 if bench.device.type == "cpu" else 256
    for mode in modes(bench.device, compiled=False):
        about = {"unet": bench.unet, "batch": batch, "mode": mode.name}
        if not bench.missing("operators", **about):
            continue
        began, unet = time.perf_counter(), mode.place(named_unet(bench.unet), bench.device)
        x, t = mode.tensor(random_images(batch, bench.device)), torch.full((batch,), TIMESTEP, device=bench.device)
        mode.arithmetic()
        with torch.no_grad():
            unet(x, t)
            with profile() as profiler:
                unet(x, t)
        name = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        # Kernels have entries of their own beside those of the operators that launch them.
        averages = [entry for entry in profiler.key_averages() if entry.device_type == DeviceType.CPU]
        times = {entry.key: getattr(entry, name) for entry in averages}
        shares = {key: value / sum(times.values()) for key, value in times.items()}
        shown = {key: shares[key] for key in sorted(shares, key=shares.get, reverse=True) if shares[key] >= 0.01}
        bench.record("operators", shown, time.perf_counter() - began, **about)


def measure_purifier(bench: Bench) -> None:
    """Our pipeline's call, placed by the one switch, against the authors' loop at its shape, per image."""
    batch = bench.batches[-1] if bench.quick else 64 if bench.device.type == "cpu" else 512
    steps = 1 if bench.quick else 2 if bench.device.type == "cpu" else 10  # what a call costs once weighs little then
    # The authors' program leaves glibc's memory settings alone; ours, which are a process's own, would speed it up.
    base = {"unet": bench.unet, "images": batch, "evaluations": steps, "authors_memory": "as shipped"}
    base |= placed_as(bench.device) | ({"compiled": True} if bench.compile else {})
    images, perceptual = random_images(batch, bench.device), LPIPSModel("alex").to(bench.device)
    runs = {}
    for precision in ("float32", "bfloat16") if has_bfloat16(bench.device) else ("float32",):
        pipe = JointConditionalPurificationPipeline(named_unet(bench.unet).eval(), ddpm_scheduler(), perceptual)
        place(pipe, bench.device, precision=precision, compiled=bench.compile)
        pipe.set_progress_bar_config(disable=True)
        call = functools.partial(
            pipe,
            images / 2 + 0.5,
            preset="paper",
            num_rounds=1,
            diffusion_steps=steps,
            num_inference_steps=steps,
            perceptual_guidance_scale=1.0,
            seed=0,
            ids=[str(i) for i in range(batch)],
            output_type="pt",
        )
        runs[precision] = functools.partial(bench.timed, call)
    if not any(bench.missing("purifier", run=name, **base) for name in ("authors", *runs)):
        return
    began = time.perf_counter()
    with authors_process(bench, batch, steps) as seconds_of_theirs:
        theirs = {"authors": functools.partial(seconds_of_theirs, tf32=torch.backends.cudnn.allow_tf32)}
        if bench.device.type == "cuda":
            theirs["authors, without TF32"] = functools.partial(seconds_of_theirs, tf32=False)
        seconds = bench.clocks_in_turn(theirs | runs)
    for name, values in seconds.items():
        value = against(values, seconds["authors"])
        value["images_per_second"] = batch * steps / value["seconds"]
        value["times_the_authors"] = 1 / value["ratio"]
        bench.record("purifier", value, (time.perf_counter() - began) / len(seconds), run=name, **base)


def measure_noise(bench: Bench) -> None:
    """The noise function against `torch.randn`, and the same compiled."""
    ways = {False: normal_noise} | ({True: compiled_normal_noise()} if bench.compile else {})
    for compiled, noise in ways.items():
        about = {"compiled": True} if compiled else {}
        for batch in bench.batches:
            if bench.missing("noise", batch=batch, **about):
                keys, began = image_keys(0, [str(i) for i in range(batch)], bench.device), time.perf_counter()
                many = dataclasses.replace(bench, repeats=3 if bench.quick else 30)
                draw = functools.partial(noise, keys, (3, 32, 32), round_index=0, step_index=0, use="variance")
                seconds = many.in_turn(
                    {"randn": lambda: torch.randn(batch, 3, 32, 32, device=bench.device), "noise": draw}
                )
                value = against(seconds["noise"], seconds["randn"])
                bench.record("noise", value, time.perf_counter() - began, batch=batch, **about)


def seconds_per_step(bench: Bench, network: nn.Module, train: Callable) -> float:
    """Median time from one forward of a network to the next, without the first two."""
    moments = []
    hook = network.register_forward_pre_hook(lambda *_: moments.append(bench.now()))
    train()
    hook.remove()
    return statistics.median(after - before for before, after in zip(moments[2:], moments[3:]))


def compare_loops(bench: Bench, what: str, loops: dict, batch: int, **settings) -> None:
    """Our training loop against a plain one, each from a new network in every repetition."""
    if not bench.missing(what, batch=batch, **settings):
        return
    began, seconds = time.perf_counter(), {"ours": [], "plain": []}
    for repeat in range(bench.repeats):
        for name in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
            network, train = loops[name]()
            seconds[name].append(seconds_per_step(bench, network, train))
    value = against(seconds["ours"], seconds["plain"])
    value["images_per_second"] = batch / value["seconds"]
    bench.record(what, value, time.perf_counter() - began, batch=batch, **settings)


def measure_training(bench: Bench) -> None:
    """A purifier's training step: noise, loss, gradient, clipping, AdamW, averaged weights."""
    name, batch, steps = ("tiny32", 8, 6) if bench.quick else ("mini32", 64, 14)
    if bench.device.type == "cuda":
        name, batch, steps = "ddpm-cifar10", 256, 40
    images = _labelled(512)
    bfloat16 = has_bfloat16(bench.device)
    config = TrainingConfig(
        max_train_steps=steps,
        train_batch_size=batch,
        checkpointing_steps=None,
        num_grid_images=0,
        mixed_precision="bf16" if bfloat16 else "no",
        cpu=bench.device.type == "cpu",
    )

    def ours():
        network = named_unet(name)

        def train():
            with tempfile.TemporaryDirectory() as folder:
                options = dict(unet=network, scheduler=ddpm_scheduler(), output_dir=folder, config=config)
                train_purifier(images, progress=False, **options)

        return network, train

    def plain():
        network = named_unet(name)
        return network, lambda: plain_denoiser(network, images, bench.device, batch, steps, bfloat16)

    loops = {"ours": ours, "plain": plain}
    compare_loops(bench, "training", loops, batch, unet=name, precision="bfloat16" if bfloat16 else "float32")


def measure_victim(bench: Bench) -> None:
    """A victim's training step, with crop, flip and SGD."""
    recipe = RECIPES["fast" if bench.device.type == "cuda" else "mini"].for_images(50_000)
    width, steps = (8, 6) if bench.quick else (recipe.width, 40)
    recipe = dataclasses.replace(recipe, epochs=1)
    images = _labelled(steps * recipe.batch_size)
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(images.labels)

    def ours():
        network = get_victim("resnet18")(10, width=width)
        return network, lambda: train_model(network, pixels, labels, recipe=recipe, device=bench.device)

    def plain():
        network = get_victim("resnet18")(10, width=width)
        return network, lambda: plain_classifier(network, pixels, labels, bench.device, recipe)

    settings = {"victim": "resnet18", "width": width, "recipe": recipe.name}
    compare_loops(bench, "victim", {"ours": ours, "plain": plain}, recipe.batch_size, **settings)


def measure_input(bench: Bench) -> None:
    """Share of a step or of a purified image that preparing its input, and writing its output, takes on one core."""
    repeats = 3 if bench.quick else 20
    images = _labelled(256)

    def share(what: str, seconds: float, whole: float, **settings) -> None:
        value = {"seconds": seconds, "share": seconds / whole}
        bench.record("input", value, seconds * repeats, of=what, **settings)

    here = bench.settings().items()
    for record in records_of(bench.output):
        if record["protocol"] != bench.protocol or not here <= record["settings"].items():
            continue
        settings, value = record["settings"], record["value"]
        if record["what"] == "training" and bench.missing("input", of="training", unet=settings["unet"]):
            layout = BatchLayout(0, 1, settings["batch"], 1)
            batches = micro_batches(images, layout.draws(0, len(images), 0, repeats + 1), bench.device)
            normalize(next(batches))
            seconds = bench.timed(lambda: [normalize(batch) for batch in batches]) / repeats
            share("training", seconds, value["seconds"], unet=settings["unet"])
        if record["what"] == "victim" and bench.missing("input", of="victim", width=settings["width"]):
            pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous().to(bench.device)
            draw = torch.Generator(bench.device).manual_seed(0)
            batch = torch.randperm(len(images), device=bench.device)[: settings["batch"]]
            several = functools.partial(_augmented, pixels, batch, draw, repeats)
            share("victim", bench.timed(several) / repeats, value["seconds"], width=settings["width"])
        if record["what"] == "purifier" and settings["run"] != "authors":
            about = {"unet": settings["unet"], "run": settings["run"], "evaluations": 10}
            if bench.missing("input", of="purification", **about):
                files = [{"bytes": file, "path": None} for file in encode_all(list(images.images))]
                decoding = bench.timed(lambda: prepare_all(files, 3, 32, "resize", 0)) / len(files)
                encoding = bench.timed(lambda: encode_all(list(images.images))) / len(files)
                share("purification", decoding + encoding, 10 / value["images_per_second"], **about)


def _augmented(pixels: torch.Tensor, batch: torch.Tensor, draw: torch.Generator, repeats: int) -> None:
    for _ in range(repeats):
        random_crop_flip(pixels[batch], draw).float().mul_(1 / 255)


def measure_pixels(bench: Bench, purifier: str, data: str, split: str | None, count: int) -> None:
    """Differences in levels of 255 between images purified as placed and as loaded, with the same noise."""
    images = load_images(data, split=split).subset(range(count))
    settings = {"diffusion_steps": 100, "num_inference_steps": 10}
    about = settings | {"purifier": Path(purifier).name, "data": Path(data).name, "split": split, "images": count}
    about |= placed_as(bench.device)
    precisions = ("float32", "bfloat16")
    if not any(bench.missing("pixels", precision=precision, **about) for precision in precisions):
        return

    def purified(precision: str | None) -> np.ndarray:
        pipe = JointConditionalPurificationPipeline.from_pretrained(purifier).to(bench.device)
        if precision:
            place(pipe, bench.device, precision=precision)
        pipe.set_progress_bar_config(disable=True)
        out = pipe(images.tensor(), ids=list(images.ids), seed=0, output_type="pt", **settings).images
        return to_uint8(out).astype(int)

    as_loaded = purified(None)
    for precision in precisions:
        began = time.perf_counter()
        levels = np.abs(purified(precision) - as_loaded)
        value = {
            "mean": float(levels.mean()),
            "largest": int(levels.max()),
            "share_changed": float((levels > 0).mean()),
            "mean_of_purification": float(np.abs(as_loaded - images.images).mean()),
        }
        bench.record("pixels", value, time.perf_counter() - began, precision=precision, **about)


def measure_accuracy(bench: Bench, data: str) -> None:
    """Seconds until a clean victim of recipe `fast` has 94 % test accuracy; for an accelerator."""
    about = {"recipe": "fast", "width": 64, "target": 0.94}
    if bench.device.type != "cuda" or not bench.missing("accuracy", **about):
        return
    result = train_victim(
        load_images(data, split="train"), load_images(data, split="test"), recipe="fast", device=bench.device
    )
    reached = [entry["seconds"] for entry in result.history if entry["test_accuracy"] >= 0.94]
    value = {"seconds": min(reached, default=None), "accuracy": result.accuracy, "seconds_of_all": result.seconds}
    bench.record("accuracy", value, result.seconds, **about)


def _labelled(count: int) -> LabelledImages:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return LabelledImages(pixels, np.arange(count) % 10, tuple(map(str, range(count))), tuple("0123456789"))


# ---------------------------------------------------------------------------------------------------------------- main

SECTIONS = {
    "peak": measure_peak,
    "steps": measure_steps,
    "operators": measure_operators,
    "purifier": measure_purifier,
    "noise": measure_noise,
    "training": measure_training,
    "victim": measure_victim,
    "input": measure_input,
}
ASKED_FOR = ("pixels", "accuracy", "plot", "table")  # only if named: they need data, or what the others measured


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join((*SECTIONS, *ASKED_FOR))}; the first eight")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file of records")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--clock", choices=("cpu", "wall"), help="cpu on a CPU with one thread, else wall")
    parser.add_argument("--unet", default="ddpm-cifar10", help="of jcdp_diffusers.train.unets")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure the compiled UNet, too")
    parser.add_argument("--quick", action="store_true", help="a tiny network, once: a test of this script")
    parser.add_argument("--purifier", help="for pixels: folder or Hub id")
    parser.add_argument("--data", help="for pixels and accuracy: folder or Hub id")
    parser.add_argument("--split", default="test", help="for pixels")
    parser.add_argument("--images", type=int, default=256, help="for pixels")
    parser.add_argument("--figure", type=Path, default=Path("results/figures/throughput.png"), help="for plot")
    args = parser.parse_args(arguments)
    for name in args.sections:
        if name not in SECTIONS and name not in ASKED_FOR:
            parser.error(f"section is {name!r}, but accepted are {', '.join((*SECTIONS, *ASKED_FOR))}.")
    for section, option in (("pixels", "purifier"), ("pixels", "data"), ("accuracy", "data")):
        if section in args.sections and getattr(args, option) is None:
            parser.error(f"--{option} is not given, but {section} needs it.")
    with ends_in_one_sentence("throughput"):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Each section that was asked for."""
    device = usable_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than measure what is not compiled
    batches = (1, 2, 4, 8, 16, 32, 64) if device.type == "cpu" else (64, 128, 256, 512, 1024)
    if args.quick:
        batches = (1, 4)
    keep_freed_memory()  # as every command does
    bench = Bench(
        output=args.output,
        device=device,
        clock=args.clock or ("cpu" if device.type == "cpu" and args.threads == 1 else "wall"),
        repeats=1 if args.quick else args.repeats,
        unet="tiny32" if args.quick else args.unet,
        batches=tuple(args.batches or batches),
        quick=args.quick,
        compile=args.compile,
    )
    usual_tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for name in args.sections or SECTIONS:
        # What a section does not set itself is as torch has it, as in the process of the authors' loop.
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = usual_tf32
        if name == "pixels":
            measure_pixels(bench, args.purifier, args.data, args.split, args.images)
        elif name == "accuracy":
            measure_accuracy(bench, args.data)
        elif name == "plot":
            draw_plot(bench, args.figure)
        elif name == "table":
            print(speed_table(records_of(bench.output), bench.unet, smoke=args.quick))
        else:
            SECTIONS[name](bench)


if __name__ == "__main__":
    sys.exit(main())
