"""Audits of digits of 16x16 in smoke runs, which take seconds: their images and their commands."""

import numpy as np
from sklearn.datasets import load_digits

from jcdp_diffusers.data import LabelledImages


ATTACKS = "gray,eclipse,purified+corruption,impulse-filter+purified+corruption"


def digits(rows) -> LabelledImages:
    source = load_digits()
    images = (source.images * 15).astype(np.uint8)[:, :, :, None]
    images = images.repeat(2, 1).repeat(2, 2).repeat(3, 3)
    ids = tuple(f"digit-{row}" for row in range(len(images)))
    return LabelledImages(images, source.target, ids, tuple("0123456789")).subset(rows)


def options(folders, *roles) -> list[str]:
    return [word for role in roles for word in (f"--{role}", folders[role])]


def command(folders, output, *more, roles=("protected", "collected", "test")) -> list[str]:
    smoke = ["--protocol", "smoke", "--seeds", "1", "--processes", "1", "--device", "cpu"]
    return ["audit", *options(folders, *roles), "--output", str(output), *smoke, *more]


def sentence(capfd) -> str:
    """What a command that failed said last."""
    lines = capfd.readouterr().err.strip().splitlines()
    return lines[-1]
