"""A whole data set: `purify_dataset` turns a protected data set into a learnable one, shard by shard."""

from .dataset import purify_dataset


__all__ = ["purify_dataset"]
