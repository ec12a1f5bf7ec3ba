"""
A purifier that has seen pairs: images before and after the very tool that made the protected set.

The attacker is stronger than that of other countermeasures: he has the tool with the owner's seed, and has protected
images of his own with it. BridgePure (Wang et al., NeurIPS 2025; EhanW/bridge-pure) has this setting for poisons, with
500 to 4,000 pairs and a diffusion bridge; LightShed (Foerster et al., USENIX Security 2025) for protections of
pictures, with an auto-encoder that predicts the perturbation. `train/paired.py` describes what is trained here, which
is closer to the second.

`paired-small` is for a CPU. `paired` has the network of the paper's CIFAR-10 purifier and has not been run yet.
"""

from collections.abc import Mapping
from dataclasses import asdict

from ..data import LabelledImages
from ..train.paired import PairedSettings, check_pairs, restore, train_paired
from . import Context, Countermeasure


ASSUMES = "the protection tool and its seed are public"
SETTINGS = {
    "paired": PairedSettings(),
    "paired-small": PairedSettings(unet="mini32", epochs=10, batch_size=64, learning_rate=1e-3),
}
SMOKE_SETTINGS = dict.fromkeys(SETTINGS, PairedSettings(unet="tiny32", epochs=2, batch_size=64))


def restore_by_pairs(data: LabelledImages, context: Context, settings: PairedSettings, name: str) -> LabelledImages:
    """
    Train on the context's pairs, and take the protection off a training set.

    Args:
        data (`LabelledImages`): Protected images, of the shape of the pairs.
        context ([`Context`]): Its `pairs` train the network with its `seed`; the network is kept in its
            `checkpoint_dir`.
        settings (`PairedSettings`): Of network and training.
        name (`str`): Of the folder within `checkpoint_dir`.

    Returns:
        `LabelledImages`: The same rows with other images.

    Raises:
        ValueError: If the images have another shape than the pairs, or one that the network cannot take.
    """
    protected, originals = context.pairs
    if protected.images.shape[1:] != data.images.shape[1:]:
        shapes = ("x".join(map(str, one.images.shape[1:])) for one in (protected, data))
        raise ValueError("pairs has images of {}, but must have those of data, {}.".format(*shapes))
    check_pairs(protected, settings)
    with context.place_for_work(f"{name}-{context.seed}") as folder:
        options = {"seed": context.seed, "device": context.device, "progress": context.progress}
        train_paired(protected, originals, folder, settings, **options)
        return restore(data, folder, device=context.device, bfloat16=settings.bfloat16)


def _registered(
    name: str, cost: str, settings: Mapping[str, PairedSettings] = SETTINGS, smoke: Countermeasure | None = None
) -> Countermeasure:
    def function(data: LabelledImages, context: Context) -> LabelledImages:
        return restore_by_pairs(data, context, settings[name], name)

    source = (
        "regression of the perturbation on pairs, ours, in the setting of BridgePure (Wang et al., NeurIPS 2025) and "
        "with the idea of LightShed (Foerster et al., USENIX Security 2025)"
    )
    declared = {"needs_pairs": True, "assumes": ASSUMES, "takes": "bytes", "smoke": smoke}
    return Countermeasure(name, "dataset", source, cost, function, asdict(settings[name]), **declared)


_COSTS = {
    "paired": "the tool on the pairs, 250 epochs of a large UNet on them, and one pass over the images",
    "paired-small": "the tool on the pairs, 10 epochs of a small UNet on them, and one pass",
}

COUNTERMEASURES = tuple(
    _registered(name, cost, smoke=_registered(name, cost, SMOKE_SETTINGS)) for name, cost in _COSTS.items()
)
