"""Plot and table of what `throughput.py` measured, made from its records."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from eval.timing import Bench, forward_flops, records_of


def draw_plot(bench: Bench, path: Path) -> None:
    """Images per second against the batch, by mode, and the limit that the convolution's peak sets, by processor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in records_of(bench.output) if r["protocol"] == bench.protocol]
    records = [r for r in records if r["settings"].get("unet", bench.unet) == bench.unet]
    processors = list(dict.fromkeys(r["settings"]["processor"] for r in records if r["what"] == "step"))
    if not processors:
        raise ValueError(f"output is {str(bench.output)!r}, which has no steps of {bench.unet} yet.")
    modes_found = dict.fromkeys(r["settings"]["mode"] for r in records if r["what"] == "step")
    colours = {mode: f"C{index}" for index, mode in enumerate(modes_found)}
    figure, axes = plt.subplots(1, len(processors), figsize=(7.5 * len(processors), 6), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], processors):
        here = [r for r in records if r["settings"]["processor"] == name]
        _draw_panel(axis, here, forward_flops(bench.unet), colours)
        axis.set_title(f"{'smoke run, ' * bench.quick}{bench.unet}: {short_name(name)}")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0, 0].set_ylabel("image-steps per second")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(axis, records: list[dict], flops: int, colours: dict[str, str]) -> None:
    steps = [r for r in records if r["what"] == "step"]
    batches = sorted({r["settings"]["batch"] for r in steps})
    for name in dict.fromkeys(r["settings"]["mode"] for r in steps):
        for kind, style, filling in (("bare", "--", "none"), ("guided", "-", "full")):
            points = {r["settings"]["batch"]: r["value"]["images_per_second"] for r in steps
                      if (r["settings"]["mode"], r["settings"]["kind"]) == (name, kind)}  # fmt: skip
            words = name.replace("_", " ").replace("winograd", "Winograd")
            label = f"{words}, {'guided step' if kind == 'guided' else 'bare UNet'}"
            xs = sorted(points)
            look = {"marker": "o", "ms": 5, "fillstyle": filling, "color": colours[name]}
            axis.plot(xs, [points[x] for x in xs], style, **look, label=label)
    for r in records:
        settings, value = r["settings"], r["value"]
        if r["what"] == "peak" and settings["operation"] == "convolution":
            limit = value / flops
            axis.axhline(limit, color="0.4", ls=":", lw=1.5)
            text = f"limit in {settings['dtype']}: {value / 1e9:,.0f} GFLOP/s of direct convolution"
            look = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": "0.3"}
            axis.annotate(text, (batches[-1], limit), xytext=(0, 3), **look)
    theirs = [r for r in records if r["what"] == "purifier" and r["settings"]["run"] == "authors"]
    if theirs:
        point = (theirs[-1]["settings"]["images"], theirs[-1]["value"]["images_per_second"])
        axis.plot(*point, "k*", ms=11, label="the authors' loop")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, map(str, batches))
    threads = steps[0]["settings"]["threads"]
    axis.set_xlabel(f"batch, on {threads} thread{'s' * (threads > 1)}" if threads else "batch")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


PRECISIONS = ("float32", "bfloat16")


def short_name(processor: str) -> str:
    """A processor's name without what all of a maker's have."""
    return re.sub(r"\(R\)| Processor", "", processor)


def machines_of(records: list[dict], unet: str, *, smoke: bool = False) -> dict[str, "Machine"]:
    """
    What was measured on each processor, by its short name.

    Args:
        records (`list[dict]`): Of `throughput.py`.
        unet (`str`): Name of the network.
        smoke (`bool`): Whether records of `--quick` are wanted, and no others.
    """
    found: dict[str, Machine] = {}
    for record in records:
        if (record["protocol"] == "smoke") == smoke:
            name = short_name(record["settings"]["processor"])
            found.setdefault(name, Machine([], unet)).records.append(record)
    return found


def speed_table(records: list[dict], unet: str, *, smoke: bool = False) -> str:
    """
    What docs/speed.md says, in Markdown, by processor; of several records of a figure the last counts.

    Args:
        records, unet, smoke: See `machines_of`.

    Raises:
        ValueError: If there are no such records.
    """
    machines = machines_of(records, unet, smoke=smoke)
    if not machines:
        raise ValueError(f"records hold no figures of {'a smoke run' if smoke else 'throughput.py'} yet.")
    by_precision = [f"{name}: {precision}" for name in machines for precision in PRECISIONS]
    tables = []
    for head, title, rows in (
        (by_precision, f"`{unet}`", [machine.by_precision() for machine in machines.values()]),
        (list(machines), "times a plain loop, median [quartiles]", [machine.loops() for machine in machines.values()]),
        (list(machines), "what else", [machine.what_else() for machine in machines.values()]),
    ):
        lines = [f"| {title} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
        for name in rows[0]:
            cells = [cell for machine in rows for cell in machine[name]]
            if not any(cells):  # of a kind of machine on which nothing was measured yet
                continue
            cells = [cell or "n.m." for cell in cells]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(["**Smoke run: no figure means anything.**"] * smoke + tables)


@dataclasses.dataclass
class Machine:
    """What was measured on one processor: rows by title, of cells, None where nothing was."""

    records: list[dict]
    unet: str

    def find(self, what: str, **settings):
        """The value of the last such record, compiled only if asked for; an empty dictionary if there is none."""
        settings = {"compiled": None} | settings
        found = [
            r
            for r in self.records
            if r["what"] == what and settings.items() <= ({"compiled": None} | r["settings"]).items()
        ]
        return found[-1]["value"] if found else {}

    def step(self, mode: str, kind: str = "bare", batch: int = 64) -> dict:
        return self.find("step", unet=self.unet, mode=mode, kind=kind, batch=batch)

    def by_precision(self) -> dict[str, list[str | None]]:
        """A cell for each of `PRECISIONS`."""
        rows = {}

        def add(title: str, form: str, value: Callable[[str], float | None]) -> None:
            values = map(value, PRECISIONS)
            rows[title] = [None if v is None else format(v, form).replace("%", " %") for v in values]

        def rate(words: str, batch: int) -> Callable[[str], float | None]:
            return lambda precision: self.step(f"{precision} {words}", batch=batch).get("images_per_second")

        def rest(kind: str) -> Callable[[str], float | None]:
            return lambda precision: self.step(f"{precision} channels_last", kind).get("one_plus_rest")

        def folded_cost(precision: str) -> float | None:
            bare = self.step(f"{precision} channels_last")
            guided = self.step(f"{precision} channels_last folded", "guided")
            return guided["seconds"] / bare["seconds"] if guided else None

        def call(figure: str, run: str | None = None) -> Callable[[str], float | None]:
            return lambda precision: self.find("purifier", unet=self.unet, run=run or precision).get(figure)

        def peak(precision: str) -> float | None:
            found = self.find("peak", operation="convolution", dtype=precision)
            return found / 1e9 if found else None

        def share(precision: str) -> float | None:
            tf32 = peak("tf32") if precision == "float32" else None  # torch's default on a GPU
            rate, limit = call("images_per_second")(precision), tf32 or peak(precision)
            return rate * forward_flops(self.unet) / 1e9 / limit if rate and limit else None

        def convolutions(precision: str) -> float | None:
            shares = self.find("operators", unet=self.unet, mode=f"{precision} channels_last")
            return shares.get("aten::mkldnn_convolution", shares.get("aten::cudnn_convolution"))

        def whole(precision: str) -> float | None:
            return self.step(f"{precision} channels_last", "guided", 256).get("ratio")

        for batch in (1, 16, 64, 256, 1024):
            add(f"bare UNet, batch {batch}, images/s", ".1f", rate("channels_last", batch))
        add("bare UNet, compiled, batch 256, images/s", ".1f", rate("channels_last compiled", 256))
        add("bare UNet, compiled, batch 16, images/s", ".1f", rate("channels_last compiled", 16))
        add("bare UNet, upsampling folded, batch 16, images/s", ".1f", rate("channels_last folded", 16))
        add(
            "bare UNet, folded, Winograd's algorithm, batch 16, images/s",
            ".1f",
            rate("channels_last folded winograd", 16),
        )
        add("bare UNet, folded and compiled, batch 16, images/s", ".1f", rate("channels_last folded compiled", 16))
        add("1 + what a step without a guide does beside the network / bare UNet, batch 64", ".4f", rest("unguided"))
        add("1 + what a step with both guides does beside the network / bare UNet, batch 64", ".4f", rest("guided"))
        add("whole step with both guides / bare UNet, batch 256", ".4f", whole)
        add("step with both guides, upsampling folded / bare UNet as diffusers has it, batch 64", ".2f", folded_cost)
        add(
            "the authors' loop (float32, as torch has it), images/s per step",
            ".1f",
            call("images_per_second", "authors"),
        )
        add("pipeline with both guides, images/s per step", ".1f", call("images_per_second"))
        add("the same, times the authors' loop", ".2f", call("times_the_authors"))
        add("arithmetic of diffusers' network in that time, share of the convolution's peak", ".0%", share)
        add("that peak, GFLOP/s", ",.0f", peak)
        add("share of convolutions in a forward's time, batch 16", ".0%", convolutions)
        return rows

    def loops(self) -> dict[str, list[str | None]]:
        rows = {}
        for title, found in (
            ("a purifier's training step", self.find("training")),
            ("a victim's training step", self.find("victim")),
            ("noise for 64 images / `torch.randn`", self.find("noise", batch=64)),
        ):
            low, high = found.get("quartiles", (0, 0))
            rows[title] = [f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]" if found else None]
        return rows

    def what_else(self) -> dict[str, list[str | None]]:
        rows, noise = {}, self.find("noise", batch=64)
        compiled = self.find("noise", batch=64, compiled=True)
        for words, found in (("", noise), (", compiled", compiled)):
            rows[f"noise for 64 images{words}, milliseconds"] = [f"{1e3 * found['seconds']:.1f}" if found else None]
        for of in ("training", "victim", "purification"):
            found = self.find("input", of=of)
            rows[f"share of preparing the input: {of}"] = [f"{100 * found['share']:.1f} %" if found else None]
        for precision in PRECISIONS:
            found, title = self.find("pixels", precision=precision), f"pixels placed in {precision} against as loaded"
            shown = f"{found['mean']:.1g} ({found['largest']})" if found else None
            rows[f"{title}, in levels of 255: mean (largest)"] = [shown]
        changed = self.find("pixels")
        rows["what purification itself changes, mean"] = [
            f"{changed['mean_of_purification']:.1f}" if changed else None
        ]
        return rows
