import argparse

import numpy as np
import pytest
from PIL import Image

from eval import page_figures
from eval.studies import finetune_versus_scratch
from jcdp_diffusers.results import read_records


@pytest.mark.long
def test_every_arm_is_recorded_and_plotted(tmp_path, monkeypatch):
    for domain in ("source", "target"):
        images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{domain}.npz", images=images, labels=np.zeros(12, np.int64))
    options = {
        "source": tmp_path / "source.npz",
        "target": tmp_path / "target.npz",
        "source_split": "train",
        "target_split": "train",
        "unet": "tiny32",
        "resolution": 8,
        "num_held_out": 4,
        "source_steps": 2,
        "target_steps": 2,
        "train_batch_size": 2,
        "validation_steps": 1,
        "output_dir": tmp_path / "runs",
        "results": tmp_path / "results.jsonl",
        "plot": tmp_path / "plot.png",
    }
    command = ["finetune_versus_scratch.py"] + [
        part for name, value in options.items() for part in (f"--{name}", str(value))
    ]
    monkeypatch.setattr("sys.argv", command)
    args = finetune_versus_scratch.parse_args()
    finetune_versus_scratch.main(args)
    records = read_records(args.results)
    arms = [*finetune_versus_scratch.ARMS, finetune_versus_scratch.SOURCE]
    assert {(r["settings"]["arm"], r["settings"]["step"]) for r in records} == {
        (arm, step) for arm in arms for step in (0, 1, 2)
    }
    # Before the first step, arms of one start have one loss; after it they differ.
    loss = {(r["settings"]["arm"], r["settings"]["step"]): r["value"] for r in records}
    assert loss["scratch, all timesteps", 0] == loss["scratch, first timesteps", 0]
    assert loss["scratch, all timesteps", 0] != loss["fine-tuned, all timesteps", 0]
    assert loss["scratch, all timesteps", 2] != pytest.approx(loss["scratch, first timesteps", 2], rel=1e-6)
    assert Image.open(args.plot).size[0] > 500
    # Given again, the command has nothing left to do.
    finetune_versus_scratch.main(args)
    assert len(read_records(args.results)) == len(records)
    # What counts is the records: of a curve cut short, the points are written again, and no step is trained again.
    lines = args.results.read_text().splitlines(keepends=True)
    args.results.write_text("".join(lines[:-1]))
    finetune_versus_scratch.main(args)
    assert finetune_versus_scratch.curve(args, arms[3]) == {step: loss[arms[3], step] for step in (0, 1, 2)}
    # Another seed or other settings are another comparison, whose records the first one's plot leaves out.
    for name, value in (("seed", 1), ("learning_rate", 1e-3), ("resolution", 16), ("source_steps", 1)):
        other = argparse.Namespace(**vars(args) | {name: value})
        assert not any(finetune_versus_scratch.on_record(other, arm, 2) for arm in arms)
    other = argparse.Namespace(**vars(args) | {"seed": 1})
    measured = {"validation": [{"step": step, "loss": 9.0} for step in (0, 1, 2)], "device": "cpu", "seconds": 1.0}
    finetune_versus_scratch.write_records(other, arms[0], measured)
    assert finetune_versus_scratch.on_record(other, arms[0], 2)
    assert finetune_versus_scratch.curve(args, arms[0]) == {step: loss[arms[0], step] for step in (0, 1, 2)}


def compared(seed: int, seconds: float, arms=None, last=4, **settings) -> list[dict]:
    """The records of one comparison, its arms trained for `last` steps and its source for 8."""
    arms = (finetune_versus_scratch.SOURCE, *finetune_versus_scratch.ARMS) if arms is None else arms
    ends = {arm: 8 if arm == finetune_versus_scratch.SOURCE else last for arm in arms}
    return [
        {"what": "loss", "seed": seed, "seconds": seconds, "value": 1.0 + seed}
        | {"settings": {"arm": arm, "step": step, "first_timesteps": 100} | settings}
        for arm, end in ends.items()
        for step in range(0, end + 1, 2)
    ]


def test_what_is_told_is_the_last_comparison_that_is_whole(monkeypatch):
    arms = (finetune_versus_scratch.SOURCE, *finetune_versus_scratch.ARMS)
    first, second = compared(0, 10.0), compared(1, 20.0)
    assert finetune_versus_scratch.last_comparison(first + second) == second
    # The second one was interrupted: before an arm, while an arm was written, or it has the source alone.
    for interrupted in (compared(1, 20.0, arms[:-1]), second[:-1], compared(1, 20.0, arms[:1])):
        assert finetune_versus_scratch.last_comparison(first + interrupted) == first
        assert finetune_versus_scratch.table(first + interrupted) == finetune_versus_scratch.table(first)
        monkeypatch.setattr(page_figures, "read_records", lambda path, found=first + interrupted: found)
        assert page_figures.finetune()["seconds_most"] == "10"
        with pytest.raises(ValueError, match="records hold no comparison in which scratch, all timesteps"):
            finetune_versus_scratch.table(interrupted)
    # Records from before the resolution was named are of 32 pixels, and of one comparison with those that name it.
    named = compared(0, 10.0, arms[-1:], resolution=32)
    assert finetune_versus_scratch.last_comparison(compared(0, 10.0, arms[:-1]) + named)[-1] == named[-1]


def test_records_name_the_precision_that_was_used(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", "--source", "a", "--target", "b"])
    args = finetune_versus_scratch.parse_args()
    assert args.mixed_precision == "auto"
    for has, precision in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr("jcdp_diffusers.train.config.has_bfloat16", lambda device, has=has: has)
        assert finetune_versus_scratch.described(args)["mixed_precision"] == precision
