"""How the report looks in a browser, on a phone and on paper."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest
from audit_reports import REPORT, long_report, photographs, sets
from PIL import Image
from pypdf import PdfReader

from jcdp_diffusers.audit.report import write_report


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Runs Chromium on the report; `shot` gives what a window of that width shows."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    folder = tmp_path_factory.mktemp("chromium")
    write_report(folder, REPORT, sets())

    def chromium(*options, place=None):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        page = (place or folder / "report.html").as_uri()
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


WIDTHS = (375, 500, 719, 725, 800, 900, 991, 993, 1100)  # a phone, and both sides of where the page changes
WINDOWS = """<!DOCTYPE html><body><iframe height="9000" srcdoc="{page}"></iframe><p id="said"></p><script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  for (const width of {widths}) {{
    frame.width = width;
    const wide = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 0.5);
    const size = [page.documentElement.clientWidth, page.documentElement.scrollWidth, page.body.scrollWidth];
    said.textContent += size.join(" ") + " wide: " + wide.map(e => e.outerHTML.slice(0, 60)).join("; ") + "|";
  }}
}};
</script></body>"""


@pytest.mark.long
@pytest.mark.parametrize("side", [16, 32, 200])
def test_nothing_is_wider_than_the_window(browser, tmp_path, side):
    report = long_report()
    write_report(tmp_path, report, sets() if side == 16 else photographs(side, side))
    place = tmp_path / "windows.html"
    place.write_text(WINDOWS.format(page=html.escape((tmp_path / "report.html").read_text()), widths=list(WIDTHS)))
    dom = browser("--dump-dom", place=place).stdout.decode()
    (said,) = re.findall(r'<p id="said">(.*?)</p>', dom, re.S)
    assert said == "".join(f"{width} {width} {min(width, 960)} wide: |" for width in WIDTHS)


@pytest.mark.long
@pytest.mark.parametrize("side", [16, 32, 200])
def test_the_owners_page_prints_on_one_sheet(browser, tmp_path, side):
    report = long_report()
    write_report(tmp_path, report, sets() if side == 16 else photographs(side, side))
    pdf = tmp_path / "print.pdf"
    browser("--no-pdf-header-footer", f"--print-to-pdf={pdf}", place=tmp_path / "report.html")
    first, second, *_ = (page.extract_text() for page in PdfReader(pdf).pages)
    assert "The protection" in first and "What to do" in first and "more victims, about" in first
    assert "What victims learned" in second.lstrip()[:40] and "What to do" not in second
