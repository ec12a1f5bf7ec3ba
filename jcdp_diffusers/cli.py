"""`jcdp COMMAND` for each of `COMMANDS`: parse, call, print."""

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

# Arguments in Python whose option has another name.
RENAMED = {"output_dir": "output", "purification": "preset", "attacks": "countermeasures", "folder": "source"}


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
    renamed = {name: f"--{option}" for name, option in RENAMED.items() if option in options}
    named = renamed | {name: f"--{name}" for name in options}
    first, space, rest = said.partition(" ")
    said = named.get(first, first) + space + rest
    called = {name: option for name, option in named.items() if "_" in name}
    # Not within paths, quotes and longer names.
    return f"{command}: " + re.sub(
        r"(?<![\w./'\"-])\w+_\w+(?![\w./(=])", lambda name: called.get(name[0], name[0]), said
    )


class Parser(argparse.ArgumentParser):
    """
    Of commands and scripts.

    An option is given by its whole name: argparse would take `--seed` for `--seeds` where there is no `--seed`. The
    home folder stands for `~` at the beginning of a path, because shells leave `--output=~/x` alone.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        return _expand_home(super().parse_args(arguments))


def _expand_home(args: argparse.Namespace) -> argparse.Namespace:

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
    parser = Parser(prog="jcdp", description="Audit unlearnable examples: does a protection survive purification?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments[:1] == [name]:
            module = importlib.import_module(path)
            module.add_arguments(command)
    args = parser.parse_args(arguments)
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
