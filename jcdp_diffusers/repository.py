"""A purifier's repository, checked before anything of it is loaded: each error is a sentence that names the file."""

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


# Names of weights and of their index, as diffusers writes them; the group is the variant.
INDEX = re.compile(r"diffusion_pytorch_model\.(?:safetensors|bin)\.index(?:\.([^.]+))?\.json")
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.([^.\-]+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
TRAINED_ON_NAME = "trained_on.json"


def read_json(path: str | os.PathLike) -> dict:
    """
    Content of a JSON file that holds an object.

    Raises:
        ValueError: If it is a git-lfs pointer, no JSON, or JSON of something else; the sentence names the file.
    """
    refuse_pointer(path)
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}), but must hold a JSON object.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {content!r:.80}, but must hold a JSON object.")
    return content


def refuse_pointer(path: str | os.PathLike) -> None:
    """ValueError if git-lfs has left a pointer where the file should be, as `git clone` without git-lfs does."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a git-lfs pointer, but must be the file itself: git lfs pull fetches it.")


def check_safetensors(path: str | os.PathLike) -> None:
    """
    Check that a safetensors file is whole; only its header is read.

    Raises:
        ValueError: If it is a git-lfs pointer, cut short or of another format; the sentence names the file.
    """
    refuse_pointer(path)
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}), but must be a safetensors file.") from error


def check_model_index(path: str | os.PathLike) -> None:
    """ValueError unless a `model_index.json` is that of a pipeline with a `UNet2DModel` and a scheduler."""
    index = read_json(path)
    for part in ("unet", "scheduler"):
        entry = index.get(part)
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ValueError(f"{path} has {entry!r} as {part}, but must name a library and a class.")
    if index["unet"][1] != "UNet2DModel":
        raise ValueError(f"{path} has a {index['unet'][1]} as unet, but must have a UNet2DModel: a DDPM's network.")


def check_folder(folder: str | os.PathLike) -> list[str]:
    """
    Check that a purifier's folder has what it needs and that each file can be read, before any of it is loaded.

    Args:
        folder (`str` or `os.PathLike`): With `model_index.json`; `unet` and `scheduler` are folders in it, or their
            files lie beside it.

    Returns:
        `list[str]`: Paths of its files, relative to it.

    Raises:
        OSError: If it is no folder with a `model_index.json`.
        ValueError: For the first file that is missing or broken, in a sentence that names it.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise OSError(f"purifier is {os.fspath(folder)!r}, but must hold a model_index.json, as a DDPM's folder does.")
    check_model_index(folder / "model_index.json")
    for part, config in (
        ("unet", "config.json"),
        ("scheduler", "scheduler_config.json"),
        ("perceptual", "config.json"),
    ):
        place = folder / part if (folder / part).is_dir() else folder
        if part == "perceptual" and place == folder:
            continue
        if not (place / config).is_file():
            raise ValueError(f"{place} has no {config}, but must hold the configuration of the {part}.")
        read_json(place / config)
        if part != "scheduler":
            check_weights(place)
    return _files_in(folder)


@contextlib.contextmanager
def on_hub(name: str) -> Iterator[None]:
    """
    For a block that asks the Hub for a repository.

    Raises:
        OSError: If the Hub cannot be reached. What it answers, such as that a token is wrong, is one already.
    """
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(
            f"{name!r} cannot be reached on the Hub at {constants.ENDPOINT} ({reason}): give the same command again "
            "when it can."
        ) from error


def check_on_hub(name: str, **hub_options) -> list[str]:
    """
    Look at what a repository on the Hub is, before gigabytes of something else are downloaded.

    Args:
        name (`str`): The repository's id.
        hub_options: As for `hf_hub_download`: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Returns:
        `list[str]`: Paths of its files; without a network, of those that have a copy on this machine.

    Raises:
        OSError: If there is no such repository, or the Hub cannot be reached and there is no copy.
        ValueError: If it holds something else than a DDPM.
    """
    try:
        validate_repo_id(name)
        with on_hub(name):
            index = hf_hub_download(name, "model_index.json", **hub_options)
    except (HFValidationError, OSError) as error:
        raise OSError(
            f"purifier is {name!r}, but must be a folder, or the Hub id of a DDPM that can be loaded "
            f"({type(error).__name__})."
        ) from error
    check_model_index(index)
    if hub_options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return _files_in(Path(index).parent)
    try:
        return HfApi(token=hub_options.get("token")).list_repo_files(name, revision=hub_options.get("revision"))
    except HTTPError:  # there was a copy of the index, so the rest of its snapshot may be here, too
        return _files_in(Path(index).parent)


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def check_weights(folder: Path) -> None:
    """Check the weights of one model: there are some, each file is whole, and the parts of sharded ones are there."""
    files = [path for path in sorted(folder.iterdir()) if WEIGHTS.fullmatch(path.name)]
    if not files:
        raise ValueError(f"{folder} has no weights, but must hold diffusion_pytorch_model.safetensors.")
    for path in files:
        if path.suffix == ".safetensors":
            check_safetensors(path)
        else:
            refuse_pointer(path)
    for path in sorted(folder.glob("diffusion_pytorch_model*.index*.json")):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{path} has {shards!r:.80} as weight_map, but must name the file of each weight.")
        if missing := sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()}):
            raise ValueError(f"{folder} has no {missing[0]}, but {path.name} says that weights are in it.")


def remove_weights(folder: Path, variant: str | None) -> None:
    """
    Remove one model's weights before others are written: diffusers leaves those of another format or number of files,
    and would load them.

    Args:
        folder (`Path`): Of the model; it need not exist.
        variant (`str`, *optional*): Of the weights, such as `"fp16"`; other variants stay.
    """
    for path in folder.glob("diffusion_pytorch_model*"):
        found = WEIGHTS.fullmatch(path.name) or INDEX.fullmatch(path.name)
        if found is not None and found[1] == variant:
            path.unlink()


def only_variant(names: Iterable[str]) -> str | None:
    """
    The variant, such as `"fp16"`, that diffusers must be asked for because the weights come in no other.

    Args:
        names (`Iterable[str]`): Names of a repository's files.

    Returns:
        `str`, *optional*: None if there are weights without a variant, or none at all; the first of several.
    """
    variants = {
        match[1]
        for name in names
        if (match := WEIGHTS.fullmatch(Path(name).name)) and Path(name).parent.name in ("", "unet")
    }
    return None if not variants or None in variants else sorted(variants)[0]


def weights_without_variant(folder: str | os.PathLike) -> list[Path]:
    """
    Safetensors files of a purifier's network that are loaded where nobody asks for a variant.

    Args:
        folder (`str` or `os.PathLike`): The repository, with its network in `unet`.
    """
    files = [path for path in sorted((Path(folder) / "unet").glob("*.safetensors")) if WEIGHTS.fullmatch(path.name)]
    loaded = only_variant(path.name for path in files)
    return [path for path in files if WEIGHTS.fullmatch(path.name)[1] == loaded]


def weights_digest(folder: str | os.PathLike) -> str:
    """
    Ties `trained_on.json` to weights: a folder into which other ones are saved keeps no list that is not theirs.

    Args:
        folder (`str` or `os.PathLike`): The repository. Variants that are saved beside the weights do not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in weights_without_variant(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def folder_of(network: torch.nn.Module) -> Path | None:
    """
    The purifier's folder that diffusers loaded a network from, as an absolute path.

    Args:
        network (`torch.nn.Module`): The network of a pipeline or a network alone.

    Returns:
        `Path`: None if it was made in memory, loaded from elsewhere, or from a folder that is not there now, which a
        warning says.
    """
    name = getattr(network.config, "_name_or_path", None)
    if not name:
        return None
    place = Path(name).absolute()
    if not place.exists():
        warnings.warn(
            f"unet was loaded from {str(name)!r}, which is no folder here, so what a purifier has beside it is not "
            "known (the colour of its noise, the images that trained it): open a purifier with from_pretrained, and "
            "keep its folder.",
            stacklevel=3,
        )
    return next((one for one in (place, place.parent) if (one / "model_index.json").is_file()), None)


def training_list(network: torch.nn.Module) -> dict | None:
    """
    `trained_on.json` of the folder that a network was loaded from, if it is a list for the weights that it has now.

    Args:
        network (`torch.nn.Module`): Its weights may be in another type than in the files.
    """
    folder = folder_of(network)
    if folder is None or not (folder / TRAINED_ON_NAME).is_file():
        return None
    listed = read_json(folder / TRAINED_ON_NAME)
    files = weights_without_variant(folder)
    if not files or listed.get("weights") != weights_digest(folder):  # without files there is nothing to compare with
        return None
    own = network.state_dict()
    for path in files:
        for name, weight in load_file(path).items():
            if name not in own or not torch.equal(weight.to(own[name].dtype), own[name].cpu()):
                return None
    return listed


def lay_aligned(network: torch.nn.Module) -> None:
    """
    Moves the weights of a network that lies on a CPU to addresses that torch would give them.

    Safetensors leaves weights where the file has them, at any address. Torch chooses some kernels by alignment, so the
    same weights gave other last bits in memory than from a file, and than from a file with a longer header.
    """
    for weight in network.parameters():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()
