"""Audit unlearnable examples: purify protected image data sets with jointly guided diffusion (JCDP)."""

from importlib import import_module
from typing import Any


__version__ = "0.2.0"  # which pyproject.toml reads from here

# Name -> module. Each is imported when the name is first used, so that `import jcdp_diffusers` and `jcdp --help` load
# neither torch nor diffusers.
_MODULES = {
    "PRESETS": "purification_config",
    "GuidedDDIMScheduler": "scheduling_guided_ddim",
    "GuidedDDPMScheduler": "scheduling_guided_ddpm",
    "JointConditionalPurificationPipeline": "pipeline_jcdp",
    "LPIPSModel": "perceptual",
    "PurificationConfig": "purification_config",
    "PurificationOutput": "pipeline_jcdp",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
