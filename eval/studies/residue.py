"""What purification leaves of a poison and what it takes from the images, by spatial frequency.

    python eval/studies/residue.py --clean DIR --protected DIR --purified "T_p 30"=DIR "T_p 100"=DIR \
        --output residue.jsonl --picture residue.png

Each purified set is a record, with one figure per octave of spatial frequency.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np


# A script is started with its own folder alone on the path, and a package has its own name for what is beside it.
sys.path.append(str(Path(__file__).parents[2]))
from eval.figures import line_style, pyplot
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import LabelledImages, load_images
from jcdp_diffusers.poisons.protect import read_card
from jcdp_diffusers.purify.manifest import RUN_NAME
from jcdp_diffusers.results import append_record
from jcdp_diffusers.trials import describe_images


def octaves(height: int, width: int) -> tuple[np.ndarray, list[float]]:
    """
    Spatial frequencies in octaves.

    Returns:
        `tuple[np.ndarray, list[float]]`: For each coefficient of `np.fft.fft2` of (height, width) its octave: 0 is the
        mean, k > 0 what lies nearest to 2^(k-1) cycles per image, and the last one all beyond it; and those cycles per
        image, 0 first.
    """
    down, across = np.fft.fftfreq(height) * height, np.fft.fftfreq(width) * width
    frequency = np.hypot(down[:, None], across[None])
    last = int(np.log2(min(height, width) / 2))
    power = np.minimum(np.rint(np.log2(np.maximum(frequency, 1))), last).astype(int)
    octave = np.where(frequency == 0, 0, 1 + power)
    return octave, [0.0, *(2.0**power for power in range(octave.max()))]


def residue(clean: np.ndarray, protected: np.ndarray, purified: np.ndarray) -> dict[str, list[float]]:
    """
    What is left, octave by octave.

    Args:
        clean, protected, purified: uint8 (N, H, W, C), the same images in the same order.

    Returns:
        `dict`: lists, one entry per octave: `cycles` per image; `poison`, the octave's share of the poison's energy;
        `kept`, the factor by which the poison that was there is still there, by least squares (1: all of it, 0: none);
        `change`, the root mean square of whatever else differs from the clean images, in levels of 255.
    """
    if not clean.shape == protected.shape == purified.shape:
        raise ValueError(
            f"purified is of shape {purified.shape} and protected {protected.shape}, but both must be as clean, "
            f"{clean.shape}."
        )
    octave, cycles = octaves(*clean.shape[1:3])
    before = clean.astype(np.float64)
    poison, difference = (np.fft.fft2(images - before, axes=(1, 2)) for images in (protected, purified))
    energy = np.array([(np.abs(poison[:, octave == k]) ** 2).sum() for k in range(len(cycles))])
    if not energy.any():
        raise ValueError("protected is equal to clean, but a poison is needed: give the protected images.")
    kept, change = [], []
    for k in range(len(cycles)):
        there, left = poison[:, octave == k], difference[:, octave == k]
        kept.append((there.conj() * left).real.sum() / energy[k] if energy[k] else 0.0)
        # By Parseval: the sum over all octaves of the squares is the mean square over all values.
        change.append((np.abs(left - kept[-1] * there) ** 2).sum() / clean[..., 0].size / octave.size / clean.shape[3])
    return {
        "cycles": cycles,
        "poison": (energy / energy.sum()).tolist(),
        "kept": [float(share) for share in kept],
        "change": np.sqrt(change).tolist(),
    }


def draw(found: dict[str, dict], path: Path) -> None:
    """Shares of the poison, what is kept of it and what else changed, against the octave."""
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 3), layout="constrained")
    first = next(iter(found.values()))
    names = [f"{cycles:g}" for cycles in first["cycles"]]
    axes[0].bar(names, [100 * share for share in first["poison"]], color="0.6")
    axes[0].set(title="where the poison is", ylabel="share of its energy (%)")
    for number, (title, entry) in enumerate(found.items()):
        axes[1].plot(names, [100 * share for share in entry["kept"]], label=title, **line_style(number))
        axes[2].plot(names, entry["change"], label=title, **line_style(number))
    axes[1].set(title="what is left of it", ylabel="share of its amplitude (%)", ylim=(0, 105))
    axes[2].set(title="what else has changed", ylabel="root mean square (levels of 255)", ylim=(0, None))
    axes[2].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("cycles per image (octaves)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def same_rows(data: LabelledImages, ids: tuple[str, ...], name: str) -> np.ndarray:
    """The images of these ids, in their order."""
    rows = {id_: row for row, id_ in enumerate(data.ids)}
    if missing := [id_ for id_ in ids if id_ not in rows]:
        raise ValueError(f"{name} lacks the image {missing[0]!r}, but all sets must have the same ids.")
    return data.images[[rows[id_] for id_ in ids]]


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clean", required=True, help="the images before they were protected")
    parser.add_argument("--split", help="of the clean images")
    parser.add_argument("--protected", required=True, help="folder that `jcdp poison` or a grid wrote")
    parser.add_argument("--purified", required=True, nargs="+", metavar="TITLE=DIR", help="folders of `jcdp purify`")
    parser.add_argument("--images", type=int, default=2000, help="how many, the first of the protected ones")
    parser.add_argument("--output", required=True, help="JSON Lines file of records")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with ends_in_one_sentence("residue"):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """A record per purified set, and the picture of all."""
    protected = load_images(args.protected)
    protected = protected.subset(range(min(args.images, len(protected))))
    clean = same_rows(load_images(args.clean, split=args.split), protected.ids, "clean")
    card, found = read_card(args.protected), {}
    for entry in args.purified:
        start = time.perf_counter()
        title, _, folder = entry.partition("=")
        purified = same_rows(load_images(folder), protected.ids, title)
        found[title] = residue(clean, protected.images, purified)
        run = json.loads((Path(folder) / RUN_NAME).read_text())
        settings = {"title": title, "poison": card["method"], "poison_preset": card["preset"]}
        settings |= {"protected": describe_images(protected)}
        settings |= {"purification": run["settings"], "purifier": run["purifier"], "purification_seed": run["seed"]}
        seconds = round(time.perf_counter() - start, 2)
        facts = {"seed": None, "protocol": "residue", "device": "cpu", "seconds": seconds}
        append_record(args.output, what="residue", value=found[title], settings=settings, **facts)
        print(f"{title}: of the poison {' '.join(f'{100 * share:.0f}' for share in found[title]['kept'])} % is left")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
