"""Reports of an audit, and images for them, as tests of the report use them."""

import copy

import numpy as np

from jcdp_diffusers.audit.learners import side_by_side
from jcdp_diffusers.data import LabelledImages


def row(name: str, title: str, values: list[float], prepare: float = 0.0) -> dict:
    spread = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "values": values}
    curves = [list(np.linspace(0.1, value, 12)) for value in values]
    return {
        "row": name,
        "title": title,
        "accuracy": spread,
        "best_accuracy": spread,
        "train_accuracy": {"mean": 0.99, "std": 0.0, "values": [0.99] * len(values)},
        "per_class_accuracy": [spread["mean"]] * 4,
        "curves": curves,
        "curve_epochs": list(range(1, 13)),
        "train_seconds": 31.4,
        "prepare_seconds": prepare,
        "device": "cpu",
        "threads": 1,
    }


def over_images(mean: float, std: float) -> dict:
    return {"mean": mean, "std": std, "least": mean - std, "most": mean + std, "images": 400}


# Two colour axes are seen at high frequencies; what is not seen is unknown.
SPECTRUM = {
    "finding": "noise",
    "p_value": 0.001,
    "largest_z": 40.0,
    "excess": 1.3,
    "deficit": 0.0,
    "excess_at": [2, 6],
    "axes": [[0.58, 0.58, 0.58], [0.71, 0.0, -0.71], [0.41, -0.82, 0.41]],
    "frequencies": list(range(9)),
    "power": [[0.0] * 9, [0.0] * 4 + [9.0] * 5, [0.0] * 2 + [11.0] * 7],
    "error": [[20.0] * 9, [3.5] * 4 + [1.0] * 5, [4.0] * 2 + [0.5] * 7],
    "upper_bound": [[40.0] * 9, [7.0] * 4 + [11.0] * 5, [8.0] * 2 + [12.0] * 7],
    "background": [[900.0] * 9, [90.0] * 9, [8.5] * 9],
    "seen": [[False] * 9, [False] * 4 + [True] * 5, [False] * 2 + [True] * 7],
    "actual": [[10.0] * 9, [9.2] * 9, [10.5] * 9],
    "images": [400, 90],
    "permutations": 999,
}


REPORT = {
    "verdict": {
        "status": "broken",
        "sentence": "The protection does not survive: 26 % -> 71 % by purification, clean 76 %, three seeds.",
        "attack": "purified",
        "regained_share": 0.9,
        "differences": {
            "lost": {"estimate": 0.5, "low": 0.46, "high": 0.54},
            "gained": {"estimate": 0.45, "low": 0.4, "high": 0.5},
        },
        "assumed_std": None,
        "enough": None,
    },
    "smoke": False,
    "roles": "disjoint",
    "planned_seeds": 3,
    "others": [],
    "side_by_side": [],
    "fractions": [],
    "rows": [
        row("clean", "clean images", [0.76, 0.77, 0.75]),
        row("protected", "protected images", [0.26, 0.28, 0.24]),
        row("purified", "purification", [0.71, 0.72, 0.70], prepare=130.0),
        row("jpeg-10", "jpeg-10", [0.61, 0.58, 0.63], prepare=2.0),
    ],
    "draws": {"count": 1, "values": [[0.71, 0.72, 0.70]]},
    "chance": 0.25,
    "data": {
        "sets": {
            "protected": {
                "images": 400,
                "shape": [16, 16, 3],
                "images_per_class": {"<cats> & dogs": 100, "b": 100, "c": 100, "d": 100},
                "duplicates": 2,
                "contradictions": 1,
            },
            "collected": {
                "images": 90,
                "shape": [16, 16, 3],
                "images_per_class": None,
                "duplicates": 0,
                "contradictions": 0,
            },
            "test": {
                "images": 200,
                "shape": [16, 16, 3],
                "images_per_class": {"<cats> & dogs": 120, "b": 70, "c": 5, "d": 5},
                "duplicates": 0,
                "contradictions": 0,
            },
        },
        "division": {"of": "", "missing": [], "stand_in": False},
        "enlarged": None,
        "separation": {"collected_in_test": 0, "budget": 16 / 255},
        "noise": {"linf": 8, "l2_mean": 0.9, "l2_max": 1.0, "l0_mean": 200, "l0_max": 256, "share_changed": 1.0},
        "visibility": {
            "images": 400,
            "network": None,
            "not_measured": {"lpips": "no network"},
            "linf": over_images(8.0, 0.0),
            "l2": over_images(0.9, 0.02),
            "psnr": over_images(31.2, 0.4),
            "ssim": over_images(0.913, 0.021),
            "lpips": None,
        },
        "jpeg_saves": {"95": over_images(0.91, 0.03), "75": over_images(0.38, 0.06)},
        "spectrum": SPECTRUM,
        "shortcut": {
            "images": 400,
            "protected": {"fitted": 1.0, "held_out": 0.98, "test": 0.21},
            "clean": {"fitted": 0.8, "held_out": 0.5, "test": 0.49},
            "gap": 0.77,
            "found": True,
            "exchanged": False,
        },
    },
    "purifier": {
        "name": "trained for this audit",
        "digest": "00ff",
        "parameters": 690_000,
        "unet": "tiny32",
        "perceptual": "lpips-alex",
        "training": {
            "steps": 800,
            "total_batch_size": 32,
            "trained_timesteps": [0, 200],
            "device": "cpu",
            "seconds": 100.0,
            "losses": [[10 * step, 1 / step + 0.05] for step in range(1, 80)],
        },
        "train_seconds": 100.0,
        "trained_here": True,
        "trained_on": 500,
    },
    "purification": {
        "diffusion_steps": 60,
        "num_rounds": 1,
        "evaluations_per_image": 6,
        "pixel_guidance_scale": 0.0,
        "perceptual_guidance_scale": 500.0,
    },
    "victims": {
        "victim": "resnet18",
        "method": "supervised",
        "probe_images": None,
        "whitening": None,
        "width": 16,
        "seeds": [0, 1, 2],
        "recipe": {
            "name": "mini",
            "epochs": 12,
            "batch_size": 128,
            "learning_rate": 0.1,
            "schedule": "one_cycle",
        },
    },
    "attacks": {"jpeg-10": {"source": "ISS", "cost": "one JPEG per image", "settings": {}}},
    "limits": ["Victims were of one kind.", "An attack that fails proves nothing."],
    "command": "jcdp audit --protected 'my <images>' --output out",
    "device": "cpu",
    "packages": {"torch": "2.15", "lpips": None},
    "time": "2026-01-01T00:00:00+00:00",
}


def sets(with_clean: bool = True) -> dict[str, LabelledImages]:
    draw = np.random.default_rng(0)
    coarse = draw.integers(40, 216, (8, 4, 4, 3))
    clean = np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)
    data = LabelledImages(
        clean, np.array([3, 3, 1, 0, 2, 1, 0, 2]), tuple("abcdefgh"), ("<cats> & dogs", "b", "c", "d")
    )
    noise = draw.choice([-8, 8], clean.shape)
    protected = data.with_images((clean + noise).astype(np.uint8))
    purified = data.with_images((clean + noise // 4).astype(np.uint8))
    return ({"clean": data} if with_clean else {}) | {"protected": protected, "purified": purified}


def photographs(height: int, width: int, count: int = 8) -> dict[str, LabelledImages]:
    draw = np.random.default_rng(0)
    clean = draw.integers(20, 236, (count, height, width, 3)).astype(np.uint8)
    data = LabelledImages(clean, np.arange(count) % 4, tuple(map(str, range(count))), tuple("abcd"))
    return {"clean": data, "protected": data.with_images(clean + 8), "purified": data.with_images(clean + 1)}


def long_report() -> dict:
    """A report with as many sentences on its first page, and as long ones, as there can be."""
    report = copy.deepcopy(REPORT) | {"smoke": True, "roles": "paper"}
    report["verdict"] |= {
        "status": "withstands",
        "attack": "impulse-filter+purified+corruption",
        "sentence": "The protection survives what was tried: 26 % -> 29 % by impulse-filter+purified+corruption, clean "
        "76 %, three seeds; no attack wins back 5 points, but a stronger one may still break it.",
    }
    report["rows"].append(row("impulse-filter+purified+corruption", "impulse-filter+purified+corruption", [0.29] * 3))
    report["rows"].append(row("jpeg-95", "jpeg-95", [0.31, 0.33, 0.29]))
    spread = {"mean": 0.7, "std": 0.01, "values": [0.69, 0.7, 0.71]}
    report["fractions"] = [
        {"fraction": part, "images": 1000, "protected_images": round(1000 * part), "all": spread, "clean_rest": spread}
        for part in (0.2, 0.5, 0.8)
    ]
    names = ("verdict", "rows", "fractions", "victims")
    report["others"] = [copy.deepcopy({name: report[name] for name in names}) for _ in range(2)]
    for other, method in zip(report["others"], ("simclr", "moco-v2")):
        other["victims"]["method"] = method
    report["side_by_side"] = side_by_side([report, *report["others"]])
    return report
