"""`python -m jcdp_diffusers.purify`: `jcdp purify` under `torchrun` or `accelerate launch`."""

import argparse
import sys

from ..acceleration.allocation import keep_freed_memory
from .command import add_arguments, run


def main(arguments: list[str] | None = None) -> int:
    """`python -m jcdp_diffusers.purify`: exit code 0 done, 1 failed with one sentence, 2 usage, 130 stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m jcdp_diffusers.purify", description="Turn a protected data set into a learnable one."
    )
    add_arguments(parser)
    keep_freed_memory()
    try:
        run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
