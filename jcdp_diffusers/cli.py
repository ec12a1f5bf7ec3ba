"""`jcdp quickstart | poison | purify | score | audit | detect`: parse, call, print."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator

from .acceleration.allocation import keep_freed_memory
from .engines import FAILURES


# Each command's room offers `add_arguments(parser)` and `run(args)`; it is imported only when its command is given, so
# that `jcdp --help` answers at once.
COMMANDS = {
    "quickstart": ("jcdp_diffusers.quickstart", "protect, purify and score real images, end to end, in minutes"),
    "poison": ("jcdp_diffusers.poisons.protect", "protect a data set with an unlearnable-examples method"),
    "purify": ("jcdp_diffusers.purify.command", "turn a protected data set into a learnable one"),
    "score": ("jcdp_diffusers.score", "train victims on one data set and test them on another"),
    "detect": ("jcdp_diffusers.detect", "find out whether a set of images carries a protection"),
    "audit": ("jcdp_diffusers.audit.run", "find out whether a protection survives purification"),
}


def sentence(command: str, error: Exception) -> str:
    """What a command says of a failure, in one line."""
    return f"{command}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def ends_in_one_sentence(script: str) -> Iterator[None]:
    """For scripts: a failure in the block ends the process with `sentence` on stderr and exit code 1."""
    try:
        yield
    except FAILURES as error:
        raise SystemExit(sentence(script, error)) from error


def main(arguments: list[str] | None = None) -> int:
    """
    Run one command.

    Args:
        arguments (`list[str]`, *optional*): Words after `jcdp`; the process's own by default.

    Returns:
        `int`: 0 done, 1 a failure with one sentence on stderr, 130 interrupted (the same command goes on from there).
        Wrong usage exits with 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="jcdp", description="Audit unlearnable examples: does a protection survive purification?"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments[:1] == [name]:
            room = importlib.import_module(module)
            room.add_arguments(command)
    args = parser.parse_args(arguments)
    keep_freed_memory()
    try:
        room.run(args)
    except KeyboardInterrupt:
        print("jcdp: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except FAILURES as error:
        print(sentence(f"jcdp {args.command}", error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
