"""Loops written by hand, which `throughput.py` times beside ours: purification, a denoiser, a classifier."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from eval.timing import Bench, Mode, random_images
from jcdp_diffusers import LPIPSModel
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.devices import has_bfloat16
from jcdp_diffusers.train.unets import ddpm_scheduler, named_unet


@contextlib.contextmanager
def authors_process(bench: Bench, batch: int, steps: int) -> Iterator[Callable[..., float]]:
    """
    A function that runs the authors' loop in a process of its own and returns the seconds that it took there.

    Raises:
        RuntimeError: When that process has ended, for example for want of memory.
    """
    ours, theirs = (context := multiprocessing.get_context("spawn")).Pipe()
    process = context.Process(
        target=serve_authors_loop, args=(theirs, bench, batch, steps, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()  # so that waiting for a process that has died ends

    def seconds(tf32: bool) -> float:
        try:
            ours.send(tf32)
            return ours.recv()
        except (ConnectionError, EOFError) as error:
            process.join()
            raise RuntimeError(f"the process of the authors' loop ended with exit code {process.exitcode}.") from error

    yield seconds
    ours.send(None)
    process.join()


def serve_authors_loop(connection, bench: Bench, batch: int, steps: int, threads: int) -> None:
    """Run the authors' loop as often as asked, with or without TF32 in convolutions, until the answer is None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
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
