"""
Victims whose weights do not start at random: pretrained elsewhere, then fine-tuned on the training images.

A pretrained network need not take the shortcut that a protection offers: what it knows of images already tells
classes apart. Two papers of 2026 (BAIT, ICLR; arXiv:2605.05224) find that this weakens most protections. Here a
network learns without labels from collected images (SimCLR, see [`contrastive`]), or somebody's weights are read.

The layer that makes logits is always a new one. Fine-tuning takes the victim's recipe with a tenth of its learning
rate. It changes all weights, or those of the upper stages alone; the lower stages then keep their weights and the
statistics of their batch normalisation. Which stages are the lower ones, a network says (`lower_stages`).

Weights come as safetensors, from a file, or from a folder or Hub repository that holds one such file. Accepted are

* what `jcdp score --model_dir` writes, of any network;
* the names of torchvision and timm, where the network is the same: a ResNet-18 whose stem is one 3x3 convolution
  (torchvision's 7x7 stem is another network), VGG-16 with batch normalisation, and MobileNetV2.

The size of the images is checked where the file (its metadata) or timm's `config.json` beside it names it.

Victims see values in [0, 1]. Most weights of others learned from images less a mean, over a standard deviation. Both
stand in timm's `config.json`, and images are normalised by them in front of the network. Weights without such a file
see values in [0, 1]. Fine-tuned as a whole, they adapt: batch normalisation in training mode follows the new values.
Lower stages that stay as they are would not, so `"upper"` is refused for them.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from .. import victims
from ..data import LabelledImages
from ..devices import cpu_threads
from ..outputs import replacing
from ..repository import check_safetensors, on_hub, read_json
from .checkpoints import digest
from .networks import FeaturesAndHead, last_layer
from .recipes import CONTRASTIVE_RECIPES, ContrastiveRecipe, Recipe, get_recipe
from .training import reproducible, train


FINETUNE = ("all", "upper")
COLLECTED = "collected"  # what commands call a network that is pretrained on collected images
LEARNING_RATE_FACTOR = 0.1
SUFFIX = ".safetensors"
INIT_FROM_HELP = (
    f"what victims start from: {COLLECTED} (SimCLR on --collected); or a {SUFFIX} file, or a folder or Hub id with "
    "one, as --model_dir has it or with torchvision's and timm's names of the same network; random if not given"
)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """
    How images with values in [0, 1] are changed before a network sees them: `(images - mean) / std`.

    Args:
        mean (`tuple` of `float`), std (`tuple` of `float`): One number for each channel, or one for all.

    Raises:
        ValueError: If one is not a list of numbers, a std is not above 0, or their lengths differ.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
            if not numbers or not values or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {values!r}, but must be a list of numbers, one for each channel.")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) <= 0 or len(self.std) != len(self.mean):
            raise ValueError(f"std is {list(self.std)}, but must be numbers above 0, as many as mean has.")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images of shape (B, C, H, W) and range [0, 1] as the network's weights know them."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


PLAIN = Normalisation((0.0,), (1.0,))


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """
    The weights of a trained network.

    Args:
        name (`str`): What messages call them.
        tensors (`dict`): By their names in the file.
        victim (`str`, *optional*): Name of the network, where it is known.
        shape (`tuple` of `int`, *optional*): `(C, H, W)` of the images that it was trained on, where it is known.
        normalisation ([`Normalisation`], *optional*): Of these images; `PLAIN`, values in [0, 1], by default, and None
            where it is not known.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    victim: str | None = None
    shape: tuple[int, int, int] | None = None
    normalisation: Normalisation | None = PLAIN

    @property
    def classes(self) -> int | None:
        """How many classes the last layer is for, which is replaced; None where there is no such layer."""
        heads = sorted(name for name, tensor in self.tensors.items() if _is_head(name) and tensor.ndim == 2)
        return self.tensors[heads[-1]].shape[0] if heads else None

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of names and values."""
        names = torch.tensor(list("\n".join(sorted(self.tensors)).encode()), dtype=torch.uint8)
        return digest(names, *(self.tensors[name] for name in sorted(self.tensors)))


@dataclasses.dataclass(frozen=True, eq=False)
class InitFrom:
    """
    What a victim starts from, and how much of it is fine-tuned.

    Args:
        source (`LabelledImages` or [`Weights`]): Images that a network is pretrained on without labels; or weights.
        finetune (`str`, defaults to `"all"`): One of `FINETUNE`.
        recipe ([`ContrastiveRecipe`], *optional*): Of the pretraining, a recipe of `"simclr"`, where the source is
            images.

    Raises:
        ValueError: If `finetune` is none of these, or there is a recipe without images or images without one.
    """

    source: LabelledImages | Weights
    finetune: str = "all"
    recipe: ContrastiveRecipe | None = None

    def __post_init__(self):
        if self.finetune not in FINETUNE:
            raise ValueError(f"finetune is {self.finetune!r}, but must be one of {', '.join(FINETUNE)}.")
        if isinstance(self.source, Weights):
            if self.recipe is not None:
                raise ValueError(f"recipe is {self.recipe.name!r}, but must be None: {self.source.name!r} is trained.")
            return
        object.__setattr__(self, "source", dataclasses.replace(self.source, labels=None))  # nobody reads them
        recipe = get_recipe(self.recipe, "simclr")
        if len(self.source) < recipe.batch_size:
            raise ValueError(
                f"collected has {len(self.source)} images, but must have at least {recipe.batch_size}, the batch_size "
                f"of recipe {recipe.name!r} for pretraining."
            )


def start_of(
    init_from: str | os.PathLike | None, finetune: str, collected: LabelledImages | None, recipe: Recipe
) -> InitFrom | None:
    """
    What victims start from, as a command is told.

    Args:
        init_from (`str` or `os.PathLike`, *optional*): `"collected"`, or what [`read_weights`] takes; None for random
            weights.
        finetune (`str`): One of `FINETUNE`.
        collected ([`LabelledImages`], *optional*): The images for `"collected"`.
        recipe ([`Recipe`]): Of the victims.

    Raises:
        ValueError: If images are missing, weights cannot be read, or `finetune` has nothing to say.
    """
    if finetune not in FINETUNE or (init_from is None and finetune != "all"):
        accepted = "'all' where init_from is None" if init_from is None else f"one of {', '.join(FINETUNE)}"
        raise ValueError(f"finetune is {finetune!r}, but must be {accepted}.")
    if init_from is None:
        return None
    if init_from != COLLECTED:
        return InitFrom(read_weights(init_from), finetune)
    if collected is None:
        raise ValueError(
            f"collected is None, but must be a set of images where init_from is {COLLECTED!r} (./{COLLECTED} is a "
            "folder of that name)."
        )
    return InitFrom(collected, finetune, pretraining_recipe(recipe))


def start_in_words(settings: Mapping[str, Any]) -> str:
    """What a trial's record says of the victim's start, in words."""
    trained = "all weights" if settings["finetune"] == "all" else "the upper stages"
    if "pretraining" in settings:
        source = f"pretrained without labels on {settings['pretraining']['collected']['images']} collected images"
        return f"{source}, {trained} fine-tuned"
    classes = settings["replaced_classes"]
    before = "" if classes is None else f" in place of that for {classes} classes"
    scale = settings.get("normalisation")
    seen = "" if scale is None else f", images normalised by mean {list(scale['mean'])} and std {list(scale['std'])}"
    return f"started from given weights with a new last layer{before}{seen}, {trained} fine-tuned"


def normalisation_facts(weights: Weights) -> dict[str, dict]:
    """What a record says of the normalisation in front of weights; nothing where images stay as they are."""
    changed = weights.normalisation not in (None, PLAIN)
    return {"normalisation": dataclasses.asdict(weights.normalisation)} if changed else {}


def pretraining_recipe(recipe: Recipe) -> ContrastiveRecipe:
    """The recipe of SimCLR that goes with a victim's recipe: of the same name, or else `"fast"`."""
    known = CONTRASTIVE_RECIPES["simclr"]
    return known.get(recipe.name, known["fast"])


def finetuning_recipe(recipe: Recipe) -> Recipe:
    """A victim's recipe for fine-tuning: a tenth of the learning rate, ours."""
    return dataclasses.replace(recipe, learning_rate=LEARNING_RATE_FACTOR * recipe.learning_rate)


# --------------------------------------------------------------------------------------------------------- pretraining


def pretrain(
    collected: LabelledImages,
    *,
    victim: str,
    width: int,
    recipe: ContrastiveRecipe,
    seed: int = 0,
    device: str | torch.device = "cpu",
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> Weights:
    """
    Train a network by SimCLR.

    Equal arguments give equal weights on one machine with one number of threads, whether or not the training was cut
    off in between.

    Args:
        collected ([`LabelledImages`]): The images. Labels are not read.
        victim (`str`): Name of the network.
        width (`int`): Its width.
        recipe ([`ContrastiveRecipe`]): Of `"simclr"`.
        seed (`int`, defaults to 0): Of weights, order and views.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where it runs.
        checkpoint_dir (`str` or `os.PathLike`, *optional*): Folder in which the training is kept after each epoch.
        progress (`bool`, defaults to `False`): Show a bar.

    Returns:
        [`Weights`]: Of the network without its last layer.
    """
    from .contrastive import SimCLR

    device = torch.device(device)
    height, width_of_images, channels = collected.images.shape[1:]
    images = torch.from_numpy(collected.images.copy()).permute(0, 3, 1, 2).to(device)
    with reproducible(seed, device):
        sides = min(height, width_of_images)
        network = victims.build(victim, 2, in_channels=channels, width=width, image_size=sides)
        if hasattr(network, "whiten"):
            network.to(device).whiten(images)
        objective = SimCLR(network, recipe, (height, width_of_images))
    with tqdm(total=recipe.epochs, unit="epoch", desc="pretraining", disable=not progress) as bar:
        train(
            objective,
            images,
            None,
            recipe=recipe,
            seed=seed,
            device=device,
            progress=lambda entry: bar.update(entry["epoch"] - bar.n),
            checkpoint_dir=checkpoint_dir,
        )
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _without_head(network).items()}
    return Weights("pretrained network", tensors, victim, (channels, height, width_of_images))


@dataclasses.dataclass(frozen=True, eq=False)
class Pretraining:
    """
    A pretraining whose network is kept in a file, as `engines.run` runs it.

    Args:
        path (`Path`): The file. The training is kept beside it until it is done.
        init_from ([`InitFrom`]): Images and recipe.
        victim (`str`), width (`int`), seed (`int`), device (`torch.device`), progress (`bool`): See [`pretrain`].
    """

    path: Path
    init_from: InitFrom
    victim: str
    width: int
    seed: int
    device: torch.device
    progress: bool

    @property
    def name(self) -> str:
        return f"pretraining of {self.victim}"

    def is_done(self) -> bool:
        return self.path.exists()

    def run(self, worker: None) -> None:
        folder = self.path.with_suffix("")
        with cpu_threads(1 if self.device.type == "cpu" else None):
            weights = pretrain(
                self.init_from.source,
                victim=self.victim,
                width=self.width,
                recipe=self.init_from.recipe,
                seed=self.seed,
                device=self.device,
                checkpoint_dir=folder,
                progress=self.progress,
            )
        save_weights(self.path, weights, facts_of(self.victim, weights.shape))
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------- files and Hub


def save_weights(path: str | os.PathLike, network: nn.Module | Weights, facts: Mapping[str, str]) -> None:
    """
    Write weights as safetensors, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file; its folder is made if needed.
        network (`nn.Module` or [`Weights`]): What is written.
        facts (`dict`): For the file's metadata, see `facts_of`; further entries are kept as they are.
    """
    tensors = network.tensors if isinstance(network, Weights) else network.state_dict()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=dict(facts))


def facts_of(victim: str, shape: tuple[int, int, int], normalisation: Normalisation = PLAIN) -> dict[str, str]:
    """What a file says of the network in it; `shape` is `(C, H, W)` of the images, and see [`Weights`]."""
    facts = {"victim": victim, "images": "x".join(map(str, shape))}
    if normalisation != PLAIN:
        facts["normalisation"] = json.dumps(dataclasses.asdict(normalisation))
    return facts


def read_weights(source: str | os.PathLike) -> Weights:
    """
    Read the weights of a trained network; see the module's description for what is accepted.

    Args:
        source (`str` or `os.PathLike`): A safetensors file, a folder, or a Hub id.

    Returns:
        [`Weights`]: On the CPU.

    Raises:
        ValueError: If there are no weights, several, or broken ones, or `config.json` has a mean and std that cannot
            be; the sentence names the source.
    """
    path, config = _find(source)
    check_safetensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"init_from is {str(source)!r}, whose {name} is not finite, but all weights must be.")
    victim, shape = metadata.get("victim"), metadata.get("images")
    shape = None if shape is None else tuple(int(size) for size in shape.split("x"))
    said = {} if config is None else read_json(config)
    said = said.get("pretrained_cfg") or said  # older files of timm's have its entries at the top
    if shape is None and (size := said.get("input_size")) is not None:
        shape = tuple(size)
    return Weights(str(source), tensors, victim, shape, _normalisation(source, metadata, said))


def _normalisation(
    source: str | os.PathLike, metadata: Mapping[str, str], said: Mapping[str, Any]
) -> Normalisation | None:
    """What a victim's own file says, or else `config.json`."""
    if "victim" in metadata:
        if "normalisation" not in metadata:
            return PLAIN
        said = json.loads(metadata["normalisation"])
    if not said or "mean" not in said or "std" not in said:
        return None
    try:
        given = Normalisation(said["mean"], said["std"])
    except ValueError as error:
        raise ValueError(f"init_from is {str(source)!r}, whose {error}") from error
    return PLAIN if set(given.mean) == {0.0} and set(given.std) == {1.0} else given


def _find(source: str | os.PathLike) -> tuple[Path, Path | None]:
    """The file of a source, and `config.json` beside it, where there is one."""
    given = f"init_from is {str(source)!r}"
    accepted = (
        f"must be 'collected', a {SUFFIX} file, or a folder or Hub id with one such file: what jcdp score --model_dir "
        "writes, or torchvision's and timm's names of the same network"
    )
    path = Path(source)
    if path.is_file():
        if path.suffix != SUFFIX:
            raise ValueError(f"{given}, but {accepted}.")
        config = path.with_name("config.json")
        return path, config if config.is_file() else None
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
    elif path.suffix == SUFFIX:  # a Hub id may end so, too, but only a mistyped path does
        raise ValueError(f"{given}, which is no file, but {accepted}.")
    else:
        try:
            names = HfApi().list_repo_files(str(source))
        except (HFValidationError, HTTPError, OSError) as error:
            raise ValueError(f"{given}, which is no path and no Hub id in reach, but {accepted}.") from error
    found = [name for name in names if name.endswith(SUFFIX)]
    if len(found) != 1:
        held = f"holds {', '.join(found)}" if found else f"holds no {SUFFIX} file"
        raise ValueError(f"{given}, which {held}, but {accepted}.")
    wanted = [found[0], *(["config.json"] if "config.json" in names else [])]
    if path.is_dir():
        files = [path / name for name in wanted]
    else:
        with on_hub(str(source)):
            files = [Path(hf_hub_download(str(source), name)) for name in wanted]
    return files[0], files[1] if len(files) > 1 else None


# ----------------------------------------------------------------------------------------------------------- a network


def start_from(network: nn.Module, weights: Weights, victim: str, shape: tuple[int, int, int], finetune: str) -> None:
    """
    Put weights into a network, all but those of its last layer, and freeze what is not fine-tuned.

    Args:
        network (`nn.Module`): The network, in place.
        weights ([`Weights`]): What it starts from.
        victim (`str`): Its name.
        shape (`tuple` of `int`): `(H, W, C)` of the images that it will be trained on.
        finetune (`str`): One of `FINETUNE`.

    Raises:
        ValueError: If the weights are of another network or of images of another size, some are missing, the network
            normalises images itself, or it does not say which stages are the lower ones, or these would stay as they
            are although nobody knows how their images were normalised.
    """
    if finetune == "upper" and weights.normalisation is None:
        raise ValueError(
            f"finetune is 'upper', but must be 'all' for init_from {weights.name!r}: no config.json with mean and std "
            "says how its images were normalised, and its lower stages would not be changed."
        )
    height, width, channels = shape
    network.load_state_dict(_fitted(weights, network, victim, (channels, height, width)), strict=False)
    if weights.normalisation not in (None, PLAIN):
        _normalise(network, weights, victim, channels)
    if finetune == "upper":
        _freeze_lower_stages(network, victim)


def check_start(init_from: InitFrom, victim: str, width: int, shape: tuple[int, int, int]) -> None:
    """
    Refuse a start that does not suit a victim, before any costly work.

    Args:
        init_from ([`InitFrom`]): The start.
        victim (`str`): Name of the network.
        width (`int`): Its width.
        shape (`tuple` of `int`): `(H, W, C)` of the training images.

    Raises:
        ValueError: As [`start_from`], or if collected images have another shape.
    """
    source = init_from.source
    if isinstance(source, LabelledImages) and source.images.shape[1:] != tuple(shape):
        raise ValueError(
            f"collected has images of {_times(source.images.shape[1:])}, but must have those of train, "
            f"{_times(shape)}, for a victim that is pretrained on them."
        )
    with reproducible(0, torch.device("cpu")):
        network = victims.build(victim, 2, in_channels=shape[2], width=width, image_size=min(shape[:2]))
    if isinstance(source, Weights):
        start_from(network, source, victim, shape, init_from.finetune)
    elif init_from.finetune == "upper":
        _freeze_lower_stages(network, victim)


def _fitted(weights: Weights, network: nn.Module, victim: str, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """The weights below the last layer, by the network's own names; `shape` is `(C, H, W)`."""
    given = f"init_from is {weights.name!r}"
    if weights.victim is not None and weights.victim != victim:
        raise ValueError(f"{given}, which is a {weights.victim}, but must be a {victim}.")
    if weights.shape is not None and tuple(weights.shape) != tuple(shape):
        raise ValueError(
            f"{given}, which was trained on images of {_times(weights.shape)}, but must have been trained on images "
            f"of {_times(shape)} (channels, height, width), as train has them."
        )
    found = _named_as_ours(weights.tensors, network)
    wanted = _without_head(network)
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # older files lack them
    if missing := sorted(wanted.keys() - found.keys() - counters):
        raise ValueError(
            f"{given}, which has no {missing[0]}, but must have all {len(wanted)} weights of victim {victim!r}."
        )
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{given}, which has {unknown[0]}, but must have the weights of victim {victim!r} alone.")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{given}, whose {name} has the shape {_times(tensor.shape)}, but must have "
                f"{_times(wanted[name].shape)}, as victim {victim!r} has it with its width and the channels of train."
            )
    return {name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}


def _normalise(network: nn.Module, weights: Weights, victim: str, channels: int) -> None:
    """Images are normalised in front of the first stage. Its weights cannot do it, because it pads with zeros."""
    scale = weights.normalisation
    given = f"init_from is {weights.name!r}, whose images had mean {list(scale.mean)} and std {list(scale.std)}"
    if len(scale.mean) not in (1, channels):
        raise ValueError(f"{given}, but must have {channels} numbers of each, the channels of train.")
    if hasattr(network, "whiten") or not hasattr(network, "lower_stages"):
        reason = "whitens them itself" if hasattr(network, "whiten") else "names no stages"
        raise ValueError(f"{given}, but must have seen values in [0, 1] for victim {victim!r}, which {reason}.")
    first = network.lower_stages()[0]
    first.register_forward_pre_hook(lambda module, inputs: (scale(inputs[0]), *inputs[1:]))


def _freeze_lower_stages(network: nn.Module, victim: str) -> None:
    """Keep the lower stages as they are: weights, statistics of batch normalisation, and no dropout."""
    if not hasattr(network, "lower_stages"):
        raise ValueError(f"finetune is 'upper', but must be 'all' for victim {victim!r}, which names no lower stages.")
    for stage in network.lower_stages():
        stage.requires_grad_(False)
        # Whoever trains the network puts all of it in training mode, countermeasures among them.
        stage.register_forward_pre_hook(_in_eval_mode)


def _in_eval_mode(module: nn.Module, inputs: tuple) -> None:
    module.eval()


def _without_head(network: nn.Module) -> dict[str, torch.Tensor]:
    head = last_layer(network)
    (prefix,) = (name for name, module in network.named_modules() if module is head)
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(f"{prefix}.")}


def _is_head(name: str) -> bool:
    """Whether a weight is of the layers that make logits, in our names, torchvision's and timm's."""
    return name.startswith(("fc.", "head.", "classifier.")) and not name.startswith("classifier.vit.")


def _named_as_ours(tensors: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """By the names that our network has, without the last layers."""
    kept = {name: tensor for name, tensor in tensors.items() if not _is_head(name)}
    if isinstance(network, FeaturesAndHead):
        # torchvision's features are the first part of our body.
        return {
            f"body.0.{name.removeprefix('features.')}" if name.startswith("features.") else name: tensor
            for name, tensor in kept.items()
        }
    return kept


def _times(shape: Any) -> str:
    return "x".join(map(str, shape))
