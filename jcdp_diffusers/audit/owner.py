"""The first page of a report, in words: three numbers, and what the owner of the images can do."""

from collections.abc import Mapping

from .verdict import NO_ATTACKS
from .words import SAVE_ROWS, row_title, seconds_in_words


_WHAT_TO_DO = {
    "broken": (
        "Do not rely on this protection. Whoever applies this attack can train on your images.",
        "Images that nobody may learn from are safe only where they are not published.",
    ),
    "undone": (
        "Do not rely on this protection. Victims learn clearly more after this attack than before.",
        "Give the originals (`--clean`): then the report says how much of the protection is left.",
    ),
    "weakened": (
        "Expect victims to learn more from these images than the protection promises. A stronger attack may win back "
        "the rest.",
        "Try further attacks (`--countermeasures`) before you rely on what is left.",
    ),
    "withstands": (
        "Publish exactly the files that were audited. Another size or file format is another protection.",
        "Repeat the audit with further attacks (`--countermeasures`) and with a larger purifier. A stronger one may "
        "still break the protection.",
    ),
    "ineffective": (
        "Do not rely on this protection: victims learn from these images as they are.",
        "Take another method or a larger budget, and audit again.",
    ),
    "exchanged": ("Check whether `--protected` and `--clean` were exchanged, and audit again.",),
    "open": ("Give the originals (`--clean`). Without them, no verdict is possible here.",),
    "undecided": (
        "Measure more, as the verdict says. For more seeds, give the same command with more `--seeds`: it goes on in "
        "this folder. For more test images, give more of them with `--test`, and another `--output`.",
    ),
    "smoke": ("Repeat the audit without `--protocol smoke`, in another folder.",),
}
_TIME_WAS_UP = "Give the same command again. It trains the other victims in this folder."
_SCATTER = "The victims scatter too much. Give more images to train them with, or another `--victim`."


def numbers(report: Mapping) -> list[dict]:
    """
    The three numbers of the first page: what victims learn from clean, protected and attacked images.

    Returns:
        `list[dict]`: Each with `row` (None where it is not known), `value`, `title` and `note`.
    """
    rows = {entry["row"]: entry for entry in report["rows"]}
    attack = report["verdict"]["attack"]
    strongest = max(rows.keys() - set(NO_ATTACKS), key=lambda row: (rows[row]["accuracy"]["mean"], row == attack))
    # A stronger one may scatter too much to bear the verdict out, or assume more.
    which = "the strongest attack" if attack == strongest else "the attack that the verdict speaks of"
    titles = {
        "clean": "learned from the clean images",
        "protected": "learned from the protected images",
        attack: f"learned after {which} ({row_title(rows[attack])})",
    }
    found = []
    for row, title in titles.items():
        if row not in rows:
            found.append({"row": None, "value": "?", "title": title, "note": "no originals were given"})
            continue
        accuracy = rows[row]["accuracy"]
        count = len(accuracy["values"])
        note = f"{count} victims" if count > 1 else "one victim"
        note += "" if accuracy["std"] is None else f", std {100 * accuracy['std']:.1f}"
        value = f"{100 * accuracy['mean']:.0f} %"
        if row == attack != strongest:
            mean = 100 * rows[strongest]["accuracy"]["mean"]
            note += f"; {mean:.0f} % on average after the strongest ({row_title(rows[strongest])})"
        found.append({"row": row, "value": value, "title": title, "note": note})
    return found


def what_to_do(report: Mapping) -> list[str]:
    """What the owner of the images can do, in sentences; backticks mark options of `jcdp audit`."""
    status, seeds = report["verdict"]["status"], len(report["victims"]["seeds"])
    said = _WHAT_TO_DO[status]
    if status == "undecided" and seeds < report["planned_seeds"]:
        said = (_TIME_WAS_UP,)
    elif status == "undecided" and seeds > 1 and report["verdict"]["enough"] is None:
        said = (_SCATTER,)
    return [*said, *after_a_save(report)]


def noise_in_short(report: Mapping) -> str:
    """How visible the protection is, in one sentence for under the pictures; empty where it is not known."""
    found = report["data"]["visibility"]
    if found is None or not found["images"]:
        return ""
    said = f"The protection changes values by up to {found['linf']['most']:.0f}/255"
    means = [
        f"{name.upper()} {found[name]['mean']:.{digits}f}{unit}"
        for name, digits, unit in (("psnr", 1, " dB"), ("ssim", 3, ""))
        if found[name] is not None
    ]
    return f"{said}; {', '.join(means)} on average."


def after_a_save(report: Mapping) -> list[str]:
    """What a JPEG save does to the protection, as far as it was measured."""
    if report["verdict"]["status"] in ("exchanged", "smoke"):
        return []
    rows = {entry["row"]: entry for entry in report["rows"]}
    before, said = rows["protected"]["accuracy"]["mean"], []
    for row, quality in SAVE_ROWS.items():
        if row in rows:
            after = rows[row]["accuracy"]["mean"]
            said.append(
                f"Saved as JPEG of quality {quality}, the protected images teach {100 * after:.0f} %; saved without "
                f"loss, {100 * before:.0f} %."
            )
    missing = [row for row in SAVE_ROWS if row not in rows]
    if missing:
        victims = seconds = 0
        for one in (report, *report["others"]):
            (protected,) = (entry for entry in one["rows"] if entry["row"] == "protected")
            more = len(missing) * len(one["victims"]["seeds"])
            victims, seconds = victims + more, seconds + more * protected["train_seconds"]
        said.append(
            f"If you publish JPEG files, measure what a save does: `--countermeasures {','.join(missing)}` trains "
            f"{victims} more victims, about {seconds_in_words(seconds)} in all."
        )
    return said
