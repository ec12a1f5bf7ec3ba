"""
Training of a purifier: an unconditional DDPM on raw images, on any number of processes.

The order of the images, their noise, timesteps, flips and crops are a pure function of (seed, step, position in the
total batch), never the state of a random stream. So a run that was killed goes on to the same weights, and two
processes of batch 8 see the same total batch as one process of batch 16. Labels are never read.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from ..acceleration.folded_upsampling import is_folded
from ..acceleration.winograd import uses_winograd
from ..data import LabelledImages
from ..devices import device_in_words
from ..engines import first_rank_decides, folder_lock
from ..noise import coloured
from ..outputs import write_atomically
from ..purification_config import default_settings
from ..results import package_versions, plain
from .checkpoints import (
    PROGRESS_NAME,
    check_form,
    find_checkpoint,
    list_checkpoints,
    load_states,
    remove_leftovers,
    save_checkpoint,
    save_states,
)
from .config import FREE_SETTINGS, TrainingConfig
from .denoising import (
    PREDICTION_TYPES,
    denoising_grid,
    denoising_target,
    held_out_losses,
    min_snr_weights,
    random_generator,
    sample_grid,
    sample_timesteps,
)
from .images import BatchLayout, ImageFiles, micro_batches, normalize
from .model_card import write_card
from .provenance import image_digests, trained_on, write_trained_on
from .reading import damaged, read_json
from .record import RECORD_NAME, ema_horizon, fingerprint


INDEX_NAME = DDPMPipeline.config_name  # what makes a folder a pipeline's
# Entries of a checkpoint's progress.json.
_PROGRESS = {"step": int, "seconds": (int, float), "identity": dict, "history": list, "validation": list}


def train_purifier(
    images: LabelledImages | ImageFiles,
    *,
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    output_dir: str | os.PathLike,
    config: TrainingConfig,
    validation_images: LabelledImages | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    data_description: dict | None = None,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """
    Train a network to denoise raw images, and write it as a plain DDPM repository.

    Called alike on each process of `torchrun` or `accelerate launch`.

    Args:
        images (`LabelledImages` or `ImageFiles`): In memory, or decoded as needed. Labels are not read.
        unet (`UNet2DModel`): Trained in place; holds the averaged weights at the end.
        scheduler (`DDPMScheduler`): The forward process; its configuration goes into the repository unchanged.
        output_dir (`str` or `os.PathLike`): The repository: weights, scheduler, `purification_config.json`,
            `training_record.json`, the card `README.md` and, where all images that the network ever saw are known,
            `trained_on.json`; beside them `checkpoint-<step>` and `grids`.
        validation_images (`LabelledImages`, *optional*): Held out, for the denoising loss and the grids.
        base_model (`str`, *optional*): Hub id or folder that the network came from, for record and card, and for
            the list of images that trained it.
        base_revision (`str`, *optional*): Of a Hub id.
        data_description (`dict`, *optional*): Where the images came from, for record and card: `source`, `split`,
            `hub_id` (if it is one), `resolution`, and whatever else decides what the network saw.
        progress (`bool`, defaults to `True`): Show a bar with loss, images per second and remaining time.
        stop (`Callable`, *optional*): Asked after each step. True ends the training before `max_train_steps`, with
            the average of the weights until then. For one process.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: If images, network, scheduler, folder and settings do not fit together, in one sentence.
        FloatingPointError: If the loss is no finite number any more.
    """
    timesteps = config.timesteps(scheduler)
    if config.validation_timesteps:
        config.timesteps(scheduler, "validation_timesteps")
    _check(images, unet, scheduler)
    output_dir = Path(output_dir)
    device = torch.device("cpu") if on_cpu(config.cpu) else torch.accelerator.current_accelerator()
    config = dataclasses.replace(config, mixed_precision=config.precision_on(device))
    # A second run in one process may want another precision than the first, which this singleton would refuse.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu(config.cpu),
        mixed_precision=config.mixed_precision,
        # Given as a number, a variable of the environment would take its place.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if config.report_to is not None and not accelerator.log_with:
        raise ValueError(f"report_to is {config.report_to!r}, which is not installed: pip install {config.report_to}.")
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), contextlib.ExitStack() as stack:
        run = _Run(accelerator, images, unet, scheduler, output_dir, config, timesteps, validation_images)
        run.describe(base_model, base_revision, data_description)
        # The main process keeps other commands away, and decides for all.
        checkpoint = first_rank_decides(lambda: _begin(output_dir, config.resume_from_checkpoint, stack))
        run.train(checkpoint, progress, stop)
        run.finish()
    return output_dir


def on_cpu(wanted: bool) -> bool:
    """What to give Accelerate as `cpu`: unless it is told so, processes started on a machine without an accelerator
    do not find each other, and each trains alone."""
    return wanted or not torch.accelerator.is_available()


def _shape(images: LabelledImages | ImageFiles) -> tuple[int, int, int]:
    """Height, width and channels."""
    if isinstance(images, ImageFiles):
        return images.resolution, images.resolution, images.channels
    return images.images.shape[1:]


def _check(images, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
    height, width, channels = _shape(images)
    if len(images) == 0:
        raise ValueError("images is empty, but must hold at least one image.")
    divisor = 2 ** (len(unet.config.block_out_channels) - 1)
    if height % divisor or width % divisor:
        raise ValueError(f"images are {height}x{width}, but the network takes multiples of {divisor} only.")
    if channels != unet.config.in_channels:
        raise ValueError(f"images have {channels} channels, but the network takes {unet.config.in_channels}.")
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"unet gives {unet.config.out_channels} channels for {unet.config.in_channels}, but must give as many as "
            "it takes: a learned variance cannot be trained."
        )
    if unet.class_embedding is not None:
        raise ValueError("unet is conditioned on classes, but must be unconditional: labels are never read.")
    if is_folded(unet) or uses_winograd(unet):
        raise ValueError(
            "unet has been placed for purification (`place`), but must be as it was loaded: its folded weights would "
            "not be trained."
        )
    prediction_type = scheduler.config.get("prediction_type")  # not every scheduler has one
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}, but must be one of {PREDICTION_TYPES}.")


def _begin(output_dir: Path, wanted: str | None, stack: contextlib.ExitStack) -> Path | None:
    """Keep other commands away for as long as the stack is open, and choose where to start, see `_start_from`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(folder_lock(output_dir / ".lock"))
    return _start_from(output_dir, wanted)


def _start_from(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start; refuse a folder that holds what would be replaced."""
    if wanted is None and (found := list_checkpoints(output_dir)):
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds {found[-1].name} of an earlier run: give "
            "resume_from_checkpoint='latest' to go on with it, or another folder."
        )
    checkpoint = None if wanted is None else find_checkpoint(output_dir, wanted)
    recorded, indexed = (output_dir / RECORD_NAME).exists(), (output_dir / INDEX_NAME).exists()
    if checkpoint is not None:
        check_form(checkpoint)
    elif recorded and indexed:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds a finished purifier ({RECORD_NAME}) and no checkpoint to "
            "go on from, but must be another folder: it would be replaced."
        )
    elif indexed:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds a pipeline ({INDEX_NAME}) that no run of this folder "
            "has finished, but must be another folder: it would be replaced."
        )
    elif (output_dir / "README.md").exists() and not recorded:  # a run that was killed as it finished leaves both
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, whose README.md is no purifier's, but must be another folder: it "
            "would be replaced."
        )
    return checkpoint


class _Run:
    """One training run: what `train_purifier` would otherwise hand from function to function."""

    def __init__(self, accelerator, images, unet, scheduler, output_dir, config, timesteps, validation_images):
        self.accelerator, self.images, self.unet, self.config = accelerator, images, unet, config
        self.output_dir, self.timesteps, self.validation_images = output_dir, timesteps, validation_images
        # Without its notes: diffusers counts arguments given by position among the defaults, and would drop them here.
        self.scheduler = DDPMScheduler.from_config(_public(scheduler.config))
        self.layout = BatchLayout(
            accelerator.process_index,
            accelerator.num_processes,
            config.train_batch_size,
            config.gradient_accumulation_steps,
        )
        height, width, _ = _shape(images)
        unet.register_to_config(sample_size=height if height == width else (height, width))
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.float().to(accelerator.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        # Not prepared: Accelerate would step a prepared schedule once per process. This one counts optimiser steps.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.ema = EMAModel(
            unet.parameters(),
            decay=config.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            foreach=True,
        )
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict] = []
        self.validation: list[dict] = []

    def describe(self, base_model: str | None, base_revision: str | None, data_description: dict | None) -> None:
        """Collect what the record says about the run, and what a continuation must share with it."""
        config = dict(vars(self.config))  # not asdict, which would copy a tracker with its files and locks
        config["report_to"] = getattr(self.config.report_to, "name", self.config.report_to)
        self.settings = config
        free = FREE_SETTINGS | ({"max_train_steps"} if self.config.lr_scheduler.startswith("constant") else set())
        self.identity = {name: value for name, value in config.items() if name not in free}
        self.identity["trained_timesteps"] = list(self.timesteps)
        self.identity["total_batch_size"] = self.layout.total
        self.identity["images"] = fingerprint(self.images)
        self.identity["unet"] = _public(self.unet.config)
        self.identity["scheduler"] = _public(self.scheduler.config)
        self.base_model_on_hub = base_model is not None and not Path(base_model).exists()
        # The record is published: no paths of one's own.
        self.base_model = base_model if self.base_model_on_hub or base_model is None else Path(base_model).name
        self.data = {"num_images": len(self.images), **(data_description or {})}
        if self.validation_images is not None:
            self.data["num_validation_images"] = len(self.validation_images)
        before = frozenset() if base_model is None else trained_on(base_model, base_revision)
        # By what the network began with, the list of its images stands or falls.
        self.identity["base_model"], self.identity["base_revision"] = self.base_model, base_revision
        self.identity["base_images"] = None if before is None else _digest(before)
        # Of squares cut anew at each visit there is no list.
        known = before is not None and isinstance(self.images, LabelledImages)
        self.trained_on = before.union(image_digests(self.images.images)) if known else None

    def train(self, checkpoint: Path | None, progress: bool, stop: Callable[[], bool] | None) -> None:
        """All steps that are left, with their checkpoints, held-out losses and grids."""
        config, accelerator = self.config, self.accelerator
        if checkpoint is not None:
            self._resume(checkpoint)
        if config.report_to is not None:
            accelerator.init_trackers("train_purifier", config={k: str(v) for k, v in self.settings.items()})
        bar = tqdm(
            total=config.max_train_steps,
            initial=self.step,
            unit="step",
            desc="train",
            disable=not (progress and accelerator.is_main_process),
        )
        draws = self.layout.draws(config.seed, len(self.images), self.step, config.max_train_steps)
        batches = micro_batches(self.images, draws, accelerator.device, config.dataloader_num_workers)
        running_loss = torch.zeros((), device=accelerator.device)
        if self.step == 0:
            self._validate()
        self.first_step, self.start = self.step, time.perf_counter()
        self.seconds_before = self.seconds
        last = self.step == config.max_train_steps
        while not last:
            loss, norm = self._optimizer_step(batches)
            self.step += 1
            running_loss += loss
            bar.update()
            last = self.step == config.max_train_steps or (stop is not None and stop())
            saving = config.checkpointing_steps is not None and (last or self.step % config.checkpointing_steps == 0)
            if last or saving or self.step % config.logging_steps == 0:
                self._log(running_loss, norm, bar)
                running_loss.zero_()
            if last or self.step % config.validation_steps == 0:
                self._validate()
            if saving:
                self._checkpoint()
        bar.close()

    def _optimizer_step(self, batches: Iterator[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """One step over this process's share of the total batch; returns its mean loss and the gradient's norm."""
        config, accelerator, layout = self.config, self.accelerator, self.layout
        generator = random_generator(config.seed, "step", self.step, device=accelerator.device)
        timesteps = sample_timesteps(config.timestep_sampling, layout.total, *self.timesteps, generator)
        flips = torch.rand(layout.total, generator=generator, device=accelerator.device) < 0.5
        height, width, channels = _shape(self.images)
        shape = (layout.total, channels, height, width)
        noise = torch.randn(shape, generator=generator, device=accelerator.device)
        noise = coloured(noise, config.noise_corner)
        mean_loss = torch.zeros((), device=accelerator.device)
        for micro in range(config.gradient_accumulation_steps):
            here = layout.positions(micro)
            clean = normalize(next(batches))
            if config.random_flip:
                clean = torch.where(flips[here].view(-1, 1, 1, 1), clean.flip(3), clean)
            # Dropout, too, is a function of the step, so it needs no saved state.
            torch.manual_seed(random_generator(config.seed, "dropout", self.step, micro, layout.rank).initial_seed())
            with accelerator.accumulate(self.model):
                loss = self._loss(clean, noise[here], timesteps[here])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean_loss += loss.detach() / config.gradient_accumulation_steps
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())
        return mean_loss, norm

    def _loss(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        noised = self.scheduler.add_noise(clean, noise, timesteps)
        prediction = self.model(noised, timesteps).sample.float()
        target = denoising_target(self.scheduler, clean, noise, timesteps)
        losses = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
        if self.config.snr_gamma is not None:
            losses = losses * min_snr_weights(self.scheduler, timesteps, self.config.snr_gamma)
        return losses.mean()

    def _log(self, running_loss: torch.Tensor, norm: torch.Tensor, bar: tqdm) -> None:
        self._clock()
        since = self.step - (self.history[-1]["step"] if self.history else 0)
        loss = (self.accelerator.reduce(running_loss, "mean") / since).item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}: lower learning_rate, which is {self.config.learning_rate}."
            )
        rate = self.layout.total * (self.step - self.first_step) / (self.seconds - self.seconds_before)
        entry = {
            "step": self.step,
            "loss": loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": float(norm),
        }
        self.history.append(entry)
        bar.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{rate:.0f}"}, refresh=False)
        self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=self.step)

    def _clock(self) -> None:
        self.seconds = self.seconds_before + time.perf_counter() - self.start

    def _validate(self) -> None:
        """Held-out loss and grids of the averaged weights; the weights in training come back unchanged."""
        if self.validation_images is None:
            return
        accelerator, config = self.accelerator, self.config
        held_out = self.validation_images.images
        where = (
            config.timesteps(self.scheduler, "validation_timesteps") if config.validation_timesteps else self.timesteps
        )
        if self.step > 0:
            self.ema.store(self.unet.parameters())
            self.ema.copy_to(self.unet.parameters())
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        noise = {"seed": config.seed, "noise_corner": config.noise_corner}
        losses = held_out_losses(self.unet, self.scheduler, held_out, timesteps=where, chunks=share, **noise)
        total = accelerator.reduce(losses.sum(), "sum")
        self.validation.append({"step": self.step, "loss": total.item() / len(held_out), "timesteps": list(where)})
        accelerator.log({"held_out_loss": self.validation[-1]["loss"]}, step=self.step)
        if accelerator.is_main_process and config.num_grid_images:
            shown = held_out[: config.num_grid_images]
            # Of a long range the part that a purifier may visit: beyond it, little of an image can be seen.
            first, end = self.timesteps
            visited = (first, max(first + 1, min(end, round(0.15 * self.scheduler.config.num_train_timesteps))))
            picture = denoising_grid(self.unet, self.scheduler, shown, timesteps=visited, **noise)
            self._show("denoising", picture)
            if self.timesteps == (0, self.scheduler.config.num_train_timesteps):
                shape = (len(shown), shown.shape[3], *shown.shape[1:3])
                self._show("samples", sample_grid(self.unet, self.scheduler, shape, **noise))
        if self.step > 0:
            self.ema.restore(self.unet.parameters())

    def _show(self, name: str, picture: np.ndarray) -> None:
        folder = self.output_dir / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{name}-{self.step:07d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None]}, step=self.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [picture]}, step=self.step)

    def _others(self) -> dict:
        """What has a state beside network, optimiser and average."""
        scaler = self.accelerator.scaler  # of float16
        return {"lr_scheduler": self.lr_scheduler} | ({} if scaler is None else {"scaler": scaler})

    def _save_states(self, folder: Path) -> None:
        save_states(folder, self.unet, self.optimizer, self._others(), self.ema)

    def _checkpoint(self) -> None:
        self._clock()
        save_checkpoint(
            self.output_dir,
            self.step,
            self._save_states,
            {
                "step": self.step,
                "seconds": self.seconds,
                "identity": self.identity,
                "history": self.history,
                "validation": self.validation,
            },
            is_main_process=self.accelerator.is_main_process,
            wait_for_everyone=self.accelerator.wait_for_everyone,
            total_limit=self.config.checkpoints_total_limit,
        )

    def _resume(self, checkpoint: Path) -> None:
        saved = read_json(checkpoint / PROGRESS_NAME, _PROGRESS)
        identity = plain(self.identity, "identity")  # tuples are lists in JSON
        if saved["identity"].keys() != identity.keys():
            raise damaged(checkpoint / PROGRESS_NAME, "identity has other entries")
        for entry in saved["history"] + saved["validation"]:
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise damaged(checkpoint / PROGRESS_NAME, "an entry of history or validation has no step")
        for name, value in saved["identity"].items():
            if identity[name] != value:
                raise ValueError(f"{name} is {identity[name]!r}, but {checkpoint} was trained with {value!r}.")
        if saved["step"] > self.config.max_train_steps:
            raise ValueError(
                f"max_train_steps is {self.config.max_train_steps}, but {checkpoint.name} has {saved['step']} already."
            )
        load_states(checkpoint, self.unet, self.optimizer, self._others(), self.ema)
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.history, self.validation = saved["history"], saved["validation"]

    def finish(self) -> None:
        """Put the averaged weights into the network and write the repository."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.ema.copy_to(self.unet.parameters())
        self.unet.to(memory_format=torch.contiguous_format).eval()
        if self.accelerator.is_main_process:
            remove_leftovers(self.output_dir)
            # Without an index the folder is no purifier: it goes first and comes last, so that whoever is killed
            # between leaves none that lacks its settings or has another's.
            (self.output_dir / INDEX_NAME).unlink(missing_ok=True)
            pipe = DDPMPipeline(self.unet, self.scheduler)
            pipe.unet.save_pretrained(self.output_dir / "unet")
            pipe.scheduler.save_pretrained(self.output_dir / "scheduler")
            facts = {"trained_timesteps": self.timesteps, "noise_corner": self.config.noise_corner}
            self.unet.purification_config = default_settings(self.timesteps[1], **facts)  # in place of its base's
            self.unet.purification_config.save_pretrained(self.output_dir)
            write_trained_on(self.output_dir, self.trained_on)
            write_atomically(self.output_dir / RECORD_NAME, json.dumps(self._record(), indent=2) + "\n")
            write_card(self.output_dir)
            write_atomically(self.output_dir / INDEX_NAME, pipe.to_json_string())
        self.accelerator.wait_for_everyone()

    def _record(self) -> dict:
        return {
            "base_model": self.base_model,
            "base_model_on_hub": self.base_model_on_hub,
            "data": self.data,
            "steps": self.step,
            "total_batch_size": self.layout.total,
            "processes": self.layout.world,
            "trained_timesteps": list(self.timesteps),
            "num_train_timesteps": self.scheduler.config.num_train_timesteps,
            "parameters": self.unet.num_parameters(),
            "settings": self.settings,
            "ema": ema_horizon(self.ema, self.step),
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.step * self.layout.total / self.seconds, 1),
            "device": self._device(),
            "packages": package_versions(),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "history": self.history,
            "validation": self.validation,
        }

    def _device(self) -> str:
        return device_in_words(self.accelerator.device)


def _digest(names: Collection[str]) -> str:
    return hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=16).hexdigest()


def _public(config: dict) -> dict:
    """A diffusers configuration without its own notes, such as the version that wrote it."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
