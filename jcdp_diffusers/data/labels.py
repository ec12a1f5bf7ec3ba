"""
Labels: which number stands for which name, and one space of names for sets that meet.

Labels of two sources are joined by the names of their classes. Names that are numbers are compared as numbers:
folders `0` to `11` are in the order of their numbers, not of their text, and meet the integers 0 to 11 of another
source. Where one set has words for names and the other has bare integers, the integers are positions in the words, as
for folders and for class labels of `datasets`. Texts of a column have no positions, so there they are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import datasets
import numpy as np

from .found import say_once
from .labelled import LabelledImages


LABEL_COLUMNS = ("label", "labels", "fine_label")
# What sources call labels that `label_column` can read; a set without labels that has one of these says so.
LIKE_LABELS = ("class", "class_id", "class_name", "category", "target", "targets", "y", "coarse_label", "fine_labels")
_FEW = 12


def number_of(name: str) -> int | None:
    """The number that a name is, or None."""
    return int(name) if name.isascii() and name.isdigit() else None


def class_order(names: Sequence[str]) -> list[str]:
    """The different names in the order of their labels: numbers by size, words by text."""
    names = set(names)
    if all(number_of(name) is not None for name in names):
        return sorted(names, key=lambda name: (number_of(name), name))
    return sorted(names)


def label_array(
    values: list, ids: Sequence[str], feature, label_column: str | None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """
    Labels as int64 and the names of the classes, as far as they are known.

    Args:
        values (`list`): One value of the label column per image.
        ids (`Sequence[str]`): Of the images, for sentences.
        feature (`Any`): The column's type in `datasets`.
        label_column (`str`, *optional*): The column, where the caller named it; then it may not be empty throughout.

    Raises:
        ValueError: If some labels are missing (None, -1, an empty text or NaN), or are no integers and no texts.
    """
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    missing = [row for row, value in enumerate(values) if _is_missing(value, names)]
    if len(missing) == len(values) and label_column is None:
        return None, None
    if missing:
        raise ValueError(
            f"the label column lacks {len(missing)} of {len(values)} labels (None, -1 or empty), the first at id "
            f"{ids[missing[0]]!r}; a label for every image is accepted."
        )
    if names is not None and max(values) >= len(names):
        raise ValueError(f"the label column goes up to {max(values)}, but has names for {len(names)} classes only.")
    if names is not None:
        return np.array(values, np.int64), names
    if all(isinstance(value, str) for value in values):
        names = class_order(values)
        rank = {name: label for label, name in enumerate(names)}
        return np.array([rank[value] for value in values], np.int64), tuple(names)
    if all(isinstance(value, int) for value in values):
        return np.array(values, np.int64), None
    raise ValueError(f"the label column has the type {feature}; class labels, integers and strings are accepted.")


def _is_missing(value, names: tuple[str, ...] | None) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if value is None or value != value or value == -1:
        return True
    return names is not None and value < len(names) and not names[value].strip()


def merged_names(names_of_parts: Sequence[Sequence[str]]) -> list[str]:
    """The classes of several parts of one source: those of the first part, then what the others have beside them."""
    merged = list(names_of_parts[0])
    for names in names_of_parts[1:]:
        merged += [name for name in names if name not in merged]
    return merged


def join_labels(sets: Mapping[str, LabelledImages]) -> dict[str, LabelledImages]:
    """
    The sets with one number for each class, joined by the names of the classes.

    A class that has a name but no image in any of the sets is left out. Sets that agree already stay as they are.

    Args:
        sets (`dict`): By role, all with labels; the first set's order of names leads.

    Returns:
        `dict`: By role, in the same order, with equal `class_names` (None where no set has names).

    Raises:
        ValueError: In one sentence that names the role and the class, if a set has a class that another lacks, or
            names cannot be compared.
    """
    named = {role: data.class_names for role, data in sets.items() if data.class_names is not None}
    texts = {role for role, data in sets.items() if data.ranked_by_text}
    keys = {role: _keys(role, data, named, texts) for role, data in sets.items()}
    used = {role: {keys[role][label] for label in np.unique(data.labels)} for role, data in sets.items()}
    everywhere = set().union(*used.values())
    spelled: dict = {}
    for role in (*named, *(role for role in sets if role not in named)):
        for label, key in enumerate(keys[role]):
            spelled.setdefault(key, named[role][label] if role in named else str(key))
    order = [key for key in spelled if key in everywhere]
    if not named:
        order.sort()
    for role, present in used.items():
        if lacking := [spelled[key] for key in order if key not in present]:
            raise ValueError(
                f"{role} has no image of class {_few(lacking)}, but every one of the {len(order)} classes needs some."
            )
    names = tuple(spelled[key] for key in order) if named else None
    joined = {}
    for role, data in sets.items():
        number = {key: label for label, key in enumerate(order)}
        mapping = [number.get(key, -1) for key in keys[role]]
        if mapping == list(range(len(order))) and data.class_names == names:
            joined[role] = data
            continue
        joined[role] = replace(data, labels=np.array(mapping)[data.labels], class_names=names)
        _say_mapping(role, data, mapping, names)
    return joined


def _keys(role: str, data: LabelledImages, named: Mapping[str, tuple[str, ...]], texts: set[str]) -> list:
    """
    What each label of a set means, as something to compare: numbers if all names of all sets are numbers. `texts` are
    the roles whose names were ranked by text.
    """
    numbers = all(number_of(name) is not None for names in named.values() for name in names)
    if role in named:
        keys = [number_of(name) if numbers else name for name in named[role]]
        if len(set(keys)) < len(keys):
            twice = next(named[role][row] for row, key in enumerate(keys) if key in keys[:row])
            raise ValueError(f"{role} has the class {twice!r} twice, but every class has one name.")
        return keys
    if numbers:
        return list(range(data.num_classes))
    first, words = next(iter(named.items()))
    if first in texts:
        raise ValueError(
            f"{role} has integers for labels and {first} has texts, such as {words[0]!r}, but both must have the "
            "same kind: which text an integer stands for is not known."
        )
    if data.labels.max() >= len(words):
        raise ValueError(
            f"{role} has label {data.labels.max()}, but there are names for {len(words)} classes only (of {first})."
        )
    return list(words)


def _say_mapping(role: str, data: LabelledImages, mapping: list[int], names: tuple[str, ...] | None) -> None:
    present = np.unique(data.labels).tolist()
    numbered = names is None or all(number_of(name) is not None for name in names)
    if numbered and all(mapping[label] == label for label in present):
        return  # each number stays what it was
    own = data.class_names or range(len(mapping))
    shown = ", ".join(
        f"{own[label]} -> {mapping[label] if names is None else f'{mapping[label]} ({names[mapping[label]]})'}"
        for label in present[:_FEW]
    )
    more = f" and {len(present) - _FEW} more" if len(present) > _FEW else ""
    say_once(f"{role}: classes are joined by name: {shown}{more}.")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
