"""Pictures of any size, protected or purified one by one, and what changed: all that the page does without Gradio."""

import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import poisons
from ..data import ImageRejected, decode_image
from ..data.perturbations import apply_perturbation, psnr
from ..data.writing import as_picture
from ..noise import content_id
from ..outputs import printable
from ..pipeline_jcdp import JointConditionalPurificationPipeline, usual_micro_batch
from ..purification_config import PRESETS, PurificationConfig
from ..purify.tiling import Blending, prepare
from ..purify.worker import purify_tiles, steady_arithmetic


# Of `PictureWork.work`'s rows.
COLUMNS = ("picture", "pixels", "largest", "mean", "changed, %", "PSNR, dB", "seconds")


class Stopped(ValueError):
    """Whoever started a purification has stopped it or left the page."""


@dataclass(frozen=True)
class Change:
    """
    One picture before and after.

    Args:
        before, after (`np.ndarray`): uint8, (H, W, 1 or 3), of one shape.
    """

    before: np.ndarray
    after: np.ndarray

    def in_numbers(self) -> tuple[int, float, float, float]:
        """
        Largest and mean absolute change of a value, in 1/255; values that changed, in %; PSNR in dB.

        The PSNR of equal pictures is infinite.
        """
        difference = np.abs(self.after.astype(np.int16) - self.before)
        before, after = (torch.from_numpy(one.astype(np.float64))[None] for one in (self.before, self.after))
        ratio = psnr(before, after, peak=255.0).item()
        return int(difference.max()), float(difference.mean()), 100 * float((difference > 0).mean()), ratio

    def magnified(self) -> tuple[np.ndarray, int]:
        """The difference on grey, uint8 (H, W, C), and by how much it is magnified: 99.5 % of it fits the scale."""
        difference = self.after.astype(np.int16) - self.before
        factor = max(1, int(127.5 / max(1.0, np.percentile(np.abs(difference), 99.5))))
        shown = 127.5 + np.multiply(difference, factor, dtype=np.float32)
        return np.rint(shown.clip(0, 255)).astype(np.uint8), factor


def read_picture(
    path: str | os.PathLike, channels: int, longest_side: int | None = None, changes: list[str] | None = None
) -> np.ndarray:
    """
    A picture's pixels, uint8 (H, W, channels), reduced where its longer side is above `longest_side`.

    Args:
        changes (`list[str]`, *optional*): Gets what else was changed, in the words of `decode_image`.

    Raises:
        ImageRejected: If it cannot be used; the reason says why.
    """
    image = decode_image(path, channels, changes=changes)
    if longest_side is None or max(image.shape[:2]) <= longest_side:
        return image
    factor = longest_side / max(image.shape[:2])
    size = tuple(max(1, round(factor * side)) for side in (image.shape[1], image.shape[0]))
    return np.asarray(as_picture(image).resize(size, Image.Resampling.LANCZOS)).reshape(size[1], size[0], channels)


def purify_picture(
    pipe: JointConditionalPurificationPipeline,
    image: np.ndarray,
    config: PurificationConfig,
    *,
    seed: int = 0,
    done: Callable[[int, int], None] = lambda tiles, of: None,
) -> Change:
    """
    Purify one picture of any size in tiles of the purifier's own size, which overlap by a quarter.

    Args:
        pipe (`JointConditionalPurificationPipeline`): The purifier.
        image (`np.ndarray`): uint8, (H, W, C), with the purifier's channels.
        config (`PurificationConfig`): Settings of the purification.
        seed (`int`, defaults to 0): Of the noise.
        done (`Callable`): Called with the number of finished tiles and of all; what it raises stops the purification.

    Returns:
        `Change`: Where the shorter side is below the purifier's, both pictures are enlarged.

    Raises:
        ImageRejected: If the picture is too narrow.
    """
    size = pipe.unet.config.sample_size
    overlap = size // 4
    tiled = prepare(as_picture(image), channels=image.shape[2], size=size, fit="tile", overlap=overlap)
    if isinstance(tiled, str):
        raise ImageRejected(tiled)
    names = tiled.names(content_id(torch.tensor(image).permute(2, 0, 1)))
    batch = usual_micro_batch(pipe._execution_device.type, size, size)
    options = {"preset": config, "seed": seed, "micro_batch_size": batch}
    squares, blending = tiled.squares(), Blending(tiled)
    done(0, len(names))
    with steady_arithmetic(pipe, None):
        for start in range(0, len(names), batch):
            own = names[start : start + batch]
            for square in purify_tiles(pipe, list(itertools.islice(squares, len(own))), own, **options):
                blending.add(square)
            done(start + len(own), len(names))
    return Change(tiled.image, blending.whole)


def protect_picture(image: np.ndarray, method: str, *, label: int = 0, seed: int = 0) -> Change:
    """
    Protect one picture by a method whose noise follows from class, seed and picture alone.

    Args:
        image (`np.ndarray`): uint8, (H, W, 1 or 3).
        method (`str`): One of `methods_for_pictures()`.
        label (`int`, defaults to 0): The class, from 0 on; each has noise of its own.
        seed (`int`, defaults to 0): Of the noise.

    Raises:
        ValueError: If the method has no use for a single picture.
    """
    if method not in methods_for_pictures():
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(methods_for_pictures())}.")
    poison, whole = poisons.get(method), image
    height, width = image.shape[:2]
    if poison.needs_whole_patches:
        side = 32 * -(-max(height, width) // 32)  # the patches of such a square fill it
        whole = np.pad(image, ((0, side - height), (0, side - width), (0, 0)), mode="edge")
    pixels = torch.tensor(whole).permute(2, 0, 1)[None].float() / 255
    noise = poison(pixels, torch.tensor([label]), seed=seed, keep_labels=True)[:, :, :height, :width]
    return Change(image, apply_perturbation(image[None], noise)[0])


def methods_for_pictures() -> tuple[str, ...]:
    """Names of the poisons that can protect a single picture."""
    return tuple(name for name in poisons.NAMES if poisons.get(name).suits_single_images)


def methods_left_out() -> list[str]:
    """Sentences that say which poisons cannot protect a single picture, and why."""
    others = [poisons.get(name) for name in poisons.NAMES if not poisons.get(name).suits_single_images]
    network = ", ".join(poison.title for poison in others if poison.surrogate is not None)
    whole = ", ".join(poison.title for poison in others if poison.surrogate is None)
    sentences = [f"{network}: a network works on the whole data set first."] if network else []
    sentences += [f"{whole}: the noise depends on all pictures of a class."] if whole else []
    return [*sentences, "`jcdp poison` protects a data set by any of them."]


def usable_presets(pipe: JointConditionalPurificationPipeline) -> list[str]:
    """Names of the presets that this purifier can follow: it knows their timesteps and has the network they need."""
    usable = []
    for name in PRESETS:
        try:
            pipe.resolve_config(name)
        except ValueError:
            continue
        usable.append(name)
    return usable


class PictureWork:
    """
    What the page's buttons do; its results lie in a folder that is removed with the object.

    Args:
        pipe (`JointConditionalPurificationPipeline`, *optional*): The purifier; without one there is only protection.
    """

    def __init__(self, pipe: JointConditionalPurificationPipeline | None):
        self.pipe, self.running = pipe, {}  # by session, what tells its last purification from those before it
        self._folder = tempfile.TemporaryDirectory(prefix="jcdp-demo-")

    def folder(self, session: str) -> Path:
        """An empty folder for the results of one browser tab."""
        self.forget(session)
        folder = self._place(session)
        folder.mkdir()
        return folder

    def stop(self, session: str) -> None:
        """Let the purification of a browser tab end at its next tiles."""
        self.running.pop(session, None)

    def forget(self, session: str) -> None:
        """Remove the results of a browser tab."""
        shutil.rmtree(self._place(session), ignore_errors=True)

    def _place(self, session: str) -> Path:
        # A client may call itself anything, `../..` among it.
        return Path(self._folder.name) / hashlib.blake2b(session.encode(), digest_size=16).hexdigest()

    def purify(self, files: Sequence[str], config: PurificationConfig, seed: int, longest_side, session: str, tell):
        """`work` with the purifier; it ends, too, where another one of the same tab begins."""
        channels, own = self.pipe.unet.config.in_channels, object()
        self.running[session] = own

        def change(image: np.ndarray, name: str) -> Change:
            start = time.monotonic()

            def done(tiles: int, of: int) -> None:
                if self.running.get(session) is not own:
                    raise Stopped("Stopped.")
                seconds = (time.monotonic() - start) / tiles * (of - tiles) if tiles else None
                left = "" if seconds is None else f", about {seconds:.0f} s left"
                tell(tiles / of, f"{name}: {tiles} of {of} tiles{left}")

            return purify_picture(self.pipe, image, config, seed=seed, done=done)

        return self.work(files, channels, longest_side, change, self.folder(session), "purified")

    def protect(self, files: Sequence[str], method: str, label: int, seed: int, longest_side, session: str, tell):
        """`work` with a poison."""

        def change(image: np.ndarray, name: str) -> Change:
            tell(None, f"{name}: {poisons.get(method).title}")
            return protect_picture(image, method, label=label, seed=seed)

        return self.work(files, 3, longest_side, change, self.folder(session), "protected")

    def work(
        self, files, channels, longest_side, change, folder: Path, word: str
    ) -> tuple[list[dict], list[str], list[str]]:
        """
        Change pictures one after another, and write what the page shows.

        Returns:
            `tuple`: For each picture a dict with `name`, `row` (of `COLUMNS`), `factor` and the paths `before`,
            `after`, `difference`; a sentence for each picture that could not be used; and one for each that was
            changed while it was read.
        """
        results, refused, notes = [], [], []
        for number, path in enumerate(files):
            name, start, changes = printable(Path(path).name), time.monotonic(), []
            try:
                made = change(read_picture(path, channels, longest_side, changes), name)
            except ImageRejected as rejection:
                refused.append(f"{name}: {rejection.reason}.")
                continue
            notes += [f"{name}: {', '.join(changes)}."] if changes else []
            difference, factor = made.magnified()
            place = folder / str(number)
            place.mkdir()
            paths = {
                "before": place / f"{Path(path).stem}-before.png",
                "after": place / f"{Path(path).stem}-{word}.png",
                "difference": place / f"{Path(path).stem}-difference.png",
            }
            for image, target in zip((made.before, made.after, difference), paths.values()):
                as_picture(image).save(target)
            largest, mean, changed, ratio = made.in_numbers()
            shape = f"{made.after.shape[1]}x{made.after.shape[0]}"
            numbers = (largest, f"{mean:.2f}", f"{changed:.1f}", f"{ratio:.1f}", f"{time.monotonic() - start:.1f}")
            results.append(
                {"name": name, "factor": factor, "row": [name, shape, *map(str, numbers)]}
                | {key: str(target) for key, target in paths.items()}
            )
        return results, refused, notes
