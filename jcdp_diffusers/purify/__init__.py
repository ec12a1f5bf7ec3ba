"""
A whole data set: `purify_dataset` turns a protected data set into a learnable one, shard by shard.

It is imported when it is first used, so that processes that decode and encode images load no diffusers.
"""

from importlib import import_module
from typing import Any


__all__ = ["purify_dataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".dataset", __name__), name)
