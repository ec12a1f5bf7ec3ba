"""The report: what it says, and how it looks in a browser."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.audit.page import TONES
from jcdp_diffusers.audit.pictures import picture_strips
from jcdp_diffusers.audit.report import markdown, write_report
from jcdp_diffusers.audit.verdict import verdict
from jcdp_diffusers.audit.words import certainty, checks, results_table, seconds_in_words
from jcdp_diffusers.data import LabelledImages


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
        "train_seconds": 31.4,
        "prepare_seconds": prepare,
        "device": "cpu",
        "threads": 1,
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
        "enough": None,
    },
    "smoke": False,
    "roles": "disjoint",
    "rows": [
        row("clean", "clean images", [0.76, 0.77, 0.75]),
        row("protected", "protected images", [0.26, 0.28, 0.24]),
        row("purified", "purification", [0.71, 0.72, 0.70], prepare=130.0),
        row("jpeg-10", "jpeg-10", [0.61, 0.58, 0.63], prepare=2.0),
    ],
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
        "separation": {"collected_in_test": 0, "budget": 16 / 255},
        "noise": {"linf": 8, "l2_mean": 0.9, "l2_max": 1.0, "l0_mean": 200, "l0_max": 256, "share_changed": 1.0},
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, REPORT, sets())
    return folder


class _Tags(HTMLParser):
    """Checks nesting, and remembers what could reach for another file."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.images = [], [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href") and v]
        self.images += tag == "img"
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_beside_it(written):
    text = (written / "report.html").read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == [] and tags.images == 5 * 4
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in tags.links)
    assert "<script" not in text and "url(http" not in text
    # Names from outside are text, not markup.
    assert "&lt;cats&gt; &amp; dogs" in text and "<cats>" not in text and "my &lt;images&gt;" in text


def test_page_and_markdown_say_the_same_as_the_figures(written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    assert json.loads((written / "report.json").read_text()) == REPORT
    assert "26&nbsp;% → 71&nbsp;% by purification, clean 76&nbsp;%" in page and REPORT["verdict"]["sentence"] in text
    for shown in results_table(REPORT):
        for name in ("title", "test", "std", "best", "train", "seconds"):
            assert shown[name] in page and shown[name] in text
    for said in (
        *REPORT["limits"],
        *certainty(REPORT),
        "Noise after rounding, in 100 % of the images: at most 8/255 per value",
    ):
        assert said in page and said in text
    assert "71.0 %" in text and "2 min (+ 2 min for the purifier)" in text
    assert "perceptual guide 500" in text and "pixel guide" not in text


def test_every_verdict_has_its_colour():
    assert set(re.findall(r'- `"(\w+)"`', verdict.__doc__)) == set(TONES)


def test_page_and_markdown_say_what_the_pictures_show(written):
    caption = picture_strips(sets()).caption
    assert caption in (written / "report.html").read_text() and caption in (written / "report.md").read_text()


def test_how_sure_the_verdict_is():
    lost, gained, chances, margin = certainty(REPORT)
    assert "falls by 50.0 points (95 % interval 46.0 to 54.0)" in lost
    assert "purification raises it by 45.0 points (95 % interval 40.0 to 50.0)" in gained
    assert "3 victims" in chances and "200" in chances and "5 points" in margin
    report = copy.deepcopy(REPORT)
    report["verdict"]["differences"] = {"lost": None, "gained": {"estimate": 0.45, "low": None, "high": None}}
    assert "raises it by 45.0 points (its interval is unknown" in certainty(report)[0]


HOSTILE = "<script>alert(1)</script>|`x`\x1b[31m\n# title\n](javascript:x)\u202e"


def test_names_from_outside_are_text_wherever_they_stand(tmp_path):
    report = copy.deepcopy(REPORT)
    report["purifier"]["name"] = report["command"] = report["device"] = HOSTILE
    report["limits"], report["rows"][3]["title"] = [HOSTILE], HOSTILE
    classes = tuple(f"{HOSTILE}{number}" for number in range(4))
    data = {role: dataclasses.replace(images, class_names=classes) for role, images in sets().items()}
    write_report(tmp_path, report, data)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "\x1b" not in text and "\u202e" not in text and r"\x1b[31m" in text
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<script" not in page
    before, _, after = text.partition("```\n")
    assert not re.search(r"(?<!\\)(<script|\]\(javascript)", before)
    rows = [line for line in before.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {9, 3}  # eight columns, and two
    assert not any(line.startswith("# title") for line in text.splitlines())


def test_what_needs_a_look_is_marked():
    marked = [sentence for good, sentence in checks(REPORT) if not good]
    assert len(marked) == 3  # duplicates, an unbalanced test set, a shortcut
    assert "2 images repeat the pixels of another, 1 of them with another label" in marked[0]
    assert "5 to 120 of each of 4 classes" in marked[1] and "shortcut that even a linear model reads" in marked[2]


def test_the_report_claims_no_more_than_was_compared():
    report = copy.deepcopy(REPORT)

    def said() -> str:
        return " ".join(("" if good else "! ") + sentence for good, sentence in checks(report))

    assert (
        "No two images of different roles have the same id or the same pixels, and no protected image and no clean "
        "original lies within 16/255 (up to 1 % of the values aside) of a collected or test image" in said()
    )
    report["data"]["noise"]["linf"] = 44
    assert "! The protection changes values by up to 44/255, more than its budget of 16/255 (--budget)" in said()
    report["data"]["noise"] = None
    report["data"]["separation"]["budget"] = 8 / 255
    assert "and no protected image lies within 8/255" in said()
    report["roles"] = "paper"
    assert "No protected image has the id or pixels of a collected or test image or lies within 8/255" in said()
    del report["data"]["sets"]["collected"]
    assert "No protected image has the id or pixels of a test image or lies within 8/255" in said()


def test_smoke_runs_roles_of_the_paper_and_missing_originals_are_marked(tmp_path):
    report = copy.deepcopy(REPORT) | {"smoke": True, "roles": "paper"}
    report["rows"] = report["rows"][1:]
    report["data"]["noise"] = None
    report["data"]["separation"]["collected_in_test"] = 90
    del report["data"]["shortcut"]["clean"]
    write_report(tmp_path, report, sets(with_clean=False))
    page, text = (tmp_path / "report.html").read_text(), markdown(report, "")
    for said in (
        "Smoke run: nothing was trained for long enough to mean anything.",
        "Roles as in the paper: the purifier has seen the test images.",
        "90 collected images are test images, as in the paper (roles: paper)",
    ):
        assert said in page and said in text
    assert "No clean originals were given." in page and "what purification changed" in page


def test_pictures_are_one_of_each_class_and_differences_share_a_scale():
    strips = picture_strips(sets())
    assert list(strips.images)[:3] == ["clean", "protected", "purified"]
    assert strips.classes == ("<cats> & dogs", "b", "c", "d")
    assert np.array_equal(strips.images["clean"], sets()["clean"].images[[3, 2, 4, 0]])
    added, left = (strips.images[title].astype(int) for title in list(strips.images)[3:])
    assert [len(images) for images in strips.images.values()] == [4] * 5
    assert np.abs(added - 127.5).min() == pytest.approx(8 * strips.gain, abs=0.5)
    assert np.abs(left - 127.5).max() == pytest.approx(8 * strips.gain / 4, abs=1)  # a quarter of the noise is left


@pytest.mark.parametrize("larger", ["added", "left"])
def test_no_difference_is_cut_off_whichever_is_the_larger(larger):
    """What purification left may be more than what the protection added."""
    data = sets()
    clean = data["clean"].images.astype(int)
    sizes = (4, 24) if larger == "left" else (24, 4)
    for role, size in zip(("protected", "purified"), sizes):
        noise = np.random.default_rng(1).choice([-size, size], clean.shape)
        data[role] = data[role].with_images((clean + noise).astype(np.uint8))
    strips = picture_strips(data)
    titles = list(strips.images)[3:]
    for title, size in zip(titles, sizes):
        assert title.endswith(f", x{strips.gain}")
        shown = np.abs(strips.images[title] - 127.5)
        assert shown.max() == pytest.approx(size * strips.gain, abs=1) == shown.min()
    assert f"magnified {strips.gain} times" in strips.caption and "one scale" in strips.caption


@pytest.mark.parametrize("seconds, said", [(0.2, "0 s"), (89, "89 s"), (150, "2 min"), (7200, "2.0 h")])
def test_times(seconds, said):
    assert seconds_in_words(seconds) == said


@pytest.fixture(scope="module")
def browser(written, tmp_path_factory):
    """Runs Chromium on the report; `shot` gives what a window of that width shows."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("chromium")

    def chromium(*options):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        page = (written / "report.html").as_uri()
        return subprocess.run([CHROMIUM, *flags, *options, page], capture_output=True, timeout=120, check=True)

    def shot(width: int, height: int) -> np.ndarray:
        chromium(f"--window-size={width},{height}", f"--screenshot={folder / 'shot.png'}")
        return np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)

    chromium.shot = shot
    return chromium


@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_shows_it(browser, width):
    shot = browser.shot(width, 3000)
    assert shot.shape == (3000, width, 3)
    # The verdict's mark and the curves have their colours, and the noise, which nearly fills the scale, is there.
    for colour in ("b3261e", "2f6f4f", "1f5fa8"):
        wanted = [int(colour[i : i + 2], 16) for i in (0, 2, 4)]
        assert (np.abs(shot - wanted).max(axis=2) <= 2).sum() > 200
    assert ((shot.max(axis=2) > 240) & (shot.min(axis=2) < 15)).sum() > 5000
    assert (shot[:, -10:] == 255).all()  # nothing is wider than the window


def test_a_browser_finds_the_verdict(browser):
    dom = browser("--dump-dom").stdout.decode()
    assert re.search(r'id="verdict" data-status="broken">The protection does not survive', dom)


def test_the_colour_of_the_noise_is_said():
    coloured = copy.deepcopy(REPORT)
    assert "corner frequency" not in markdown(coloured, "")
    coloured["purification"]["noise_corner"] = 8.0
    assert "noise of corner frequency 8 cycles per image" in markdown(coloured, "")
