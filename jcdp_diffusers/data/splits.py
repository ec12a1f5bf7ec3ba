"""
Which files make which split: the rules of `datasets`, and an error wherever they leave a doubt.

The first rule that fits any file decides for all of them:

1. `<split>-00000-of-00002.*`, directly in the folder or in its `data/`: the split is named so.
2. A folder on the way to the file has a keyword among its words: `train`, `Testing`, `fold_val`, `split=dev`.
3. The file's own name has one: `photos-test-1.png`.
4. All files are `train`.

The keywords are those of `datasets`, in any case of letters. `datasets` reads a file that has the keywords of two
splits twice, and leaves out in silence a file that has none where others have one; both are refused here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

from .names import name_of


_KEYWORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_BETWEEN_WORDS = re.compile(f"[{NON_WORDS_CHARS}=]+")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}.*\..*")
_SHARD_PLACES = (PurePath(), PurePath("data"))


def choose_split(splits: Sequence[str] | Mapping, split: str | None, source: Any) -> str:
    """The split that was asked for, or the only one there is; `source` is named in the error."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split is None:
        raise ValueError(
            f"source {name_of(source)} has several splits and split is None; {', '.join(splits)} are accepted."
        )
    if split not in splits and len(meant := split_words(split).intersection(splits)) == 1:
        return meant.pop()
    if split not in splits:
        raise ValueError(
            f"split is {split!r}, which source {name_of(source)} lacks; {', '.join(splits)} are accepted."
        )
    return split


def splits_of(files: Sequence[Path], source: Path) -> dict[str, list[Path]]:
    """
    The files of each split, by the rules above.

    Args:
        files (`Sequence[Path]`): Relative to `source`.
        source (`Path`): The folder, for sentences.

    Returns:
        `dict`: Files by split, in their order; splits in alphabetical order.

    Raises:
        ValueError: If a file belongs to two splits, or to none where others have one; the folders are named.
    """
    for rule in (_by_shard, _by_folders, _by_file_name):
        found = {file: rule(file) for file in files}
        if not any(found.values()):
            continue
        if several := {file: names for file, names in found.items() if len(names) > 1}:
            file, names = next(iter(several.items()))
            raise ValueError(
                f"source {name_of(source)} holds {str(file)!r}, whose name speaks of the splits "
                f"{' and '.join(sorted(names))}; names with one of them are accepted."
            )
        if without := [file for file, names in found.items() if not names]:
            with_one = next(file for file, names in found.items() if names)
            raise ValueError(
                f"source {name_of(source)} has splits ({_place(with_one)} is {next(iter(found[with_one]))!r}), but "
                f"{_few_places(without)} {'is' if len(_places(without)) == 1 else 'are'} in none of them; give one "
                "folder, or move or rename the others."
            )
        splits: dict[str, list[Path]] = {}
        for file in files:
            splits.setdefault(next(iter(found[file])), []).append(file)
        return dict(sorted(splits.items()))
    return {"train": list(files)}


def split_of_file(file: Path) -> str:
    """The split of a file that is a source of its own: its name tells it, or else the folder that it lies in."""
    shard = _SHARD.fullmatch(file.name)
    words = split_words(file.name)
    return shard[1] if shard else words.pop() if len(words) == 1 else _KEYWORDS.get(file.parent.name.lower(), "train")


def split_words(name: str) -> set[str]:
    """The splits that a name's words speak of; of names such as `key=value` only `split=...` does."""
    key, equals, _ = name.partition("=")
    if equals and key != "split":
        return set()
    return {_KEYWORDS[word] for word in _BETWEEN_WORDS.split(name.lower()) if word in _KEYWORDS}


def below_split(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders on the way to a file, before and behind the folder that names its split."""
    folders = file.parts[:-1]
    named = [index for index, name in enumerate(folders) if split_words(name)]
    return (folders[: named[0]], folders[named[-1] + 1 :]) if named else ((), folders)


def _by_shard(file: Path) -> set[str]:
    shard = _SHARD.fullmatch(file.name) if file.parent in _SHARD_PLACES else None
    return {shard[1]} if shard else set()


def _by_folders(file: Path) -> set[str]:
    return set().union(*map(split_words, file.parts[:-1]))


def _by_file_name(file: Path) -> set[str]:
    return split_words(file.name)


def _place(file: Path) -> str:
    """The folder at the top that a file lies in, or the file."""
    return repr(file.parts[0] + "/") if len(file.parts) > 1 else repr(file.name)


def _places(files: Sequence[Path]) -> list[str]:
    return sorted({_place(file) for file in files})


def _few_places(files: Sequence[Path]) -> str:
    places = _places(files)
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more
