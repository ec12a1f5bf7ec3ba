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
import contextlib
import dataclasses
import functools
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from jcdp_diffusers import (
    GuidedDDPMScheduler,
    JointConditionalPurificationPipeline,
    LPIPSModel,
    PurificationConfig,
    victims,
)
from jcdp_diffusers.acceleration.allocation import keep_freed_memory
from jcdp_diffusers.acceleration.folded_upsampling import fold_upsampling
from jcdp_diffusers.acceleration.placement import compiled_normal_noise, place
from jcdp_diffusers.acceleration.winograd import use_winograd
from jcdp_diffusers.data import LabelledImages, load_images, to_uint8
from jcdp_diffusers.devices import has_bfloat16
from jcdp_diffusers.noise import image_keys, normal_noise
from jcdp_diffusers.pipeline_jcdp import usual_micro_batch
from jcdp_diffusers.purify.tiling import encode_all, prepare_all
from jcdp_diffusers.results import append_record, read_records
from jcdp_diffusers.train.config import TrainingConfig
from jcdp_diffusers.train.images import BatchLayout, micro_batches, normalize
from jcdp_diffusers.train.loop import train_purifier
from jcdp_diffusers.train.unets import ddpm_scheduler, named_unet
from jcdp_diffusers.victims import RECIPES, random_crop_flip, train_model, train_victim


TIMESTEP = 15
GUIDES = {"pixel_guidance_scale": 1.0, "perceptual_guidance_scale": 1.0}
NO_GUIDES = {"pixel_guidance_scale": 0.0, "perceptual_guidance_scale": 0.0}


def guided_step(
    unet,
    reference,
    t: int,
    *,
    pixel_guidance_scale: float = 1.0,
    perceptual_guidance_scale: float = 1.0,
    perceptual_trunk: str = "alex",
    noise_reference: str = "fresh",
    compiled_noise: bool = False,
):
    """
    A reverse step of the whole batch with one UNet call, through the very functions that the pipeline uses.

    Args:
        unet (`UNet2DModel`): Or a stand-in with its `config`, `dtype` and `device`.
        reference (`torch.Tensor`): Images to be purified, (B, C, H, W) in [-1, 1].
        t (`int`): Timestep, from 0.
        pixel_guidance_scale, perceptual_guidance_scale (`float`): Scales of the guides; 0 leaves one out.
        perceptual_trunk (`str`): Trunk of the perceptual network, whose weights are random: only its cost matters
            here.
        noise_reference (`str`): `"fresh"` draws the reference's noise at every step, `"chain"` follows the forward
            chain.
        compiled_noise (`bool`): As `place` has it for a compiled purifier.

    Returns:
        `Callable[[torch.Tensor], torch.Tensor]`: From x_t to x_{t-1}, float32 inside.
    """
    perceptual = LPIPSModel(perceptual_trunk).to(reference.device) if perceptual_guidance_scale else None
    pipe = JointConditionalPurificationPipeline(unet, GuidedDDPMScheduler(), perceptual)
    config = PurificationConfig(
        diffusion_steps=t + 1,
        pixel_guidance_scale=pixel_guidance_scale,
        perceptual_guidance_scale=perceptual_guidance_scale,
        reference=noise_reference,
        variance_type="fixed_large",
    )
    scheduler = pipe.prepare_scheduler(config)
    keys = image_keys(0, [str(i) for i in range(len(reference))], reference.device)
    original = reference.to(torch.float32, memory_format=torch.contiguous_format)
    chain_noise = original.clone()
    earlier = scheduler.alphas_cumprod[t].item() * 0.999

    noise = compiled_normal_noise() if compiled_noise else normal_noise

    def draw(use):
        return noise(keys, reference.shape[1:], round_index=0, step_index=0, use=use)

    def step(x):
        x = x.to(torch.float32, memory_format=torch.contiguous_format)  # as the pipeline holds its state
        return pipe.reverse_step(scheduler, config, t, x, original, chain_noise, earlier, draw)[0]

    return step


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclasses.dataclass
class Bench:
    """Where figures are measured and where they are put on record."""

    output: Path
    device: torch.device
    clock: str
    repeats: int
    unet: str
    batches: tuple[int, ...]
    quick: bool
    compile: bool

    def timed(self, run: Callable) -> float:
        """Seconds that a call takes."""
        before = self.now()
        run()
        return self.now() - before

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def several(self, mode: "Mode", step: Callable, x: torch.Tensor) -> Callable[[], float]:
        """
        A function that returns the seconds of a step: on a CPU of one, on a GPU of one of ten, between which nothing
        waits, since a step's launches run ahead of the device in a purification, too.
        """
        count = 10 if self.device.type == "cuda" else 1

        def run() -> None:
            mode.arithmetic()
            with torch.no_grad():
                for _ in range(count):
                    step(x)

        return lambda: self.timed(run) / count

    def in_turn(self, runs: dict) -> dict:
        """Seconds of each run in each repetition."""
        return self.clocks_in_turn({name: functools.partial(self.timed, run) for name, run in runs.items()})

    def clocks_in_turn(self, clocks: dict) -> dict:
        """The same of functions that return their seconds themselves."""
        names = list(clocks)
        for name in names:
            clocks[name]()  # to warm up
        seconds = {name: [] for name in names}
        for repeat in range(self.repeats):
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(clocks[name]())
        return seconds

    def settings(self, **settings) -> dict:
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        return settings | {"threads": threads, "clock": self.clock, "processor": processor(self.device)}

    @property
    def protocol(self) -> str:
        return "smoke" if self.quick else "throughput"

    def missing(self, what: str, **settings) -> bool:
        """Whether a figure is still to be measured."""
        return self.find(what, **settings) is None

    def find(self, what: str, **settings):
        """The value on record, or None."""
        wanted = (what, self.protocol, self.settings(**settings))
        found = [r for r in records_of(self.output) if (r["what"], r["protocol"], r["settings"]) == wanted]
        return found[-1]["value"] if found else None

    def record(self, what: str, value, seconds: float, **settings) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        append_record(
            self.output,
            what=what,
            value=value,
            seed=None,
            protocol=self.protocol,
            settings=self.settings(**settings),
            device=f"cuda ({name})" if name else self.device.type,
            seconds=round(seconds, 2),
        )
        shown = value if isinstance(value, dict) else {"value": value}
        words = [f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
        print(f"{what} {' '.join(str(s) for s in settings.values())}: {', '.join(words)}", flush=True)


def records_of(path: Path) -> list[dict]:
    return read_records(path) if path.exists() else []


def processor(device: torch.device) -> str:
    """What the machine calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name, bfloat16 = names[0] if names else "unknown", has_bfloat16(device)
    return f"{name}{', AMX' if torch.cpu._is_amx_tile_supported() else ', AVX-512 BF16' if bfloat16 else ''}"


def spread(values: list[float]) -> list[float]:
    """First and third quartile."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else values * 2


def against(seconds: list[float], base: list[float]) -> dict:
    """Median seconds, and the median ratio to a base of the same repetitions with its quartiles."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "quartiles": spread(ratios),
        "repeats": len(ratios),
    }


# --------------------------------------------------------------------------------------------------------------- modes


@dataclasses.dataclass(frozen=True)
class Mode:
    """Type and layout of a UNet, whether its upsampling is folded, and whether Winograd's algorithm convolves."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    tf32: bool = False
    folded: bool = False
    winograd: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [str(self.dtype).removeprefix("torch.")]
        words += [word for word in ("tf32", "channels_last", "folded", "winograd", "compiled") if getattr(self, word)]
        return " ".join(words)

    def place(self, unet: UNet2DModel, device: torch.device) -> nn.Module:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        if self.folded:
            fold_upsampling(unet)
        nn.Module.to(unet, device=device, dtype=self.dtype, memory_format=layout)
        unet.eval().requires_grad_(False)
        if self.winograd:
            use_winograd(unet)
        if self.compiled:
            unet.compile(dynamic=False)
        return unet

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return values.to(self.dtype, memory_format=layout)

    def arithmetic(self) -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.tf32


def modes(device: torch.device, compiled: bool) -> list[Mode]:
    """What a UNet can run as on a device, the authors' way first."""
    found = [Mode(), Mode(channels_last=True)]
    if device.type == "cuda":
        found += [Mode(channels_last=True, tf32=True), Mode(torch.float16, channels_last=True), Mode(torch.bfloat16)]
    if has_bfloat16(device):
        found.append(Mode(torch.bfloat16, channels_last=True))
    folded = [dataclasses.replace(mode, folded=True) for mode in found if mode.channels_last and not mode.tf32]
    if device.type == "cpu":
        folded.insert(1, dataclasses.replace(folded[0], winograd=True))
    fastest = (found[-1], folded[-1]) if compiled else ()
    return [*found, *folded, *(dataclasses.replace(mode, compiled=True) for mode in fastest)]


class Stub(nn.Module):
    """Stands in for a UNet: its configuration, a stored output, no work."""

    def __init__(self, unet: UNet2DModel, output: torch.Tensor):
        super().__init__()
        self.config, self.output, self.dtype, self.device = unet.config, output, output.dtype, output.device

    def forward(self, sample, timestep, return_dict=True):
        return UNet2DOutput(sample=self.output) if return_dict else (self.output,)


def placed_as(device: torch.device) -> dict[str, str]:
    """What a network does on a device beyond type and layout, for records: the figures change where this changes."""
    if device.type == "cpu":
        return {"placed": "upsampling folded, float32 by Winograd"}
    return {"placed": f"float32 convolutions in TF32: {torch.backends.cudnn.allow_tf32}"}


@functools.cache
def forward_flops(name: str) -> int:
    """Floating-point operations of one image's forward as diffusers has it."""
    unet = named_unet(name)
    # As matrix products: not every version of torch counts a CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(torch.zeros(1, 3, 32, 32), torch.tensor([1]))
    return counter.get_total_flops()


def random_images(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """In [-1, 1], (N, 3, 32, 32)."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(device)


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


@contextlib.contextmanager
def authors_process(bench: Bench, batch: int, steps: int) -> Iterator[Callable[..., float]]:
    """A function that runs the authors' loop in a process of its own and returns the seconds that it took there."""
    ours, theirs = (context := multiprocessing.get_context("spawn")).Pipe()
    process = context.Process(
        target=serve_authors_loop, args=(theirs, bench, batch, steps, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()  # so that waiting for a process that has died ends

    def seconds(tf32: bool) -> float:
        ours.send(tf32)
        return ours.recv()

    yield seconds
    ours.send(None)
    process.join()


def serve_authors_loop(connection, bench: Bench, batch: int, steps: int, threads: int) -> None:
    """Run the authors' loop as often as asked, with or without TF32 in convolutions, until the answer is None."""
    torch.set_num_threads(threads)
    unet = Mode().place(named_unet(bench.unet), bench.device)
    images, perceptual = random_images(batch, bench.device), LPIPSModel("alex").to(bench.device)
    while (tf32 := connection.recv()) is not None:
        torch.backends.cudnn.allow_tf32 = tf32
        connection.send(bench.timed(lambda: authors_loop(unet, perceptual, images, steps)))


def authors_loop(unet: UNet2DModel, perceptual: LPIPSModel, images: torch.Tensor, steps: int) -> torch.Tensor:
    """
    What the authors' program computes, in its shape: the whole batch at once in contiguous float32, both guides by
    automatic differentiation at every step although only one of them enters, both branches of the perceptual network
    within the graph, a draw of reference noise for each guide, losses averaged over the batch, and the schedule looked
    up in NumPy arrays.
    """
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    bar_before = np.append(1.0, bar[:-1])
    draw = torch.Generator(images.device).manual_seed(0)

    def at(values: np.ndarray, t: int) -> torch.Tensor:
        return torch.from_numpy(values).to(images.device)[t].float()

    def noise() -> torch.Tensor:
        return torch.randn(images.shape, generator=draw, device=images.device)

    def noised(t: int) -> torch.Tensor:
        return at(bar, t).sqrt() * images + (1 - at(bar, t)).sqrt() * noise()

    x = noised(steps - 1)
    for t in reversed(range(steps)):
        with torch.no_grad():
            prediction = unet(x, torch.full((len(x),), t, device=x.device)).sample
            original = ((x - (1 - at(bar, t)).sqrt() * prediction) / at(bar, t).sqrt()).clamp(-1, 1)
            mean = at(beta, t) * at(bar_before, t).sqrt() / (1 - at(bar, t)) * original
            mean = mean + (1 - at(bar_before, t)) * (1 - at(beta, t)).sqrt() / (1 - at(bar, t)) * x
        leaf = x.detach().requires_grad_(True)
        pixel = torch.autograd.grad(F.mse_loss(leaf, noised(t)), leaf)[0]
        leaf = x.detach().requires_grad_(True)
        perceived = torch.autograd.grad(perceptual(leaf, noised(t)).mean(), leaf)[0]
        x = mean - at(beta, t) * (pixel if t > 10 else perceived) + at(beta, t).sqrt() * noise()
    return x


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


def plain_denoiser(unet, images: LabelledImages, device, batch: int, steps: int, bfloat16: bool) -> None:
    """A DDPM's training loop by hand."""
    unet.to(device, memory_format=torch.channels_last).train()
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous().to(device)
    bar = ddpm_scheduler().alphas_cumprod.to(device)
    parameters = list(unet.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0)
    draw = torch.Generator(device).manual_seed(0)
    for _ in range(steps):
        clean = pixels[torch.randint(len(pixels), (batch,), generator=draw, device=device)].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=draw, device=device)
        t = torch.randint(1000, (batch,), generator=draw, device=device)
        level = bar[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            prediction = unet(level.sqrt() * clean + (1 - level).sqrt() * noise, t).sample
        F.mse_loss(prediction.float(), noise).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.01)


def measure_victim(bench: Bench) -> None:
    """A victim's training step, with crop, flip and SGD."""
    recipe = RECIPES["fast" if bench.device.type == "cuda" else "mini"].for_images(50_000)
    width, steps = (8, 6) if bench.quick else (recipe.width, 40)
    recipe = dataclasses.replace(recipe, epochs=1)
    images = _labelled(steps * recipe.batch_size)
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(images.labels)

    def ours():
        network = victims.get("resnet18")(10, width=width)
        return network, lambda: train_model(network, pixels, labels, recipe=recipe, device=bench.device)

    def plain():
        network = victims.get("resnet18")(10, width=width)
        return network, lambda: plain_classifier(network, pixels, labels, bench.device, recipe)

    settings = {"victim": "resnet18", "width": width, "recipe": recipe.name}
    compare_loops(bench, "victim", {"ours": ours, "plain": plain}, recipe.batch_size, **settings)


def plain_classifier(network, pixels, labels, device, recipe) -> None:
    """A classifier's training loop by hand: one epoch."""
    network.to(device, memory_format=torch.channels_last).train()
    pixels, labels = pixels.to(device), labels.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    draw = torch.Generator(device).manual_seed(0)
    for batch in torch.randperm(len(pixels), generator=draw, device=device).split(recipe.batch_size):
        padded = F.pad(pixels[batch], (4, 4, 4, 4))
        rows, columns = torch.randint(9, (2, len(batch), 1), generator=draw, device=device)
        rows, columns = rows + torch.arange(32, device=device), columns + torch.arange(32, device=device)
        flip = torch.rand(len(batch), 1, generator=draw, device=device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
        each = torch.arange(len(batch), device=device)
        x = padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            loss = F.cross_entropy(network(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure_input(bench: Bench) -> None:
    """Share of a step or of a purified image that preparing its input, and writing its output, takes on one core."""
    repeats = 3 if bench.quick else 20
    images = _labelled(256)

    def share(what: str, seconds: float, whole: float, **settings) -> None:
        value = {"seconds": seconds, "share": seconds / whole}
        bench.record("input", value, seconds * repeats, of=what, **settings)

    here = bench.settings().items()
    for record in [r for r in records_of(bench.output) if here <= r["settings"].items()]:
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


# ---------------------------------------------------------------------------------------------------------------- plot


def draw_plot(bench: Bench, path: Path) -> None:
    """Images per second against the batch, by mode, and the limit that the convolution's peak sets, by processor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in records_of(bench.output) if r["settings"].get("unet", bench.unet) == bench.unet]
    processors = list(dict.fromkeys(r["settings"]["processor"] for r in records if r["what"] == "step"))
    if not processors:
        raise SystemExit(f"throughput: output is {str(bench.output)!r}, which has no steps of {bench.unet} yet.")
    modes_found = dict.fromkeys(r["settings"]["mode"] for r in records if r["what"] == "step")
    colours = {mode: f"C{index}" for index, mode in enumerate(modes_found)}
    figure, axes = plt.subplots(1, len(processors), figsize=(7.5 * len(processors), 6), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], processors):
        here = [r for r in records if r["settings"]["processor"] == name]
        _draw_panel(axis, here, forward_flops(bench.unet), colours)
        axis.set_title(f"{bench.unet}: {short_name(name)}")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0, 0].set_ylabel("image-steps per second")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(axis, records: list[dict], flops: int, colours: dict[str, str]) -> None:
    steps = [r for r in records if r["what"] == "step"]
    batches = sorted({r["settings"]["batch"] for r in steps})
    for name in dict.fromkeys(r["settings"]["mode"] for r in steps):
        for kind, style, filling in (("bare", "--", "none"), ("guided", "-", "full")):
            points = {r["settings"]["batch"]: r["value"]["images_per_second"] for r in steps
                      if (r["settings"]["mode"], r["settings"]["kind"]) == (name, kind)}  # fmt: skip
            words = name.replace("_", " ").replace("winograd", "Winograd")
            label = f"{words}, {'guided step' if kind == 'guided' else 'bare UNet'}"
            xs = sorted(points)
            look = {"marker": "o", "ms": 5, "fillstyle": filling, "color": colours[name]}
            axis.plot(xs, [points[x] for x in xs], style, **look, label=label)
    for r in records:
        settings, value = r["settings"], r["value"]
        if r["what"] == "peak" and settings["operation"] == "convolution":
            limit = value / flops
            axis.axhline(limit, color="0.4", ls=":", lw=1.5)
            text = f"limit in {settings['dtype']}: {value / 1e9:,.0f} GFLOP/s of direct convolution"
            look = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": "0.3"}
            axis.annotate(text, (batches[-1], limit), xytext=(0, 3), **look)
    theirs = [r for r in records if r["what"] == "purifier" and r["settings"]["run"] == "authors"]
    if theirs:
        point = (theirs[-1]["settings"]["images"], theirs[-1]["value"]["images_per_second"])
        axis.plot(*point, "k*", ms=11, label="the authors' loop")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, map(str, batches))
    threads = steps[0]["settings"]["threads"]
    axis.set_xlabel(f"batch, on {threads} thread{'s' * (threads > 1)}" if threads else "batch")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


PRECISIONS = ("float32", "bfloat16")


def short_name(processor: str) -> str:
    """A processor's name without what all of a maker's have."""
    return re.sub(r"\(R\)| Processor", "", processor)


def speed_table(records: list[dict], unet: str) -> str:
    """What docs/speed.md says, in Markdown, by processor; of several records of a figure the last counts."""
    processors = dict.fromkeys(r["settings"]["processor"] for r in records)
    machines = {
        short_name(name): Machine([r for r in records if r["settings"]["processor"] == name], unet)
        for name in processors
    }
    by_precision = [f"{name}: {precision}" for name in machines for precision in PRECISIONS]
    tables = []
    for head, title, rows in (
        (by_precision, f"`{unet}`", [machine.by_precision() for machine in machines.values()]),
        (list(machines), "times a plain loop, median [quartiles]", [machine.loops() for machine in machines.values()]),
        (list(machines), "what else", [machine.what_else() for machine in machines.values()]),
    ):
        lines = [f"| {title} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for name in rows[0]:
            cells = [cell for machine in rows for cell in machine[name]]
            if not any(cells):  # of a kind of machine on which nothing was measured yet
                continue
            cells = [cell or "n.m." for cell in cells]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


@dataclasses.dataclass
class Machine:
    """What was measured on one processor: rows by title, of cells, None where nothing was."""

    records: list[dict]
    unet: str

    def find(self, what: str, **settings):
        """The value of the last such record, compiled only if asked for; an empty dictionary if there is none."""
        settings = {"compiled": None} | settings
        found = [
            r
            for r in self.records
            if r["what"] == what and settings.items() <= ({"compiled": None} | r["settings"]).items()
        ]
        return found[-1]["value"] if found else {}

    def step(self, mode: str, kind: str = "bare", batch: int = 64) -> dict:
        return self.find("step", unet=self.unet, mode=mode, kind=kind, batch=batch)

    def by_precision(self) -> dict[str, list[str | None]]:
        """A cell for each of `PRECISIONS`."""
        rows = {}

        def add(title: str, form: str, value: Callable[[str], float | None]) -> None:
            values = map(value, PRECISIONS)
            rows[title] = [None if v is None else format(v, form).replace("%", " %") for v in values]

        def rate(words: str, batch: int) -> Callable[[str], float | None]:
            return lambda precision: self.step(f"{precision} {words}", batch=batch).get("images_per_second")

        def rest(kind: str) -> Callable[[str], float | None]:
            return lambda precision: self.step(f"{precision} channels_last", kind).get("one_plus_rest")

        def folded_cost(precision: str) -> float | None:
            bare = self.step(f"{precision} channels_last")
            guided = self.step(f"{precision} channels_last folded", "guided")
            return guided["seconds"] / bare["seconds"] if guided else None

        def call(figure: str, run: str | None = None) -> Callable[[str], float | None]:
            return lambda precision: self.find("purifier", unet=self.unet, run=run or precision).get(figure)

        def peak(precision: str) -> float | None:
            found = self.find("peak", operation="convolution", dtype=precision)
            return found / 1e9 if found else None

        def share(precision: str) -> float | None:
            tf32 = peak("tf32") if precision == "float32" else None  # torch's default on a GPU
            rate, limit = call("images_per_second")(precision), tf32 or peak(precision)
            return rate * forward_flops(self.unet) / 1e9 / limit if rate and limit else None

        def convolutions(precision: str) -> float | None:
            shares = self.find("operators", unet=self.unet, mode=f"{precision} channels_last")
            return shares.get("aten::mkldnn_convolution", shares.get("aten::cudnn_convolution"))

        def whole(precision: str) -> float | None:
            return self.step(f"{precision} channels_last", "guided", 256).get("ratio")

        for batch in (1, 16, 64, 256, 1024):
            add(f"bare UNet, batch {batch}, images/s", ".1f", rate("channels_last", batch))
        add("bare UNet, compiled, batch 256, images/s", ".1f", rate("channels_last compiled", 256))
        add("bare UNet, compiled, batch 16, images/s", ".1f", rate("channels_last compiled", 16))
        add("bare UNet, upsampling folded, batch 16, images/s", ".1f", rate("channels_last folded", 16))
        add(
            "bare UNet, folded, Winograd's algorithm, batch 16, images/s",
            ".1f",
            rate("channels_last folded winograd", 16),
        )
        add("bare UNet, folded and compiled, batch 16, images/s", ".1f", rate("channels_last folded compiled", 16))
        add("step without a guide / bare UNet, batch 64", ".4f", rest("unguided"))
        add("step with both guides / bare UNet, batch 64", ".4f", rest("guided"))
        add("whole step with both guides / bare UNet, batch 256", ".4f", whole)
        add("step with both guides, upsampling folded / bare UNet as diffusers has it, batch 64", ".2f", folded_cost)
        add(
            "the authors' loop (float32, as torch has it), images/s per step",
            ".1f",
            call("images_per_second", "authors"),
        )
        add("pipeline with both guides, images/s per step", ".1f", call("images_per_second"))
        add("the same, times the authors' loop", ".2f", call("times_the_authors"))
        add("arithmetic of diffusers' network in that time, share of the convolution's peak", ".0%", share)
        add("that peak, GFLOP/s", ",.0f", peak)
        add("share of convolutions in a forward's time, batch 16", ".0%", convolutions)
        return rows

    def loops(self) -> dict[str, list[str | None]]:
        rows = {}
        for title, found in (
            ("a purifier's training step", self.find("training")),
            ("a victim's training step", self.find("victim")),
            ("noise for 64 images / `torch.randn`", self.find("noise", batch=64)),
        ):
            low, high = found.get("quartiles", (0, 0))
            rows[title] = [f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]" if found else None]
        return rows

    def what_else(self) -> dict[str, list[str | None]]:
        rows, noise = {}, self.find("noise", batch=64)
        compiled = self.find("noise", batch=64, compiled=True)
        for words, found in (("", noise), (", compiled", compiled)):
            rows[f"noise for 64 images{words}, milliseconds"] = [f"{1e3 * found['seconds']:.1f}" if found else None]
        for of in ("training", "victim", "purification"):
            found = self.find("input", of=of)
            rows[f"share of preparing the input: {of}"] = [f"{100 * found['share']:.1f} %" if found else None]
        for precision in PRECISIONS:
            found, title = self.find("pixels", precision=precision), f"pixels placed in {precision} against as loaded"
            shown = f"{found['mean']:.1g} ({found['largest']})" if found else None
            rows[f"{title}, in levels of 255: mean (largest)"] = [shown]
        changed = self.find("pixels")
        rows["what purification itself changes, mean"] = [
            f"{changed['mean_of_purification']:.1f}" if changed else None
        ]
        return rows


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
    device = torch.device(args.device)
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
            print(speed_table(records_of(bench.output), bench.unet))
        else:
            SECTIONS[name](bench)


if __name__ == "__main__":
    sys.exit(main())
