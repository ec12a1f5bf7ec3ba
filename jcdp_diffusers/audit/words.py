"""What a report says in words: the same for the page and for Markdown."""

from collections.abc import Mapping

from ..countermeasures.iss import SAVES
from ..data import FEW
from ..data.perturbations import visibility_in_words
from ..noise import colour_in_words
from .evidence import evidence_in_words
from .verdict import LEAST_IMAGES_FOR_IT, MARGIN


# Rows of protected images that were saved as people save pictures, and the quality.
SAVE_ROWS = {f"jpeg-{quality}": quality for quality in SAVES}
SPECTRUM_CAPTION = (
    "The power that the protection adds, by colour axis and frequency, in squared levels of 255. It is estimated from "
    "the collected images, without originals and without labels."
)


def marks(report: dict) -> list[str]:
    """What a reader must know before any figure, in sentences."""
    said = []
    if report["smoke"]:
        said.append("Smoke run: nothing was trained for long enough to mean anything.")
    if report["roles"] == "paper":
        said.append("Roles as in the paper: the purifier has seen the test images.")
    if not any(entry["row"] == "clean" for entry in report["rows"]):
        said.append("No clean originals were given.")
    return said


def results_table(report: dict) -> list[dict]:
    """The main table in words; `row` and `fraction` (the mean accuracy, of 1) are what the page needs beside them."""
    purifier_seconds = report["purifier"]["train_seconds"]
    table = []
    for entry in report["rows"]:
        accuracy, parts, before = entry["accuracy"], entry["row"].split("+"), "-"
        if entry["prepare_seconds"] >= 0.5:
            before = seconds_in_words(entry["prepare_seconds"])
        if "purified" in parts and purifier_seconds is not None:
            before += f" (+ {seconds_in_words(purifier_seconds)} for the purifier)"
        table.append(
            {
                "row": entry["row"],
                "title": row_title(entry, report["draws"]["count"]),
                "test": f"{100 * accuracy['mean']:.1f} %",
                "std": "-" if accuracy["std"] is None else f"{100 * accuracy['std']:.1f}",
                "values": ", ".join(f"{100 * value:.1f}" for value in accuracy["values"]),
                "best": _mean(entry["best_accuracy"]),
                "train": _mean(entry["train_accuracy"]),
                "fraction": accuracy["mean"],
                "before": before,
                "seconds": seconds_in_words(entry["train_seconds"]),
            }
        )
    return table


def _mean(spread: Mapping | None) -> str:
    return "-" if spread is None else f"{100 * spread['mean']:.1f} %"


def row_title(entry: Mapping, draws: int = 1) -> str:
    """
    What the victims of a row were trained on.

    Args:
        entry (`dict`): A row of the report.
        draws (`int`): Purifications of which the row `purified` is the mean.
    """
    parts = entry["row"].split("+")
    if parts[0] in ("clean", "control", "protected"):
        return f"trained on {entry['title']}"
    if entry["row"] in SAVE_ROWS:
        return f"protected images, saved as JPEG of quality {SAVE_ROWS[entry['row']]}"
    if parts[0] == "purified":
        with_others = f", with {'+'.join(parts[1:])}" if parts[1:] else ""
        several = f", {draws} draws" if draws > 1 and not parts[1:] else ""
        return f"trained on purified images{with_others}{several}"
    return f"protected images, with {entry['title']}"


def certainty(report: dict) -> list[str]:
    """How sure the verdict is, in sentences."""
    judged, said = report["verdict"], []
    titles = {entry["row"]: entry["title"] for entry in report["rows"]}
    # What the protection took is clean minus protected, and a change is the other way round.
    ways = {
        "lost": ("From the clean to the protected images", -1),
        "gained": (f"From the protected images to {titles[judged['attack']]}", 1),
    }
    for name, found in judged["differences"].items():
        if found is None:
            continue
        way, sign = ways[name]
        limits = "its interval is unknown, because a single victim shows no spread"
        if found["low"] is not None:
            low, high = sorted((sign * found["low"], sign * found["high"]))
            limits = f"95 % interval {100 * low:+z.1f} to {100 * high:+z.1f}"
        said.append(f"{way}, test accuracy changes by {100 * sign * found['estimate']:+z.1f} points ({limits}).")
    if (assumed := judged["assumed_std"]) is not None:
        said.append(
            f"A single victim shows no spread. {100 * assumed:.0f} points are assumed: more than every spread in our "
            f"records of classifiers that learned from {LEAST_IMAGES_FOR_IT:,} images or more. Yours may be larger. "
            "Three seeds measure it."
        )
    seeds, images = len(report["victims"]["seeds"]), report["data"]["sets"]["test"]["images"]
    if any(found is not None and found["low"] is not None for found in judged["differences"].values()):
        spread = f"{seeds} victims per row; Welch, 1947" if assumed is None else "by the assumed spread"
        said.append(
            f"The intervals cover other seeds ({spread}) and other test images ({images:,}; Agresti and Caffo, 2000)."
        )
    said.append(
        f"A difference below {100 * MARGIN:.0f} points counts as none. The verdict says that there is none only where "
        "the whole interval lies below that."
    )
    return said + about_draws(report["draws"])


def about_draws(draws: Mapping) -> list[str]:
    """How much depends on the draw of a randomised purifier, in sentences."""
    if draws["count"] == 1:
        return [
            "Purification is random, and its row is that of one draw. Another draw gives other images; `--draws 3` "
            "measures how much that changes."
        ]
    means = ", ".join(f"{100 * mean:.1f}" for mean in draws["means"])
    victims = len(draws["values"][0])
    said = [
        f"Purification was drawn {draws['count']} times, with {victims} victim{'s' * (victims != 1)} each: {means} %. "
        f"Its figure is the mean over draws, with a standard error of {100 * draws['standard_error']:.1f} points."
    ]
    if victims == 1:
        return [
            *said,
            f"These figures have a standard deviation of {100 * draws['together']:.1f} points. One victim per draw "
            "cannot tell the spread between draws from that between victims; two can (`--seeds 2`).",
        ]
    return [
        *said,
        f"Standard deviation between draws {100 * draws['between_draws']:.1f} points, between victims of one draw "
        f"{100 * draws['between_victims']:.1f} points (random-effects model; F test that draws do not matter: p = "
        f"{draws['p_value']:.2g}).",
    ]


def visible(report: dict) -> list[tuple[str, str]]:
    """How visible the protection is, by measure; nothing where there are no originals."""
    found = report["data"]["visibility"]
    return [] if found is None else visibility_in_words(found)


def visible_said(report: dict) -> list[str]:
    """What the measures of visibility do not say by themselves, in sentences."""
    found, saves = report["data"]["visibility"], report["data"]["jpeg_saves"]
    if found is None:
        return ["Not measured: no clean originals were given (--clean)."]
    all_images = report["data"]["sets"]["protected"]["images"]
    said = [f"Measured on the {found['images']} of {all_images} images that the protection changes."]
    for quality, kept in (saves or {}).items():
        spread = "" if kept["std"] is None else f", std {100 * kept['std']:.0f} over {kept['images']} images"
        said.append(f"A JPEG save of quality {quality} leaves {100 * kept['mean']:.0f} % of the noise{spread}.")
    return [*said, "What is left of the noise does not say what victims then learn."] if saves else said


def spectrum_said(report: dict) -> list[str]:
    """What the spectra say of the protection, or why they were not compared."""
    spectrum, division = report["data"]["spectrum"], report["data"]["division"]
    if spectrum is not None:
        return evidence_in_words(spectrum)
    if report["data"]["enlarged"] is not None:
        return [report["data"]["enlarged"]]
    if division["of"] == "protected" and "collected" in division["missing"]:
        return [
            "Spectra were not compared: the images that trained the purifier are protected, too. Give unprotected "
            "ones with --collected."
        ]
    return ["Spectra were not compared: without collected images (--collected) there is nothing to compare with."]


def curves_said(report: dict) -> str:
    """What the learning curves show where the table shows something else; empty where both show the same."""
    if report["victims"]["method"] == "supervised":
        return ""
    return "The curves show the accuracy of nearest neighbours. The table shows that of the linear probe."


def checks(report: dict) -> list[tuple[bool, str]]:
    """What the data checks found: whether it is as it should be, and a sentence."""
    found = []
    for role, facts in report["data"]["sets"].items():
        found += _set_checked(role, facts)
    found += _roles_checked(report)
    if report["data"]["noise"] is not None:
        found += _noise_checked(report["data"]["noise"], _levels(report))
    shortcut = report["data"]["shortcut"]  # needs the labels of protected images
    return found if shortcut is None else [*found, _shortcut_checked(shortcut, kind_of_test_images(report))]


def _levels(report: dict) -> int:
    """The protection's budget, in 1/255."""
    return round(255 * report["data"]["separation"]["budget"])


def _set_checked(role: str, facts: Mapping) -> list[tuple[bool, str]]:
    counts = list((facts["images_per_class"] or {}).values())
    balance = ""
    if counts:
        least, most = min(counts), max(counts)
        balance = f", {least if least == most else f'{least} to {most}'} of each of {len(counts)} classes"
    shape = "x".join(map(str, facts["shape"]))
    balanced = not counts or max(counts) <= 10 * min(counts)
    found = [(balanced, f"{role}: {facts['images']} images{balance}; {shape}")]
    if facts["duplicates"]:
        found.append(
            (
                False,
                f"{role}: {facts['duplicates']} images repeat the pixels of another, "
                f"{facts['contradictions']} of them with another label",
            )
        )
    return found


def _roles_checked(report: dict) -> list[tuple[bool, str]]:
    data, listed = report["data"], report["purifier"]["trained_on"]
    originals = data["noise"] is not None
    ours = "protected image and no clean original" if originals else "protected image"
    near = f"within {_levels(report)}/255 (up to {100 * FEW:g} % of the values aside)"
    if "collected" in data["sets"]:
        if report["roles"] == "disjoint":
            return [
                (
                    True,
                    "No two images of different roles have the same id or the same pixels, and no "
                    f"{ours} lies {near} of a collected or test image",
                )
            ]
        shared = data["separation"]["collected_in_test"]
        return [
            (False, f"{shared} collected images are test images, as in the paper (roles: paper)"),
            (True, f"No {ours} has the id or pixels of a collected or test image or lies {near} of one"),
        ]
    if listed is None:
        first = (False, "What trained the purifier is not known and could not be compared with the other sets")
    elif report["roles"] == "paper":
        first = (False, f"Among the {listed} images that trained the purifier are test images (roles: paper)")
    else:
        seen = "protected or test image or clean original" if originals else "protected or test image"
        first = (True, f"The purifier was trained on {listed} images, by its own list, and on no {seen}")
    return [first, (True, f"No {ours} has the id or pixels of a test image or lies {near} of one")]


def _noise_checked(noise: Mapping, levels: int) -> list[tuple[bool, str]]:
    found = []
    if noise["linf"] > levels:
        found.append(
            (
                False,
                f"The protection changes values by up to {noise['linf']:.0f}/255, more than its budget of "
                f"{levels}/255 (--budget): originals among the collected and test images can be told by the clean "
                "ones only, which are compared with them as well",
            )
        )
    found.append(
        (
            True,
            f"Noise after rounding, in {100 * noise['share_changed']:.0f} % of the images: at most "
            f"{noise['linf']:.0f}/255 per value, Euclidean norm {noise['l2_mean']:.2f} on average and "
            f"{noise['l2_max']:.2f} at most (images in [0, 1]), {noise['l0_mean']:.0f} pixels per image",
        )
    )
    return found


def kind_of_test_images(report: Mapping) -> str:
    """What the test images are, for behind their number."""
    return "purified test images" if report["data"]["division"]["stand_in"] else "clean test images"


def _shortcut_checked(shortcut: Mapping, tested: str) -> tuple[bool, str]:
    figures, clean, beside = shortcut["protected"], shortcut.get("clean"), ""
    if clean:
        beside = f"; from the clean originals it gets {_whole(clean['held_out'])} and {_whole(clean['test'])}"
    said = "It sees no shortcut, which proves nothing: a linear model cannot read every protection."
    if shortcut["found"]:
        said = "The protection is a shortcut that even a linear model reads."
    elif shortcut["exchanged"]:
        said = "It sees a shortcut in the clean originals instead: the two sets may be exchanged."
    return (
        not shortcut["found"] and not shortcut["exchanged"],
        f"Shortcut test: a linear model fitted to protected images gets {_whole(figures['held_out'])} of other "
        f"protected images right and {_whole(figures['test'])} of {tested}{beside}. {said}",
    )


def _whole(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def settings_in_words(report: dict) -> list[tuple[str, str]]:
    """Settings in words, by topic."""
    altered = "purified" if report["data"]["division"]["stand_in"] else "never altered"
    said = [
        ("Purifier", _purifier_in_words(report["purifier"])),
        ("Purification", _purification_in_words(report["purification"])),
        *(("Victims", _victims_in_words(one["victims"], altered)) for one in (report, *report["others"])),
        ("Roles", _roles_in_words(report["roles"], report["purifier"]["trained_on"])),
        ("Device", report["device"]),
    ]
    said += [(f"`{name}`", f"{facts['source']}; cost: {facts['cost']}") for name, facts in report["attacks"].items()]
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
    return [*said, ("Versions", packages)]


def _victims_in_words(victims: Mapping, altered: str) -> str:
    recipe, learner, whitened = victims["recipe"], victims["victim"], ""
    if victims["method"] != "supervised":
        learner += f" by {victims['method']}, a linear probe of {victims['probe_images']} clean labelled images"
    if victims["whitening"]:
        whitened = f", patches of {victims['whitening']} collected images whitened"
    return (
        f"{learner}, width {victims['width']}, protocol `{recipe['name']}` ({recipe['epochs']} epochs, batch "
        f"{recipe['batch_size']}, learning rate {recipe['learning_rate']:g}, {recipe['schedule']}){whitened}, "
        f"seed{'s' * (len(victims['seeds']) > 1)} {', '.join(map(str, victims['seeds']))}; last epoch, test images "
        f"{altered}"
    )


def _purifier_in_words(purifier: Mapping) -> str:
    said = f"{purifier['name']}, {purifier['parameters'] / 1e6:.2f} million parameters"
    if purifier["unet"]:
        said += f" (`{purifier['unet']}`)"
    if purifier["perceptual"]:
        said += f", perceptual network {purifier['perceptual']}"
    if training := purifier["training"]:
        said += (
            f"; {training['steps']} steps of {training['total_batch_size']} images, timesteps "
            f"{training['trained_timesteps'][0]} to {training['trained_timesteps'][1] - 1}, "
            f"{seconds_in_words(training['seconds'])} on {training['device']}"
        )
    return said


def _purification_in_words(purification: Mapping) -> str:
    guides = ", ".join(
        f"{guide} guide {purification[f'{name}_guidance_scale']:g}"
        for name, guide in (("pixel", "pixel"), ("perceptual", "perceptual"), ("protection", "spectrum"))
        if purification.get(f"{name}_guidance_scale")
    )
    rounds = purification["num_rounds"]
    return (
        f"T_p {purification['diffusion_steps']}, {rounds} round{'s' * (rounds > 1)}, "
        f"{purification['evaluations_per_image']} network evaluations per image, {guides or 'no guide'}"
        + colour_in_words(purification.get("noise_corner"))
    )


def _roles_in_words(roles: str, trained_on: int | None) -> str:
    if trained_on is None:
        return f"{roles}, as far as the purifier is believed: it does not list the images that trained it"
    listed = f"the purifier was trained on {trained_on} images,"
    return f"disjoint: {listed} none of the test" if roles == "disjoint" else f"paper: {listed} test images among them"


def seconds_in_words(seconds: float) -> str:
    """Rounded seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
