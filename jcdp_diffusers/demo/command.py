"""The options of `jcdp demo`, and what it says where there is no purifier."""

import argparse
import importlib.util
import socket

from ..acceleration.placement import PRECISIONS


HOW_TO_GET_A_PURIFIER = (
    "`jcdp quickstart` makes one of handwritten digits in runs/quickstart/purifier; "
    "`python training/train_purifier.py` trains one on pictures of your own; `--purifier google/ddpm-cifar10-32` "
    "names one on the Hub, whose large network takes minutes for a photograph on a CPU."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jcdp demo`."""
    parser.add_argument("--purifier", help="folder or Hub id of a DDPM; without one the page only protects")
    parser.add_argument("--device", help="cuda if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the purifier's network")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines reach the page")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on, if not given")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")


def run(args: argparse.Namespace) -> None:
    """`jcdp demo`: serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("jcdp demo needs gradio, which is not installed: pip install 'jcdp-diffusers[demo]'.")
    if args.port is not None and not 0 < args.port < 2**16:
        raise ValueError(f"--port is {args.port}, but must lie between 1 and {2**16 - 1}.")
    try:
        socket.getaddrinfo(args.host, None)
    except OSError as error:
        raise ValueError(f"--host is {args.host!r}, but must be a name or an address of this machine.") from error
    from .page import launch, page

    if args.purifier is None:
        print(f"No --purifier is given, so the page only protects. {HOW_TO_GET_A_PURIFIER}")
    blocks = page(args.purifier, device=args.device, precision=args.precision)
    launch(blocks, server_name=args.host, server_port=args.port, inbrowser=args.open)
