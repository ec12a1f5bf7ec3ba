"""`python -m jcdp_diffusers.purify`: `jcdp purify` under `torchrun` or `accelerate launch`."""

import sys

from .. import cli


def main(arguments: list[str] | None = None) -> int:
    """`jcdp purify` with these options, the process's own by default; its exit code."""
    return cli.main(["purify", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
