"""Audit unlearnable examples: purify protected image data sets with jointly guided diffusion (JCDP)."""

from .perceptual import LPIPSModel
from .pipeline_jcdp import JointConditionalPurificationPipeline, PurificationOutput
from .purification_config import PRESETS, PurificationConfig
from .scheduling_guided_ddim import GuidedDDIMScheduler
from .scheduling_guided_ddpm import GuidedDDPMScheduler


__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "GuidedDDIMScheduler",
    "GuidedDDPMScheduler",
    "JointConditionalPurificationPipeline",
    "LPIPSModel",
    "PurificationConfig",
    "PurificationOutput",
]
