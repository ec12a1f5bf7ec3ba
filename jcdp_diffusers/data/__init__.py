"""Any image data set in; images, labels and stable ids out; and the check that the three roles do not overlap.

An image is uint8 of shape (height, width, channels) here. Floats exist between [`LabelledImages.tensor`] and
[`to_uint8`], which rounds once. Ids travel with the images, so that shuffles and filters cannot misalign anything.
"""

from .decoding import MAX_PIXELS, ImageRejected, decode_image, picture_size
from .labelled import LabelledImages, to_uint8
from .labels import join_labels
from .parquet import is_url, parquet_files, parquet_shards
from .roles import FEW, USUAL_BUDGET, check_roles, find_likenesses, find_overlap
from .sources import column_names, load_images, open_dataset, present_columns
from .splits import choose_split
from .writing import write_dataset


__all__ = [
    "FEW",
    "MAX_PIXELS",
    "USUAL_BUDGET",
    "ImageRejected",
    "LabelledImages",
    "check_roles",
    "choose_split",
    "column_names",
    "decode_image",
    "find_likenesses",
    "find_overlap",
    "is_url",
    "join_labels",
    "load_images",
    "open_dataset",
    "parquet_files",
    "parquet_shards",
    "picture_size",
    "present_columns",
    "to_uint8",
    "write_dataset",
]
