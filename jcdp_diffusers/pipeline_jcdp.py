"""A batch of images in, purified images out: joint conditional diffusion purification as a diffusers pipeline."""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from huggingface_hub import snapshot_download
from PIL import Image

from .acceleration.feature_cache import FeatureCache, check_cacheable
from .guidance import (
    earlier_chain_noise,
    in_window,
    perceptual_gradient,
    pixel_gradient,
    posterior_start,
    strength,
    towards_protected,
)
from .hub import create_repository, push_purifier
from .images import Images, pictures_of, to_bytes, within_unit_range
from .noise import coloured, content_id, image_keys, noise_power, normal_noise, times_covariance
from .perceptual import LPIPSModel, load_perceptual
from .purification_config import CONFIG_NAME, PurificationConfig
from .repository import (
    TRAINED_ON_NAME,
    check_folder,
    check_on_hub,
    folder_of,
    lay_aligned,
    on_hub,
    only_variant,
    remove_weights,
    training_list,
    weights_digest,
)
from .scheduling_guided_ddim import GuidedDDIMScheduler
from .scheduling_guided_ddpm import GuidedDDPMScheduler, guided, settings_of


HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
MICRO_BATCH = {"cpu": 16}  # beyond it activations leave a CPU's cache and up to a third of the speed is lost
PIXELS_ON_ACCELERATOR = 256 * 32 * 32  # of a micro-batch: 256 images of CIFAR-10, and as much memory for larger ones

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from jcdp_diffusers import JointConditionalPurificationPipeline

        >>> pipe = JointConditionalPurificationPipeline.from_pretrained("google/ddpm-cifar10-32")
        >>> protected = [Image.open("protected.png").convert("RGB").resize((32, 32))]
        >>> purified = pipe(protected, seed=0).images[0]
        >>> purified.save("purified.png")

        >>> # fewer forward steps, and the pixel guide, which keeps the result closer to the image
        >>> closer = pipe(protected, diffusion_steps=50, pixel_guidance_scale=1000.0, seed=0).images[0]
        ```
"""


@dataclasses.dataclass
class PurificationOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Purified images, as `output_type` asked: PIL,
            float array (N, H, W, C) in [0, 1], or float32 tensor (N, C, H, W) in [0, 1].
        seed (`int`, *optional*): Seed of the noise, given or drawn; None if generators were given.
        ids (`list[str]`, *optional*): Id of each image, given or made from its content; None if generators were given.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    seed: int | None = None
    ids: list[str] | None = None


class JointConditionalPurificationPipeline(DiffusionPipeline):
    """
    Diffuse protected images a little and denoise them again, guided towards what they show.

    Implements Algorithm 1 of *Unlearnable Examples Give a False Sense of Security* (ACM MM 2023): N rounds of T_p
    forward steps and T_p reverse steps whose mean is shifted by sigma_t^2 (d1 + d2), d1 = -scale grad MSE, d2 = -scale
    grad LPIPS.

    Any DDPM repository is a purifier: `from_pretrained("google/ddpm-cifar10-32")` works, and what `save_pretrained`
    writes loads in plain diffusers. Beside the DDPM it may hold `purification_config.json` and `perceptual/`.

    Args:
        unet (`UNet2DModel`): Noise predictor, trained on raw images in [-1, 1].
        scheduler (`GuidedDDPMScheduler`): A `DDPMScheduler`, or another one with the same noise schedule (DDIM's, for
            example), is converted, and its configuration kept.
        perceptual (`LPIPSModel`, *optional*): Needed for a positive perceptual scale only.

    What the repository of the network says of it, `purification_config`, is kept on the network. So it comes along to
    every pipeline of this class that gets the network, however that is made. Pipelines with the same network share it.
    """

    model_cpu_offload_seq = "unet"
    # Called at every step: moving it in and out would cost more than its work.
    _exclude_from_cpu_offload = ["perceptual"]
    _optional_components = ["perceptual"]
    _callback_tensor_inputs = ["sample"]

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler, perceptual: LPIPSModel | None = None):
        super().__init__()
        if not isinstance(scheduler, GuidedDDPMScheduler):
            scheduler = guided(scheduler)
        size = getattr(unet.config, "sample_size", None)
        if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
            unet.register_to_config(sample_size=size[0])  # the other way in which diffusers writes a square
        for network in (unet, perceptual):
            if network is not None:
                lay_aligned(network)
        if not hasattr(unet, "purification_config"):  # plain diffusers loaded it, or it was made in memory
            folder = folder_of(unet)
            unet.purification_config = None if folder is None else PurificationConfig.from_pretrained(folder)
        self.register_modules(unet=unet, scheduler=scheduler, perceptual=perceptual)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.normal_noise = normal_noise  # or the same compiled: `placement.place`

    @property
    def purification_config(self) -> PurificationConfig | None:
        """Settings of the network's repository, with what it was trained on; None if it has none."""
        return getattr(self.unet, "purification_config", None)

    @purification_config.setter
    def purification_config(self, config: PurificationConfig | None) -> None:
        self.unet.purification_config = config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Load a purifier: a folder or Hub repository that `DDPMPipeline` can load, too.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or repository id.
            kwargs: As for `DiffusionPipeline.from_pretrained`; `perceptual=` takes precedence over the repository's
            own.

        Raises:
            OSError: If it is neither a folder with a DDPM nor the name of a repository that can be loaded.
            ValueError: If a file of it is broken; the sentence names the file.
        """
        name, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        hub_options = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
        files = check_folder(folder) if folder.exists() else check_on_hub(name, **hub_options)
        kwargs.setdefault("variant", only_variant(files))
        if not folder.is_dir():
            # diffusers downloads only what model_index.json names; the same snapshot gets what lies beside it.
            beside = [CONFIG_NAME, TRAINED_ON_NAME, "perceptual/*"]
            with on_hub(name):
                folder = Path(snapshot_download(name, allow_patterns=beside, **hub_options))
        config = PurificationConfig.from_pretrained(folder)
        try:
            pipe = super().from_pretrained(name, **kwargs)
        except Exception as error:  # whatever diffusers says of files that nobody here has written
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise OSError(f"purifier is {name!r}, but must be a DDPM that can be loaded ({reason:.300}).") from error
        pipe.purification_config = config
        if "perceptual" not in kwargs and (folder / "perceptual").is_dir():
            perceptual = load_perceptual(folder / "perceptual").to(pipe.unet.device)  # where device_map has put that
            pipe.register_modules(perceptual=perceptual)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """
        Share the components of another pipeline, e.g. a `DDPMPipeline`; `perceptual=` may be added.

        What a purifier's repository says of its network beyond plain diffusers (`purification_config`) comes along
        from a pipeline of this class, and from any that was loaded from a folder which is still there. From one that
        plain diffusers loaded from the Hub it does not: open such a purifier with `from_pretrained`.
        """
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = pipeline.unet.dtype  # diffusers would turn the shared network to float32
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str = "Upload purifier",
        private: bool | None = None,
        create_pr: bool = False,
        token: str | None = None,
        **kwargs,
    ):
        """
        Write a plain DDPM repository, with `purification_config.json` and `perceptual/` beside it if there are any.

        The list of the images that trained the network, `trained_on.json`, comes along from the folder that it was
        loaded from if the network has still the weights of that folder, in whatever type.

        Args:
            save_directory (`str` or `os.PathLike`): Made if needed.
            push_to_hub (`bool`): Push the folder, as it then is, in one commit.
            repo_id (`str`, *optional*): The folder's name by default.
            commit_message, private, create_pr, token: As for `hub.push_purifier`, which says what becomes of files of
                an earlier push.
            kwargs: Passed to `DDPMPipeline.save_pretrained`: `safe_serialization`, `variant`, `max_shard_size`. Other
                weights of the variant that is written are deleted, and those of another variant stay.
        """
        if push_to_hub:  # whoever may not push learns it first
            repo_id = create_repository(repo_id or Path(save_directory).name, private=private, token=token)
        listed = training_list(unwrap_module(self.unet))  # read first: these files may be replaced now
        # Of a purifier that was saved here before.
        remove_weights(Path(save_directory) / "unet", kwargs.get("variant"))
        DDPMPipeline(self.unet, DDPMScheduler.from_config(settings_of(self.scheduler))).save_pretrained(
            save_directory, **kwargs
        )
        files = [path.name for path in (Path(save_directory) / "unet").iterdir()]
        if listed is not None and only_variant(files) == kwargs.get("variant"):
            listed["weights"] = weights_digest(save_directory)
            (Path(save_directory) / TRAINED_ON_NAME).write_text(json.dumps(listed) + "\n")
        if self.purification_config is not None:
            self.purification_config.save_pretrained(save_directory)
        else:  # of a purifier that was saved here before
            (Path(save_directory) / CONFIG_NAME).unlink(missing_ok=True)
        if self.perceptual is not None:
            self.perceptual.save_pretrained(Path(save_directory) / "perceptual")
        elif (Path(save_directory) / "perceptual").is_dir():  # of a purifier that was saved here before
            shutil.rmtree(Path(save_directory) / "perceptual")
        if push_to_hub:
            push_purifier(save_directory, repo_id, commit_message=commit_message, create_pr=create_pr, token=token)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Push the purifier in one commit; `kwargs` as for `save_pretrained`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        images: Images,
        *,
        preset: str | PurificationConfig | None = None,
        diffusion_steps: int | None = None,
        num_inference_steps: int | tuple[int, ...] | None = None,
        num_rounds: int | None = None,
        pixel_guidance_scale: float | None = None,
        perceptual_guidance_scale: float | None = None,
        guidance_strength: str | None = None,
        pixel_guidance_window: tuple[int, int] | None = None,
        perceptual_guidance_window: tuple[int, int] | None = None,
        reference: str | None = None,
        variance_type: str | None = None,
        sampler: str | None = None,
        feature_reuse: int | None = None,
        seed: int | None = None,
        ids: list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        micro_batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sample",),
    ) -> PurificationOutput | tuple:
        """
        Purify images.

        A setting is the argument of this call if given, else that of `preset`, else of the repository's
        `purification_config.json`, else the package's default, preset `"unconditional"`: T_p 100 in 10 evaluations.

        An image's result depends on its content, the settings, the seed and its id, not on the other images of the
        call: the networks always run on exactly `micro_batch_size` images, the last batch padded, and on a CPU on a
        power of two of threads. Equal bits are promised for equal settings on one kind of machine, and for networks of
        two levels or more: one of a single level takes images of an odd number of pixels, whose last bits then depend
        on their place in the batch.

        Args:
            images (`PIL.Image.Image`, `list`, `np.ndarray` or `torch.Tensor`): PIL images of one size, of any mode
                that has an RGB or grey image without loss; or a float array (N, H, W, C) or tensor (N, C, H, W) in
                [0, 1]. C is the UNet's number of channels.
            preset (`str` or `PurificationConfig`, *optional*): `"unconditional"`, `"tuned"`, `"paper"`, `"code"`,
                `"gdmp"`, or settings, such as `adaptive_settings` makes. With a purifier of coloured noise
                (`noise_corner`) none of the presets is the published method.
            diffusion_steps (`int`, *optional*): T_p.
            num_inference_steps (`int` or `tuple[int, ...]`, *optional*): UNet evaluations per round, at most T_p; or
                one number for each round.
            num_rounds (`int`, *optional*): N.
            pixel_guidance_scale, perceptual_guidance_scale (`float`, *optional*): Scales of the guides; 0 costs
                nothing.
            guidance_strength, pixel_guidance_window, perceptual_guidance_window, reference, variance_type, sampler,
            feature_reuse (*optional*):
                As in `PurificationConfig`.
            seed (`int`, *optional*): Of the noise; drawn and returned if neither seed nor generator is given.
            ids (`list[str]`, *optional*): Unique id of each image, part of the noise's key; made from its content if
                not given.
            generator (`torch.Generator` or a list of one per image, *optional*): Instead of a seed. A list makes an
                image's result independent of its batch, a single generator does not.
            micro_batch_size (`int`, *optional*): Images per UNet call, by default 16 on a CPU, elsewhere 256 of 32x32
                pixels and fewer of larger ones.
            output_type (`str`): `"pil"`, `"np"` or `"pt"`.
            return_dict (`bool`): A `PurificationOutput`, or the tuple `(images,)`.
            callback_on_step_end (`Callable`, *optional*): Called as `f(pipe, step, timestep, {"sample": sample})`
                after each step, counted over all rounds; a dictionary that it returns may replace the sample, shape
                (N, C, H, W).
            callback_on_step_end_tensor_inputs (`tuple[str, ...]`): `"sample"` is all there is.

        Examples:

        Returns:
            [`PurificationOutput`] or `tuple`: The purified images, the seed and the ids.

        Raises:
            ValueError: For images, settings or components that cannot be used, in one sentence.
            TypeError: For images of a type that is not listed above.
        """
        # 1. Check and settle
        self.check_inputs(seed, ids, generator, micro_batch_size, output_type, callback_on_step_end_tensor_inputs)
        self.check_unet()
        config = self.resolve_config(
            preset,
            diffusion_steps=diffusion_steps,
            num_inference_steps=num_inference_steps,
            num_rounds=num_rounds,
            pixel_guidance_scale=pixel_guidance_scale,
            perceptual_guidance_scale=perceptual_guidance_scale,
            guidance_strength=guidance_strength,
            pixel_guidance_window=pixel_guidance_window,
            perceptual_guidance_window=perceptual_guidance_window,
            reference=reference,
            variance_type=variance_type,
            sampler=sampler,
            feature_reuse=feature_reuse,
        )
        original = self.prepare_images(images)
        count = len(original)
        if generator is None:
            seed = secrets.randbits(63) if seed is None else int(seed)
            ids = [content_id(image) for image in to_bytes(original)] if ids is None else list(ids)
        self.check_lengths(original, ids, generator)
        if config.perceptual_guidance_scale > 0:
            self.perceptual.check_size(*original.shape[-2:])
        self.check_colour(config, *original.shape[-2:])
        self.check_protection(config, *original.shape[-2:])

        # 2. Pad to whole micro-batches, so that the networks see one shape only
        device = self._execution_device
        original = original.to(device)
        size = micro_batch_size or usual_micro_batch(device.type, *original.shape[-2:])
        batches = [slice(start, start + size) for start in range(0, count, size)]
        original = torch.cat([original, original.new_zeros(-count % size, *original.shape[1:])])
        draw_noise = self.prepare_noise(original.shape, count, seed, ids, generator, device, config.noise_corner)

        # 3. Timesteps, on schedulers of this call's own
        schedulers = [self.prepare_scheduler(config, round_index) for round_index in range(config.num_rounds)]
        start_bar = schedulers[0].alpha_bars[config.start_level]

        # 4. N rounds of forward and reverse
        sample = original.clone()
        chain_noise, chain_bar = torch.empty_like(original), [start_bar] * len(batches)
        steps_done = 0
        with (
            power_of_two_threads(device),
            without_dropout(self.unet),
            self.progress_bar(total=config.evaluations_per_image * len(batches)) as progress,
        ):
            for round_index, scheduler in enumerate(schedulers):
                networks = [self.unet] * len(batches)
                if config.feature_reuse > 1:
                    networks = [FeatureCache(self.unet, config.feature_reuse) for _ in batches]
                for index, rows in enumerate(batches):
                    noise = draw_noise(rows, round_index, 0, "start").mul_((1 - start_bar) ** 0.5)
                    if config.protection is not None and round_index == 0:
                        sample[rows] = self.start_by_protection(config, original[rows], noise, start_bar)
                    else:
                        sample[rows] = sample[rows].mul_(start_bar**0.5).add_(noise)
                    chain_noise[rows], chain_bar[index] = noise, start_bar
                for step_index, timestep in enumerate(scheduler.timesteps.tolist()):
                    for index, rows in enumerate(batches):
                        sample[rows], chain_bar[index] = self.reverse_step(
                            scheduler,
                            config,
                            timestep,
                            sample[rows],
                            original[rows],
                            chain_noise[rows],
                            chain_bar[index],
                            lambda use, rows=rows: draw_noise(rows, round_index, step_index, use),
                            networks[index],
                        )
                        progress.update()
                    if callback_on_step_end is not None:
                        given = {name: sample[:count].clone() for name in callback_on_step_end_tensor_inputs}
                        changed = callback_on_step_end(self, steps_done + step_index, timestep, given) or {}
                        if unknown := sorted(set(changed) - set(self._callback_tensor_inputs)):
                            raise ValueError(
                                f"callback_on_step_end returned {unknown[0]!r}, but must return 'sample'."
                            )
                        sample[:count] = changed.get("sample", sample[:count])
                steps_done += len(scheduler.timesteps)

        # 5. Back to images
        sample = sample[:count]
        if not torch.isfinite(sample).all():
            scales = " and the scales of the guides" if config.is_guided else ""
            raise ValueError(
                f"unet of type {self.unet.dtype} returned values that are not finite, but images must be: check its "
                f"weights or type{scales}."
            )
        purified = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (purified,)
        return PurificationOutput(images=purified, seed=seed, ids=ids)

    def reverse_step(
        self, scheduler, config, timestep, sample, original, chain_noise, chain_bar, draw_noise, network=None
    ) -> tuple[torch.Tensor, float]:
        """
        One guided reverse step of one micro-batch: predict, guide, draw.

        Args:
            scheduler (`GuidedDDPMScheduler`): With this run's timesteps.
            config (`PurificationConfig`): Settings.
            timestep (`int`): t, counted from 0.
            sample (`torch.Tensor`): x_t, float32, (B, C, H, W).
            original (`torch.Tensor`): The protected images in [-1, 1], (B, C, H, W).
            chain_noise (`torch.Tensor`): Noise of the reference's forward chain at `chain_bar`; overwritten when it
                moves on.
            chain_bar (`float`): alpha_bar that `chain_noise` belongs to.
            draw_noise (`Callable[[str], torch.Tensor]`): From a use to noise of the sample's shape, standard normal or
                coloured with the settings' `noise_corner`.
            network (`UNet2DModel` or `FeatureCache`, *optional*): Predicts in place of `unet`.

        Returns:
            `tuple[torch.Tensor, float]`: x_{t-1} and the chain's alpha_bar.
        """
        # A tensor filled on the device: from a number the UNet would copy it there, and wait.
        time = torch.full((len(sample),), timestep, device=sample.device)
        network = self.unet if network is None else network
        prediction = network(sample.to(self.unet.dtype), time, return_dict=False)[0]
        # The state's type and layout: sums of tensors that lie differently cost several times as much.
        prediction = prediction.to(torch.float32, memory_format=torch.contiguous_format)
        if config.protection is not None:
            estimate = scheduler.predicted_original(prediction, timestep, sample)
            bar = scheduler.alpha_bars[timestep]
            ratio = noise_power(sample, config.noise_corner) * ((1 - bar) / bar)
            estimate = towards_protected(
                estimate, original, config.protection, ratio, scale=config.protection_guidance_scale
            )
            prediction = scheduler.output_for(estimate, timestep, sample)
        gradient = None
        pixel = config.pixel_guidance_scale > 0 and in_window(timestep, config.pixel_guidance_window)
        perceptual = config.perceptual_guidance_scale > 0 and in_window(timestep, config.perceptual_guidance_window)
        if pixel or perceptual:
            bar = scheduler.alpha_bars[timestep]
            if config.reference == "fresh":
                noise = draw_noise("reference").mul_((1 - bar) ** 0.5)
            else:
                if bar != chain_bar:
                    chain_noise.copy_(earlier_chain_noise(chain_noise, chain_bar, bar, draw_noise("reference")))
                noise, chain_bar = chain_noise, bar
            reference = (original * bar**0.5).add_(noise)
            factor = -strength(config.guidance_strength, bar)
            if timestep == 0:
                factor *= config.final_variance_factor
            if pixel:
                gradient = pixel_gradient(sample, reference).mul_(factor * config.pixel_guidance_scale)
            if perceptual:
                slope = perceptual_gradient(sample, reference, self.perceptual)
                slope.mul_(factor * config.perceptual_guidance_scale)
                gradient = slope if gradient is None else gradient.add_(slope)
            # A mean is shifted by its covariance times the gradient, of which the scheduler knows the scalar part.
            gradient = times_covariance(gradient, config.noise_corner)
        noise = draw_noise("variance") if scheduler.adds_noise(timestep) else torch.zeros_like(sample)
        previous = scheduler.step(prediction, timestep, sample, gradient=gradient, variance_noise=noise)
        return previous.prev_sample, chain_bar

    def start_by_protection(self, config, original, noise, bar) -> torch.Tensor:
        """x_Tp of one micro-batch where the protection's spectrum is known; `noise` has the variance 1 - bar."""
        ratio = noise_power(noise, config.noise_corner) * ((1 - bar) / bar)
        return posterior_start(original, config.protection, bar, noise, ratio, scale=config.protection_guidance_scale)

    def resolve_config(self, preset: str | PurificationConfig | None = None, **arguments) -> PurificationConfig:
        """
        The settings that a call with these arguments uses, looked up by `PurificationConfig.resolve` and checked.

        Args:
            preset (`str` or `PurificationConfig`, *optional*): A preset's name, or settings.
            arguments: Fields of `PurificationConfig`; None is not given.

        Raises:
            ValueError: If the preset is unknown, or this purifier cannot do what the settings ask.
        """
        config = PurificationConfig.resolve(preset, repository=self.purification_config, **arguments)
        self.check_scheduler(config)
        self.check_timesteps(config)
        self.check_guides(config)
        if config.feature_reuse > 1:
            check_cacheable(self.unet, config.feature_reuse)
        if config.perceptual_guidance_scale > 0:
            self.check_perceptual(config)
        return config

    def variance_type_of(self, config: PurificationConfig) -> str:
        """The settings' variance type, or the scheduler's own."""
        return config.variance_type or self.scheduler.config.variance_type

    def check_timesteps(self, config: PurificationConfig) -> None:
        """Refuse timesteps that the network was not trained on."""
        trained = config.trained_timesteps
        if trained is not None and trained[0] > 0:
            raise ValueError(f"trained_timesteps is {trained}, but must begin at 0, where purification ends.")
        end = len(self.scheduler.alpha_bars)  # a schedule may be shorter than that of the training
        end = end if trained is None else min(end, trained[1])
        most = end - config.start_one_level_higher
        if config.diffusion_steps > most:
            raise ValueError(
                f"diffusion_steps is {config.diffusion_steps}, but must be at most {most}: this purifier knows only "
                f"timesteps below {end}."
            )

    def check_scheduler(self, config: PurificationConfig) -> None:
        """Refuse schedulers that cannot be guided, or would decide what the setting `sampler` does."""
        if not isinstance(self.scheduler, GuidedDDPMScheduler) or isinstance(self.scheduler, GuidedDDIMScheduler):
            raise ValueError(
                f"scheduler is a {type(self.scheduler).__name__}, but must be a GuidedDDPMScheduler: "
                "GuidedDDPMScheduler.from_config(pipe.scheduler.config) makes one, and sampler='ddim' takes DDIM's "
                "steps."
            )
        variance_type = self.variance_type_of(config)
        if variance_type not in ("fixed_small", "fixed_large"):
            raise ValueError(
                f"variance_type is {variance_type!r} in the scheduler's configuration, but must be 'fixed_small' or "
                "'fixed_large': pass one of them as variance_type."
            )

    def check_guides(self, config: PurificationConfig) -> None:
        """Refuse guides that act at none of a round's timesteps."""
        # The posterior's variance, by which a mean would be shifted, is zero at the last step of a round.
        last_is_free = config.sampler == "ddpm" and self.variance_type_of(config) == "fixed_small"
        if config.is_guided and last_is_free and min(config.evaluations_per_round) == 1:
            raise ValueError(
                f"num_inference_steps is {config.num_inference_steps} and diffusion_steps {config.diffusion_steps}, "
                "but a guide needs at least 2 evaluations per round: the last step of the sampler 'ddpm' has no "
                "variance that could be shifted by; sampler='ddim' takes 1."
            )
        for guide in ("pixel_guidance", "perceptual_guidance"):
            window = getattr(config, f"{guide}_window")
            for timesteps in config.timesteps_per_round if getattr(config, f"{guide}_scale") > 0 else ():
                acting = timesteps[:-1] if last_is_free else timesteps
                if not any(in_window(timestep, window) for timestep in acting):
                    raise ValueError(
                        f"{guide}_window is {window}, but must hold a timestep at which the guide can act: with "
                        f"diffusion_steps {config.diffusion_steps} and {len(timesteps)} evaluations these are "
                        f"{', '.join(map(str, acting))}."
                    )

    def check_perceptual(self, config: PurificationConfig) -> None:
        """Refuse to guide by another perceptual network than the one that the scale was tuned for."""
        wanted, present = config.perceptual_network, None if self.perceptual is None else self.perceptual.name
        if present is None or wanted not in (None, present):
            trunk = (wanted or "lpips-alex").removeprefix("lpips-")
            loading, name = (f"from_lpips({trunk!r})", trunk) if trunk != wanted else ("from_trunk_file(PATH)", "PATH")
            raise ValueError(
                f"perceptual is {present!r}, but must be {repr(wanted) if wanted else 'a network'} for a "
                f"perceptual_guidance_scale of {config.perceptual_guidance_scale:g}: LPIPSModel.{loading} makes one, "
                f"and so does --perceptual {name} of jcdp purify."
            )

    def check_colour(self, config: PurificationConfig, height: int, width: int) -> None:
        """Refuse images in which coloured noise is not what the network was trained on: it is per image, not pixel."""
        size = self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        if config.noise_corner and (size is None or (height, width) != tuple(size)):
            trained = "which its unet's sample_size (None) does not say" if size is None else f"{size[0]}x{size[1]}"
            raise ValueError(
                f"images are {height}x{width}, but must have the size that this purifier's noise_corner "
                f"({config.noise_corner:g} cycles per image) was trained with: {trained}."
            )

    def check_protection(self, config: PurificationConfig, height: int, width: int) -> None:
        """Refuse a protection's spectrum that was read from images of another size or number of channels."""
        if config.protection is None:
            return
        channels, frequencies = len(config.protection.power), len(config.protection.power[0])
        wanted = self.unet.config.in_channels, min(height, width) // 2 + 1
        if (channels, frequencies) != wanted:
            raise ValueError(
                f"protection has {channels} colour axes and {frequencies} frequencies, but must have {wanted[0]} and "
                f"{wanted[1]} for images of {height}x{width}."
            )

    def prepare_scheduler(self, config: PurificationConfig, round_index: int = 0) -> DDPMScheduler:
        """A copy of the scheduler for one round: its sampler and variance type, and the timesteps from T_p - 1 on."""
        changes = {} if config.variance_type is None else {"variance_type": config.variance_type}
        kind = GuidedDDIMScheduler if config.sampler == "ddim" else type(self.scheduler)
        scheduler = kind.from_config(settings_of(self.scheduler), **changes)
        if scheduler.alpha_bars[config.start_level] == 0:
            raise ValueError(
                f"diffusion_steps is {config.diffusion_steps}, but must be fewer: this scheduler's alpha_bar is 0 "
                "there, so nothing of the image would be left."
            )
        scheduler.set_timesteps(timesteps=list(config.timesteps_per_round[round_index]))
        return scheduler

    def prepare_noise(self, shape, count, seed, ids, generator, device, corner) -> Callable:
        """
        From (rows, round, step, use) to noise for those rows; rows behind the last image get zeros or a key of their
        own.
        """
        if generator is None:
            keys = image_keys(seed, ids + ["padding"] * (shape[0] - count), device)

            def draw(rows, round_index, step_index, use):
                counter = {"round_index": round_index, "step_index": step_index, "use": use}
                return coloured(self.normal_noise(keys[rows], shape[1:], **counter), corner)
        else:

            def draw(rows, round_index, step_index, use):
                real = range(count)[rows]
                own = generator if isinstance(generator, torch.Generator) else [generator[i] for i in real]
                noise = torch.zeros(rows.stop - rows.start, *shape[1:], device=device)
                noise[: len(real)] = randn_tensor((len(real), *shape[1:]), generator=own, device=device)
                return coloured(noise, corner)

        return draw

    def check_inputs(self, seed, ids, generator, micro_batch_size, output_type, callback_tensor_inputs):
        """Refuse arguments that cannot be used, before anything is computed."""
        if seed is not None and (not isinstance(seed, Integral) or isinstance(seed, bool)):
            raise TypeError(f"seed is {seed!r}, but must be a whole number.")
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise TypeError(f"generator is {generator!r}, but must be a torch.Generator or a list, one per image.")
        if generator is not None and (seed is not None or ids is not None):
            raise ValueError("generator is given together with seed or ids, but must be given alone: it is the noise.")
        listed = isinstance(ids, Sequence) and not isinstance(ids, str)  # a set has another order in each process
        if ids is not None and not (listed and all(isinstance(one, str) for one in ids)):
            raise TypeError(f"ids is {ids!r:.80}, but must be a list of strings, one per image.")
        if micro_batch_size is not None and (not isinstance(micro_batch_size, Integral) or micro_batch_size < 1):
            raise ValueError(f"micro_batch_size is {micro_batch_size!r}, but must be at least 1, a whole number.")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}, but must be 'pil', 'np' or 'pt'.")
        if unknown := [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]:
            raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}, but must have 'sample' or none.")

    def check_unet(self):
        """Refuse networks that are not a plain noise predictor of grey or RGB images."""
        config = self.unet.config
        if config.in_channels not in (1, 3):
            raise ValueError(f"unet takes {config.in_channels} channels, but must take 1 or 3: those of images.")
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"unet gives {config.out_channels} channels for {config.in_channels}, but must give as many as it "
                "takes: its prediction alone, without a variance."
            )
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise ValueError("unet is conditioned on classes, but must be unconditional: labels are never read.")

    def prepare_images(self, images: Images) -> torch.Tensor:
        """Images as float32 in [-1, 1], shape (N, C, H, W), on the CPU or where they are; refuses what is none."""
        channels = self.unet.config.in_channels
        if isinstance(images, (Image.Image, list, tuple)):
            images = pictures_of([images] if isinstance(images, Image.Image) else list(images), channels)
            (width, height), given = images[0].size, channels
        elif isinstance(images, (np.ndarray, torch.Tensor)):
            images = within_unit_range(images)
            given, height, width = (
                images.shape[1:] if isinstance(images, torch.Tensor) else (images.shape[3], *images.shape[1:3])
            )
        else:
            raise TypeError(
                f"images is a {type(images).__name__}, but must be a PIL image, a list of them, a NumPy array or a "
                "torch tensor."
            )
        if given != channels:
            raise ValueError(f"images has {given} channels, but must have {channels}, which this UNet takes.")
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % multiple or width % multiple:
            raise ValueError(
                f"images are {height}x{width}, but must have a height and width that are multiples of {multiple} for "
                "this UNet."
            )
        return self.image_processor.preprocess(images).to(torch.float32)

    def check_lengths(self, original, ids, generator):
        """Refuse ids or generators that are not one per image; equal images may share an id, as those made here do."""
        count, first = len(original), {}
        if ids is not None and len(ids) != count:
            raise ValueError(f"ids has {len(ids)} entries, but must have one for each of the {count} images.")
        for row, one in enumerate(ids or ()):  # ids are made of 8-bit images, so these decide
            same = first.setdefault(one, row)
            if same != row and not torch.equal(to_bytes(original[same]), to_bytes(original[row])):
                raise ValueError(f"ids has {one!r} for two different images, but must have an id for each.")
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"generator has {len(generator)} entries, but must have one for each of {count} images.")


def usual_micro_batch(device_type: str, height: int, width: int) -> int:
    """Images per UNet call where nobody says how many."""
    return MICRO_BATCH.get(device_type) or max(1, PIXELS_ON_ACCELERATOR // (height * width))


@contextlib.contextmanager
def without_dropout(network: torch.nn.Module):
    """A network that was built and not loaded is in training mode, where dropout would draw from the global state."""
    was_training = network.training
    network.train(False)
    try:
        yield
    finally:
        network.train(was_training)


@contextlib.contextmanager
def power_of_two_threads(device: torch.device):
    """
    On a CPU, run on the largest power of two of the available threads: with three, results depend on an image's place.
    """
    threads = torch.get_num_threads()
    allowed = 1 << (threads.bit_length() - 1)
    if device.type == "cpu" and allowed != threads:
        torch.set_num_threads(allowed)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
