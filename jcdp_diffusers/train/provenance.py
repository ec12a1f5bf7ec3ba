"""
Which images trained a purifier: a list of their digests beside its weights.

An audit that is given a purifier would otherwise have to believe that it never saw the test images or the originals
of the protected ones. Whoever holds an image can look it up; nobody can get an image back from the list.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from ..data import LabelledImages
from ..repository import TRAINED_ON_NAME, weights_digest
from .reading import damaged, read_json


WEIGHTS = "unet/*.safetensors"


def image_digests(images: np.ndarray) -> list[str]:
    """
    What stands for each image: 16 hexadecimal digits, made of its shape and its pixels.

    Args:
        images (`np.ndarray`): uint8, shape (N, H, W, C).
    """
    shape = repr(images.shape[1:]).encode()
    return [hashlib.blake2b(shape + image.tobytes(), digest_size=8).hexdigest() for image in images]


def write_trained_on(folder: str | os.PathLike, digests: Collection[str] | None) -> None:
    """
    Write `trained_on.json` beside a purifier's weights, or remove it where the list would not be whole.

    Args:
        folder (`str` or `os.PathLike`): The repository, with its weights.
        digests (`Collection[str]`, *optional*): Of all images that the network ever saw; None if some are not known.
    """
    path = Path(folder) / TRAINED_ON_NAME
    if digests is None:
        path.unlink(missing_ok=True)
        return
    path.write_text(json.dumps({"weights": weights_digest(path.parent), "images": sorted(set(digests))}) + "\n")


def trained_on(purifier: str | os.PathLike, revision: str | None = None) -> frozenset[str] | None:
    """
    Digests of all images that a purifier was trained on.

    Args:
        purifier (`str` or `os.PathLike`): Folder or Hub id.
        revision (`str`, *optional*): Of a Hub id: branch, tag or commit.

    Returns:
        `frozenset[str]`: See `image_digests`; None if the repository has no list, one of other weights, or cannot be
        reached.

    Raises:
        ValueError: If the list is damaged; the sentence names the file.
    """
    folder = Path(purifier)
    if not folder.is_dir():
        try:
            wanted = [TRAINED_ON_NAME, WEIGHTS]
            folder = Path(snapshot_download(str(purifier), revision=revision, allow_patterns=wanted))
        except (HTTPError, LocalEntryNotFoundError):
            return None
    path = folder / TRAINED_ON_NAME
    if not path.is_file():
        return None
    listed = read_json(path, {"weights": str, "images": list})
    if not all(isinstance(digest, str) for digest in listed["images"]):
        raise damaged(path, "images holds something else than digests")
    return frozenset(listed["images"]) if listed["weights"] == weights_digest(folder) else None


def check_trained_on(purifier: str | os.PathLike, sets: Mapping[str, LabelledImages], *, roles: str) -> int | None:
    """
    Refuse a purifier that was trained on images which it must not have seen.

    Args:
        purifier (`str` or `os.PathLike`): Folder or Hub id.
        sets (`dict`): By role; of them only `test` may have been seen, and must have been, where `roles` is `"paper"`.
        roles (`str`): One of `data.checks.ROLES`.

    Returns:
        `int`: How many images trained it; None if its repository does not list them (`trained_on.json`).

    Raises:
        ValueError: In one sentence that names the role and the first image.
    """
    listed = trained_on(purifier)
    if listed is None:
        return None
    for role, data in sets.items():
        seen = [id_ for id_, digest in zip(data.ids, image_digests(data.images)) if digest in listed]
        if roles == "paper" and role == "test":
            if not seen:
                raise ValueError(
                    f"roles is 'paper', but purifier {str(purifier)!r} was trained on none of the test images: "
                    "'disjoint' is what these sets are."
                )
        elif seen:
            raise ValueError(
                f"purifier {str(purifier)!r} was trained on {len(seen)} of the {len(data)} {role} images, the first "
                f"{seen[0]!r}, but must have seen none of them."
            )
    return len(listed)
