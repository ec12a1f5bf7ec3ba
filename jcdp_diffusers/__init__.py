"""Audit unlearnable examples: purify protected image data sets with jointly guided diffusion (JCDP)."""

__version__ = "0.1.0"
