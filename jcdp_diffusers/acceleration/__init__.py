"""Faster networks with the same numbers: `placement.place` puts a pipeline on a device in the fastest way."""
