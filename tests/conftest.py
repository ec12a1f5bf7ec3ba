"""Fixtures that every room's tests may use. One thread and no network, so that a run is the same everywhere."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
