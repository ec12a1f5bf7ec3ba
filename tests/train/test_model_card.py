import copy
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from jcdp_diffusers.hub import PURIFIER_FILES
from jcdp_diffusers.train import model_card
from jcdp_diffusers.train.model_card import purifier_card, write_card


ROOT = Path(__file__).parents[2]
RECORD = {
    "base_model": "google/ddpm-cifar10-32",
    "base_model_on_hub": True,
    "prediction_type": "epsilon",
    "data": {
        "num_images": 9000,
        "num_validation_images": 256,
        "source": "me/photos",
        "hub_id": "me/photos",
        "split": "train",
        "resolution": 32,
        "crop": "random",
    },
    "steps": 1234,
    "total_batch_size": 96,
    "processes": 2,
    "trained_timesteps": [0, 50],
    "num_train_timesteps": 1000,
    "parameters": 35746307,
    "settings": {
        "timestep_sampling": "antithetic",
        "learning_rate": 0.00025,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 77,
        "max_grad_norm": 1.5,
        "snr_gamma": None,
        "ema_max_decay": 0.999,
        "mixed_precision": "bf16",
        "random_flip": False,
        "seed": 11,
    },
    "ema": {"weight_of_start": 1.5e-7, "mean_age": 181.2},
    "seconds": 4321.0,
    "images_per_second": 27.4,
    "device": "cuda (a GPU)",
    "packages": {"torch": "2.15.0", "diffusers": "0.42.1", "accelerate": "1.15.0"},
    "validation": [
        {"step": 0, "loss": 0.25, "timesteps": [0, 50]},
        {"step": 1234, "loss": 0.123456, "timesteps": [0, 50]},
    ],
}


def changed(**changes):
    return copy.deepcopy(RECORD) | changes


def test_card_says_what_the_record_says():
    card = purifier_card(RECORD, repo_id="me/purifier", license="mit")
    text = " ".join(card.text.split())
    for expected in (
        "fine-tuned from `google/ddpm-cifar10-32`",
        "9000 from `me/photos`, split `train`, 32x32 pixels; labels were not read",
        "35,746,307 parameters",
        "0 to 49 of 1000, antithetic",
        "1,234 of 96 images, on 2 processes",
        "learning rate 0.00025 (cosine, 77 steps of warm-up), gradients clipped to 1.5",
        "mean squared error, unweighted",
        "decay at most 0.999; mean age 181 steps, share of the starting weights 1.5e-07",
        "bf16, without flips, 11",
        "4,321 s on cuda (a GPU), 27 images/s",
        "torch 2.15.0, diffusers 0.42.1, accelerate 1.15.0",
        "on 256 images that were not trained on",
        "| 1234 | 0.12346 |",
        'from_pretrained("me/purifier")',
        "Intended use",
        "Not to be used",
    ):
        assert expected in text
    assert "{" not in re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)


def test_header_is_what_the_hub_reads(tmp_path):
    purifier_card(RECORD, repo_id="me/purifier", license="mit").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "image-to-image", "mit")
    assert data.base_model == "google/ddpm-cifar10-32" and data.datasets == ["me/photos"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("mse", 0.123456)
    assert result.metric_name == "denoising loss at timesteps 0 to 49"


def test_a_model_of_the_first_timesteps_says_that_it_does_not_generate_images():
    sentence = "This model does not generate images"
    assert sentence in purifier_card(RECORD, repo_id="x").text
    assert sentence not in purifier_card(changed(trained_timesteps=[0, 1000]), repo_id="x").text


def test_only_what_was_measured_appears():
    data = {name: value for name, value in RECORD["data"].items() if name != "num_validation_images"}
    bare = purifier_card(changed(validation=[], data=data), repo_id="x", results=())
    assert "## Measured" not in bare.text and "Nothing was measured" in bare.text
    assert bare.data.eval_results is None
    result = {
        "what": "accuracy after purification",
        "value": 0.875,
        "protocol": "fast",
        "seed": 3,
        "settings": {"poison": "lsp", "width": 16},
        "device": "cpu",
    }
    quoted = purifier_card(changed(validation=[], data=data), repo_id="x", results=[result]).text
    assert "| accuracy after purification | 0.875 | fast | 3 | poison lsp, width 16 | cpu |" in quoted


def test_local_sources_are_no_hub_metadata():
    data = RECORD["data"] | {"hub_id": None, "source": "photos"}
    card = purifier_card(changed(base_model="old", base_model_on_hub=False, data=data), repo_id="x")
    assert card.data.base_model is None and card.data.datasets is None
    assert "fine-tuned from `old`" in card.text and "9000 from `photos`" in card.text
    assert "from scratch" in purifier_card(changed(base_model=None, base_model_on_hub=False), repo_id="x").text


def test_card_of_a_folder_without_a_record(tmp_path):
    with pytest.raises(FileNotFoundError, match="training_record.json"):
        write_card(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff" + content,
        lambda content: b"[1]",
        lambda content: content.replace(b'"steps": 1234', b'"steps": "many"'),
        lambda content: content.replace(b'"data"', b'"date"'),
        lambda content: content.replace(b'"weight_of_start"', b'"weight"'),
        lambda content: content.replace(b'"learning_rate"', b'"rate"'),
        lambda content: content.replace(b'"loss": 0.123456', b'"loss": "low"'),
        lambda content: content.replace(b'"trained_timesteps": [0, 50]', b'"trained_timesteps": []'),
        lambda content: content.replace(b'"timesteps": [0, 50]', b'"timesteps": 50'),
        lambda content: content.replace(b'"num_validation_images"', b'"held_out"'),
    ],
)
def test_a_damaged_record_is_named(tmp_path, change):
    content = json.dumps(RECORD).encode()
    (tmp_path / "training_record.json").write_bytes(content)
    write_card(tmp_path)
    assert change(content) != content
    (tmp_path / "training_record.json").write_bytes(change(content))
    with pytest.raises(ValueError, match=r"training_record\.json is damaged") as raised:
        write_card(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_wheel_holds_the_template(tmp_path):
    """In the package the template is a link, and a wheel knows no links."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jcdp_diffusers", copy / "jcdp_diffusers", symlinks=True, ignore=ignored)
    build = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("jcdp_diffusers/train/model_card.md").decode() == (ROOT / "model_card.md").read_text()


def test_template_is_the_one_at_the_top_and_explains_its_variables():
    top = ROOT / "model_card.md"
    assert model_card.TEMPLATE.read_text() == top.read_text()
    explained, template = top.read_text().split("-#}")
    for name in ("card_data", "model_name", "repo_id", "record", "generates", "held_out", "first_held_out", "results"):
        assert re.search(rf"\b{name}\b", explained) and re.search(rf"\b{name}\b", template), name


def test_files_of_a_repository_leave_out_checkpoints():
    from fnmatch import fnmatch

    pushed = [
        "README.md",
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "perceptual/config.json",
    ]
    kept = [
        "checkpoint-5/optimizer.bin",
        "checkpoint-5/unet.safetensors",
        "grids/denoising-0000001.png",
        "logs/x",
        "a.txt",
    ]
    for path in pushed + kept:
        assert any(fnmatch(path, pattern) for pattern in PURIFIER_FILES) == (path in pushed), path
