import argparse

import numpy as np
import pytest
from PIL import Image

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
