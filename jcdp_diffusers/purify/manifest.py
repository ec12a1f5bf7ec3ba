"""
What decides the pixels of a purified data set, written once as `run.json`; who goes on must agree with it.

Some settings belong to the run rather than to whoever works on it: the micro-batch size and, on a CPU, the number of
threads change the last bits of a convolution. A worker that does not ask for others takes them from the record, so
that a run begun on one machine goes on with the same bits on another one of its kind.
"""

import hashlib
import json
import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from ..acceleration.compiling import is_compiled
from ..acceleration.folded_upsampling import is_folded
from ..acceleration.winograd import uses_winograd
from ..devices import available_cores
from ..outputs import public_name
from ..pipeline_jcdp import JointConditionalPurificationPipeline, usual_micro_batch
from ..purification_config import PurificationConfig
from ..results import as_settings, package_versions, plain
from ..storage import Folder
from .reader import Rows
from .tiling import squares_per_image, usual_fit


if TYPE_CHECKING:
    from .worker import Job


RUN_NAME = "run.json"
SHARD_IN_MICRO_BATCHES = 8  # rows of a shard by default: what a kill costs, against rows that pad the last micro-batch
PACKAGES_OF_PIXELS = ("jcdp-diffusers", "torch", "diffusers", "numpy", "pillow")
# Settings that the first worker of a run fixes, and others take over unless they ask for something else.
TAKEN_OVER = (
    ("sizes", "tile_overlap"),
    ("arithmetic", "micro_batch_size"),
    ("arithmetic", "threads"),
    ("shards", "rows_per_shard"),
    ("shards", "count"),
)
# On record for people only.
INFORMATION = (("purifier", "name"), ("purifier", "revision"), ("source", "name"), ("begun",), ("machine",))


def describe_run(
    pipe: JointConditionalPurificationPipeline,
    config: PurificationConfig,
    rows: Rows,
    job: "Job",
    size: int,
    fit: str,
) -> dict:
    """A run as asked for: None where it is left to the record, or to `settle_run` if there is none."""
    device = pipe._execution_device
    return {
        # First, because another type of the weights is another content, too, and the sentence should name the cause.
        "arithmetic": {
            "device": device.type,
            "dtype": str(pipe.unet.dtype).removeprefix("torch."),
            "micro_batch_size": job.micro_batch_size,
            "threads": job.threads if device.type == "cpu" else None,
            "channels_last": pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last),
            "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
            **({"compiled": True} if is_compiled(pipe.unet) else {}),
            **({"folded_upsampling": True} if is_folded(pipe.unet) else {}),
            **({"winograd": True} if uses_winograd(pipe.unet) else {}),
        },
        "purifier": {**_name_and_revision(pipe), "content": content_of(pipe, config)},
        "settings": as_settings(config),
        "seed": job.seed,
        "source": {
            "name": public_name(rows.name),
            "split": rows.split,
            # Before the content, which changes with them, so that the sentence names the cause.
            "image_column": job.image_column,
            "label_column": job.label_column,
            "id_column": job.id_column,
            "rows": rows.length,
            "content": rows.fingerprint,
        },
        "sizes": {"image_size": size, "fit": fit, "tile_overlap": job.tile_overlap if fit == "tile" else None},
        "shards": {"count": job.shards, "rows_per_shard": job.rows_per_shard},
        "packages": package_versions(),
    }


def run_on_record(folder: Folder) -> dict | None:
    """
    The run that a folder holds, if it holds one.

    Raises:
        ValueError: If its record is damaged.
    """
    if not folder.fs.exists(RUN_NAME):
        return None
    try:
        run = json.loads(folder.fs.read_text(RUN_NAME))
        if all(isinstance(run[group], dict) for group in ("arithmetic", "sizes", "shards", "source")):
            return run
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        f"output_dir is {folder.url!r}, whose {RUN_NAME} is damaged, but must hold it as it was written: bring it "
        "back, or choose another output_dir."
    )


def settled_fit(folder: Folder, rows: Rows, size: int, asked: str | None) -> tuple[str, str | None]:
    """
    What becomes of images of other sizes: what is asked for, else what the folder's run was begun with, else
    `usual_fit`; and what to say of it, if anything.

    Args:
        folder (`Folder`): Where `run.json` is, or will be.
        rows (`Rows`), size (`int`): As for `usual_fit`.
        asked (`str`, *optional*): One of `tiling.FITS`.
    """
    if asked is None and (begun := run_on_record(folder)):
        return begun["sizes"]["fit"], None
    return usual_fit(rows, size, asked) if asked in (None, "exact") else (asked, None)


def settle_run(folder: Folder, run: dict, begin: dict | None = None) -> dict:
    """
    Begin a run, or join the one that the folder holds.

    Args:
        folder (`Folder`): Where `run.json` is, or will be.
        run (`dict`): From `describe_run`.
        begin (`dict`, *optional*): The same, from `completed`; to be written where the folder holds no run.

    Returns:
        `dict`: The run as recorded.

    Raises:
        ValueError: The folder's run differs in something that changes what is written; the sentence names it. Or
            there is none, as on a node from which the folder cannot be seen.
    """
    recorded = run_on_record(folder)
    if recorded is None and begin is None:
        raise ValueError(
            f"output_dir is {folder.url!r}, which holds no {RUN_NAME} on {platform.node()}, but must be a folder that "
            "all workers share."
        )
    if recorded is None:
        begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
        recorded = plain(begin, "run") | {"begun": begun, "machine": platform.platform()}
        folder.write(RUN_NAME, json.dumps(recorded, indent=2))
    wanted = plain(run, "run")  # tuples are lists in JSON
    for group, name in TAKEN_OVER:
        if wanted[group][name] is None:
            wanted[group][name] = recorded.get(group, {}).get(name)
    asked, present = _deciding(wanted), _deciding(recorded)
    for key in {**asked, **present}:
        if asked.get(key) != present.get(key):
            raise ValueError(
                f"output_dir {folder.url!r} holds a run whose {_called(key)} is {present.get(key)!r}, but "
                f"{asked.get(key)!r} is wanted now: go on with what it was begun with, or choose another output_dir."
            )
    return recorded


def completed(run: dict, rows: Rows, processes: int | None = None) -> dict:
    """The run with a value for everything that was left open; `processes` workers share this machine's cores."""
    arithmetic, sizes, shards = dict(run["arithmetic"]), dict(run["sizes"]), dict(run["shards"])
    side, squares = sizes["image_size"], 1.0
    if sizes["fit"] == "tile":
        if sizes["tile_overlap"] is None:
            sizes["tile_overlap"] = side // 4
        squares = squares_per_image(rows, side, sizes["tile_overlap"])
    if arithmetic["micro_batch_size"] is None:
        arithmetic["micro_batch_size"] = usual_micro_batch(arithmetic["device"], side, side)
    if arithmetic["threads"] is None and arithmetic["device"] == "cpu":
        arithmetic["threads"] = default_threads(processes)
    if shards["count"] is None and shards["rows_per_shard"] is None:
        shards["rows_per_shard"] = max(1, int(SHARD_IN_MICRO_BATCHES * arithmetic["micro_batch_size"] / squares))
    return run | {"arithmetic": arithmetic, "sizes": sizes, "shards": shards}


def default_threads(processes: int | None = None) -> int:
    """
    The largest power of two of threads that each of this machine's workers can have.

    torchrun tells every process to use one thread unless OMP_NUM_THREADS is set; here, the cores are shared out.
    """
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    threads = max(1, available_cores() // processes) if processes else torch.get_num_threads()
    return 1 << (threads.bit_length() - 1)


def content_of(pipe: JointConditionalPurificationPipeline, config: PurificationConfig) -> str:
    """Digest of every weight and of the configurations that a purification with these settings uses."""
    state = hashlib.blake2b(digest_size=16)
    parts = {"unet": unwrap_module(pipe.unet), "scheduler": pipe.scheduler}
    if config.perceptual_guidance_scale > 0:
        parts["perceptual"] = pipe.perceptual
    for part, component in parts.items():
        settings = {name: value for name, value in sorted(component.config.items()) if not name.startswith("_")}
        state.update(f"{part} {json.dumps(settings, sort_keys=True, default=str)}\n".encode())
        if isinstance(component, torch.nn.Module):
            for name, tensor in sorted(component.state_dict().items()):
                state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _name_and_revision(pipe: JointConditionalPurificationPipeline) -> dict:
    name = pipe.config.get("_name_or_path")
    if not name or Path(name).exists():
        return {"name": public_name(name) if name else None, "revision": None}
    # The weights were loaded from the cache's folder of one commit, whichever revision was asked for.
    commit = re.search(r"snapshots/([0-9a-f]{40})", Path(pipe.unet.config.get("_name_or_path", "")).as_posix())
    return {"name": name, "revision": commit[1] if commit else None}


def _called(key: tuple[str, ...]) -> str:
    """A part of a run in a sentence: by the name of its option, with its group where that alone says too little."""
    return " ".join(key if key[-1] in ("content", "count", "rows", *PACKAGES_OF_PIXELS) else key[-1:])


def _deciding(value: dict, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """What decides the pixels, by its place in a run."""
    flat = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat |= _deciding(entry, (*prefix, name))
        elif (*prefix, name) not in INFORMATION and (prefix != ("packages",) or name in PACKAGES_OF_PIXELS):
            flat[*prefix, name] = entry
    return flat
