"""`audit` finds out whether a protection survives purification, and writes a report."""

from .run import audit


__all__ = ["audit"]
