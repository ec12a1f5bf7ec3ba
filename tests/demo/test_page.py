"""The page of `jcdp demo` in headless Chromium, on a screen and on a phone."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from purifying import quick_pipe


pytestmark = pytest.mark.long
CHROMIUM = os.environ.get("JCDP_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"screen": (1280, 900), "phone": (390, 844)}
SECONDS = 40_000  # milliseconds, for a machine that does something else, too


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name, shape in (("wide.png", (40, 64, 3)), ("tall.jpg", (70, 30, 3))):
        Image.fromarray(draw.integers(0, 256, shape).astype(np.uint8)).save(folder / name)
    (folder / "wrong.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page that is served by the command itself; its purifier takes a moment per picture."""
    folder = tmp_path_factory.mktemp("purifier")
    quick_pipe().save_pretrained(folder)
    words = [sys.executable, "-m", "jcdp_diffusers.cli", "demo", "--purifier", str(folder)]
    served = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        for line in served.stdout:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        for _ in range(60):
            try:
                urllib.request.urlopen(found[0], timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        yield found[0]
    finally:
        served.terminate()
        served.wait(20)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium: JCDP_CHROMIUM names its program")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def tab(request, browser, address):
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(SECONDS)
    page.asked = []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(address)
    page.wait_for_selector("#pictures")
    yield page
    page.close()


def give(tab, *files: Path) -> None:
    tab.set_input_files("#pictures input[type=file]", [str(file) for file in files])
    for file in files:
        tab.locator("#pictures").get_by_text(file.stem).wait_for()


def write(tab, setting: str, text: str) -> None:
    """As a person does, who sees what is there: text that is written while Gradio still builds the fold is lost."""
    field = tab.locator(f"#{setting} input")
    for _ in range(10):
        field.fill(text)
        field.press("Tab")  # the page takes a setting when it is left
        tab.wait_for_timeout(500)
        if field.input_value() == text:
            return
    raise AssertionError(f"{setting} has {field.input_value()!r}, not {text!r}")


def image_at(tab, address) -> np.ndarray:
    with urllib.request.urlopen(address) as content:
        return np.asarray(Image.open(content))


def test_purify_and_compare(tab, pictures):
    give(tab, pictures / "wide.png", pictures / "tall.jpg")
    tab.locator("#purify-settings").get_by_text("Settings").click()
    write(tab, "diffusion_steps", "3")
    tab.click("#purify")
    tab.locator("#status textarea, #status input").filter(visible=True).wait_for()
    tab.wait_for_function("() => document.querySelector('#numbers')?.innerText.includes('tall.jpg')")
    assert "64x40" in tab.inner_text("#numbers")
    sources = [one.get_attribute("src") for one in tab.locator("#slider img").all()]
    before, after = (image_at(tab, source) for source in sources)
    assert np.array_equal(before, np.asarray(Image.open(pictures / "wide.png")))
    assert after.shape == before.shape and not np.array_equal(after, before)
    assert "magnified" in tab.inner_text("#difference")
    # The slider moves with the mouse.
    tab.locator("#slider").scroll_into_view_if_needed()
    place = tab.locator("#slider img").first.bounding_box()
    middle = place["y"] + place["height"] / 2
    shown = tab.locator("#slider").inner_html()
    tab.mouse.move(place["x"] + place["width"] / 2, middle)
    tab.mouse.down()
    tab.mouse.move(place["x"] + place["width"] / 4, middle, steps=5)
    tab.mouse.up()
    assert tab.locator("#slider").inner_html() != shown
    # The other picture can be chosen, and the results taken as pictures.
    tab.locator("#chooser input").click()
    tab.get_by_role("option", name="tall.jpg").click()
    tab.wait_for_function(f"() => document.querySelector('#slider img').src !== '{sources[0]}'")
    tab.click("#again")
    tab.locator("#pictures").get_by_text("wide-purified").wait_for()
    # The page is as wide as the screen, and no other machine heard of it.
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    assert {url.split("/")[2].split(":")[0] for url in tab.asked if url.startswith("http")} == {"127.0.0.1"}


def test_protect(tab, pictures):
    give(tab, pictures / "wide.png")
    tab.get_by_role("tab", name="Protect").click()
    tab.get_by_label("CUDA").check()
    tab.click("#protect")
    tab.locator("#files").get_by_text("wide-protected").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]


def test_a_wrong_file_is_an_error_in_words(tab, pictures):
    give(tab, pictures / "wrong.png")
    tab.click("#purify")
    tab.get_by_text(re.compile(r"wrong\.png: not a readable image")).first.wait_for()
    assert not tab.locator("#slider").is_visible()


def test_without_pictures_the_page_asks_for_some(tab):
    tab.click("#purify")
    tab.get_by_text("drop at least one").first.wait_for()


def test_a_setting_that_is_no_number_is_an_error_in_words(tab, pictures):
    give(tab, pictures / "wide.png")
    tab.locator("#purify-settings").get_by_text("Settings").click()
    write(tab, "num_rounds", "two")
    tab.click("#purify")
    tab.get_by_text(re.compile("num_rounds is .*two.*, but must be a whole number")).first.wait_for()


def test_settings_beyond_the_purifier_are_an_error_in_words(tab, pictures):
    give(tab, pictures / "wide.png")
    tab.locator("#purify-settings").get_by_text("Settings").click()
    write(tab, "diffusion_steps", "2000")
    tab.click("#purify")
    tab.get_by_text(re.compile("diffusion_steps is 2000, but must be")).first.wait_for()


def test_stop_ends_what_runs_and_what_waits(browser, address, tmp_path):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
    large.save(tmp_path / "large.png")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "small.png")
    first, second = (browser.new_page() for _ in range(2))
    for tab, file in ((first, "large"), (second, "small")):
        tab.set_default_timeout(SECONDS)
        tab.goto(address)
        tab.wait_for_selector("#pictures")
        give(tab, tmp_path / f"{file}.png")
        tab.locator("#purify").click()
        tab.locator("#status").get_by_text("tiles" if tab is first else "queue").wait_for()
    for tab in (second, first):
        tab.locator("#stop").click()
        tab.wait_for_function("document.querySelector('#status textarea').value == 'Stopped.'")
    first.wait_for_timeout(3000)  # by then the second would have had its turn
    assert not any(tab.locator("#results").is_visible() for tab in (first, second))
    second.locator("#purify").click()
    second.locator("#numbers").get_by_text("small.png").wait_for()
    for tab in (first, second):
        tab.close()
