"""To the Hub, one commit a folder: a purifier's repository, or a purified or protected data set."""

import os
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .repository import INDEX, WEIGHTS, on_hub


# All that a purifier's repository consists of; not checkpoints (which hold optimiser states), grids and logs.
PURIFIER_FILES = (
    "README.md",
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model*.safetensors",
    "unet/diffusion_pytorch_model*.index*.json",
    "scheduler/scheduler_config.json",
    "purification_config.json",
    "training_record.json",
    "trained_on.json",
    "perceptual/*",
)
_NEEDED = ("unet/config.json", "unet/diffusion_pytorch_model*.safetensors", "scheduler/scheduler_config.json")
EVAL_RESULTS = ".eval_results/jcdp.yaml"  # what `jcdp publish` says of a purifier's audit
# Images that were refused are the source's own, and may be anything; what is hidden is the state of the work.
NOT_OF_A_DATASET = ("rejected/*", ".*")


def push_purifier(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload purifier",
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """
    Push a purifier's repository: weights, configurations, records and card, and nothing else of the folder.

    Weights, settings and results of an earlier push that this one does not have are deleted in the same commit: they
    belong to another purifier. Weights of another variant stay, and so do card, record and list of images, which tells
    by a digest whether it is of these weights.

    Args:
        folder (`str` or `os.PathLike`): What `save_pretrained` of the pipeline or `train_purifier` wrote.
        repo_id (`str`): Name on the Hub, with or without a namespace; made if needed.
        private (`bool`, *optional*): For a repository that is made now; None is the namespace's default.
        commit_message (`str`, defaults to `"Upload purifier"`): Of the one commit.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing to the main branch.
        token (`str`, *optional*): Of the Hub; None is the one that `hf auth login` saved.

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: As `files_of_purifier`, before anything is pushed.
    """
    options = {"repo_type": "model", "private": private, "token": token}
    files = files_of_purifier(folder)
    return push_files(files, repo_id, commit_message=commit_message, create_pr=create_pr, **options)


def push_dataset(
    folder: str | os.PathLike, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """
    Push a purified data set: all that the folder holds but rejected images and hidden files.

    Shards of the same split that an earlier push has put there are deleted in the same commit, or the data set would
    be of both.

    Args:
        folder (`str` or `os.PathLike`): What `purify_dataset` wrote, finished.
        repo_id, private, token: As for [`push_purifier`].

    Returns:
        `str`: URL of the commit.
    """
    options = {"repo_type": "dataset", "private": private, "token": token}
    return push_files(files_of_dataset(folder), repo_id, commit_message="Upload purified data set", **options)


def create_repository(repo_id: str, *, repo_type: str = "model", private: bool | None = None, token=None) -> str:
    """
    Make a repository unless it is there: whoever may not push learns it before the work.

    Args:
        repo_id, private, token: As for [`push_purifier`].
        repo_type (`str`, defaults to `"model"`): Or `"dataset"`.

    Returns:
        `str`: The repository's name with its namespace.

    Raises:
        OSError: If the Hub cannot be reached, or refuses.
    """
    with on_hub(repo_id):
        return HfApi(token=token).create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id


def files_of_purifier(folder: str | os.PathLike) -> dict[str, Path]:
    """
    What [`push_purifier`] pushes of a folder: path in the repository -> file.

    Raises:
        ValueError: If weights or a configuration are not among them.
    """
    files = {name: path for name, path in _files(folder) if any(fnmatch(name, one) for one in PURIFIER_FILES)}
    for needed in _NEEDED:
        if not any(fnmatch(name, needed) for name in files):
            raise ValueError(
                f"folder is {os.fspath(folder)!r}, which has no {needed}, but must be as the pipeline's "
                "`save_pretrained` writes it, with weights as safetensors."
            )
    return files


def files_of_dataset(folder: str | os.PathLike) -> dict[str, Path]:
    """What [`push_dataset`] pushes of a folder: path in the repository -> file."""
    return {name: path for name, path in _files(folder) if not any(fnmatch(name, one) for one in NOT_OF_A_DATASET)}


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    repo_type: str,
    private: bool | None = None,
    commit_message: str,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """
    Push files in one commit, which deletes what they replace (`is_replaced`).

    Args:
        files (`dict`): Path in the repository -> file, or its content.
        repo_id, private, token: As for [`push_purifier`].
        repo_type (`str`): `"model"` or `"dataset"`.
        commit_message (`str`): Of the one commit.
        create_pr (`bool`, defaults to `False`): As for [`push_purifier`].

    Returns:
        `str`: URL of the commit.

    Raises:
        OSError: If the Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    repo_id = create_repository(repo_id, repo_type=repo_type, private=private, token=token)
    with on_hub(repo_id):
        there = api.list_repo_files(repo_id, repo_type=repo_type)
        operations = [CommitOperationDelete(name) for name in there if is_replaced(name, files, repo_type)]
        operations += [CommitOperationAdd(name, content) for name, content in files.items()]
        options = {"repo_type": repo_type, "commit_message": commit_message, "create_pr": create_pr}
        return api.create_commit(repo_id, operations, **options).commit_url


def is_replaced(name: str, files: Collection[str], repo_type: str) -> bool:
    """
    Whether a file of a repository is one of an earlier push, and would be wrong beside the files of this one.

    Of a purifier these are weights of a variant that is pushed now, the settings, the perceptual network and the
    results of an audit. Of a data set these are shards of a split that is pushed now, all shards of a folder that is
    pushed now, and summary, manifest and benchmark.

    Args:
        name (`str`): Path in the repository.
        files (`Collection[str]`): Paths that are pushed now.
        repo_type (`str`): `"model"` or `"dataset"`.
    """
    if name in files:
        return False
    if repo_type == "model" and (variant := _variant(name)) is not None:
        return variant in map(_variant, files)
    if repo_type == "model":
        return fnmatch(name, "perceptual/*") or name in ("purification_config.json", EVAL_RESULTS)
    if name.endswith(".parquet"):
        # Of a folder the card takes all files as one split; beside the card each split has files of its name.
        same = os.path.dirname if "/" in name else _shards_of
        return same(name) in map(same, files)
    return name in ("summary.json", "run.json", "eval.yaml")


def _variant(name: str) -> str | None:
    """Of a file of the network's weights, or of their index: its variant, "" for none; None of other files."""
    folder, _, file = name.rpartition("/")
    found = (WEIGHTS.fullmatch(file) or INDEX.fullmatch(file)) if folder == "unet" else None
    return None if found is None else found[1] or ""


def _shards_of(name: str) -> str:
    """Folder and split of a Parquet file."""
    return re.sub(r"-\d+-of-\d+(?=\.parquet$)", "", name)


def _files(folder: str | os.PathLike) -> list[tuple[str, Path]]:
    folder = Path(folder)
    return [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]
