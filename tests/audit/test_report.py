"""The report: what it says, and its pictures."""

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from audit_reports import REPORT, SPECTRUM, photographs, row, sets
from PIL import Image

from jcdp_diffusers.audit.draws import separate_spreads
from jcdp_diffusers.audit.evidence import evidence_in_words
from jcdp_diffusers.audit.owner import numbers, what_to_do
from jcdp_diffusers.audit.page import TONES, page
from jcdp_diffusers.audit.pictures import NATIVE_SIDE, draw_spectrum, native_pictures, picture_strips
from jcdp_diffusers.audit.report import markdown, write_report
from jcdp_diffusers.audit.verdict import verdict
from jcdp_diffusers.audit.words import (
    certainty,
    checks,
    results_table,
    seconds_in_words,
    settings_in_words,
    spectrum_said,
)


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
    assert tags.open == [] and tags.images == 5 * 4 + 4
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in tags.links)
    assert "<script" not in text and "url(http" not in text
    # Names from outside are text, not markup.
    assert "&lt;cats&gt; &amp; dogs" in text and "<cats>" not in text and "my &lt;images&gt;" in text


def test_page_and_markdown_say_the_same_as_the_figures(written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    page = re.sub("</?code>", "`", page)
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
    lost, gained, chances, margin, draws = certainty(REPORT)
    assert lost == (
        "From the clean to the protected images, test accuracy changes by -50.0 points (95 % interval -54.0 to -46.0)."
    )
    assert gained == (
        "From the protected images to purification, test accuracy changes by +45.0 points (95 % interval +40.0 to "
        "+50.0)."
    )
    assert "3 victims" in chances and "200" in chances and "5 points" in margin
    assert "its row is that of one draw" in draws and "`--draws 3`" in draws
    report = copy.deepcopy(REPORT)
    report["verdict"]["differences"] = {"lost": None, "gained": {"estimate": 0.45, "low": None, "high": None}}
    assert "by +45.0 points (its interval is unknown" in certainty(report)[0]
    assert not any("intervals cover" in sentence for sentence in certainty(report))
    exchanged = {"lost": {"estimate": -0.8, "low": -0.84, "high": -0.76}, "gained": None}
    report["verdict"] |= {"differences": exchanged, "assumed_std": 0.05}
    lost, assumed, chances = certainty(report)[:3]
    assert "changes by +80.0 points (95 % interval +76.0 to +84.0)" in lost and "5 points are assumed" in assumed
    assert chances == (
        "The intervals cover other seeds (by the assumed spread) and other test images (200; Agresti and Caffo, 2000)."
    )


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
    # Limits name files, whose backticks are no code.
    limits = page[page.index('id="limits"') : page.index('id="command"')]
    assert "`x`" in limits and "<code>" not in limits and r"\`x\`" in text[text.index("## Limits") :]
    before, _, after = text.partition("```\n")
    assert not re.search(r"(?<!\\)(<script|\]\(javascript)", before)
    rows = [line for line in before.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {9, 4, 3}  # eight columns, three and two
    assert not any(line.startswith("# title") for line in text.splitlines())


def test_what_needs_a_look_is_marked():
    marked = [sentence for good, sentence in checks(REPORT) if not good]
    assert len(marked) == 3  # duplicates, an unbalanced test set, a shortcut
    assert "2 images repeat the pixels of another, 1 of them with another label" in marked[0]
    assert any("400 images, 100 of each of 4 classes" in sentence for _, sentence in checks(REPORT))
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
    report["data"]["visibility"] = report["data"]["jpeg_saves"] = report["data"]["spectrum"] = None
    report["data"]["separation"]["collected_in_test"] = 90
    del report["data"]["shortcut"]["clean"]
    write_report(tmp_path, report, sets(with_clean=False))
    page, text = (
        (tmp_path / "report.html").read_text(),
        markdown(report, "", native_pictures(picture_strips(sets(with_clean=False)))),
    )
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


def test_pictures_at_actual_size_are_the_images_themselves():
    data = photographs(32, 32)
    native = native_pictures(picture_strips(data))
    assert list(native.pictures) == ["clean", "protected", "purified", "what protection added, x15"]
    for role in ("clean", "protected", "purified"):
        picture = native.pictures[role]
        assert picture.shape == (32, 4 * 36 - 4, 3)
        for number in range(4):
            assert np.array_equal(picture[:, 36 * number : 36 * number + 32], data[role].images[number])
    assert "a pixel of an image is a pixel of this page" in native.caption and "15 times" in native.caption


def test_of_large_pictures_the_middle_is_shown_at_actual_size():
    data = photographs(200, 300)
    native = native_pictures(picture_strips(data))
    assert np.array_equal(native.pictures["clean"], data["clean"].images[0, 20:180, 70:230])
    assert "A part of 160x160 pixels from the middle of 300x200." in native.caption
    assert max(max(picture.shape[:2]) for picture in native.pictures.values()) == NATIVE_SIDE


def test_the_page_shows_pictures_at_their_own_size(written):
    page = (written / "report.html").read_text()
    (natives,) = re.findall(r'<div class="natives".*?</div>', page, re.S)
    for picture in native_pictures(picture_strips(sets())).pictures.values():
        height, width = picture.shape[:2]
        assert f'width="{width}" height="{height}"' in natives
    assert natives.count("<img") == 4


def test_the_first_page_has_the_verdict_three_numbers_pictures_and_what_to_do(written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    owner = page[page.index('<section id="owner">') : page.index('<section id="full">')]
    first = text[: text.index("## What victims learned")]
    for said in ("76&nbsp;%", "26&nbsp;%", "71&nbsp;%"):
        assert f"<b>{said}</b>" in owner and f"**{said.replace('&nbsp;', ' ')}**" in first
    for said in (
        "learned after the strongest attack (trained on purified images)",
        "3 victims, std 2.0",
        "Do not rely on this protection.",
        "The protection changes values by up to 8/255; PSNR 31.2 dB, SSIM 0.913 on average.",
    ):
        assert said in owner and said in first
    assert "`--countermeasures jpeg-95,jpeg-75` trains 6 more victims, about 3 min in all." in first  # 6 x 31.4 s


def test_an_attack_is_called_the_strongest_only_if_it_is():
    report = copy.deepcopy(REPORT)
    assert numbers(report)[2]["title"].startswith("learned after the strongest attack (")
    report["verdict"]["attack"] = "jpeg-10"
    third = numbers(report)[2]
    assert third["value"] == "61 %" and "with jpeg-10" in third["title"] and "strongest" not in third["title"]
    assert third["note"].endswith("; 71 % on average after the strongest (trained on purified images)")
    report["rows"] = report["rows"][1:]
    assert numbers(report)[0] | {"title": ""} == {
        "row": None,
        "value": "?",
        "title": "",
        "note": "no originals were given",
    }


@pytest.mark.parametrize("status", sorted(TONES))
def test_every_verdict_says_what_to_do(status):
    report = copy.deepcopy(REPORT)
    report["verdict"]["status"] = status
    said = what_to_do(report)
    assert said and (("--countermeasures jpeg-95" in said[-1]) == (status not in ("smoke", "exchanged")))


@pytest.mark.parametrize(
    "planned, seeds, enough, said",
    [
        (3, 3, {"seeds": 5, "test_images": 200}, "with more `--seeds`"),
        (3, 2, {"seeds": 5, "test_images": 200}, "Give the same command again."),
        (1, 1, None, "with more `--seeds`"),
        (3, 3, None, "Give more images to train them with, or another `--victim`."),
    ],
)
def test_what_to_do_where_the_figures_are_not_enough(planned, seeds, enough, said):
    report = copy.deepcopy(REPORT) | {"planned_seeds": planned}
    report["verdict"] |= {"status": "undecided", "enough": enough}
    report["victims"]["seeds"] = list(range(seeds))
    assert said in what_to_do(report)[0]


def test_further_victims_are_counted_for_every_way_of_learning():
    report = copy.deepcopy(REPORT)
    other = copy.deepcopy({name: report[name] for name in ("verdict", "rows", "victims")})
    other["rows"][1]["train_seconds"] = 600
    report["others"] = [other]
    assert "trains 12 more victims, about 63 min in all." in what_to_do(report)[-1]  # 6 x 31.4 s and 6 x 600 s


def test_curves_of_victims_without_labels_are_called_what_they_are(written, monkeypatch):
    for name in ("draw_spectrum", "draw_losses"):  # slow, and of no interest here
        monkeypatch.setattr(f"jcdp_diffusers.audit.page.{name}", lambda _: "")
    report = copy.deepcopy(REPORT)
    report["victims"]["method"] = "simclr"
    strips = picture_strips(sets())
    native = native_pictures(strips)
    texts = [page(report, strips, native), markdown(report, "", native)]
    assert "accuracy of nearest neighbours (%)" in texts[0] and "test accuracy (%)" not in texts[0]
    said = "The curves show the accuracy of nearest neighbours. The table shows that of the linear probe."
    assert all(said in text for text in texts)
    supervised = (written / "report.html").read_text()
    assert "test accuracy (%)" in supervised and "nearest neighbours" not in supervised


def test_settings_name_one_seed_or_several():
    report = copy.deepcopy(REPORT)
    assert "seeds 0, 1, 2;" in dict(settings_in_words(report))["Victims"]
    report["victims"]["seeds"] = [0]
    assert ", seed 0;" in dict(settings_in_words(report))["Victims"]


def test_what_a_jpeg_save_does_is_said_once_it_is_measured():
    report = copy.deepcopy(REPORT)
    report["rows"].append(row("jpeg-95", "jpeg-95", [0.31, 0.33, 0.29]))
    said = " ".join(what_to_do(report))
    assert "Saved as JPEG of quality 95, the protected images teach 31 %; saved without loss, 26 %." in said
    assert "`--countermeasures jpeg-75` trains 3 more victims" in said
    assert results_table(report)[-1]["title"] == "protected images, saved as JPEG of quality 95"
    report["rows"].append(row("jpeg-75", "jpeg-75", [0.5, 0.5, 0.5]))
    assert "--countermeasures" not in " ".join(what_to_do(report))


def test_visibility_is_in_the_tables(written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    for said in (
        "31.2 dB, std 0.4 over 400 images; at least 30.8 dB",
        "not measured: no network",
        "A JPEG save of quality 75 leaves 38 % of the noise, std 6 over 400 images.",
    ):
        assert said in page and said in text


def test_draws_are_said():
    report = copy.deepcopy(REPORT)
    values = [[0.71, 0.72, 0.70], [0.68, 0.69, 0.67], [0.74, 0.75, 0.73]]
    report["draws"] = {"count": 3, "values": values} | separate_spreads(values)
    mean, spreads = certainty(report)[-2:]
    assert "drawn 3 times, with 3 victims each: 71.0, 68.0, 74.0 %" in mean
    assert "standard error of 1.7 points" in mean  # 3 / sqrt 3
    assert "between draws 2.9 points, between victims of one draw 1.0 points" in spreads
    assert results_table(report)[2]["title"] == "trained on purified images, 3 draws"
    values = [[0.71], [0.68], [0.74]]
    report["draws"] = {"count": 3, "values": values} | separate_spreads(values)
    assert "One victim per draw cannot tell" in certainty(report)[-1]


def test_what_is_not_seen_in_the_spectrum_is_drawn_as_unknown(tmp_path):
    svg = draw_spectrum(SPECTRUM)
    assert svg.startswith("<svg") and "unknown, at most this much" in svg and "true, from the originals" in svg
    assert "colour axis 2: 0.71 R + 0.00 G - 0.71 B" in svg
    assert svg.count("url(#h") == 9 + 4 + 2 + 1  # hatched: a bar for each bin that is not seen, and the legend's
    everything = SPECTRUM | {"seen": [[True] * 9] * 3, "power": [[5.0] * 9] * 3, "actual": None}
    seen = draw_spectrum(everything)
    assert "unknown" not in seen and "true, from" not in seen and seen.count("url(#h") == 0
    draw_spectrum(SPECTRUM, tmp_path / "spectrum.png")
    assert Image.open(tmp_path / "spectrum.png").size[0] > 300


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {},
            "2.3 times the power of collected images at 6 cycles per image in colour axis 3 "
            "(0.41 R - 0.82 G + 0.41 B), p at most 0.001: the sign",
        ),
        (
            {"background": [[0.0] * 9] * 3, "axes": [[0.0] * 3, [0.0] * 3, [-0.53, 0.81, -0.26]]},
            "a power of 11.0 squared levels at 6 cycles per image in colour axis 3 (-0.53 R + 0.81 G - 0.26 B), where",
        ),
        ({"finding": "none", "p_value": 0.4}, "do not differ by more than chance explains (p = 0.4)"),
        ({"finding": "filtered"}, "as after a JPEG save, a blur or a protection by convolution"),
        ({"finding": "other kind"}, "no sign of an added protection"),
    ],
)
def test_what_the_spectra_show_is_said_with_its_limits(changes, said):
    sentence, *limits = evidence_in_words(SPECTRUM | changes)
    assert said in sentence
    assert "999 random divisions of the 400 protected and 90 collected images" in limits[0]
    assert "not why they do" in limits[0] and "one kind" in limits[1]


@pytest.mark.parametrize(
    "of, missing, said",
    [
        ("", [], "without collected images (--collected) there is nothing"),
        ("protected", ["test"], "without collected images (--collected) there is nothing"),
        ("protected", ["collected", "test"], "the images that trained the purifier are protected, too"),
    ],
)
def test_why_spectra_were_not_compared_is_said(of, missing, said):
    report = copy.deepcopy(REPORT)
    report["data"] |= {"spectrum": None, "division": {"of": of, "missing": missing, "stand_in": False}}
    (sentence,) = spectrum_said(report)
    assert sentence.startswith("Spectra were not compared: ") and said in sentence
    report["data"]["enlarged"] = "Spectra were not compared: enlarged."
    assert spectrum_said(report) == ["Spectra were not compared: enlarged."]


@pytest.mark.parametrize("seconds, said", [(0.2, "0 s"), (89, "89 s"), (150, "2 min"), (7200, "2.0 h")])
def test_times(seconds, said):
    assert seconds_in_words(seconds) == said


def test_the_colour_of_the_noise_is_said():
    coloured = copy.deepcopy(REPORT)
    assert "corner frequency" not in markdown(coloured, "", native_pictures(picture_strips(sets())))
    coloured["purification"]["noise_corner"] = 8.0
    assert "noise of corner frequency 8 cycles per image" in markdown(
        coloured, "", native_pictures(picture_strips(sets()))
    )
