"""
The page of `jcdp demo`, in Gradio. `spaces/` publishes it as a Space of the Hub.

Pictures keep their size: what is larger than the purifier's images goes through it in overlapping tiles, as with
`jcdp purify --fit tile`.
"""

import contextlib
import html
import os
from collections.abc import Iterator
from typing import Any

import gradio as gr

from .. import poisons
from ..acceleration.placement import place
from ..devices import default_device
from ..engines import FAILURES
from ..outputs import printable
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from .command import HOW_TO_GET_A_PURIFIER
from .pictures import COLUMNS, PictureWork, methods_for_pictures, methods_left_out, usable_presets


CLASSES = 10  # from which the noise's class is chosen
LARGEST_FILE = "64mb"
SECONDS_KEPT = 3600  # of files that Gradio copied; it looks as often
LONGEST_SIDES = {"full size": None, "1024 pixels at most": 1024, "512 pixels at most": 512, "256 pixels at most": 256}
THE_PURIFIERS_OWN = "the purifier's own"
CSS = """
.gradio-container {max-width: 960px !important; margin: 0 auto !important}
#numbers {overflow-x: auto !important; contain: inline-size}  /* a wide table scrolls, and the page does not */
#numbers table {border-collapse: collapse; width: 100%}
#numbers th, #numbers td {text-align: left; padding: 4px 8px; border-bottom: 1px solid var(--border-color-primary)}
"""
HEAD = """
# jcdp demo: does a protection of pictures survive?

**Protect** adds noise that keeps classifiers from learning from a picture. **Purify** removes such noise with a
diffusion model. Slide over the result to compare. Pictures go to the machine that serves this page and nowhere else.
They are deleted two hours after you close it, at the latest.

Use pictures that you may use: that a protection can be removed is no permission.
"""


def page(
    purifier: str | os.PathLike | None = None, *, device: str | None = None, precision: str = "auto"
) -> gr.Blocks:
    """
    The page, which `launch` serves.

    Args:
        purifier (`str` or `os.PathLike`, *optional*): Folder or Hub id of a DDPM; without one the page only protects.
        device (`str`, *optional*): Where the purifier runs; a GPU if there is one.
        precision (`str`): As for `jcdp purify`.

    Returns:
        `gradio.Blocks`: With the endpoints `purify` and `protect`.
    """
    pipe = None
    if purifier is not None:
        pipe = JointConditionalPurificationPipeline.from_pretrained(purifier)
        pipe = place(pipe, device or default_device(), precision=precision)
    handlers = Handlers(pipe)
    with gr.Blocks(title="jcdp demo", analytics_enabled=False, delete_cache=(SECONDS_KEPT,) * 2) as blocks:
        gr.Markdown(HEAD)
        kinds = ["image", ".heic", ".heif"]
        pictures = gr.File(label="Pictures", file_count="multiple", file_types=kinds, elem_id="pictures")
        size = gr.Radio(list(LONGEST_SIDES), value="full size", label="Work on each picture at its", elem_id="size")
        with gr.Tabs(selected="protect" if pipe is None else "purify"):
            with gr.Tab("Purify", id="purify"):
                purify = _purify_tab(pipe)
            with gr.Tab("Protect", id="protect"):
                protect = _protect_tab()
        status = gr.Textbox("Drop pictures above.", label="Status", interactive=False, elem_id="status")
        with gr.Column(visible=False, elem_id="results") as column:
            chooser = gr.Dropdown([], label="Picture", elem_id="chooser")
            slider = gr.ImageSlider(label="Before | after", interactive=False, type="filepath", elem_id="slider")
            difference = gr.Image(
                label="What changed",
                interactive=False,
                type="filepath",
                buttons=["download", "fullscreen"],  # and none that would share it
                elem_id="difference",
            )
            numbers = gr.HTML(elem_id="numbers")  # a table of Gradio's would be wider than a phone
            files = gr.File(label="Results, PNG", file_count="multiple", interactive=False, elem_id="files")
            again = gr.Button("Take the results as pictures", elem_id="again")
        results = gr.State([])
        outputs = [status, results, column, chooser, slider, difference, numbers, files]
        # One piece of work at a time: two at once would each take longer than both in turn.
        how = {"concurrency_id": "work", "concurrency_limit": 1, "show_progress_on": status}
        if purify:
            start, stop, *settings = purify
            purifying = start.click(handlers.purify, [pictures, size, *settings], outputs, **how)
            # Gradio ends what waits, or what it waits for; the handler ends the work itself.
            stop.click(handlers.stop, None, status, queue=False, cancels=purifying, api_visibility="private")
        start, *settings = protect
        start.click(handlers.protect, [pictures, size, *settings], outputs, **how)
        chooser.input(handlers.choose, [results, chooser], [slider, difference], api_visibility="private")
        again.click(handlers.take_results, results, pictures, api_visibility="private")
        blocks.unload(handlers.leave)
    return blocks


def launch(blocks: gr.Blocks, **options) -> Any:
    """
    Serve the page until Ctrl-C.

    Args:
        blocks (`gradio.Blocks`): What `page` returned.
        options: Of `gradio.Blocks.launch`.
    """
    theme = gr.themes.Default(primary_hue="blue")
    return blocks.launch(theme=theme, css=CSS, max_file_size=LARGEST_FILE, footer_links=["api"], **options)


class Handlers:
    """
    What the page's buttons do.

    Args:
        pipe (`JointConditionalPurificationPipeline`, *optional*): The purifier.
    """

    def __init__(self, pipe: JointConditionalPurificationPipeline | None):
        self.work = PictureWork(pipe)

    def purify(
        self,
        pictures: list[str] | None,
        size: str,
        preset: str,
        diffusion_steps: str,
        num_inference_steps: str,
        num_rounds: str,
        seed: int,
        request: gr.Request,
        progress=gr.Progress(),
    ) -> list:
        """Purify pictures; returns what the page shows."""
        with in_words():
            config = self.work.pipe.resolve_config(
                None if preset == THE_PURIFIERS_OWN else preset,
                diffusion_steps=_whole("diffusion_steps", diffusion_steps),
                num_inference_steps=_whole("num_inference_steps", num_inference_steps),
                num_rounds=_whole("num_rounds", num_rounds),
            )
            options = (LONGEST_SIDES[size], request.session_hash, progress)
            return _shown(*self.work.purify(_given(pictures), config, seed, *options))

    def protect(
        self,
        pictures: list[str] | None,
        size: str,
        method: str,
        label: int,
        seed: int,
        request: gr.Request,
        progress=gr.Progress(),
    ) -> list:
        """Protect pictures; returns what the page shows."""
        with in_words():
            options = (LONGEST_SIDES[size], request.session_hash, progress)
            return _shown(*self.work.protect(_given(pictures), method, label, seed, *options))

    def stop(self, request: gr.Request) -> str:
        """Let the purification of this tab end; returns its status."""
        self.work.stop(request.session_hash)
        return "Stopped."

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.work.stop(request.session_hash)
        self.work.forget(request.session_hash)

    def choose(self, results: list[dict], number: int) -> list:
        """Another one of the results is to be seen."""
        return _pictures_of(results[number])

    def take_results(self, results: list[dict]) -> list[str]:
        """The results become the pictures to work on."""
        return [one["after"] for one in results]


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """A failure in the block becomes a sentence on the page; a defect of ours keeps its traceback."""
    try:
        yield
    except FAILURES as error:
        sentence = _safe(" ".join(str(error).split()))
        raise gr.Error(sentence, duration=None, print_exception=False) from error


def _given(pictures: list[str] | None) -> list[str]:
    if not pictures:
        raise ValueError("There are no pictures yet: drop at least one.")
    return pictures


def _safe(sentence: str) -> str:
    """A sentence with names from outside in it, for a message that Gradio shows as HTML."""
    return html.escape(printable(sentence))


def _shown(results: list[dict], refused: list[str], notes: list[str]) -> list:
    """The page's outputs after a piece of work."""
    if not results:
        raise ValueError(" ".join(refused))
    for sentence in refused:
        gr.Warning(_safe(sentence), title="One picture could not be used")
    names = [(one["name"], number) for number, one in enumerate(results)]
    chooser = gr.Dropdown(names, value=0, visible=len(names) > 1)
    numbers, files = _table([one["row"] for one in results]), [one["after"] for one in results]
    done = " ".join([f"Done: {len(results)} of {len(results) + len(refused)} pictures.", *refused, *notes])
    return [done, results, gr.Column(visible=True), chooser, *_pictures_of(results[0]), numbers, files]


def _pictures_of(one: dict) -> list:
    """The two pictures of the slider, and their difference."""
    title = f"What changed, magnified {one['factor']} times, on grey"
    return [(one["before"], one["after"]), gr.Image(one["difference"], label=title)]


def _table(rows: list[list[str]]) -> str:
    """What changed in numbers, as HTML."""

    def line(kind: str, values) -> str:
        return "<tr>" + "".join(f"<{kind}>{_safe(value)}</{kind}>" for value in values) + "</tr>"

    lines = line("th", COLUMNS) + "".join(line("td", row) for row in rows)
    return f"<table>{lines}</table><p>Largest and mean change of a value, of 255; PSNR: higher is less change.</p>"


def _purify_tab(pipe: JointConditionalPurificationPipeline | None) -> list:
    """Start and stop button, and the settings in the order of `Handlers.purify`; nothing without a purifier."""
    if pipe is None:
        gr.Markdown(f"This page was started without a purifier. {HOW_TO_GET_A_PURIFIER}")
        return []
    side = pipe.unet.config.sample_size
    millions = sum(weight.numel() for weight in pipe.unet.parameters()) / 1e6
    colours = "colour" if pipe.unet.config.in_channels == 3 else "grey"
    name = printable(os.path.basename(str(pipe.config._name_or_path)))
    gr.Markdown(f"Purifier `{name}`: {millions:.2f} million parameters, {colours} pictures in tiles of {side}x{side}.")
    with gr.Accordion("Settings", open=False, elem_id="purify-settings"):
        preset = gr.Dropdown(
            [THE_PURIFIERS_OWN, *usable_presets(pipe)], value=THE_PURIFIERS_OWN, label="preset", elem_id="preset"
        )
        # No numbers of Gradio's, where one that is left empty becomes 0.
        with gr.Row():
            own = pipe.resolve_config()
            steps = _number("diffusion_steps", f"more is more noise; the purifier's own: {own.diffusion_steps}")
            evaluations = _number("num_inference_steps", "evaluations of the network, each round")
            rounds = _number("num_rounds", f"how often; the purifier's own: {own.num_rounds}")
        seed = gr.Number(0, label="seed", info="of the noise", precision=0)
    with gr.Row():
        start = gr.Button("Purify", variant="primary", elem_id="purify")
        stop = gr.Button("Stop", elem_id="stop")
    return [start, stop, preset, steps, evaluations, rounds, seed]


def _number(name: str, info: str) -> gr.Textbox:
    """A setting of the purification that may stay empty."""
    return gr.Textbox("", label=name, info=info, placeholder="the preset's", max_lines=1, elem_id=name)


def _whole(name: str, text: str) -> int | None:
    """What stands in the field of a setting; None where it is empty."""
    if not text.strip():
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, but must be a whole number or empty.") from None


def _protect_tab() -> list:
    """Start button, and the settings in the order of `Handlers.protect`."""
    methods = [(poisons.get(name).title, name) for name in methods_for_pictures()]
    method = gr.Radio(methods, value=methods[0][1], label="Method", elem_id="method")
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            label = gr.Slider(0, CLASSES - 1, value=0, step=1, label="label", info="each class has noise of its own")
            seed = gr.Number(0, label="seed", info="of the noise", precision=0)
    with gr.Accordion("Why no other methods?", open=False):
        gr.Markdown("\n".join(f"* {sentence}" for sentence in methods_left_out()))
    start = gr.Button("Protect", variant="primary", elem_id="protect")
    return [start, method, label, seed]
