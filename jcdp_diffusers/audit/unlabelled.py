"""
An audit of photographs without labels: no victim can be trained, but some things can be said, and they are cleaned.

What is said: how visible the protection is, where the originals are given; whether its noise shows in the spectrum,
where other photographs are given; and what purification changes.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from ..data import LabelledImages
from ..data.checks import check_separation, describe_set, find_originals
from ..data.perturbations import changed_images, measured_norms, psnr
from ..outputs import printable, write_atomically
from ..results import as_settings, package_versions, plain
from .division import Division, likenesses
from .evidence import evidence_in_words, spectral_evidence
from .page import as_html, as_html_with_code
from .pictures import Strips, picture_strips
from .purifier import AuditPurifier, purify
from .report import escaped, fenced, with_code
from .settings import AuditSettings


COLLECTED_FRACTION = 0.25  # of the photographs, where none are given to train the purifier
LEAST_IMAGES = 4
LEAST_FOR_A_SPECTRUM = 50  # of each set: with fewer, chance explains any difference
SHOWN = 6
SHOWN_SIDE = 128  # pixels, of a shown image
HOW_TO_LABEL = (
    "The photographs have no labels, so no victim can be trained and no verdict is possible. Put them into one folder "
    "per class, such as cats/ and dogs/. Then give the command again with another folder: `--output NAME`."
)
SMOKE = "Smoke run: the purifier was hardly trained, and no figure means anything."
SMOKE_OF_GIVEN = "Smoke run: purification had only a few steps, and no figure means anything."

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit of photographs without labels</title>
<style>body { font: 17px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 2rem 1rem; }
img { max-width: 100%; } pre { white-space: pre-wrap; }</style></head><body>
<h1>Audit of photographs without labels</h1>
<p><b>$sentence</b></p>
<ul>$said</ul>
<p><img alt="$caption" src="data:image/png;base64,$picture"></p><p>$caption</p>
<h2>How to repeat this</h2><pre>$command</pre>
<p>$time; figures in <code>report.json</code>, purified images in <code>purified/</code>.</p>
</body></html>
""")


def divide_unlabelled(
    sets: Mapping[str, LabelledImages], *, needs_collected: bool, seed: int, budget: float
) -> tuple[dict[str, LabelledImages], Division]:
    """
    The sets with collected images, where these are needed and not given: a part of the originals or the protected.

    Args:
        sets, needs_collected, seed, budget: As for `division.divide`.

    Raises:
        ValueError: If there are fewer than `LEAST_IMAGES` different images.
    """
    sets = dict(sets)
    if "clean" in sets:
        sets["clean"] = replace(find_originals(sets["clean"], sets["protected"]), labels=None, class_names=None)
    if "collected" in sets or not needs_collected:
        return sets, Division()
    of = "clean" if "clean" in sets else "protected"
    source, groups = sets[of], likenesses(sets[of], budget)
    different = groups.max() + 1
    if different < LEAST_IMAGES:
        raise ValueError(
            f"protected has {different} different image(s), but must have {LEAST_IMAGES} to be divided: give more, or "
            "--collected."
        )
    chosen = np.random.default_rng(seed).permutation(different)[: max(1, round(COLLECTED_FRACTION * different))]
    is_collected = np.isin(groups, chosen)
    for role in {"protected", "clean"} & sets.keys():
        sets[role] = sets[role].subset(np.flatnonzero(~is_collected))
    together = int((np.bincount(groups)[groups] > 1).sum())
    collected = source.subset(np.flatnonzero(is_collected))
    return sets | {"collected": collected}, Division(of, ("collected",), together=together)


def check_unlabelled(sets: Mapping[str, LabelledImages], asked: AuditSettings) -> None:
    """
    Refuse sets that do not fit together.

    Raises:
        ValueError: In one sentence that begins with a role.
    """
    shape = sets["protected"].images.shape[1:]
    for role, data in sets.items():
        if data.images.shape[1:] != shape:
            raise ValueError(f"{role} has images of {data.images.shape[1:]}, but protected has {shape}.")
    if "collected" in sets:
        check_separation(sets["protected"], sets["collected"], None, sets.get("clean"), budget=asked.budget)


def evidence(
    sets: Mapping[str, LabelledImages], division: Division, seed: int, *, enlarged: str | None = None
) -> dict:
    """
    What can be said without labels, in JSON's types.

    Args:
        sets (`dict`): `protected`, `purified` and, where given, `clean` and `collected`.
        division (`Division`): Collected images that are protected ones have the same spectrum, so it is not compared.
        seed (`int`): Of the spectrum's test.
        enlarged (`str`, *optional*): Why the spectrum is not to be compared; see `reading.Found.enlarged`.
    """
    protected, purified, clean = sets["protected"], sets["purified"], sets.get("clean")
    collected = None if division.of == "protected" else sets.get("collected")
    spectrum = None
    if enlarged is None and collected is not None and min(len(protected), len(collected)) >= LEAST_FOR_A_SPECTRUM:
        spectrum = spectral_evidence(protected, collected, clean, seed=seed)
    everything = changed = np.arange(len(protected))
    if clean is not None:
        changed = np.flatnonzero(changed_images(clean.images, protected.images))
    rows = changed if len(changed) else everything
    return {
        "changed": None if clean is None else len(changed),
        "added": None if clean is None else _change(clean, protected, rows),
        "removed": _change(protected, purified, everything),
        "left": None if clean is None else _change(clean, purified, rows),
        "spectrum": spectrum,
    }


def sentences(
    found: Mapping, sets: Mapping[str, LabelledImages], division: Division, *, enlarged: str | None = None
) -> list[str]:
    """The evidence in words, and what would tell more."""
    said = [HOW_TO_LABEL]
    if (added := found["added"]) is None:
        said.append("Without the originals (--clean) nobody knows how large the protection is.")
    elif not found["changed"]:
        said.append("The protected images are equal to their originals: nothing is protected.")
    else:
        left = found["left"]["psnr"]
        after = "after purification they are equal to them" if left is None else f"{left:.1f} dB after purification"
        said.append(
            f"The protection changes {found['changed']} of {len(sets['protected'])} images, a value by "
            f"{added['linf']}/255 at most. The PSNR of these images to their originals is {added['psnr']:.1f} dB, and "
            f"{after}."
        )
    removed = found["removed"]
    if removed["psnr"] is None:
        said.append("Purification changes nothing.")
    else:
        said.append(
            f"Purification changes a value by {removed['linf']}/255 at most; PSNR {removed['psnr']:.1f} dB to the "
            "protected images."
        )
    if found["spectrum"] is not None:
        said += evidence_in_words(found["spectrum"])[:3]  # the fourth is of a picture
    elif enlarged is not None:
        said.append(enlarged)
    else:
        count = len(sets["collected"]) if "collected" in sets and division.of != "protected" else 0
        said.append(
            f"The spectrum was not compared: that needs {LEAST_FOR_A_SPECTRUM} protected photographs and as many "
            f"unprotected ones (--collected); there are {len(sets['protected'])} and {count}."
        )
    if division.of == "protected":
        said.append(
            f"The purifier was trained on {len(sets['collected'])} of the protected photographs, so it takes a part "
            "of the protection for a part of photographs. --collected, other photographs of the kind, is better."
        )
    return said


def audit_unlabelled(
    sets: dict[str, LabelledImages],
    used: AuditPurifier,
    asked: AuditSettings,
    division: Division,
    facts: Mapping,
    output_dir: Path,
    command: str,
    say: Callable[[str], None],
) -> dict:
    """
    Purify the images, say what can be said, and write `report.html`, `report.md` and `report.json`.

    Args:
        sets (`dict`): Images by role.
        used (`AuditPurifier`): Trained or given.
        asked (`AuditSettings`), output_dir, command, say: As for the audit.
        division (`Division`): How the collected images came to be.
        facts (`Mapping`): Of `reading.Found`, with `lessened`, what a budget has changed.

    Returns:
        `dict`: What `report.json` holds.
    """
    say(f"Purifying {len(sets['protected'])} images: {used.config.evaluations_per_image} evaluations each")
    sets["purified"] = purify(sets["protected"], used, output_dir / "purified", asked.seed)
    enlarged = facts["enlarged"]
    found = evidence(sets, division, asked.seed, enlarged=enlarged)
    verdict, *said = [
        *sentences(found, sets, division, enlarged=enlarged),
        *facts["unusable_said"],
        *facts["lessened"],
    ]
    if asked.smoke:
        said.insert(0, SMOKE_OF_GIVEN if used.plan is None else SMOKE)
    report = {
        "smoke": asked.smoke,
        "verdict": {"status": "unlabelled", "sentence": verdict},
        "said": said,
        "evidence": found,
        "data": {"sets": {role: describe_set(images) for role, images in sets.items()}, **facts},
        "purification": as_settings(used.config) | {"evaluations_per_image": used.config.evaluations_per_image},
        "command": command,
        "packages": package_versions(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    report = plain(report, "report")
    _write(output_dir, report, sets)
    for sentence in (verdict, *said):
        say(printable(sentence))
    return report


def _write(output_dir: Path, report: dict, sets: Mapping[str, LabelledImages]) -> None:
    strips = picture_strips(sets)
    picture, caption = _montage(strips), f"From top to bottom: {'; '.join(strips.images)}. {strips.caption}"
    (output_dir / "pictures").mkdir(exist_ok=True)
    write_atomically(output_dir / "pictures" / "images.png", picture)
    write_atomically(output_dir / "report.json", json.dumps(report, indent=2) + "\n")
    lines = ["# Audit of photographs without labels", "", f"**{with_code(report['verdict']['sentence'])}**", ""]
    lines += [f"- {escaped(sentence)}" for sentence in report["said"]]
    lines += ["", f"![{caption}](pictures/images.png)", "", caption, "", *fenced(report["command"]), ""]
    write_atomically(output_dir / "report.md", "\n".join(lines))
    page = _PAGE.substitute(
        sentence=as_html_with_code(report["verdict"]["sentence"]),
        said="".join(f"<li>{as_html(sentence)}</li>" for sentence in report["said"]),
        caption=caption,
        picture=base64.b64encode(picture).decode(),
        command=as_html(report["command"]),
        time=report["time"],
    )
    write_atomically(output_dir / "report.html", page)


def _montage(strips: Strips) -> bytes:
    """Some images of each row, one row above the other: a PNG file."""
    rows = [np.concatenate(list(images[:SHOWN]), axis=1) for images in strips.images.values()]
    picture = Image.fromarray(np.concatenate(rows, axis=0).squeeze())
    factor = max(1, round(SHOWN_SIDE * len(rows) / picture.height))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _change(before: LabelledImages, after: LabelledImages, rows: np.ndarray) -> dict[str, float | None]:
    """
    How large a change is, of these rows: norms, and the mean peak signal-to-noise ratio in dB of the images that
    differ; None where none does.
    """
    before, after = before.subset(rows), after.subset(rows)
    found = measured_norms(before.images, after.images) | {"psnr": None}
    if len(differ := np.flatnonzero(changed_images(before.images, after.images))):
        found["psnr"] = float(psnr(before.subset(differ).tensor(), after.subset(differ).tensor()).mean())
    return found
