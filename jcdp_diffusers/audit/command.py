"""The command line of `jcdp audit`."""

import argparse
import shlex
from pathlib import Path

from .. import countermeasures
from ..data import present_columns
from ..data.checks import ROLES, budget_of_levels
from ..outputs import check_output_folder, public_name
from ..victims import choice
from .attacks import PRETRAINED, PURIFIED
from .run import BEGUN_NAME, OWN_NAMES, audit
from .sets import UNLABELLED, about
from .settings import DIVIDED_MINUTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `jcdp audit`."""
    what = parser.add_argument_group("the images, each a folder, file or Hub id")
    what.add_argument("--protected", required=True, help="protected images; with labels if --method needs them")
    what.add_argument(
        "--collected",
        help="unprotected images that train the purifier; no labels needed; a part of the others if not given",
    )
    what.add_argument(
        "--collected_protected", help="of --collected what the protection tool makes, for an attack with pairs"
    )
    what.add_argument("--test", help="clean labelled images of the same classes; a part of the others if not given")
    what.add_argument("--clean", help="originals of the protected images, under the same ids")
    what.add_argument(
        "--probe_images",
        help="clean labelled images to probe what --method learns without labels; --clean if not given",
    )
    for role in ("protected", "collected", "collected_protected", "test", "clean", "probe_images"):
        what.add_argument(f"--{role}_split", help="the only one if not given" if role == "protected" else None)
    what.add_argument("--image_column", help="found by its usual names if not given, and so the next")
    what.add_argument("--label_column", help="of images whose labels are used, and of others where they have it")
    what.add_argument(
        "--image_size", type=int, help="side in pixels to which images are brought; chosen for assorted ones"
    )
    what.add_argument(
        "--skip_unusable_images", action="store_true", help="leave out images that cannot be used, and list them"
    )
    what.add_argument("--channels", type=int, choices=(1, 3), default=3)
    what.add_argument("--roles", choices=ROLES, default="disjoint", help="paper: collected are the test images")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--output", help="folder for report, records, purifier and purified images; audit-NAME if not given"
    )
    how.add_argument(
        "--budget_minutes",
        type=float,
        metavar="N",
        help=f"train no longer; {DIVIDED_MINUTES:g} if the audit divides images itself or has no labels, else without "
        "limit",
    )
    how.add_argument("--purifier", help="folder or Hub id of a DDPM; trained on --collected if not given")
    how.add_argument(
        "--perceptual",
        metavar="NAME_OR_PATH",
        help="of a purifier trained here, for guides that need one: alex, vgg, squeeze, a folder or SqueezeNet's file",
    )
    how.add_argument("--preset", help="how to purify; what the purifier's repository says if not given")
    how.add_argument(
        "--countermeasures",
        "--attacks",
        default="",
        help=f"to try beside purification, commas between them: {', '.join(countermeasures.NAMES)}; several joined by "
        f"'+', such as impulse-filter+{PURIFIED}+corruption, where {PURIFIED} is the audit's purification; "
        f"{' or '.join(PRETRAINED)} for victims that start from a network trained on --collected",
    )
    how.add_argument("--pairs", type=int, default=4000, help="how many of --collected an attack with pairs protects")
    how.add_argument(
        "--control", action="store_true", help="also train on clean images with noise of the same size, as a control"
    )
    choice.add_arguments(
        how,
        short=True,
        nargs="+",
        default=["supervised"],
        help="how victims learn; of several, the first gives the verdict, and the report has all",
    )
    how.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=[],
        metavar="F",
        help="also train on images of which these fractions are protected, such as 0.2 0.4 0.6 0.8 1.0, beside the "
        "clean rest alone; needs --clean",
    )
    how.add_argument("--seeds", type=int, default=3, help="victims per row")
    how.add_argument("--seed", type=int, default=0, help="of purifier and purification")
    how.add_argument(
        "--draws",
        type=int,
        default=1,
        help="purifications, each with victims of its own: several show the spread between draws beside that between "
        "victims",
    )
    how.add_argument(
        "--budget",
        type=int,
        default=16,
        metavar="N",
        help="largest change of a value by the protection, in 1/255: images of two roles that are as near are refused",
    )
    how.add_argument("--device", help="an accelerator if there is one")
    how.add_argument("--processes", type=int, help="victims at a time on a CPU; one per processor if not given")


def run(args: argparse.Namespace) -> None:
    """`jcdp audit`: the report, and where it lies."""
    budget = budget_of_levels(args.budget)
    roles = ("protected", "collected", "collected_protected", "test", "clean", "probe_images")
    if args.output is None:
        args.output = f"audit-{public_name(args.protected).rpartition('/')[2]}"
    sources = {f"--{name}": getattr(args, name) for name in (*roles, "purifier")}
    check_output_folder(args.output, marks=(BEGUN_NAME,), own=OWN_NAMES, sources=sources, name="--output")
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    options = {role: {"split": getattr(args, f"{role}_split")} for role in roles}
    unused = UNLABELLED if "supervised" in args.method else (*UNLABELLED, "protected")
    for role in roles:
        if role in unused and getattr(args, role) is not None:
            found = about(role, present_columns, getattr(args, role), named=columns, **options[role])
            options[role] |= found
        else:
            options[role] |= columns
    audit(
        protected=args.protected,
        collected=args.collected,
        collected_protected=args.collected_protected,
        pairs=args.pairs,
        test=args.test,
        clean=args.clean,
        probe_images=args.probe_images,
        purifier=args.purifier,
        perceptual=args.perceptual,
        output_dir=args.output,
        protocol=args.protocol,
        roles=args.roles,
        control=args.control,
        attacks=[name.strip() for name in args.countermeasures.split(",") if name.strip()],
        seeds=args.seeds,
        seed=args.seed,
        draws=args.draws,
        victim=args.victim,
        method=args.method,
        whitening=args.whitening,
        fractions=args.fractions,
        width=args.width,
        preset=args.preset,
        budget=budget,
        image_size=args.image_size,
        channels=args.channels,
        skip_unusable_images=args.skip_unusable_images,
        budget_minutes=args.budget_minutes,
        load_options=options,
        device=args.device,
        processes=args.processes,
        command=command_of(args),
    )
    print(f"Report: {Path(args.output) / 'report.html'} (and report.md, report.json)")


def command_of(args: argparse.Namespace) -> str:
    """
    The command that was given, without the options that have their default values.

    A report is there to be forwarded, so of a path that begins at the root only the last part is given.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["jcdp", "audit"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value is None or value == action.default:
            continue
        words.append(action.option_strings[0])
        if action.nargs != 0:
            values = value if isinstance(value, list) else [value]
            words += [public_name(one) if Path(str(one)).is_absolute() else str(one) for one in values]
    return shlex.join(words)
