"""Thirty photographs of mixed sizes: a verdict, cleaned copies at full size and a report, by two commands.

    python eval/studies/photographs.py --output runs/photographs [--records results/photographs.jsonl]

The photographs are parts of the example images of scikit-image and scikit-learn: two classes, from 200 to 4,000
pixels, portrait and landscape, as JPEG, PNG, WebP and HEIC, some turned by their orientation tag, some transparent.
Several are parts of one example image, so the figures say nothing about photographs at large. (SciPy downloads its
example images, so they are not among them.) They are protected by LSP at their own size. Then an owner's two commands
are given, and timed:

    jcdp audit --protected protected/ --clean photographs/
    jcdp purify --purifier audit/purifier --dataset protected/ --output cleaned --export cleaned-pictures

The record has the seconds of both, and the processors' load before them, because other programs slow them down.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


# A script is started with its own folder alone on the path, and a package has its own name for what is beside it.
sys.path.append(str(Path(__file__).parents[2]))
from jcdp_diffusers.cli import Parser, ends_in_one_sentence
from jcdp_diffusers.data import decode_image
from jcdp_diffusers.results import append_record


# Class -> scikit-image's files and scikit-learn's. Things, and surfaces or what is seen from above.
CLASSES = {
    "things": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "motorcycle_left.png",
        "rocket.jpg",
        "china.jpg",
        "flower.jpg",
    ),
    "surfaces": ("brick.png", "grass.png", "gravel.png", "coins.png", "ihc.png", "hubble_deep_field.jpg", "moon.png"),
}
# Longer and shorter side in pixels of each class's photographs, in turn landscape and portrait.
SIZES = (
    *((4000, 3000), (2400, 1600), (1200, 900), (1024, 768), (900, 600), (800, 800), (640, 480), (512, 384)),
    *((480, 320), (450, 300), (400, 400), (360, 240), (320, 200), (256, 200), (200, 200)),
)
FORMATS = ("jpg", "png", "webp", "heic")


def example_images() -> dict[str, list[Image.Image]]:
    """The example images by class, in colour."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    places = [Path(skimage.data.__file__).parent, *{Path(name).parent for name in load_sample_images().filenames}]
    found = {}
    for name, files in CLASSES.items():
        paths = [next(place / file for place in places if (place / file).exists()) for file in files]
        found[name] = [Image.open(path).convert("RGB") for path in paths]
    return found


def photographs(sizes: Sequence[tuple[int, int]], seed: int = 0) -> Iterator[tuple[str, Image.Image]]:
    """Name without suffix and picture of each photograph, a part of an example image."""
    draw = np.random.default_rng(seed)
    for name, images in example_images().items():
        for row, (longer, shorter) in enumerate(sizes):
            width, height = (longer, shorter) if row % 2 == 0 else (shorter, longer)
            source = images[row % len(images)]
            fraction = draw.uniform(0.6, 0.95) * min(source.width / width, source.height / height)
            left = draw.uniform(0, source.width - fraction * width)
            top = draw.uniform(0, source.height - fraction * height)
            box = (left, top, left + fraction * width, top + fraction * height)
            yield f"{name}/IMG_{row:04d}", source.resize((width, height), Image.Resampling.LANCZOS, box=box)


def write_photographs(folder: Path, sizes: Sequence[tuple[int, int]]) -> int:
    """
    Write the photographs as owners have them; returns their pixels.

    Args:
        folder (`Path`): Gets one folder per class.
        sizes (`Sequence`): Longer and shorter side of each class's photographs.
    """
    import pillow_heif

    pillow_heif.register_heif_opener()
    srgb, pixels = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), 0
    for row, (name, picture) in enumerate(photographs(sizes)):
        suffix, exif = FORMATS[row % len(FORMATS)], Image.Exif()
        pixels += picture.width * picture.height
        if row % 5 == 1:  # held upright, stored lying
            exif[0x0112] = 6
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        if suffix == "png" and row % 3 == 0:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        path = folder / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"quality": 92} if suffix in ("jpg", "heic", "webp") else {}
        picture.save(path, exif=exif.tobytes(), icc_profile=srgb, **options)
    return pixels


def run_timed(words: Sequence[str], log: Path) -> float:
    """Give a `jcdp` command, with its output in a file, and return its seconds."""
    began = time.perf_counter()
    with open(log, "w") as file:
        command = [sys.executable, "-m", "jcdp_diffusers.cli", *words]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"jcdp {words[0]} failed: {log.read_text().strip().splitlines()[-1]}")
    return time.perf_counter() - began


def compare_at_full_size(originals: Path, protected: Path, cleaned: Path) -> dict[str, float | None]:
    """
    Mean PSNR in dB to the originals, of the protected and of the cleaned pictures, all at their own size. Pictures
    that are equal to their originals have none and are left out; None where all are.
    """
    found = {"protected": [], "cleaned": []}
    for path in sorted(originals.rglob("IMG_*")):
        original = decode_image(str(path)).astype(float)
        for role, folder in (("protected", protected), ("cleaned", cleaned)):
            other = decode_image(str(folder / path.relative_to(originals).with_suffix(".png")))
            if other.shape != original.shape:
                raise ValueError(f"{role} has {path.stem} as {other.shape}, but must have {original.shape}.")
            if error := np.square(other - original).mean():
                found[role].append(10 * np.log10(255**2 / error))
    return {role: float(np.mean(values)) if values else None for role, values in found.items()}


def study(output: Path, records: Path | None, sizes: Sequence[tuple[int, int]], audit_options: Sequence[str]) -> dict:
    """
    Make the photographs, protect them, give the two commands, and record what they took and found.

    Args:
        output (`Path`): Folder for everything.
        records (`Path`, *optional*): JSON Lines file for the record.
        sizes (`Sequence`): Of each class's photographs.
        audit_options (`Sequence[str]`): Further words for `jcdp audit`.
    """
    output.mkdir(parents=True, exist_ok=True)
    originals, protected, audit, cleaned = (output / name for name in ("originals", "protected", "audit", "cleaned"))
    pixels = write_photographs(originals, sizes)
    poison = ["poison", "--method", "lsp", "--dataset", str(originals), "--output", str(output / "protected-set")]
    run_timed([*poison, "--export", str(protected)], output / "poison.log")
    load = os.getloadavg()[0]
    seconds = {
        "audit": run_timed(
            [
                "audit",
                "--protected",
                str(protected),
                "--clean",
                str(originals),
                "--output",
                str(audit),
                *audit_options,
            ],
            output / "audit.log",
        )
    }
    purify = ["purify", "--purifier", str(audit / "purifier"), "--dataset", str(protected), "--output", str(cleaned)]
    seconds["purify"] = run_timed([*purify, "--export", str(output / "cleaned-pictures")], output / "purify.log")
    report = json.loads((audit / "report.json").read_text())
    value = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "load_before": round(load, 1),
        "verdict": report["verdict"]["status"],
        "accuracy": {entry["row"]: entry["accuracy"]["mean"] for entry in report["rows"]},
        "psnr": compare_at_full_size(originals, protected, output / "cleaned-pictures"),
    }
    settings = {
        "stage": "photographs",
        "photographs": 2 * len(sizes),
        "megapixels": round(pixels / 1e6, 1),
        "side": report["data"]["sets"]["protected"]["shape"][0],
        "purifier": report["purifier"]["unet"],
        "purifier_steps": report["purifier"]["training"]["steps"],
        "purification": report["purification"],
        "options": list(audit_options),
    }
    if records is not None:
        append_record(
            records,
            what="photographs",
            value=value,
            seed=0,
            protocol=report["victims"]["recipe"]["name"],
            settings=settings,
            device=report["device"],
            seconds=sum(seconds.values()),
        )
    return settings | value


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, type=Path, help="folder for everything, without photographs yet")
    parser.add_argument("--records", type=Path, help="JSON Lines file for the record")
    parser.add_argument("--largest", type=int, default=4000, help="leave out photographs with a longer side than this")
    parser.add_argument("--budget_minutes", type=float, default=15)
    parser.add_argument("--image_size", type=int, help="of the audit")
    parser.add_argument("--protocol", help="of the audit's victims")
    args = parser.parse_args(arguments)
    sizes = [size for size in SIZES if size[0] <= args.largest]
    options = ["--budget_minutes", f"{args.budget_minutes:g}"]
    options += [] if args.image_size is None else ["--image_size", str(args.image_size)]
    options += [] if args.protocol is None else ["--protocol", args.protocol]
    with ends_in_one_sentence("photographs.py"):
        found = study(args.output, args.records, sizes, options)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
