"""
Purification with a diffusion model, before training; everything runs through the pipeline.

AVATAR is DiffPure applied to a training set: one pass, no guide, all steps from t* = 0.1, which is step 100 of 1000.
Both integrate the reverse SDE by Euler's method in steps of 1/1000, whose noise has variance beta_t: diffusers'
`fixed_large`. For perturbations bounded in L2 DiffPure chose t* = 0.075.
"""

from ..data import LabelledImages, load_images
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PRESETS, PurificationConfig
from ..purify.dataset import open_purifier, purify_to_folder
from ..results import as_settings
from . import Context, Countermeasure


def purifying(name: str, source: str, config: PurificationConfig) -> Countermeasure:
    """A countermeasure that purifies with these settings, unless the context has others."""

    def function(data: LabelledImages, context: Context) -> LabelledImages:
        return purify(data, config if context.purification is None else context.purification, context, name)

    cost = f"{config.evaluations_per_image} UNet evaluations per image, once"
    declared = {"needs_purifier": True, "takes": "bytes"}
    return Countermeasure(name, "dataset", source, cost, function, as_settings(config), **declared)


def purify(
    data: LabelledImages, config: PurificationConfig | str, context: Context, name: str = "purified"
) -> LabelledImages:
    """
    Purify images and round them to 8 bits.

    Args:
        data (`LabelledImages`): Images of any size; see `purify_to_folder`.
        config (`PurificationConfig` or `str`): Settings, or the name of a preset.
        context ([`Context`]): Its `purifier` purifies, with noise from its `seed`; the images are kept in its
            `checkpoint_dir`. A folder or Hub id is placed as suits the device, a pipeline runs as it is.
        name (`str`, *optional*, defaults to `"purified"`): Of the folder within `checkpoint_dir`.

    Returns:
        `LabelledImages`: The same rows in the same order.

    Raises:
        ValueError: If the folder holds images of other ids.
    """
    pipe = context.purifier
    with context.place_for_work(f"{name}-{context.seed}") as folder:
        if not isinstance(pipe, JointConditionalPurificationPipeline):
            pipe = open_purifier(pipe, context.device, output_dir=folder)
        options = {"preset": config, "fit": "resize", "progress": context.progress}
        purify_to_folder(data, pipe, output_dir=folder, seed=context.seed, **options)
        purified = load_images(folder, channels=data.images.shape[3])
    if purified.ids != data.ids:
        raise ValueError(f"checkpoint_dir is {str(context.checkpoint_dir)!r}, but must not hold images of other ids.")
    return data.with_images(purified.images)


def check_purifier(pipe: JointConditionalPurificationPipeline, images: LabelledImages) -> None:
    """
    Refuse a purifier made for other images.

    Raises:
        ValueError: If it takes another size or number of channels.
    """
    height, width, channels = images.images.shape[1:]
    size = pipe.unet.config.sample_size
    if size is None:  # the network says nothing of a size
        size = height, width
    size = (size, size) if isinstance(size, int) else tuple(size)
    if pipe.unet.config.in_channels != channels:
        raise ValueError(
            f"purifier takes images of {pipe.unet.config.in_channels} channels, but these have {channels}: channels "
            "says how images are read."
        )
    if size != (height, width):
        raise ValueError(
            f"purifier was trained on {size[0]}x{size[1]} pixels, but these images have {height}x{width}: image_size "
            "brings them to its size."
        )


def check_purifier_suits(
    measure: Countermeasure,
    pipe: JointConditionalPurificationPipeline,
    purification: PurificationConfig | str | None,
    data: LabelledImages,
) -> None:
    """
    Check before any costly work that a countermeasure can purify these images.

    Args:
        measure ([`Countermeasure`]): One that needs a purifier.
        pipe (`JointConditionalPurificationPipeline`): The purifier.
        purification (`PurificationConfig` or `str`, *optional*): Settings that replace the countermeasure's own.
        data (`LabelledImages`): Images to purify.

    Raises:
        ValueError: If the purifier takes other images, was not trained on the timesteps, or lacks a network that a
            guide needs.
    """
    check_purifier(pipe, data)
    for part in measure.parts or (measure,):
        if part.needs_purifier:
            pipe.resolve_config(PurificationConfig(**part.settings) if purification is None else purification)


_SDE = "reverse SDE, t* = 0.1 (Nie et al., ICML 2022; NVlabs/DiffPure)"

COUNTERMEASURES = (
    purifying(
        "jcdp",
        "Joint conditional diffusion purification (Jiang, Diao et al., ACM MM 2023), Algorithm 1",
        PRESETS["paper"],
    ),
    purifying(
        "jcdp-code", "Joint conditional diffusion purification, as released (jiangw-0/LE_JCDP)", PRESETS["code"]
    ),
    purifying(
        "unconditional", "diffusion and denoising without a guide, T_p 100, 10 evaluations", PRESETS["unconditional"]
    ),
    purifying(
        "avatar",
        f"AVATAR (Dolatabadi, Erfani and Leckie, SaTML 2024; hmdolatabadi/AVATAR): {_SDE}",
        PurificationConfig(diffusion_steps=100, variance_type="fixed_large"),
    ),
    purifying("diffpure", f"DiffPure: {_SDE}", PurificationConfig(diffusion_steps=100, variance_type="fixed_large")),
    purifying(
        "diffpure-l2",
        "DiffPure for perturbations bounded in L2, t* = 0.075 (Nie et al., ICML 2022; NVlabs/DiffPure)",
        PurificationConfig(diffusion_steps=75, variance_type="fixed_large"),
    ),
    purifying(
        "gdmp",
        "Guided diffusion model for purification (Wang et al., 2022; JinyiW/GuidedDiffusionPur)",
        PRESETS["gdmp"],
    ),
)
