"""`jcdp quickstart | poison | purify | score | audit | detect`: parse, call, print."""

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .acceleration.allocation import keep_freed_memory
from .engines import FAILURES
from .outputs import printable


# Each command's module offers `add_arguments(parser)` and `run(args)`. It is imported only when its command is given,
# so that `jcdp --help` answers at once.
COMMANDS = {
    "quickstart": ("jcdp_diffusers.quickstart", "protect, purify and score real images, end to end, in minutes"),
    "poison": ("jcdp_diffusers.poisons.protect", "protect a data set with an unlearnable-examples method"),
    "purify": ("jcdp_diffusers.purify.command", "turn a protected data set into a learnable one"),
    "score": ("jcdp_diffusers.score", "train victims on one data set and test them on another"),
    "detect": ("jcdp_diffusers.detect", "find out whether a set of images carries a protection"),
    "audit": ("jcdp_diffusers.audit.command", "find out whether a protection survives purification"),
    "publish": ("jcdp_diffusers.publish", "push a purifier or protected data sets to the Hub, with their cards"),
    "demo": ("jcdp_diffusers.demo.command", "a page on which to drop pictures, protect or purify them, and compare"),
}


def sentence(command: str, error: Exception, options: Collection[str] = ()) -> str:
    """
    What a command says of a failure, in one line that no terminal obeys.

    Args:
        command (`str`): Its name, which comes first.
        error (`Exception`): Whose sentence begins with the name of an argument in Python.
        options (`Collection[str]`): Names of the command's options, without dashes. An argument that is one of them
            is called by its option where the sentence begins with it, and where its name, such as `image_size`, is no
            word of prose.
    """
    said = printable(" ".join(str(error).split()))
    if said.split(" ", 1)[0] in options:
        said = f"--{said}"
    called = {name: f"--{name}" for name in options if "_" in name}
    if "output" in options:
        called["output_dir"] = "--output"
    # Not within paths, quotes and longer names.
    return f"{command}: " + re.sub(
        r"(?<![\w./'\"-])\w+_\w+(?![\w./(=])", lambda name: called.get(name[0], name[0]), said
    )


def expand_home(args: argparse.Namespace) -> argparse.Namespace:
    """Parsed options, with the home folder for `~` at the beginning of a path: shells leave `--output=~/x` alone."""

    def expanded(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(expanded, value))
        return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value

    for name, value in vars(args).items():
        setattr(args, name, expanded(value))
    return args


def check_belongings(args: argparse.Namespace) -> None:
    """Refuse `--collected_split` without `--collected`, and so on: how to read or write what is not given."""
    for name, value in vars(args).items():
        what, _, aspect = name.rpartition("_")
        if aspect in ("split", "format") and value is not None and getattr(args, what, value) is None:
            raise ValueError(f"--{name} is {value!r}, but must be left out without --{what}.")


@contextlib.contextmanager
def ends_in_one_sentence(script: str, go_on: str = "give the same command again") -> Iterator[None]:
    """
    For scripts: a failure in the block ends the process with `sentence` on stderr and exit code 1, an interruption
    with how to go on and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{script}: interrupted; {go_on}", file=sys.stderr)
        raise SystemExit(130) from None
    except FAILURES as error:
        raise SystemExit(sentence(script, error)) from error


def main(arguments: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        arguments (`list[str]`, *optional*): Words after `jcdp`; the process's own by default.

    Returns:
        `int`: 0 done, 1 a failure with one sentence on stderr, 130 interrupted (the same command continues).
        Wrong usage exits with 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="jcdp", description="Audit unlearnable examples: does a protection survive purification?"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments[:1] == [name]:
            module = importlib.import_module(path)
            module.add_arguments(command)
    args = expand_home(parser.parse_args(arguments))
    keep_freed_memory()
    try:
        check_belongings(args)
        module.run(args)
    except KeyboardInterrupt:
        print("jcdp: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except FAILURES as error:
        print(sentence(f"jcdp {args.command}", error, options=vars(args)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
