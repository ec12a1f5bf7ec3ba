"""The report as one HTML page that needs nothing beside it, for a wide window, a phone and paper."""

import base64
import html
import io
import re
from string import Template

import numpy as np
from PIL import Image

from ..outputs import printable
from .fractions import FRACTIONS_CAPTION, fractions_table, fractions_title
from .learners import report_of, title_of
from .owner import noise_in_short, numbers, what_to_do
from .pictures import (
    NativePictures,
    Strips,
    draw_curves,
    draw_fractions,
    draw_losses,
    draw_spectrum,
    row_colours,
)
from .words import (
    SPECTRUM_CAPTION,
    certainty,
    checks,
    curves_said,
    kind_of_test_images,
    marks,
    results_table,
    settings_in_words,
    spectrum_said,
    visible,
    visible_said,
)


TONES = {
    "broken": "#b3261e",
    "undone": "#b3261e",
    "weakened": "#b26a00",
    "withstands": "#2f6f4f",
    "ineffective": "#5f6368",
    "exchanged": "#b26a00",
    "open": "#5f6368",
    "undecided": "#5f6368",
    "smoke": "#5f6368",
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.5rem 4rem; color: #202124; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1rem; font-weight: 600; color: #5f6368; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; }
p.verdict { margin: 0; padding: .2rem 0 .2rem 1.1rem; border-left: .4rem solid $tone; font-size: 1.6rem;
  line-height: 1.3; font-weight: 600; }
p.mark { margin: 1rem .6rem 0 0; padding: .15rem .7rem; border-radius: .3rem; background: #fef3d6;
  display: inline-block; font-size: .92rem; }
p.note, td.note { color: #5f6368; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .94rem; }
th { text-align: left; font-weight: 600; color: #5f6368; font-size: .82rem; overflow-wrap: normal; }
th, td { padding: .5rem .8rem .5rem 0; border-bottom: 1px solid #e4e6e9; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 17%; min-width: 7rem; vertical-align: middle; }
.results td { overflow-wrap: normal; }
.results td:first-child { min-width: 11.5rem; }
.results td.note { min-width: 7rem; }
#settings td:first-child, #visibility td:first-child { width: 9rem; color: #5f6368; }
.fractions :is(th.n, td:first-child) { white-space: normal; }
.track { background: #f1f3f4; border-radius: .2rem; height: .85rem; position: relative; }
.fill { height: 100%; border-radius: .2rem; }
.tick { position: absolute; top: -.15rem; width: 1px; height: 1.15rem; background: #202124; opacity: .55; }
.strip { display: grid; grid-template-columns: 10.5rem repeat($count, minmax(0, 1fr)); gap: .25rem;
  align-items: center; margin-top: .25rem; }
.strip span { font-size: .85rem; color: #5f6368; padding-right: .6rem; line-height: 1.2; }
.strip img { width: 100%; display: block; image-rendering: pixelated; border-radius: .12rem; }
.strip.classes span { font-size: .78rem; text-align: center; padding: 0; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.numbers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.2rem; margin: 1.6rem 0 1.4rem; }
.numbers div { border-top: .25rem solid; padding-top: .4rem; }
.numbers b { display: block; font-size: 2.3rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.numbers span { display: block; font-size: .9rem; line-height: 1.3; color: #202124; overflow-wrap: break-word; }
.numbers i { display: block; font-style: normal; font-size: .8rem; color: #5f6368; }
.natives { display: flex; flex-wrap: wrap; gap: .9rem .75rem; }
.natives figure { margin: 0; width: 160px; }
.natives img { display: block; max-width: none; image-rendering: pixelated; }
.natives figcaption { font-size: .8rem; line-height: 1.25; color: #5f6368; padding-bottom: .25rem; }
#owner h2 { margin-top: 1.6rem; }
#full { border-top: 1px solid #c9ccd1; margin-top: 2.6rem; }
svg { width: 100%; max-width: 40rem; height: auto; }
ul { padding-left: 1.2rem; }
ul.checks { list-style: none; padding: 0; margin: 0; }
ul.checks li { padding: .3rem 0 .3rem 1.8rem; position: relative; }
ul.checks li::before { position: absolute; left: 0; font-weight: 700; }
li.good::before { content: "✓"; color: #2f6f4f; }
li.look::before { content: "!"; color: #b26a00; padding-left: .25rem; }
li { margin: .15rem 0; }
pre { background: #f6f7f8; padding: .9rem 1rem; border-radius: .3rem; white-space: pre-wrap; font-size: .85rem; }
code { font-size: .92em; }
@media (max-width: 62rem) {
  .bar { display: none; }
  .results td:first-child { min-width: 0; overflow-wrap: anywhere; }
}
@media (max-width: 45rem) {
  body { padding: 1.5rem 1rem 3rem; }
  p.verdict { font-size: 1.3rem; }
  .numbers { gap: .6rem; }
  .numbers b { font-size: 1.7rem; }
  .numbers span { font-size: .8rem; }
  .wide { display: none; }
  .fractions :is(th, td):nth-child(3), .fractions :is(th, td):nth-child(5) { display: none; }
  #settings tr, #settings td { display: block; width: auto; border: 0; padding: 0; }
  #settings tr { padding: .5rem 0; border-bottom: 1px solid #e4e6e9; }
  .strip { grid-template-columns: repeat($count, minmax(0, 1fr)); gap: .15rem; margin-top: .5rem; }
  .strip span { grid-column: 1 / -1; }
  .strip.classes span { grid-column: auto; font-size: .62rem; }
  .strip.classes span:first-child { display: none; }
}
@media print {
  :root { font-size: 13.5px; }
  body { padding: 0; font-size: 8.8pt; max-width: none; }
  .results td:first-child { min-width: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .bar { display: none; }
  @page { margin: 14mm; }
  #owner { break-after: page; }
  #owner p.verdict { font-size: 1.25rem; }
  #owner h2 { margin: .7rem 0 .3rem; }
  #owner p.mark, #owner p.note, #owner p.way { margin: .4rem .6rem 0 0; }
  #owner ul { margin: .3rem 0; }
  .numbers { margin: .8rem 0 .6rem; }
  .numbers b { font-size: 1.8rem; }
  #full { border-top: 0; margin-top: 0; }
  #full > h2:first-child { margin-top: 0; }
  h2 { break-after: avoid; }
  tr, li, .strip, svg, pre, p { break-inside: avoid; }
}
</style>
</head>
<body>
<section id="owner">
<h1>Audit of a protected data set</h1>
<p class="verdict" id="verdict" data-status="$status">$sentence</p>
$marks
$ways
<div class="numbers" id="numbers">
$numbers
</div>
<p class="note">Accuracy of victims on $test. Giving one answer for all images gets $chance.</p>
<div class="natives" id="natives">
$natives
</div>
<p class="note">$native_caption</p>
<h2>What to do</h2>
<ul id="advice">
$advice
</ul>
</section>
<section id="full">
<h2>What victims learned</h2>
<table id="results" class="results">
<thead>$head</thead>
<tbody>
$rows
</tbody>
</table>
<p class="note">Accuracy after the last epoch on $test, mean over $seeds<span class="bar">; the marks
in a bar are the single victims</span>. The best epoch is chosen by the test images and is no result. Giving one answer
for all images gets $chance. Times are per victim, before and while training, on $device.</p>
$others
$fractions
<h2>How sure this is</h2>
<ul id="certainty">
$certainty
</ul>
<h2>What the images look like</h2>
$strips
<p class="note">$caption</p>
<h2>How visible the protection is</h2>
<table id="visibility"><tbody>
$visible
</tbody></table>
<ul>
$visible_said
</ul>
<h2>Where the protection is</h2>
$spectrum
<ul id="evidence">
$evidence
</ul>
<h2>How they learned</h2>
$curves
$losses
<h2>The data</h2>
<ul class="checks" id="checks">
$checks
</ul>
<h2>Settings</h2>
<table id="settings"><tbody>
$settings
</tbody></table>
<h2>Limits</h2>
<ul id="limits">
$limits
</ul>
<h2>How to repeat this</h2>
<pre id="command">$command</pre>
<p class="note">Written $time. The figures are in <code>report.json</code>, one record per victim in
<code>records.jsonl</code>; the purified images are in <code>purified/</code>.</p>
</section>
</body>
</html>
""")


# Of every table of victims.
_HEAD = """<tr><th>victims</th><th class="n">test accuracy</th><th class="n">std</th><th class="bar"></th>
<th class="n wide">best epoch</th><th class="n wide">training accuracy</th><th class="wide">before</th>
<th class="n wide">training</th></tr>"""


def page(report: dict, strips: Strips, native: NativePictures) -> str:
    """
    The report as a page: the owner's part first, which prints on one sheet, then all tables.

    Args:
        report (`dict`): What `report.json` holds.
        strips (`Strips`): The images to show.
        native (`NativePictures`): Some of them at 1:1.
    """
    judged, seeds = report["verdict"], len(report["victims"]["seeds"])
    losses = draw_losses(report)
    rows = zip(results_table(report), report["rows"], row_colours(report))
    return _PAGE.substitute(
        title=as_html(f"Audit: {judged['sentence']}"),
        tone=TONES[judged["status"]],
        status=judged["status"],
        sentence=as_html(judged["sentence"]).replace("-&gt;", "→").replace(" %", "&nbsp;%"),
        marks="\n".join(f'<p class="mark">{as_html(mark)}</p>' for mark in marks(report)),
        ways="\n".join(f'<p class="way">{as_html(sentence)}</p>' for sentence in report["side_by_side"]),
        numbers=_numbers(report),
        natives=_natives(native),
        native_caption=as_html(f"{native.caption} {noise_in_short(report)}".strip()),
        advice=_items(what_to_do(report)),
        head=_HEAD,
        rows="\n".join(_result_row(row, entry, colour) for row, entry, colour in rows),
        others="\n".join(_other(report, other) for other in report["others"]),
        fractions="\n".join(_fractions(one) for one in (report, *report["others"]) if one["fractions"]),
        test=f"{report['data']['sets']['test']['images']} {kind_of_test_images(report)}",
        seeds="one seed" if seeds == 1 else f"{seeds} seeds",
        chance=f"{100 * report['chance']:.0f} %",
        device=as_html(report["device"]),
        certainty=_items(certainty(report)),
        strips=_strips(strips),
        count=len(strips.classes),
        caption=as_html(strips.caption),
        visible="\n".join(
            f"<tr><td>{as_html(title)}</td><td>{as_html(said)}</td></tr>" for title, said in visible(report)
        ),
        visible_said=_items(visible_said(report)),
        spectrum=_spectrum(report["data"]["spectrum"]),
        evidence=_items(spectrum_said(report)),
        curves=_curves(report),
        losses=f"<h2>How the purifier learned</h2>\n{losses}" if losses else "",
        checks="\n".join(
            f'<li class="{"good" if good else "look"}">{as_html(sentence)}</li>' for good, sentence in checks(report)
        ),
        settings="\n".join(
            f"<tr><td>{as_html_with_code(topic)}</td><td>{as_html_with_code(text)}</td></tr>"
            for topic, text in settings_in_words(report)
        ),
        limits="\n".join(f"<li>{as_html(limit)}</li>" for limit in report["limits"]),
        command=as_html(report["command"]),
        time=as_html(report["time"]),
    )


def _items(sentences: list[str]) -> str:
    return "\n".join(f"<li>{as_html_with_code(sentence)}</li>" for sentence in sentences)


def _numbers(report: dict) -> str:
    colours = dict(zip((entry["row"] for entry in report["rows"]), row_colours(report)))
    return "\n".join(
        f'<div style="border-color:{colours.get(one["row"], "#9aa0a6")}"><b>{one["value"].replace(" ", "&nbsp;")}</b>'
        f"<span>{as_html(one['title'])}</span><i>{as_html(one['note'])}</i></div>"
        for one in numbers(report)
    )


def _natives(native: NativePictures) -> str:
    return "\n".join(
        f'<figure><figcaption>{as_html(title)}</figcaption><img alt="" width="{picture.shape[1]}" '
        f'height="{picture.shape[0]}" src="{_embedded(picture)}"></figure>'
        for title, picture in native.pictures.items()
    )


def _spectrum(spectrum: dict | None) -> str:
    if spectrum is None:
        return ""
    return f'{draw_spectrum(spectrum)}\n<p class="note">{as_html(SPECTRUM_CAPTION)}</p>'


def _curves(report: dict) -> str:
    said = curves_said(report)
    return draw_curves(report) + (f'\n<p class="note">{as_html(said)}</p>' if said else "")


def _other(report: dict, other: dict) -> str:
    """The table and the verdict of a further way of learning."""
    alone = report_of(report, other)
    rows = zip(results_table(alone), alone["rows"], row_colours(alone))
    shown = "\n".join(_result_row(row, entry, colour) for row, entry, colour in rows)
    return (
        f"<h2>{as_html(title_of(other))}</h2>\n<p>{as_html(other['verdict']['sentence'])}</p>\n"
        f'<table class="results"><thead>{_HEAD}</thead><tbody>\n{shown}\n</tbody></table>\n{_curves(alone)}'
    )


def _fractions(one: dict) -> str:
    """Table and curve of the fractions."""
    head, *rows = fractions_table(one["fractions"])
    cells = ["".join(f'<td class="n">{as_html(cell)}</td>' for cell in row) for row in rows]
    return (
        f'<h2>{as_html(fractions_title(one))}</h2>\n<table class="fractions"><thead><tr>'
        + "".join(f'<th class="n">{as_html(cell)}</th>' for cell in head)
        + "</tr></thead><tbody>\n"
        + "\n".join(f"<tr>{row}</tr>" for row in cells)
        + f'\n</tbody></table>\n<p class="note">{as_html(FRACTIONS_CAPTION)}</p>\n{draw_fractions(one["fractions"])}'
    )


def _result_row(row: dict, entry: dict, colour: str) -> str:
    ticks = "".join(f'<i class="tick" style="left:{100 * v:.2f}%"></i>' for v in entry["accuracy"]["values"])
    bar = f'<div class="fill" style="width:{100 * row["fraction"]:.2f}%;background:{colour}"></div>{ticks}'
    return (
        f'<tr data-row="{as_html(row["row"])}"><td>{as_html(row["title"])}</td><td class="n"><b>{row["test"]}</b></td>'
        f'<td class="n">{row["std"]}</td><td class="bar"><div class="track">{bar}</div></td>'
        f'<td class="n wide">{row["best"]}</td><td class="n wide">{row["train"]}</td>'
        f'<td class="wide note">{as_html(row["before"])}</td><td class="n wide">{row["seconds"]}</td></tr>'
    )


def _strips(strips: Strips) -> str:
    titles = "".join(f"<span>{as_html(name)}</span>" for name in strips.classes)
    lines = [f'<div class="strip classes"><span></span>{titles}</div>']
    for title, images in strips.images.items():
        shown = "".join(f'<img alt="" src="{_embedded(image)}">' for image in images)
        lines.append(f'<div class="strip"><span>{as_html(title)}</span>{shown}</div>')
    return "\n".join(lines)


def _embedded(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def as_html(text: str) -> str:
    """Text from anywhere, as text."""
    return html.escape(printable(str(text)))


def as_html_with_code(text: str) -> str:
    """A sentence of ours, with what stands between backticks as code. A file's name may have backticks of its own."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", as_html(text))
