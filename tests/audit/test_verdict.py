"""The one sentence of an audit: in every case that it knows, and how often it is wrong."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri

from jcdp_diffusers.audit.limits import limits
from jcdp_diffusers.audit.verdict import assumed_std, verdict
from jcdp_diffusers.results import read_records


RESULTS = Path(__file__).parents[2] / "results"
TITLES = {"purified": "purification"}


@pytest.mark.parametrize(
    "rows, status, figures",
    [
        (
            {"clean": [0.76, 0.77, 0.75], "protected": [0.26, 0.27, 0.25], "purified": [0.71, 0.70, 0.72]},
            "broken",
            "26 % -> 71 % by purification, clean 76 %, three seeds",
        ),
        (
            {"clean": [0.76, 0.77], "protected": [0.26, 0.27], "purified": [0.40, 0.41]},
            "weakened",
            "The protection is weakened: 26 % -> 40 % by purification, clean 76 %, two seeds. Purification wins back 28 % "
            "of the lost accuracy.",
        ),
        (
            {"clean": [0.76, 0.77, 0.76], "protected": [0.26, 0.27, 0.26], "purified": [0.27, 0.27, 0.26]},
            "withstands",
            "26 % -> 27 % by purification, clean 76 %, three seeds; no attack wins back 5 points",
        ),
        (
            {"clean": [0.76, 0.75, 0.76], "protected": [0.75, 0.75, 0.75], "purified": [0.70, 0.71, 0.70]},
            "ineffective",
            "75 % from the protected images and 76 % from the clean ones, three seeds; it takes less than 5 points",
        ),
        (
            {"clean": [0.26, 0.27, 0.25], "protected": [0.76, 0.77, 0.78], "purified": [0.71, 0.70, 0.72]},
            "exchanged",
            "77 % from the protected images and 26 % from the clean ones, three seeds",
        ),
        ({"protected": [0.26, 0.27], "purified": [0.71, 0.70]}, "undone", "26 % -> 70 % by purification, two seeds"),
        ({"protected": [0.26, 0.27], "purified": [0.27, 0.26]}, "open", "26 % -> 26 % by purification, two seeds"),
        (
            {"clean": [0.8], "protected": [0.1], "purified": [0.8]},
            "undecided",
            "10 % from the protected images and 80 % from the clean ones, one seed, 2,000 test images. A single victim",
        ),
    ],
)
def test_statuses_and_figures(rows, status, figures):
    judged = verdict(rows, TITLES, test_images=2000)
    assert judged["status"] == status and figures in judged["sentence"]


def test_an_attack_that_assumes_more_counts_where_no_other_bears_the_sentence_out():
    rows = {"clean": [0.8, 0.81], "protected": [0.1, 0.106], "purified": [0.7, 0.71], "paired": [0.78, 0.79]}
    titles = TITLES | {"paired": "paired (assumes that the tool is public)"}
    judge = lambda rows: verdict(rows, titles, test_images=1000, assuming={"paired"})
    assert judge(rows)["attack"] == "purified" and judge(rows)["status"] == "broken"
    judged = judge(rows | {"purified": [0.11, 0.12]})
    assert judged["attack"] == "paired" and judged["status"] == "broken"
    assert "10 % -> 78 % by paired (assumes that the tool is public), clean" in judged["sentence"]


def test_the_strongest_attack_is_named_again_where_it_weakens():
    rows = {"clean": [0.76, 0.77], "protected": [0.26, 0.27], "purified": [0.3, 0.31], "gray": [0.40, 0.41]}
    sentence = verdict(rows, TITLES, test_images=2000)["sentence"]
    assert sentence.endswith("two seeds. gray wins back 28 % of the lost accuracy.")


def test_the_strongest_attack_counts():
    rows = {"clean": [0.8, 0.81], "protected": [0.1, 0.106], "purified": [0.3, 0.31], "jpeg-10": [0.7, 0.71]}
    judged = verdict(rows, TITLES, test_images=1000)
    assert judged["attack"] == "jpeg-10" and "10 % -> 70 % by jpeg-10" in judged["sentence"]
    assert judged["regained_share"] == pytest.approx(0.8575)
    assert judged["differences"]["lost"]["estimate"] == 0.702 and judged["differences"]["gained"]["low"] > 0.5


def test_the_control_is_no_attack():
    rows = {"clean": [0.8, 0.81], "control": [0.79, 0.8], "protected": [0.1, 0.11], "purified": [0.7, 0.71]}
    judged = verdict(rows, TITLES, test_images=1000)
    assert (judged["status"], judged["attack"]) == ("broken", "purified")


def test_few_photographs_decide_nothing():
    """28 photographs and 16 test images: 73 % from the protected, 58 % from the clean, spreads of 32 and 14 points."""
    rows = {"clean": [0.4375, 0.5625, 0.75], "protected": [0.375, 0.8125, 1.0], "purified": [0.5, 0.75, 0.625]}
    judged = verdict(rows, TITLES, test_images=16)
    assert judged["status"] == "undecided" and "no protection" not in judged["sentence"]
    assert judged["enough"]["seeds"] > 3 and judged["enough"]["test_images"] > 16
    assert f"{judged['enough']['test_images']:,} test images are enough" in judged["sentence"]


@pytest.mark.parametrize(
    "purified, status", [(0.8, "broken"), (0.4, "weakened"), (0.18, "undecided"), (0.1, "undecided")]
)
def test_one_victim_of_each_row_with_an_assumed_spread(purified, status):
    rows = {"clean": [0.93], "protected": [0.14], "purified": [purified]}
    judged = verdict(rows, TITLES, test_images=5000, single_victim_std=0.05)
    assert judged["status"] == status and judged["assumed_std"] == 0.05
    assert "one seed (a spread of 5 points between victims is assumed)" in judged["sentence"]
    half = ndtri(0.975) * np.hypot(0.05, 0.05)  # of the seeds alone
    gained = judged["differences"]["gained"]
    assert gained["low"] == pytest.approx(purified - 0.14 - half, abs=0.005)
    unknown = verdict(rows, TITLES, test_images=5000)
    assert unknown["status"] == "undecided" and unknown["assumed_std"] is None


def test_no_spread_is_assumed_where_it_was_measured():
    rows = {"clean": [0.76, 0.77, 0.75], "protected": [0.26, 0.27, 0.25], "purified": [0.71, 0.70, 0.72]}
    judged = verdict(rows, TITLES, test_images=2000, single_victim_std=0.05)
    assert judged == verdict(rows, TITLES, test_images=2000) and judged["assumed_std"] is None


def test_the_assumed_spread_is_above_all_on_record():
    by_row = defaultdict(list)
    for path in RESULTS.rglob("*.jsonl"):
        for record in read_records(path):
            settings = record["settings"]
            if record["what"] != "accuracy" or "method" in settings:
                continue
            images = settings["train"]["images"] if "trial" in settings else settings.get("train_images", 0)
            if assumed_std(images, "supervised") is not None:
                same = {name: value for name, value in settings.items() if name != "trial"}
                by_row[path, record["protocol"], str(same)].append(record)
    spreads = [np.std([one["value"] for one in row], ddof=1) for row in by_row.values() if len(row) >= 3]
    assert len(spreads) > 50 and max(spreads) < assumed_std(10_000, "supervised") == 0.05
    assert assumed_std(9_999, "supervised") is None is assumed_std(50_000, "simclr")


@pytest.mark.parametrize("purified", [[0.9, 0.1, 0.4], [0.1, 0.9, 0.1], [0.6, 0.1, 0.1]])
def test_a_protection_that_one_victim_got_around_does_not_survive(purified):
    rows = {"clean": [0.9, 0.89, 0.91], "protected": [0.1, 0.1, 0.1], "purified": purified}
    judged = verdict(rows, TITLES, test_images=10_000)
    assert judged["status"] == "undecided" and "survives." not in judged["sentence"]
    other = verdict(rows | {"purified": [0.1, 0.1, 0.1], "gray": purified}, TITLES, test_images=10_000)
    assert other["status"] == "undecided"


def test_many_victims_of_which_one_got_around_it():
    """The mean gains nothing, and still nobody is told that the protection survives."""
    rows = {"clean": [0.9] * 40, "protected": [0.1] * 40, "purified": [0.9, *[0.1] * 39]}
    assert verdict(rows, TITLES, test_images=10_000)["status"] == "undecided"
    assert verdict(rows | {"purified": [0.1] * 40}, TITLES, test_images=10_000)["status"] == "withstands"


def test_what_would_be_enough_is_enough():
    """The same means and spreads with the numbers that are asked for."""
    rows = {"clean": [0.70, 0.76, 0.79], "protected": [0.28, 0.16, 0.36], "purified": [0.31, 0.45, 0.62]}
    judged = verdict(rows, TITLES, test_images=60)
    seeds, images = judged["enough"]["seeds"], judged["enough"]["test_images"]
    assert judged["status"] == "undecided" and seeds >= 3 and images >= 60

    def stretched(values):
        """As many values of the same mean and standard deviation."""
        shape = np.resize(np.array(values) - np.mean(values), seeds)
        shape -= shape.mean()
        return np.mean(values) + shape * np.std(values, ddof=1) / np.std(shape, ddof=1)

    assert verdict({row: stretched(v) for row, v in rows.items()}, TITLES, test_images=images)["status"] != "undecided"


def test_where_no_number_is_enough_none_is_named():
    rows = {"clean": [0.9, 0.1, 0.5], "protected": [0.1, 0.9, 0.5], "purified": [0.5, 0.1, 0.9]}
    judged = verdict(rows, TITLES, test_images=1000)
    assert judged["status"] == "undecided" and judged["enough"] is None and "might not tell" in judged["sentence"]


def test_a_smoke_run_decides_nothing():
    judged = verdict({"clean": [0.8], "protected": [0.1], "purified": [0.8]}, TITLES, test_images=100, smoke=True)
    assert judged["status"] == "smoke" and judged["enough"] is None


def test_a_verdict_needs_an_attack():
    for rows in ({"protected": [0.5]}, {"protected": [0.5], "control": [0.6]}, {"purified": [0.5]}):
        with pytest.raises(ValueError, match=r"accuracies has the rows \('p.*but must have 'protected' and an attack"):
            verdict(rows, TITLES, test_images=10)


# ---------------------------------------------------------------------------------------------------------- simulation


def simulated(accuracies, *, std, seeds, test_images, draw):
    """
    Victims whose true accuracies scatter by seed, scored on one drawn test set.

    Some images are harder than others for every victim: half of the variance of what decides an answer is the image's.
    """
    difficulty = draw.standard_normal(test_images)
    rows = {}
    for row, mean in accuracies.items():
        true = np.clip(mean + std * draw.standard_normal(seeds), 0.0, 1.0)
        answers = (difficulty + draw.standard_normal((seeds, test_images))) / np.sqrt(2) < ndtri(true)[:, None]
        rows[row] = answers.mean(axis=1).tolist()
    return rows


def rates(accuracies, *, runs=200, **sizes) -> dict[str, float]:
    draw = np.random.default_rng(0)
    options = {"test_images": sizes["test_images"], "single_victim_std": assumed_std(10_000, "supervised")}
    found = [verdict(simulated(accuracies, draw=draw, **sizes), {}, **options)["status"] for _ in range(runs)]
    return {status: found.count(status) / runs for status in set(found)}


FAST = ((2, 100, 0.15), (3, 16, 0.0), (5, 1000, 0.15))
SIZES = [
    pytest.param(
        {"std": std, "seeds": seeds, "test_images": images},
        id=f"{seeds}-seeds-{images}-images-std-{std}",
        marks=[pytest.mark.long] * ((seeds, images, std) not in FAST),
    )
    for seeds, images in ((2, 100), (3, 16), (3, 400), (5, 1000))
    for std in (0.0, 0.03, 0.15)
]
SIZES += [  # one victim, which scatters no more than is assumed
    pytest.param(
        {"std": std, "seeds": 1, "test_images": images},
        id=f"1-seed-{images}-images-std-{std}",
        marks=[pytest.mark.long] * (images == 1000),
    )
    for images in (100, 1000)
    for std in (0.0, 0.05)
]


@pytest.fixture(autouse=True)
def no_search(monkeypatch, request):
    """What would be enough is of no interest in a simulation, and slow."""
    if "sizes" in request.fixturenames:
        monkeypatch.setattr("jcdp_diffusers.audit.verdict.what_would_decide", lambda rows, largest, assuming: None)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("truth", "false"),
    [
        # The protection takes just the margin: saying that there is none is wrong.
        ({"clean": 0.75, "protected": 0.70, "purified": 0.70}, "ineffective"),
        ({"clean": 0.95, "protected": 0.70, "purified": 0.95}, "ineffective"),
        # An attack wins back just the margin, or half: saying that it survives is wrong.
        ({"clean": 0.80, "protected": 0.20, "purified": 0.25}, "withstands"),
        ({"clean": 0.80, "protected": 0.20, "purified": 0.20, "gray": 0.25}, "withstands"),
        ({"clean": 0.60, "protected": 0.52, "purified": 0.56}, "withstands"),
        # Attacks win back just less than half, or nothing: saying that it is broken is wrong.
        ({"clean": 0.80, "protected": 0.20, "purified": 0.499}, "broken"),
        ({"clean": 0.80, "protected": 0.20, "purified": 0.49, "gray": 0.49, "jpeg-10": 0.49}, "broken"),
        ({"clean": 0.80, "protected": 0.20, "purified": 0.20}, "broken"),
        ({"clean": 0.80, "protected": 0.80, "purified": 0.80}, "broken"),
        ({"clean": 0.80, "protected": 0.80, "purified": 0.80}, "exchanged"),
        ({"protected": 0.40, "purified": 0.45}, "undone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{100 * share:g}" for share in value.values()),
)
def test_false_statements_are_rare(truth, false, sizes):
    assert rates(truth, **sizes).get(false, 0.0) < 0.05


@pytest.mark.parametrize(
    ("truth", "right"),
    [
        ({"clean": 0.77, "protected": 0.26, "purified": 0.72}, "broken"),
        ({"clean": 0.77, "protected": 0.26, "purified": 0.40}, "weakened"),
        ({"clean": 0.77, "protected": 0.26, "purified": 0.26}, "withstands"),
        ({"clean": 0.77, "protected": 0.77, "purified": 0.74}, "ineffective"),
    ],
)
def test_enough_victims_and_images_tell(truth, right):
    assert rates(truth, std=0.005, seeds=3, test_images=5000, runs=40)[right] > 0.9


# -------------------------------------------------------------------------------------------------------------- limits


def told(status="broken", **changed):
    facts = {
        "victim": "resnet18",
        "seeds": 3,
        "planned_seeds": 3,
        "test_images": 5000,
        "clean_known": True,
        "roles": "disjoint",
        "listed": 100,
        "training": {"steps": 20, "seconds": 3.2},
        "attacks": [],
        "assumptions": {},
    }
    return limits(status, **facts | changed)


def test_limits_that_every_audit_has():
    sentences = told()
    assert len(sentences) == 4
    # A share of one half scatters by 0.5 / sqrt(5000) = 0.71 points, 1.96 times that is 1.4.
    assert "uncertain by up to 1.4 points" in sentences[2]
    assert "trained here, on 100 images in 20 steps and 3 s" in sentences[3]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": 2}, "2 victims per row: too few to know the spread"),
        ({"seeds": 1}, "One victim per row: too few to know the spread"),
        (
            {"seeds": 1},
            "The time was up after 1 of 3 victims per row. The same command, given again, trains the others.",
        ),
        ({"clean_known": False}, "No clean originals were given"),
        ({"roles": "paper"}, "trained on the very test images"),
        ({"listed": None, "training": None}, "does not list the images that trained it"),
        ({"training": None, "clean_known": False}, "by the list of 100 images in its repository"),
        ({"attacks": ["eclipse"]}, "The row eclipse purifies with the purifier of this audit"),
        (
            {"assumptions": {"paired": "the tool is public"}},
            "The row paired assumes more than the others: that the tool",
        ),
        ({"attacks": ["jpeg-10", "gray"]}, "one of 3 attacks: the strongest that bears it out"),
        ({"status": "smoke"}, "no figure means anything"),
        ({"status": "withstands", "attacks": ["jpeg-10"]}, "The verdict holds for all 2 attacks that were tried."),
        # Three victims, none of whom succeeded: 1 - 0.05 ** (1 / 3) = 0.63.
        ({"status": "withstands"}, "that more than 63 % of all would"),
    ],
)
def test_limits_that_some_audits_have(changed, said):
    assert said not in " ".join(told())
    assert said in " ".join(told(**changed))


@pytest.mark.parametrize("status", ["exchanged", "ineffective", "undecided", "withstands", "open", "smoke"])
def test_where_the_verdict_is_not_of_one_attack_none_is_named(status):
    assert "The verdict speaks of one" not in " ".join(told(status, attacks=["jpeg-10"]))
