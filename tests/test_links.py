"""Every relative link of README.md, docs/ and the other pages leads somewhere, and every anchor to a heading."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/*.md",
        "docs/*.ipynb",
        "eval/*.md",
        "training/*.md",
        "spaces/*.md",
        "results/**/*.md",
    )
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(\s*<?([^)<>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")


def prose(path: Path) -> str:
    """A page's text without code, in which brackets mean something else."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]+`", "`", text)


def links(path: Path) -> list[str]:
    return [first or second for first, second in LINK.findall(prose(path))]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, flags=re.M):
        heading = re.sub(r"<!--.*?-->|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number, unique = 0, slug
        while unique in found:
            number, unique = number + 1, f"{slug}-{number + 1}"
        found.add(unique)
    return found


def broken(path: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    wrong = []
    for link in links(path):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        target, _, anchor = link.partition("#")
        place = (path.parent / unquote(target)).resolve() if target else path
        if not place.exists() or (anchor and (place.suffix != ".md" or anchor not in anchors(place))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken(ROOT / page) == []


def test_links_are_found_and_broken_ones_told(tmp_path):
    (tmp_path / "b c.md").write_text("# A `b`: c?\n\n## Same\n\n## Same\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[good](b%20c.md#a-b-c) [again](b%20c.md#same-1) [here](#top) ![none](none.png 'x') [web](https://x.y/z)\n"
        "# Top\n[`code`](b%20c.md#nowhere) `[no](link.md)` [![picture](gone.svg)](#top)\n```\n[no](link.md)\n```\n"
        '<img src="lost.png"> [two](gone.md "title")\n'
    )
    assert set(broken(page)) >= {"b%20c.md#nowhere", "lost.png", "gone.md", "gone.svg"}
    assert not {"b%20c.md#a-b-c", "b%20c.md#same-1", "#top", "link.md"} & set(broken(page))


def test_the_site_has_every_guide():
    """Of `docs/`; a page that is not in the navigation is found by nobody."""
    nav = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert [
        page for page in PAGES if page.startswith("docs/") and page.endswith(".md") and f'"{page}"' not in nav
    ] == []


@pytest.mark.long
def test_the_site_builds_and_a_broken_link_stops_it(tmp_path):
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (copy / "build/site/index.html").read_text(encoding="utf-8")
    assert not re.findall(
        r"<(?:link|script|img)[^>]+(?:src|href)=\"?https?://(?!colab)[^ >]*\.(?:css|js|woff2?)", page
    )
    assert (copy / "build/site/results/cifar10_mini/pictures.png").is_file()
    with open(copy / "docs/audit.md", "a") as file:
        file.write("\n[gone](results.md#no-such-heading)\n")
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    assert done.returncode != 0 and "no-such-heading" in done.stderr
