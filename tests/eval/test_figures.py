"""Figures from records: what tables refuse they refuse, and every line can be told from every other."""

import json
import re
import shlex
import sys
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from eval import figures, pictures
from jcdp_diffusers.data import LabelledImages, write_dataset


def records(poison, column, values, *, steps=None, epochs=3, **settings):
    """Of seeds 0 and on; purified if `steps`, T_p, is given."""
    settings = (
        {
            "trial": "x",
            "dataset": "cifar10",
            "collected": "cifar10",
            "poison": poison,
            "column": column,
            "victim": "resnet18",
            "width": 16,
            "recipe": {"name": "mini", "epochs": 3, "smoke": False},
            "countermeasure": "none" if steps is None else "unconditional",
            "train": {"images": 100, "content": poison},
            "test": {"images": 100, "content": "test"},
        }
        | ({} if steps is None else {"roles": "disjoint", "purifier": "digest"})
        | ({} if steps is None else {"purification": {"diffusion_steps": steps, "num_rounds": 1}})
        | settings
    )
    for seed, value in enumerate(values):
        history = [{"test_accuracy": value}] * epochs
        yield {"what": "victim", "value": {"history": history}, "seed": seed, "settings": settings}
        yield {"what": "accuracy", "value": value, "seed": seed, "settings": settings}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Runs a command on records and returns the matplotlib figure that it has saved."""

    def run(kind, found, *options):
        path, kept = tmp_path / "records.jsonl", []
        path.write_text("\n".join(map(json.dumps, found)))
        output = tmp_path / f"{kind}.png"
        monkeypatch.setattr(matplotlib.pyplot, "close", kept.append)
        monkeypatch.setattr(sys, "argv", ["figures", kind, "--records", str(path), "--output", str(output), *options])
        figures.main()
        assert Image.open(output).size > (200, 200)
        return kept[0]

    yield run
    monkeypatch.undo()
    matplotlib.pyplot.close("all")


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]


def looks_of(figure) -> list[tuple]:
    handles, _ = figure.axes[-1].get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]  # a line and its error bars
    return [(to_hex(line.get_color()), line.get_marker(), line.get_linestyle()) for line in lines]


@pytest.mark.parametrize("kind", ["curves", "strength"])
def test_what_no_table_holds_no_figure_does(drawn, kind):
    first = [*records("lsp", "none", [0.2]), *records("lsp", "T_p 30", [0.6], steps=30)]
    for change, name in (
        ({"train": {"images": 50, "content": "lsp"}}, r"train\.images 100 and 50"),
        ({"test": {"images": 100, "content": "validation"}}, r"test\.content 'test' and 'validation'"),
        ({"purifier": "other"}, "purifier 'digest' and 'other'"),
    ):
        with pytest.raises(SystemExit, match=f"figures: records hold .*{name}"):
            drawn(kind, [*first, *records("lsp", "T_p 30", [0.5], steps=30, **change)])
    with pytest.raises(SystemExit, match=r"the records hold \[\] of the victim 'vgg16'"):
        drawn(kind, first, "--victim", "vgg16")
    with_another = [*first, *records("lsp", "T_p 30", [0.1], steps=30, victim="vgg16")]
    assert drawn(kind, with_another)  # another victim is not drawn, and no obstacle


def test_the_legend_has_the_lines_of_all_panels(drawn):
    figure = drawn(
        "curves",
        [
            *records("lsp", "none", [0.2, 0.3]),
            *records("lsp", "gray", [0.6]),
            *records("none", "none", [0.8]),
        ],
    )
    assert legend_of(figure) == ["vanilla", "gray"]
    assert [axis.get_title() for axis in figure.axes] == ["clean", "LSP"]
    assert list(figure.axes[1].lines[0].get_ydata()) == [25.0] * 3


def test_chosen_columns_and_poisons_in_rows_of_three_panels(drawn):
    found = [record for poison in ("none", "emn", "lsp", "tap", "ops") for record in records(poison, "none", [0.2])]
    found += [*records("lsp", "gray", [0.6]), *records("ops", "mixup", [0.3])]
    figure = drawn("curves", found, "--columns", "mixup", "none", "gray")
    assert legend_of(figure) == ["Mixup", "vanilla", "gray"] and len(figure.axes) == 5
    assert len({axis.get_position().y0 for axis in figure.axes}) == 2
    assert figure.get_suptitle().startswith("cifar10: 100 training images, resnet18 of width 16, protocol mini")
    figure = drawn("curves", found, "--poisons", "lsp", "ops")
    assert [axis.get_title() for axis in figure.axes] == ["LSP", "OPS"]


def test_a_poison_of_another_preset_has_a_panel_of_its_own(drawn):
    both = [record for preset in ("cpu", "wide") for record in records("remn", "none", [0.2], poison_preset=preset)]
    assert [axis.get_title() for axis in drawn("curves", both).axes] == ["REMN (cpu)", "REMN (wide)"]


def test_histories_of_unequal_length_are_refused(drawn):
    other_seed = [record | {"seed": 1} for record in records("lsp", "none", [0.3], epochs=2)]
    with pytest.raises(SystemExit, match="histories of 2 and 3 epochs for vanilla against LSP"):
        drawn("curves", [*records("lsp", "none", [0.2]), *other_seed])


def test_no_two_lines_look_alike(drawn):
    found = [*records("none", "none", [0.8]), *records("lsp", "none", [0.2])]
    for rounds in range(1, 14):
        purification = {"diffusion_steps": 30, "num_rounds": rounds}
        found += records("lsp", f"{rounds} rounds", [0.5 + rounds / 100], steps=30, purification=purification)
    figure = drawn("strength", found)
    labels, looks = legend_of(figure), looks_of(figure)
    assert len(labels) == len(set(labels)) == len(set(looks)) == 15
    assert {"clean, not purified", "LSP, not purified", "LSP, 13 rounds"} <= set(labels)
    # The dotted line of clean images shares its colour with no line of a poison.
    colour = dict(zip(labels, looks))
    assert colour["clean, not purified"][0] != colour["LSP, not purified"][0] == colour["LSP, 1 round"][0]


def test_a_line_has_one_purifier_and_one_point_at_each_strength(drawn):
    found = [*records("lsp", "T_p 30", [0.6], steps=30), *records("lsp", "T_p 60", [0.5, 0.6], steps=60)]
    figure = drawn("strength", found)
    assert legend_of(figure) == ["LSP, 1 round"] and list(figure.axes[0].lines[0].get_ydata()) == [60.0, 55.0]
    # The point of one seed has no bar, and that is what the caption is about.
    ((_, bar),) = [segments for segments in figure.axes[0].collections[0].get_segments() if len(segments)]
    assert bar[1] == pytest.approx(55 + 10 / 2**0.5)
    assert figure.get_suptitle().endswith("mean ± standard deviation over 1 to 2 seeds")
    with pytest.raises(SystemExit, match="points of one line, LSP, 1 round, with purifier 'digest' and 'other'"):
        drawn("strength", [*found, *records("lsp", "T_p 90", [0.5], steps=90, purifier="other")])
    with pytest.raises(SystemExit, match="'again' and 'T_p 30' against 'lsp', both with T_p 30 on one line"):
        drawn("strength", [*found, *records("lsp", "again", [0.5], steps=30)])
    assert legend_of(drawn("strength", [*found, *records("lsp", "four", [0.5], steps=30, draws=4)])) == [
        "LSP, 1 round",
        "LSP, 1 round, 4 draws",
    ]


def test_evaluations_are_those_of_all_rounds_and_draws(drawn):
    def cell(column, value, evaluations, rounds=2, **settings):
        purification = {"diffusion_steps": 30, "num_rounds": rounds, "num_inference_steps": evaluations}
        # What the pipeline takes by itself where steps are left out; with all of them it has to be said.
        purification["variance_type"] = "fixed_small" if evaluations is None else None
        return list(records("lsp", column, [value], steps=30, purification=purification, **settings))

    found = [*cell("a", 0.5, 1), *cell("b", 0.6, [4, 2]), *cell("c", 0.7, None)]
    one_draw = [*found, *cell("d", 0.4, 3, rounds=1, noise_corner=8.0, purifier="other")]
    figure = drawn("evaluations", [*one_draw, *cell("e", 0.8, 2, draws=4)])
    lines = {
        container.get_label(): (list(container[0].get_xdata()), list(container[0].get_ydata()))
        for container in figure.axes[0].containers
    }
    assert lines == {
        "LSP, T_p 30, 2 rounds": ([2, 6, 60], [50.0, 60.0, 70.0]),
        "LSP, T_p 30, 1 round, coloured noise, corner 8": ([3], [40.0]),
        "LSP, T_p 30, 2 rounds, 4 draws": ([16], [80.0]),
    }
    with pytest.raises(SystemExit, match="'again' and 'b' against 'lsp', both with evaluations 6 on one line"):
        drawn("evaluations", [*found, *cell("again", 0.6, [3, 3])])


def guided(column, values, pixel, perceptual, **settings):
    purification = {"diffusion_steps": 30, "num_rounds": 4, "pixel_guidance_scale": pixel}
    purification |= {"perceptual_guidance_scale": perceptual}
    return records("lsp", column, values, steps=30, purification=purification, **settings)


def test_scales_of_guides_are_a_field_each(drawn):
    found = [*guided("a", [0.6, 0.7], 0.0, 0.0), *guided("b", [0.5], 3e4, 0.0), *guided("c", [0.4], 0.0, 60.0)]
    axis = drawn("scales", found).axes[0]
    field = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axis.texts}
    assert field == {(0, 0): "65.0 ± 7.1", (1, 0): "50.0", (0, 1): "40.0", (1, 1): "n.m."}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "30000"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "60"]
    assert axis.get_title() == "LSP: test accuracy (%)\nT_p 30\n4 rounds"
    # A victim that trains otherwise has a panel of its own, if it has several fields.
    one_more = guided("d", [0.9], 0.0, 0.0, countermeasure="unconditional+corruption")
    assert len(drawn("scales", [*found, *one_more]).axes) == 1
    with pytest.raises(SystemExit, match="'again' and 'b' against 'lsp', both with pixel scale 30000 and perceptual"):
        drawn("scales", [*found, *guided("again", [0.5], 3e4, 0.0)])
    with pytest.raises(
        SystemExit,
        match="fields of one panel, LSP, T_p 30, 4 rounds, with purifier 'digest' and 'other'",
    ):
        drawn("scales", [*found, *guided("e", [0.5], 1e4, 0.0, purifier="other")])
    with pytest.raises(SystemExit, match="no way of purifying at two scales"):
        drawn("scales", list(records("lsp", "none", [0.2])))


@pytest.mark.parametrize(("shown", "rows"), [(2, 2), (2, 6), (8, 3)])
def test_titles_of_rows_of_images_are_whole(tmp_path, shown, rows):
    images = np.zeros((shown, 8, 8, 3), dtype=np.uint8)
    sets = {f"a title that is long {row}": (images, images if row else None) for row in range(rows)}
    pictures.save_rows(sets, str(tmp_path / "rows.png"))
    pixels = np.asarray(Image.open(tmp_path / "rows.png").convert("L"))
    for edge in (pixels[:3], pixels[:, :3], pixels[-3:], pixels[:, -3:]):  # a cut letter would be at an edge
        assert (edge == 255).all()


def test_a_single_set_has_nothing_beside_it(monkeypatch, tmp_path):
    data = LabelledImages(np.zeros((2, 8, 8, 3), dtype=np.uint8), np.arange(2), ("a", "b"), ("0", "1"))
    write_dataset(tmp_path / "clean", data)
    monkeypatch.setattr(sys, "argv", ["figures", "purified", "--sets", f"clean={tmp_path / 'clean'}"])
    with pytest.raises(SystemExit, match="figures: sets is clean="):
        figures.main()


def test_every_committed_picture_has_its_command(monkeypatch, tmp_path):
    folder = Path(__file__).parents[2] / "results/figures"
    blocks = re.findall(r"`(\S+\.png)`: .*?```bash\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert sorted(name for name, _ in blocks) == sorted(path.name for path in folder.glob("*.png"))
    monkeypatch.chdir(folder.parents[1])
    drawn_here = []
    for name, command in blocks:
        _, script, *options = shlex.split(command.replace("\\\n", " "))
        if script == "eval/figures.py":
            args = figures.parser_of_figures().parse_args(options)
            assert args.output == f"results/figures/{name}"
            if hasattr(args, "records"):  # the others need images that are not in the repository
                args.output = str(tmp_path / name)
                args.draw(args)
                drawn_here.append(name)
    assert drawn_here == [
        "curves.png",
        "strength.png",
        "evaluations.png",
        "evaluations_3k.png",
        "scales.png",
        "contrastive.png",
    ]
