"""`jcdp demo` as a Space: the variable PURIFIER of the Space names a purifier on the Hub."""

import os

from jcdp_diffusers.demo.page import launch, page


launch(page(os.environ.get("PURIFIER", "google/ddpm-cifar10-32")))
