"""
Faster networks with the same numbers: `place` puts a pipeline on a device in the fastest way.

    from jcdp_diffusers.acceleration import place

    place(pipe, "cuda")

Names are imported when they are first used: commands take `allocation` from here before torch is loaded, and the
pipeline itself takes `feature_cache`.
"""

from importlib import import_module
from typing import Any


__all__ = ["PRECISIONS", "place"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".placement", __name__), name)
