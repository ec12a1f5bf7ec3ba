"""What a purifier is known by: its content, whatever it is called."""

import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import hf_hub_download

from .pipeline_jcdp import JointConditionalPurificationPipeline
from .purification_config import PurificationConfig
from .repository import on_hub
from .results import plain


def purifier_digest(purifier: str | os.PathLike | JointConditionalPurificationPipeline) -> str:
    """
    What a purifier is known by: its content, whatever it is called.

    Of a folder, a hash of networks, scheduler and noise spectrum; of a pipeline, a hash of the same as they are in
    memory; of a Hub id, the id and the commit that it stands for now.
    """
    if isinstance(purifier, JointConditionalPurificationPipeline):
        return _digest_of_pipeline(purifier)
    folder = Path(purifier)
    if not folder.is_dir():
        # Every purifier has this file. It lies in a folder of the cache that bears the commit's name.
        with on_hub(str(purifier)):
            return f"{purifier}@{Path(hf_hub_download(str(purifier), 'model_index.json')).parent.name}"
    parts = [folder / part for part in ("unet", "scheduler", "perceptual")]
    files = [path for part in parts for path in sorted(part.glob("*"))]
    if not (folder / "unet").is_dir():  # a network that lies beside model_index.json, as in google/ddpm-cifar10-32
        names = ("config.json", "scheduler_config.json", "diffusion_pytorch_model*")
        files += [path for name in names for path in sorted(folder.glob(name))]
    states = (path.stat() for path in files)
    return _digest_of_files(
        tuple((path, state.st_size, state.st_mtime_ns, state.st_ino) for path, state in zip(files, states)),
        noise_corner(purifier),
    )


@functools.lru_cache(maxsize=64)
def _digest_of_files(files: tuple[tuple[Path, int, int, int], ...], corner: float) -> str:
    """A hash of files, read again where one is of another size, time or inode than before."""
    digest = hashlib.blake2b(digest_size=16)
    for path, *_ in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    if corner:
        digest.update(f"noise_corner {corner}".encode())
    return digest.hexdigest()


def _digest_of_pipeline(pipe: JointConditionalPurificationPipeline) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (unwrap_module(pipe.unet), pipe.perceptual):  # weights have other names in torch.compile's wrapper
        for name, tensor in {} if part is None else sorted(part.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for part in (pipe.unet, pipe.scheduler):
        # What begins with an underscore says where the part is from.
        config = {name: value for name, value in part.config.items() if not name.startswith("_")}
        digest.update(json.dumps(plain(config, "config"), sort_keys=True).encode())
    digest.update(f"noise_corner {noise_corner(pipe)}".encode())
    return digest.hexdigest()


def noise_corner(purifier: str | os.PathLike | JointConditionalPurificationPipeline) -> float:
    """What a pipeline or a folder says; a Hub repository says it when it is opened, and its commit stands for it."""
    if isinstance(purifier, JointConditionalPurificationPipeline):
        config = purifier.purification_config
    else:
        config = PurificationConfig.from_pretrained(purifier) if Path(purifier).is_dir() else None
    return 0.0 if config is None else config.noise_corner
