"""A perturbation is `poisoned - clean`: applied to 8-bit images with one rounding, and measured on them."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch


SSIM_WINDOW = 11  # Wang et al.'s
# Of which SSIM and LPIPS are measured, and what a JPEG save leaves: their mean is certain long before.
MOST_IMAGES = 2000
VALUES_AT_A_TIME = 2**21


def changed_images(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    """bool (N,), which of the uint8 images (N, H, W, C) differ."""
    return (clean != poisoned).any(axis=(1, 2, 3))


def apply_perturbation(images: np.ndarray, perturbation: torch.Tensor | np.ndarray) -> np.ndarray:
    """Adds a perturbation to 8-bit images: in floating point, clipped to the valid range, rounded once.

    Args:
        images (`np.ndarray`): uint8 `(N, H, W, C)`.
        perturbation (`torch.Tensor` or `np.ndarray`): Float `(N, C, H, W)`, for images in [0, 1].

    Returns:
        `np.ndarray`: uint8 `(N, H, W, C)`.

    Raises:
        ValueError: if the two do not belong together.
    """
    perturbation = np.asarray(perturbation)
    n, height, width, channels = images.shape
    if images.dtype != np.uint8:
        raise ValueError(f"images has dtype {images.dtype}, but uint8 is needed.")
    if perturbation.shape != (n, channels, height, width):
        raise ValueError(
            f"perturbation has shape {perturbation.shape}, but the images need {(n, channels, height, width)}."
        )
    if not np.isfinite(perturbation).all():
        raise ValueError("perturbation holds values that are no numbers or infinite, but must hold finite ones.")
    poisoned = np.empty_like(images)
    for start in range(0, n, 1024):
        rows = slice(start, start + 1024)
        moved = images[rows] + 255.0 * perturbation[rows].transpose(0, 2, 3, 1).astype(np.float64)
        poisoned[rows] = np.rint(moved.clip(0, 255))
    return poisoned


def measured_norms(clean: np.ndarray, poisoned: np.ndarray) -> dict[str, float]:
    """Sizes of a perturbation as published: of the 8-bit images, after clipping and rounding.

    Args:
        clean, poisoned (`np.ndarray`): uint8 `(N, H, W, C)`, in the same order.

    Returns:
        `dict`: `linf`, the largest change of any value, in 1/255; `l2_mean` and `l2_max`, the Euclidean norm per
        image, images in [0, 1]; `l0_mean` and `l0_max`, the pixels changed per image.

    Raises:
        ValueError: if the two arrays differ in shape.
    """
    _check_pair(clean, poisoned)
    largest, l2, l0 = 0, [], []
    for start in range(0, len(clean), 1024):
        rows = slice(start, start + 1024)
        change = poisoned[rows].astype(np.int32) - clean[rows]
        largest = max(largest, int(np.abs(change).max()))
        l2.append(np.sqrt(np.square(change).sum(axis=(1, 2, 3))) / 255)
        l0.append((change != 0).any(axis=3).sum(axis=(1, 2)))
    l2, l0 = np.concatenate(l2), np.concatenate(l0)
    return {
        "linf": largest,
        "l2_mean": float(l2.mean()),
        "l2_max": float(l2.max()),
        "l0_mean": float(l0.mean()),
        "l0_max": int(l0.max()),
    }


@dataclasses.dataclass(frozen=True)
class OverImages:
    """
    A figure of each image, summed up.

    Args:
        mean (`float`): Over the images.
        std (`float`, *optional*): Sample standard deviation over the images; None for a single one.
        least, most (`float`): The smallest and the largest.
        images (`int`): How many were measured.
    """

    mean: float
    std: float | None
    least: float
    most: float
    images: int

    @classmethod
    def of(cls, values: np.ndarray) -> "OverImages":
        """From one figure per image."""
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        return cls(float(values.mean()), std, float(values.min()), float(values.max()), len(values))


def psnr(clean: torch.Tensor, changed: torch.Tensor, *, peak: float = 1.0, least_error: float = 0.0) -> torch.Tensor:
    """
    Peak signal-to-noise ratio of each image, differentiable.

    Args:
        clean, changed (`torch.Tensor`): float (N, C, H, W) or in any other order behind the images.
        peak (`float`, *optional*, defaults to 1): Largest possible value.
        least_error (`float`, *optional*, defaults to 0): The mean squared error counts as this much at least. Above 0
            equal images have a finite ratio and a gradient.

    Returns:
        `torch.Tensor`: (N,), in dB; infinite for equal images.
    """
    errors = (clean - changed).square().mean(dim=(1, 2, 3)).clamp(min=least_error)
    return -10 * (errors / peak**2).log10()


def visibility(
    clean: np.ndarray, poisoned: np.ndarray, *, perceptual: torch.nn.Module | None = None, seed: int = 0
) -> dict:
    """
    How visible a perturbation is, on the 8-bit images that it changes.

    L-inf, L2 and PSNR are measured on all changed images. SSIM and LPIPS take longer, and are measured on at most
    `MOST_IMAGES` of them, drawn by the seed.

    Args:
        clean, poisoned (`np.ndarray`): uint8 (N, H, W, C), in the same order.
        perceptual (`LPIPSModel`, *optional*): The network of LPIPS; see `perceptual.lpips_at_hand`.
        seed (`int`): Of the draw.

    Returns:
        `dict`: `images`, how many are changed; by name of a measure the fields of [`OverImages`], or None; and
        `not_measured`, by name why. The measures are `linf`, the largest change of a value, in 1/255; `l2`, the
        Euclidean norm, images in [0, 1]; `psnr`, in dB for a peak of 255; `ssim`, structural similarity (Wang et al.,
        IEEE Transactions on Image Processing 13, 2004) with its Gaussian window, per channel; `lpips`, the distance
        of `perceptual`, whose name is `network`.

    Raises:
        ValueError: If the two arrays differ in shape.
    """
    _check_pair(clean, poisoned)
    rows = np.flatnonzero(changed_images(clean, poisoned))
    found: dict = {"images": len(rows), "not_measured": {}, "network": getattr(perceptual, "name", None)}
    measures = {"linf": _linf, "l2": _l2, "psnr": _psnr_of_bytes}
    few = np.sort(np.random.default_rng(seed).permutation(rows)[:MOST_IMAGES])
    for name, measure in (measures | {"ssim": _ssim, "lpips": _distance(perceptual)}).items():
        chosen = rows if name in measures else few
        if reason := _why_not(name, clean.shape, len(rows), perceptual):
            found["not_measured"][name], found[name] = reason, None
        else:
            parts = [measure(clean[part], poisoned[part]) for part in _parts(chosen, clean[0].size)]
            found[name] = dataclasses.asdict(OverImages.of(np.concatenate(parts)))
    return found


def noise_kept(clean: np.ndarray, poisoned: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> dict:
    """
    How much of a perturbation is left after both images of a pair went through the same change, such as a JPEG save.

    With d = poisoned - clean before the change and d' after it, an image keeps the fraction <d', d> / <d, d>: 1 where
    nothing is lost, 0 where nothing of d is left.

    Args:
        clean, poisoned (`np.ndarray`): uint8 (N, H, W, C), in the same order.
        change (`Callable`): From uint8 (H, W, C) to the same.

    Returns:
        `dict`: The fields of [`OverImages`], over at most `MOST_IMAGES` of the images that differ.

    Raises:
        ValueError: If the two arrays differ in shape, or no image differs.
    """
    _check_pair(clean, poisoned)
    rows = np.flatnonzero(changed_images(clean, poisoned))
    if len(rows) == 0:
        raise ValueError("poisoned has no image that differs from its clean one, but one at least is needed.")
    kept = []
    for row in np.sort(np.random.default_rng(0).permutation(rows)[:MOST_IMAGES]):
        before = poisoned[row].astype(np.float64) - clean[row]
        after = change(poisoned[row]).astype(np.float64) - change(clean[row])
        kept.append((after * before).sum() / np.square(before).sum())
    return dataclasses.asdict(OverImages.of(np.array(kept)))


def visibility_in_words(found: Mapping) -> list[tuple[str, str]]:
    """
    What `visibility` found, as name and text of each measure.

    Args:
        found (`dict`): From `visibility`.
    """
    said = []
    for name, (title, unit, digits, worst) in _IN_WORDS.items():
        if found[name] is None:
            said.append((title, f"not measured: {found['not_measured'][name]}"))
            continue
        one = found[name]
        if name == "lpips" and found["network"].startswith("features"):
            title = "Perceptual distance, not LPIPS"
        text = f"{one['mean']:.{digits}f}{unit}"
        if one["std"] is not None:
            text += f", std {one['std']:.{digits}f} over {one['images']} images"
        text += f"; at {'least' if worst == 'least' else 'most'} {one[worst]:.{digits}f}{unit}"
        said.append((title, text + (f"; network {found['network']}" if name == "lpips" else "")))
    return said


_IN_WORDS = {
    "linf": ("L-inf", "/255", 1, "most"),
    "l2": ("L2", "", 3, "most"),
    "psnr": ("PSNR", " dB", 1, "least"),
    "ssim": ("SSIM", "", 3, "least"),
    "lpips": ("LPIPS", "", 4, "most"),
}


def _why_not(name: str, shape: tuple[int, ...], changed: int, perceptual: torch.nn.Module | None) -> str | None:
    """Why a measure is left out; None where it is measured."""
    if changed == 0:
        return "no image is changed"
    if name == "lpips" and perceptual is None:
        return "no network"
    least = {"ssim": SSIM_WINDOW, "lpips": getattr(perceptual, "smallest_input", 0)}.get(name, 0)
    if min(shape[1:3]) < least:
        return f"images of {shape[1]}x{shape[2]} pixels are smaller than {least}x{least}"
    return None


def _check_pair(clean: np.ndarray, poisoned: np.ndarray) -> None:
    if clean.shape != poisoned.shape:
        raise ValueError(f"poisoned has shape {poisoned.shape}, but the clean images have {clean.shape}.")


def _parts(rows: np.ndarray, values: int) -> list[np.ndarray]:
    """Rows in parts whose images, of so many values each, fit into memory as floats."""
    size = max(1, VALUES_AT_A_TIME // values)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _linf(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    return np.abs(poisoned.astype(np.int32) - clean).max(axis=(1, 2, 3)).astype(np.float64)


def _l2(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(poisoned.astype(np.int32) - clean).sum(axis=(1, 2, 3))) / 255


def _psnr_of_bytes(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    return psnr(*(torch.from_numpy(images.astype(np.float64)) for images in (clean, poisoned)), peak=255.0).numpy()


def _ssim(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
    from kornia.metrics import ssim

    # In float64: float32's rounding shows where a window is nearly flat.
    one, other = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 for images in (clean, poisoned))
    return ssim(one, other, SSIM_WINDOW, eps=0.0, padding="valid").mean(dim=(1, 2, 3)).numpy()


def _distance(perceptual: torch.nn.Module | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    @torch.no_grad()
    def measure(clean: np.ndarray, poisoned: np.ndarray) -> np.ndarray:
        device = next(perceptual.parameters()).device
        one, other = (
            torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1 for images in (clean, poisoned)
        )
        return perceptual(one, other).double().cpu().numpy()

    return measure
