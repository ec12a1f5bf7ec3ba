"""What the folder of an audit was begun for: its purifier and purified images serve no other audit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import LabelledImages
from ..outputs import write_atomically
from ..purification_config import PurificationConfig
from ..results import as_settings, plain
from ..trials import describe_images, purifier_digest
from .settings import AuditSettings


if TYPE_CHECKING:
    from .purifier import AuditPurifier


BEGUN_NAME = "audit.json"


def begun_for(asked: AuditSettings, sets: Mapping[str, LabelledImages], used: "AuditPurifier") -> dict:
    """What an output folder's purifier and purified images are made for, in JSON's types."""
    trains = used.plan is not None
    begun = {
        "smoke": asked.smoke,
        "seed": asked.seed,
        "protected": describe_images(sets["protected"])["content"],
        "purifier": None if trains else purifier_digest(used.name),
        "collected": describe_images(sets["collected"])["content"] if trains else None,
        "plan": as_settings(used.plan) if trains else None,
        "preset": as_settings(asked.preset) if isinstance(asked.preset, PurificationConfig) else asked.preset,
        "perceptual": None if asked.perceptual is None else str(asked.perceptual),
    }
    return plain(begun, "settings")


def read_begun(output_dir: Path) -> dict:
    """What a folder was begun for; empty for a new one."""
    path = output_dir / BEGUN_NAME
    return json.loads(path.read_text()) if path.exists() else {}


def check_begun(output_dir: Path, asked: dict) -> None:
    """
    Refuse a folder in which another audit was begun, one whose purifier or purified images cannot serve this.

    Raises:
        ValueError: With what is different.
    """
    before = read_begun(output_dir)
    changed = [name for name in asked if name in before and before[name] != asked[name]]
    if changed:
        said = {
            "smoke": "protocol 'smoke'" if before.get("smoke") else "a protocol other than 'smoke'",
            "seed": f"seed {before.get('seed')}",
            "protected": "other protected images",
            "collected": "other collected images",
            "purifier": "another purifier" if before.get("purifier") else "a purifier of its own",
            "plan": "another plan for the purifier (it depends on the device)",
            "preset": "another preset",
            "perceptual": "another perceptual network" if before.get("perceptual") else "no perceptual network",
        }
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, where an audit with {said[changed[0]]} was begun, whose purifier and "
            "purified images cannot serve this one: take another --output."
        )


def write_begun(output_dir: Path, begun: dict) -> None:
    """Write it down, before anything is made."""
    write_atomically(output_dir / BEGUN_NAME, json.dumps(begun, indent=2) + "\n")
