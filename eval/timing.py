"""The bench that `throughput.py` measures with, in turn with a plain loop, and the forms of a UNet that it times."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jcdp_diffusers import GuidedDDPMScheduler, JointConditionalPurificationPipeline, LPIPSModel, PurificationConfig
from jcdp_diffusers.acceleration.folded_upsampling import fold_upsampling
from jcdp_diffusers.acceleration.placement import compiled_normal_noise
from jcdp_diffusers.acceleration.winograd import use_winograd
from jcdp_diffusers.devices import has_bfloat16
from jcdp_diffusers.noise import image_keys, normal_noise
from jcdp_diffusers.results import append_record, read_records
from jcdp_diffusers.train.unets import named_unet


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
