import numpy as np
import pytest
from PIL import Image

from jcdp_diffusers.results import read_records
from training import finetune_versus_scratch


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
