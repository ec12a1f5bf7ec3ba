"""Any image data set in; images, labels and stable ids out; and the check that the three roles do not overlap.

An image is uint8 of shape (height, width, channels) here. Floats exist between :meth:`LabelledImages.tensor` and
:func:`to_uint8`, which rounds once. Ids travel with the images, so that shuffles and filters cannot misalign anything.
"""

from .decoding import MAX_PIXELS, ImageRejected, decode_image
from .labelled import LabelledImages, to_uint8
from .names import choose_split, split_of
from .parquet import parquet_files
from .roles import FEW, check_roles, find_overlap
from .sources import load_images, open_dataset
from .writing import write_dataset


__all__ = [
    "FEW",
    "MAX_PIXELS",
    "ImageRejected",
    "LabelledImages",
    "check_roles",
    "choose_split",
    "decode_image",
    "find_overlap",
    "load_images",
    "open_dataset",
    "parquet_files",
    "split_of",
    "to_uint8",
    "write_dataset",
]
