"""How to purify: settings, six named presets, and the file in which a purifier repository keeps its own."""

import dataclasses
import difflib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .guidance import STRENGTHS
from .noise import checked_corner, noise_power
from .repository import on_hub, read_json
from .spectrum import ProtectionTable, radial_bins


CONFIG_NAME = "purification_config.json"
REFERENCES = ("chain", "fresh")
SAMPLERS = ("ddpm", "ddim")
# The preset that depends on the images: `adaptive_settings`.
ADAPTIVE = "adaptive"
ADAPTIVE_SCALE = 0.3
HIDDEN_BELOW_NOISE = 0.9


@dataclasses.dataclass(frozen=True)
class PurificationConfig:
    """
    Settings of one purification; `pipe(images, ...)` takes most of them as arguments, too.

    Args:
        diffusion_steps (`int`): T_p, the number of forward steps: images are diffused to the level alpha_bar[T_p - 1].
        num_inference_steps (`int` or `tuple[int, ...]`, *optional*): UNet evaluations E per round, or one number for
            each round, at the timesteps T_p (1 - k / E) - 1, rounded, for k = 0 ... E - 1; the last one ends the
            round. None is T_p. With the sampler `"ddpm"` and `"fixed_small"` the last one has no variance, so that
            neither guide acts there.
        num_rounds (`int`): N, how often the image is diffused and denoised again.
        pixel_guidance_scale (`float`): Scale of the pixel guide (gradient of the per-image mean squared error); 0 is
            off.
        perceptual_guidance_scale (`float`): Scale of the perceptual guide (gradient of the per-image LPIPS); 0 is off.
        guidance_strength (`str`): Factor on both scales over time: `"constant"` or `"noise_to_signal"`
            (`guidance.strength`). Like the windows and the reference, it is not read where both scales are 0.
        pixel_guidance_window (`tuple[int, int]`, *optional*): First and last timestep (inclusive, counted from 0) at
            which the pixel guide acts; None is always.
        perceptual_guidance_window (`tuple[int, int]`, *optional*): The same for the perceptual guide.
        reference (`str`): Noise of the reference that the guides pull towards. `"chain"`: the forward chain of the
            protected image, with the noise that made x_Tp (the paper's Algorithm 1). `"fresh"`: drawn anew at every
            step (the authors' code).
        start_one_level_higher (`bool`): Start from alpha_bar[T_p] but denoise from T_p - 1, the authors' code's
            off-by-one.
        final_variance_factor (`float`): Factor on the guidance at t = 0, where variance conventions differ.
        variance_type (`str`, *optional*): `"fixed_small"` or `"fixed_large"`; None keeps the repository's scheduler as
            it is at stride 1 and takes `"fixed_small"`, the posterior's own variance, when steps are left out. The
            sampler `"ddim"` has no variance and does not read it.
        sampler (`str`): `"ddpm"`, the stochastic reverse process; or `"ddim"`, the deterministic one
            (`GuidedDDIMScheduler`), which draws no noise after the start.
        feature_reuse (`int`): Of each round's evaluations, the first and every `feature_reuse`-th after it run the
            whole network, the others its full resolution alone (`FeatureCache`); 1 is off.
        perceptual_network (`str`, *optional*): `LPIPSModel.name` that the perceptual scale was tuned for.
        trained_timesteps (`tuple[int, int]`, *optional*): First timestep (inclusive) and end (exclusive) that the
            network was trained on; a T_p beyond it is refused. None is the whole schedule.
        noise_corner (`float`): Corner frequency of the noise that the network was trained to remove, in cycles per
            image (`noise.coloured`); 0 is white noise, a DDPM's own. With another a published preset (`"paper"`,
            `"code"`, `"gdmp"`, `"unconditional"`, AVATAR's) is no longer the published method.
        protection_guidance_scale (`float`): Scale of the guide by the protection's spectrum
            (`guidance.towards_protected`); 0 is off, 1 is the posterior.
        protection (`ProtectionTable` or `dict`, *optional*): That spectrum, of images of the size that are purified.
    """

    diffusion_steps: int = 100
    num_inference_steps: int | tuple[int, ...] | None = None
    num_rounds: int = 1
    pixel_guidance_scale: float = 0.0
    perceptual_guidance_scale: float = 0.0
    guidance_strength: str = "constant"
    pixel_guidance_window: tuple[int, int] | None = None
    perceptual_guidance_window: tuple[int, int] | None = None
    reference: str = "chain"
    start_one_level_higher: bool = False
    final_variance_factor: float = 1.0
    variance_type: str | None = None
    sampler: str = "ddpm"
    feature_reuse: int = 1
    perceptual_network: str | None = None
    trained_timesteps: tuple[int, int] | None = None
    noise_corner: float = 0.0
    protection_guidance_scale: float = 0.0
    protection: ProtectionTable | None = None

    def __post_init__(self):
        self._settle_types()
        for name in ("diffusion_steps", "num_rounds", "feature_reuse"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be at least 1, a whole number.")
        for name in ("pixel_guidance_window", "perceptual_guidance_window", "trained_timesteps"):
            pair = getattr(self, name)
            whole = pair is None or isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_whole, pair))
            if not whole or pair is not None and not 0 <= pair[0] <= pair[1]:
                raise ValueError(f"{name} is {pair!r}, but must be two timesteps 0 <= first <= last, or None.")
        if self.trained_timesteps is not None and self.trained_timesteps[0] == self.trained_timesteps[1]:
            raise ValueError(f"trained_timesteps is {self.trained_timesteps}, but must hold one timestep at least.")
        if not isinstance(self.start_one_level_higher, bool):
            raise ValueError(f"start_one_level_higher is {self.start_one_level_higher!r}, but must be True or False.")
        self._check_evaluations()
        for name in (
            "pixel_guidance_scale",
            "perceptual_guidance_scale",
            "final_variance_factor",
            "protection_guidance_scale",
        ):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value!r}, but must be a finite number of at least 0.")
        object.__setattr__(self, "noise_corner", checked_corner(self.noise_corner))
        self._check_protection()
        if not isinstance(self.perceptual_network, str | None):
            raise ValueError(f"perceptual_network is {self.perceptual_network!r}, but must be a name or None.")
        for name, accepted in (
            ("guidance_strength", STRENGTHS),
            ("reference", REFERENCES),
            ("variance_type", (None, "fixed_small", "fixed_large")),
            ("sampler", SAMPLERS),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {accepted}.")

    def _settle_types(self) -> None:
        """JSON has lists where these are tuples, and can hold Python's numbers but not NumPy's."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
            if isinstance(value, np.generic):
                value = value.item()
            elif isinstance(value, tuple):
                value = tuple(entry.item() if isinstance(entry, np.generic) else entry for entry in value)
            object.__setattr__(self, field.name, value)

    def _check_evaluations(self) -> None:
        if not all(map(_is_whole, self.evaluations_per_round)):
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps!r}, but must be a whole number, a tuple of them or "
                "None."
            )
        if len(self.evaluations_per_round) != self.num_rounds:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}, but must be one number, or one for each of the "
                f"{self.num_rounds} rounds."
            )
        if not all(1 <= evaluations <= self.diffusion_steps for evaluations in self.evaluations_per_round):
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}, but must lie between 1 and diffusion_steps "
                f"({self.diffusion_steps})."
            )

    def _check_protection(self) -> None:
        if isinstance(self.protection, Mapping):  # as JSON has it
            try:
                object.__setattr__(self, "protection", ProtectionTable(**self.protection))
            except (TypeError, ValueError) as error:
                raise ValueError(f"protection cannot be used: {error}") from error
        if not isinstance(self.protection, ProtectionTable | None):
            raise ValueError(f"protection is {self.protection!r:.80}, but must be a ProtectionTable or None.")
        if (self.protection is None) != (self.protection_guidance_scale == 0):
            given = "None" if self.protection is None else "a table"
            raise ValueError(
                f"protection_guidance_scale is {self.protection_guidance_scale:g} and protection is {given}, but "
                "must be given together."
            )

    @property
    def evaluations_per_round(self) -> tuple[int, ...]:
        """UNet evaluations between T_p - 1 and 0, of each round."""
        given = self.diffusion_steps if self.num_inference_steps is None else self.num_inference_steps
        return given if isinstance(given, tuple) else (given,) * self.num_rounds

    @property
    def timesteps_per_round(self) -> tuple[tuple[int, ...], ...]:
        """The timesteps of these evaluations, of each round, from T_p - 1 down."""
        steps = self.diffusion_steps
        return tuple(
            tuple(round(steps * (1 - k / evaluations)) - 1 for k in range(evaluations))
            for evaluations in self.evaluations_per_round
        )

    @property
    def start_level(self) -> int:
        """The timestep whose alpha_bar a round starts at."""
        return self.diffusion_steps if self.start_one_level_higher else self.diffusion_steps - 1

    @property
    def is_guided(self) -> bool:
        """Whether a guide has a scale."""
        return self.pixel_guidance_scale > 0 or self.perceptual_guidance_scale > 0

    @property
    def evaluations_per_image(self) -> int:
        """UNet evaluations that purifying one image costs, whole or not."""
        return sum(self.evaluations_per_round)

    @property
    def leaves_out_steps(self) -> bool:
        """Whether a round has fewer evaluations than steps."""
        return min(self.evaluations_per_round) < self.diffusion_steps

    def changed(self, **values) -> "PurificationConfig":
        """
        These settings with other values of some fields.

        A variance type that was chosen for every step does not hold for longer ones: where the new values leave steps
        out and the old ones did not, it is None unless it is among the new values.
        """
        config = dataclasses.replace(self, **values)
        if config.leaves_out_steps and not self.leaves_out_steps and "variance_type" not in values:
            config = dataclasses.replace(config, variance_type=None)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Write `purification_config.json` into a folder, which is made if needed; returns the file's path."""
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **hub_options
    ) -> "PurificationConfig | None":
        """
        Read `purification_config.json` of a purifier repository; None if it has none.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or a repository on the Hub.
            hub_options: Passed to `hf_hub_download`: `revision`, `token`, `cache_dir`, `local_files_only`,
            `force_download`.
        """
        path = Path(pretrained_model_name_or_path) / CONFIG_NAME
        if not path.parent.is_dir():
            try:
                with on_hub(str(pretrained_model_name_or_path)):
                    path = Path(hf_hub_download(str(pretrained_model_name_or_path), CONFIG_NAME, **hub_options))
            except LocalEntryNotFoundError:  # no network and no copy: nobody knows whether the repository has the file
                raise
            except EntryNotFoundError:
                return None
        if not path.is_file():
            return None
        values = read_json(path)
        if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"{path} holds {unknown[0]!r}, which is no field of PurificationConfig.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error

    @classmethod
    def resolve(
        cls,
        preset: "str | PurificationConfig | None" = None,
        *,
        repository: "PurificationConfig | None" = None,
        **arguments,
    ) -> "PurificationConfig":
        """
        Look settings up: the argument if given, else the preset's, else the repository's, else the package's default.

        What the network was trained on, `trained_timesteps` and `noise_corner`, is the repository's whatever settings
        are used. Where steps are left out, the variance is `"fixed_small"`, unless an argument names another, or
        settings that leave steps out themselves. A preset means the same by its name and as an object.

        Args:
            preset (`str` or `PurificationConfig`, *optional*): A preset's name, or settings.
            repository (`PurificationConfig`, *optional*): What the purifier's own `purification_config.json` holds.
            arguments: Fields of `PurificationConfig`; None is not given.

        Raises:
            TypeError: If an argument is no field of `PurificationConfig`.
            ValueError: If the preset is unknown, or a setting impossible.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in arguments if name not in known]:
            accepted = difflib.get_close_matches(unknown[0], known, n=1) or known
            raise TypeError(f"{unknown[0]} is no setting of a purification, but must be {' or '.join(accepted)}.")
        if preset == ADAPTIVE:
            raise ValueError(
                f"preset is {ADAPTIVE!r}, but must be made from collected images first: by adaptive_settings, or by "
                "--collected of jcdp purify."
            )
        if preset is not None and not isinstance(preset, cls) and preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}, but must be one of {tuple(PRESETS)} or a PurificationConfig.")
        base = PRESETS[preset] if isinstance(preset, str) else preset or repository or PRESETS["unconditional"]
        given = {name: value for name, value in arguments.items() if value is not None}
        facts = base if repository is None else repository
        trained = {name: getattr(facts, name) for name in ("trained_timesteps", "noise_corner")}
        asked = {"noise_corner": base.noise_corner or facts.noise_corner} | given
        for name, value in trained.items():
            if asked.get(name, value) != value:
                raise ValueError(f"{name} is {asked[name]!r}, but must be {value!r}, as this purifier was trained.")
        given |= trained
        if "perceptual_guidance_scale" in given:  # a scale of the caller's own was tuned for no network that is known
            given.setdefault("perceptual_network", None)
        steps = given.get("diffusion_steps", base.diffusion_steps)
        if "num_inference_steps" not in given and _is_whole(steps):  # a smaller T_p takes the evaluations with it
            given["num_inference_steps"] = _at_most(base.num_inference_steps, steps)
        config = base.changed(**given)
        if config.leaves_out_steps and config.variance_type is None:
            # The larger variance is that of the whole stride: it leaves noise in x_0 that no later step removes.
            config = dataclasses.replace(config, variance_type="fixed_small")
        return config


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _at_most(evaluations: int | tuple[int, ...] | None, steps: int) -> int | tuple[int, ...] | None:
    if isinstance(evaluations, tuple):
        return tuple(min(each, steps) for each in evaluations)
    return None if evaluations is None else min(evaluations, steps)


# Per-image scales of the authors' code, which divides the gradient of a batch mean over 500 images by
# m = (2 * 8 / 255) / 3 / 70000: one image's share of 1/m is 1 / (500 m). GDMP: batch 100, scale 60000.
_CODE_SCALE = 70_000 * 3 * 255 / (2 * 8) / 500
_GDMP_SCALE = 60_000 * 3 * 255 / (2 * 8) / 100
# At t = 0 both programs have a variance of 5.4532e-5, that of the posterior at t = 1, where diffusers' fixed_large has
# beta_0 = 1.0e-4.
_FINAL_VARIANCE_FACTOR = 0.545317

# Published ones are what their papers have with a purifier of white noise alone: see `noise_corner`.
PRESETS = {
    # Ours: the best of eval/grids/search.yaml on validation images of CIFAR-10, protected by LSP. Many light rounds
    # remove as much as one strong one and leave more of the image; both guides together bring some of the poison
    # back (eval/grids/guides.yaml).
    "tuned": PurificationConfig(diffusion_steps=30, num_inference_steps=2, num_rounds=8, variance_type="fixed_small"),
    # Diffuse and denoise without a guide: AVATAR (Dolatabadi et al., 2024) and DiffPure (Nie et al., 2022), t* = 100,
    # with a tenth of their evaluations, whose victims learn as much (eval/grids/evaluations_3k.yaml).
    "unconditional": PurificationConfig(num_inference_steps=10),
    # Algorithm 1 of the paper: both guides at every step, constant scales. T_p and N are the authors' code's. The
    # paper does not give the scales; these are ours: the code's scale, averaged over its 20 steps (0.04465 * 6693.75 =
    # 298.9).
    "paper": PurificationConfig(
        diffusion_steps=20,
        num_rounds=4,
        pixel_guidance_scale=300.0,
        perceptual_guidance_scale=300.0,
        perceptual_network="lpips-alex",
    ),
    # What the authors' released code does (jiangw-0/LE_JCDP): the pixel guide at t = 19..11, the perceptual one at
    # 10..0.
    "code": PurificationConfig(
        diffusion_steps=20,
        num_rounds=4,
        pixel_guidance_scale=_CODE_SCALE,
        perceptual_guidance_scale=_CODE_SCALE,
        guidance_strength="noise_to_signal",
        pixel_guidance_window=(11, 19),
        perceptual_guidance_window=(0, 10),
        reference="fresh",
        start_one_level_higher=True,
        final_variance_factor=_FINAL_VARIANCE_FACTOR,
        variance_type="fixed_large",
        perceptual_network="lpips-alex",
    ),
    # Guided Diffusion Model for Purification (Wang et al., 2022): the pixel guide alone, at every step; start and
    # variance at t = 0 as in "code", which was made from its program.
    "gdmp": PurificationConfig(
        diffusion_steps=36,
        num_rounds=4,
        pixel_guidance_scale=_GDMP_SCALE,
        guidance_strength="noise_to_signal",
        reference="fresh",
        start_one_level_higher=True,
        final_variance_factor=_FINAL_VARIANCE_FACTOR,
        variance_type="fixed_large",
    ),
}


def default_settings(end: int, **facts) -> PurificationConfig:
    """
    The package's default, preset `"unconditional"`, for a network that may know fewer timesteps than it takes.

    Args:
        end (`int`): First timestep that the network does not know.
        facts: Fields that say what the network was trained on: `trained_timesteps`, `noise_corner`.
    """
    usual = PRESETS["unconditional"]
    steps = min(usual.diffusion_steps, end)
    evaluations = min(usual.num_inference_steps, steps)
    return dataclasses.replace(usual, diffusion_steps=steps, num_inference_steps=evaluations, **facts)


def adaptive_settings(
    table: ProtectionTable,
    alpha_bars: Sequence[float],
    *,
    noise_corner: float = 0.0,
    scale: float = ADAPTIVE_SCALE,
    evaluations: int = 10,
) -> PurificationConfig:
    """
    Preset `"adaptive"`: one recipe that knows nothing of the poison but what the spectrum says.

    The guide is `guidance.towards_protected`. T_p is the first timestep whose noise covers at least
    `HIDDEN_BELOW_NOISE` of what the protection hides of the images: V = P S / (P + S) summed over all colour axes and
    coefficients, of which the noise (1 - alpha_bar) / alpha_bar covers the part below it. What lies below the noise is
    drawn anew by the network, and what lies above it is Gaussian. If no timestep covers as much, T_p is the last one,
    and a warning says how much that is.

    Args:
        table (`ProtectionTable`): From `ProtectionSpectrum.table`.
        alpha_bars (`Sequence[float]`): By timestep, up to the last one that the network was trained on.
        noise_corner (`float`): Of the purifier's noise, as in `PurificationConfig`.
        scale (`float`): Of the guide; below 1, because a victim reads less of a protection than a mean square tells.
            The default is the best of two on validation images of one poison (docs/spectrum.md).
        evaluations (`int`): Of the network, at most T_p.
    """
    power, background = np.array(table.power) / scale, np.array(table.background)
    background[:, 0] = background[:, 1]
    hidden = power * background / (power + background)
    side = 2 * (hidden.shape[1] - 1)
    bins = radial_bins(side, side)[0][:, : side // 2 + 1]
    hidden, count = hidden[:, bins], np.full(bins.shape, 2.0)  # most coefficients of a real image stand for two
    count[:, [0, -1]] = 1
    noise = 127.5**2 * noise_power(torch.empty(side, side), noise_corner).numpy()
    for steps, bar in enumerate(alpha_bars, start=1):
        below = np.minimum(hidden, (1 - bar) / bar * noise)
        covered = (below * count).sum() / (hidden * count).sum()
        if covered >= HIDDEN_BELOW_NOISE:
            break
    else:
        warnings.warn(
            f"diffusion_steps is {steps}, the last timestep that the purifier knows, whose noise covers {covered:.0%} "
            f"of what the protection hides: {HIDDEN_BELOW_NOISE:.0%} would need a purifier of more timesteps.",
            stacklevel=2,
        )
    return PurificationConfig(
        diffusion_steps=steps,
        num_inference_steps=min(evaluations, steps),
        variance_type="fixed_small",
        protection_guidance_scale=scale,
        protection=table,
    )
