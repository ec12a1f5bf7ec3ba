"""Images with their labels and ids, in memory, and the one rounding to bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


LARGEST_LABEL = 999_999  # a network has an output for each number up to the largest


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their labels and ids, in memory.

    Args:
        images (`np.ndarray`): uint8 of shape (N, H, W, C), C = 1 or 3, N at least 1.
        labels (`np.ndarray`, *optional*): Integers of shape (N,), kept as int64, or None.
        ids (`tuple[str, ...]`): N different strings.
        class_names (`tuple[str, ...]`, *optional*): Name of label 0, 1, ..., where known.
        id_space (`str`, *optional*): Where the ids have their meaning. "" for ids that were given (an `id` column, the
            caller); the source's name for row numbers of a source without ids, which mean something within that source
            only; None for row numbers of something without a name. Ids of two sets are compared only within one space.
        files (`tuple[str | None, ...]`, *optional*): The file that each image lies in, for sentences; None where it
            has none of its own.
        ranked_by_text (`bool`): Whether the labels are ranks of texts in a column, whose order nobody else knows. Bare
            integers of another set are no such ranks.
    """

    images: np.ndarray
    labels: np.ndarray | None
    ids: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    id_space: str | None = ""
    files: tuple[str | None, ...] | None = None
    ranked_by_text: bool = False

    def __post_init__(self):
        check_image_array(self.images, "images")
        object.__setattr__(self, "ids", tuple(self.ids))
        if len(self.ids) != len(self.images):
            raise ValueError(f"ids has {len(self.ids)} entries for {len(self.images)} images; one each is accepted.")
        check_ids(self.ids)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.labels is not None:
            labels = np.asarray(self.labels)
            if labels.shape != (len(self.images),):
                raise ValueError(
                    f"labels has shape {labels.shape} for {len(self.images)} images; one label per image is accepted."
                )
            if labels.dtype.kind not in "iu":
                raise ValueError(f"labels has dtype {labels.dtype}; integers are accepted.")
            if labels.min() < 0:
                row = int(np.argmax(labels < 0))
                raise ValueError(f"labels has {labels[row]} at id {self.ids[row]!r}; 0 and above are accepted.")
            if labels.max() > LARGEST_LABEL:
                row = int(np.argmax(labels))
                raise ValueError(
                    f"labels has {labels[row]} at id {self.ids[row]!r}; at most {LARGEST_LABEL:,} is accepted: "
                    "classes are numbered from 0 on."
                )
            if self.class_names is not None and labels.max() >= len(self.class_names):
                raise ValueError(
                    f"labels goes up to {labels.max()} but class_names has {len(self.class_names)} entries; "
                    "a name for every label is accepted."
                )
            object.__setattr__(self, "labels", labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """
        Number of classes: that of the names where there are names, else the largest label plus 1.

        Raises:
            ValueError: If there are neither names nor labels.
        """
        if self.class_names is not None:
            return len(self.class_names)
        if self.labels is None:
            raise ValueError("labels is None, but must be given where class_names is None to tell the classes.")
        return int(self.labels.max()) + 1

    def called(self, row: int) -> str:
        """What a sentence calls an image: its file, or else its id."""
        return repr((self.files[row] if self.files is not None else None) or self.ids[row])

    def subset(self, indices: Sequence[int] | np.ndarray) -> "LabelledImages":
        """The rows at `indices` (integers, or a boolean mask of length N), in that order, ids and labels with them."""
        indices = np.asarray(indices)
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise ValueError(f"indices is a mask of shape {indices.shape}; ({len(self)},) is accepted.")
            indices = np.flatnonzero(indices)
        if indices.size == 0:
            raise ValueError("indices selects no image; at least one is accepted.")
        return replace(
            self,
            images=self.images[indices],
            labels=None if self.labels is None else self.labels[indices],
            ids=tuple(self.ids[index] for index in indices),
            files=None if self.files is None else tuple(self.files[index] for index in indices),
        )

    def with_images(self, images: np.ndarray) -> "LabelledImages":
        """The same rows with other pixels: uint8 (N, H, W, C), of any size."""
        return replace(self, images=images)

    def tensor(self) -> torch.Tensor:
        """float32 (N, C, H, W) in [0, 1]."""
        return torch.from_numpy(np.ascontiguousarray(self.images.transpose(0, 3, 1, 2))).float().div_(255)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Clip to [0, 1] and round once.

    Args:
        images (`torch.Tensor`): Float (N, C, H, W); 1.0 is level 255.

    Returns:
        `np.ndarray`: uint8 (N, H, W, C).
    """
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; floats in [0, 1] are accepted.")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}; (N, 1 or 3, H, W) is accepted.")
    if not torch.isfinite(images).all():
        raise ValueError("images holds NaN or infinity; finite values are accepted.")
    levels = images.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


def check_image_array(images: np.ndarray, name: str) -> None:
    """Refuse what is not uint8 of shape (N, H, W, 1 or 3) with an image in it; `name` is the argument's."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{name} is of type {kind}; a uint8 array is accepted (to_uint8 rounds floats).")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(f"{name} has shape {images.shape}; (N, H, W, 1 or 3) is accepted.")
    if len(images) == 0:
        raise ValueError(f"{name} is empty; at least one image is accepted.")


def check_ids(ids: Sequence[str | None], prefix: str = "") -> None:
    """Refuse ids that are no strings or there twice; `prefix` begins the error."""
    seen = set()
    for id_ in ids:
        if not isinstance(id_, str):
            raise ValueError(f"{prefix}ids holds {id_!r}; strings are accepted.")
        if id_ in seen:
            raise ValueError(f"{prefix}ids holds {id_!r} more than once; different ids are accepted.")
        seen.add(id_)
