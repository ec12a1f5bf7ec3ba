"""The one sentence of an audit, in every case that it knows."""

import pytest

from jcdp_diffusers.audit.verdict import limits, verdict


TITLES = {"purified": "purification"}


@pytest.mark.parametrize(
    "rows, status, sentence",
    [
        (
            {"clean": [0.76, 0.77, 0.75], "protected": [0.26, 0.27, 0.25], "purified": [0.71, 0.70, 0.72]},
            "broken",
            "The protection does not survive: 26 % -> 71 % by purification, clean 76 %, three seeds.",
        ),
        (
            {"clean": [0.76, 0.77], "protected": [0.26, 0.27], "purified": [0.40, 0.41]},
            "weakened",
            "The protection survives in part: 26 % -> 40 % by purification, clean 76 %, two seeds, which wins back 28 % "
            "of what it took.",
        ),
        (
            {"clean": [0.76, 0.77], "protected": [0.26, 0.27], "purified": [0.27, 0.27]},
            "withstands",
            "The protection survives what was tried: 26 % -> 27 % by purification, clean 76 %, two seeds; a stronger "
            "attack may still break it.",
        ),
        (
            {"clean": [0.76, 0.75], "protected": [0.75, 0.75], "purified": [0.70, 0.71]},
            "ineffective",
            "There is no protection to remove: victims get 75 % from the protected images and 76 % from the clean ones, "
            "two seeds.",
        ),
        (
            {"clean": [0.26, 0.27, 0.25], "protected": [0.76, 0.77, 0.78], "purified": [0.71, 0.70, 0.72]},
            "exchanged",
            "No verdict: the protected and the clean images seem to be exchanged, for victims get 77 % from those given "
            "as protected and 26 % from those given as clean, three seeds.",
        ),
        (
            {"protected": [0.26, 0.27], "purified": [0.71, 0.70]},
            "undone",
            "The protection does not hold: 26 % -> 70 % by purification, two seeds; how much of it is left cannot be "
            "known without clean images.",
        ),
        (
            {"protected": [0.26], "purified": [0.27]},
            "open",
            "No verdict: 26 % -> 27 % by purification, one seed; without clean images, a protection that survives "
            "cannot be told from images that teach little.",
        ),
    ],
)
def test_sentences(rows, status, sentence):
    judged = verdict(rows, TITLES)
    assert (judged["status"], judged["sentence"]) == (status, sentence)


def test_the_strongest_attack_counts():
    rows = {"clean": [0.8, 0.8], "protected": [0.1, 0.1], "purified": [0.3, 0.3], "jpeg-10": [0.7, 0.7]}
    judged = verdict(rows, TITLES)
    assert judged["attack"] == "jpeg-10" and "10 % -> 70 % by jpeg-10" in judged["sentence"]
    assert judged["regained_share"] == pytest.approx(0.8571)


def test_figures_that_scatter_widely_decide_nothing():
    rows = {"clean": [0.8, 0.8], "protected": [0.2, 0.4], "purified": [0.3, 0.5]}
    assert verdict(rows, TITLES)["status"] == "withstands"


def test_only_a_clear_difference_is_an_exchange():
    for clean in ([0.70, 0.70], [0.5, 0.9]):  # a point and a half below, and below within the spread
        rows = {"clean": clean, "protected": [0.715, 0.715], "purified": [0.7, 0.7]}
        assert verdict(rows, TITLES)["status"] == "ineffective"


def test_a_smoke_run_decides_nothing():
    judged = verdict({"clean": [0.8], "protected": [0.1], "purified": [0.8]}, TITLES, smoke=True)
    assert judged["status"] == "smoke" and judged["sentence"].startswith("A first try in seconds, from which nothing")


def test_a_verdict_needs_an_attack():
    with pytest.raises(ValueError, match=r"accuracies has the rows \('protected',\), but 'protected' and an attack"):
        verdict({"protected": [0.5]}, TITLES)


def told(status="broken", **changed):
    facts = {
        "victim": "resnet18",
        "seeds": 3,
        "test_images": 5000,
        "clean_known": True,
        "roles": "disjoint",
        "listed": 100,
        "training": {"steps": 20, "seconds": 3.2},
        "attacks": [],
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
        ({"seeds": 2}, "2 victim(s) per row"),
        ({"clean_known": False}, "No clean originals were given"),
        ({"roles": "paper"}, "trained on the very test images"),
        ({"listed": None, "training": None}, "does not list the images that trained it"),
        ({"training": None, "clean_known": False}, "by the list of 100 images in its repository"),
        ({"attacks": ["eclipse"]}, "The row eclipse purifies with the purifier of this audit"),
        ({"attacks": ["jpeg-10", "gray"]}, "the strongest of 3 attacks"),
        ({"status": "smoke"}, "no figure means anything"),
    ],
)
def test_limits_that_some_audits_have(changed, said):
    assert said not in " ".join(told())
    assert said in " ".join(told(**changed))


def test_exchanged_sets_name_no_strongest_attack():
    assert "strongest" not in " ".join(told("exchanged", attacks=["jpeg-10"]))
