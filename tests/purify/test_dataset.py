"""A data set purified in one process: what comes out, from what sources, and what is refused."""

import contextlib
import datetime
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image
from purifying import SETTINGS, quick_pipe, read_back, same, some_images, source_folder
from tiny import tiny_unet

from jcdp_diffusers.data import load_images, open_dataset, to_uint8, write_dataset
from jcdp_diffusers.perceptual import LPIPSModel
from jcdp_diffusers.pipeline_jcdp import JointConditionalPurificationPipeline
from jcdp_diffusers.purify import reader
from jcdp_diffusers.purify import worker as worker_module
from jcdp_diffusers.purify.__main__ import main
from jcdp_diffusers.purify.dataset import purify_dataset, purify_to_folder
from jcdp_diffusers.purify.shards import explained
from jcdp_diffusers.purify.tiling import encode_all, starts
from jcdp_diffusers.purify.worker import steady_arithmetic
from jcdp_diffusers.storage import Folder


datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def pipe():
    return quick_pipe()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_folder(tmp_path_factory.mktemp("source"), 50)


@pytest.fixture(scope="module")
def expected(pipe):
    """What the pipeline itself makes of the images, by id."""
    images = some_images(50)
    purified = pipe(images.tensor(), seed=0, ids=list(images.ids), diffusion_steps=3, output_type="pt").images
    return dict(zip(images.ids, to_uint8(purified)))


@pytest.fixture(scope="module")
def finished(pipe, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    purify_to_folder(source, pipe, output_dir=folder, rows_per_shard=16, **SETTINGS)
    return folder


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def png(image: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ what comes out


def test_purifies_as_the_pipeline_does(pipe, source, expected, tmp_path):
    purified = purify_dataset(source, pipe, output_dir=tmp_path, seed=0, **SETTINGS)
    assert purified["id"] == list(some_images(50).ids)
    assert purified["label"] == [row % 3 for row in range(50)]
    assert purified.features["label"].names == ["a", "b", "c"]
    assert purified.features["image"] == datasets.Image()
    assert same({row["id"]: np.asarray(row["image"]) for row in purified}, expected)


def test_a_thread_for_the_accelerator_changes_nothing_and_runs_ahead(pipe, source, expected, tmp_path, monkeypatch):
    """As on a GPU: the next micro-batch is under way while the images of the one before are stored."""
    events = []

    @contextlib.contextmanager
    def device_thread(device_type):
        assert device_type == "cpu"
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as thread:
            yield thread

    def noted(function, name):
        def run(*args, **options):
            events.append(f"{name} begins")
            time.sleep(0.02)
            return function(*args, **options)

        return run

    monkeypatch.setattr(worker_module, "open_device_thread", device_thread)
    monkeypatch.setattr(worker_module, "purify_tiles", noted(worker_module.purify_tiles, "purify"))
    monkeypatch.setattr("jcdp_diffusers.purify.worker.encode_all", noted(encode_all, "store"))
    purify_to_folder(source, pipe, output_dir=tmp_path, rows_per_shard=50, micro_batch_size=16, **SETTINGS)
    assert same(read_back(tmp_path), expected)
    assert events.count("purify begins") == 4
    assert events.index("store begins") > [i for i, event in enumerate(events) if event == "purify begins"][1]


def test_cudnn_stays_on(pipe):
    assert torch._C._get_cudnn_enabled()
    with steady_arithmetic(pipe, None):
        assert torch._C._get_cudnn_enabled() and torch.backends.cudnn.deterministic
    with torch.backends.cudnn.flags(enabled=False), steady_arithmetic(pipe, None):
        assert not torch._C._get_cudnn_enabled()  # if its owner has switched it off


def test_grey_images(tmp_path):
    images = some_images(5).images[:, :, :, :1]
    pipe = quick_pipe(channels=1)
    purified = purify_dataset(images, pipe, output_dir=tmp_path, **SETTINGS)
    assert all(image.mode == "L" and image.size == (8, 8) for image in purified["image"])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    alone = pipe(tensor, seed=0, ids=purified["id"][:], diffusion_steps=3, output_type="pt").images
    assert np.array_equal(np.stack([np.asarray(image) for image in purified["image"]])[..., None], to_uint8(alone))


def test_every_column_survives(pipe, tmp_path):
    images = some_images(6)
    columns = {
        "img": [Image.fromarray(image) for image in images.images],
        "fine_label": list(images.labels),
        "id": list(range(6)),
        "boxes": [[[0.5, 1.0]] * row for row in range(6)],
        "meta": [{"when": datetime.datetime(2024, 1, 1 + row), "who": None} for row in range(6)],
        "preview": [Image.fromarray(image[::2, ::2]) for image in images.images],
        "text": ["é", None, "", "x" * 300, "\n", "5"],
    }
    source = datasets.Dataset.from_dict(columns)
    purified = purify_dataset(source, pipe, output_dir=tmp_path, **SETTINGS)
    assert purified.column_names == ["id", "image", "label", "boxes", "meta", "preview", "text"]
    assert purified["id"][:] == [str(row) for row in range(6)] and purified["label"][:] == columns["fine_label"]
    for name in ("boxes", "meta", "text"):
        assert purified[name][:] == source[name][:] and purified.features[name] == source.features[name]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(purified["preview"], source["preview"]))


def test_other_images_that_are_files_are_embedded(pipe, tmp_path):
    (tmp_path / "preview.png").write_bytes(png(some_images(1).images[0]))
    source = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(some_images(1).images[0])], "preview": [str(tmp_path / "preview.png")]}
    ).cast_column("preview", datasets.Image())
    purified = purify_dataset(source, pipe, output_dir=tmp_path / "out", **SETTINGS)
    stored = purified.cast_column("preview", datasets.Image(decode=False))[0]["preview"]
    assert stored["bytes"] == (tmp_path / "preview.png").read_bytes() and os.sep not in stored["path"]


def test_output_loads_as_a_data_set_with_a_card(finished, expected):
    loaded = datasets.load_dataset(str(finished), split="train")
    assert same({row["id"]: np.asarray(row["image"]) for row in loaded}, expected)
    assert same(dict(zip(load_images(finished).ids, load_images(finished).images)), expected)
    card = (finished / "README.md").read_text()
    for part in ("| Rows in | 50 |", "| Rejected | 0 |", "T_p = 3", "Intended use", "path: train-*.parquet"):
        assert part in card
    assert not re.search(r"\{\w+\}", card)
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["rows_in"], summary["rows_out"], summary["rejected"]) == (50, 50, 0)
    assert sorted(summary["files"]) == sorted(path.name for path in finished.glob("*.parquet"))


def test_guides_take_part(tmp_path):
    """A preset's scale given anew is for the network at hand, whichever the preset names."""
    pipe = JointConditionalPurificationPipeline(tiny_unet(), DDPMScheduler(), LPIPSModel("squeeze"))
    images = some_images(2, size=32)
    settings = {"diffusion_steps": 4, "num_rounds": 1, "perceptual_guidance_scale": 1e7, "preset": "paper"}
    purified = purify_dataset(images, pipe, output_dir=tmp_path, progress=False, **settings)
    purify = lambda scale: (
        pipe(
            images.tensor(),
            seed=0,
            ids=list(images.ids),
            output_type="pt",
            **settings | {"perceptual_guidance_scale": scale},
        ).images
    )
    guided, without = to_uint8(purify(1e7)), to_uint8(purify(0.0))
    assert np.array_equal(np.stack([np.asarray(image) for image in purified["image"]]), guided)
    assert not np.array_equal(guided, without)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"]["perceptual_network"] == pipe.perceptual.name


def test_pipe_and_threads_are_left_as_they_were(two_threads, tmp_path):
    pipe = quick_pipe()
    pipe.set_progress_bar_config(desc="mine")
    purify_to_folder(some_images(2), pipe, output_dir=tmp_path, threads=1, **SETTINGS)
    assert torch.get_num_threads() == 2 and pipe._progress_bar_config == {"desc": "mine"}


# --------------------------------------------------------------------------------------------- same bits however it is cut


CUTS = [{"shards": 1}, {"shards": 7}, {"rows_per_shard": 10}, {"rows_per_shard": 64}, {"streaming": True}]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("folder", cut) for cut in CUTS] + [(kind, cut) for kind in ("dataset", "stream") for cut in (CUTS[2], CUTS[4])],
    ids=str,
)
def test_same_bits_from_any_source_in_any_shards(kind, options, pipe, source, expected, tmp_path):
    given = source if kind == "folder" else open_dataset(source, streaming=kind == "stream")
    summary = purify_to_folder(given, pipe, output_dir=tmp_path, **options, **SETTINGS)
    assert same(read_back(tmp_path), expected)
    count = options.get("shards") or -(-50 // options.get("rows_per_shard", 128))
    assert list(summary["files"]) == [f"train-{index:05d}-of-{count:05d}.parquet" for index in range(count)]


def test_same_bits_with_decoding_and_encoding_processes(pipe, source, expected, tmp_path):
    purify_to_folder(source, pipe, output_dir=tmp_path, num_workers=2, rows_per_shard=32, **SETTINGS)
    assert same(read_back(tmp_path), expected)


def test_another_micro_batch_size_differs_by_one_level_at_most(pipe, source, expected, tmp_path):
    purify_to_folder(source, pipe, output_dir=tmp_path, micro_batch_size=5, **SETTINGS)
    purified = read_back(tmp_path)
    assert max(np.abs(purified[name].astype(int) - expected[name]).max() for name in expected) <= 1


@pytest.mark.parametrize("count", [1, 9, 10, 20])
def test_streams_of_any_length(count, pipe, tmp_path):
    images = some_images(count)
    stream = open_dataset(images, streaming=True)
    summary = purify_to_folder(stream, pipe, output_dir=tmp_path, rows_per_shard=10, **SETTINGS)
    assert summary["rows_in"] == summary["rows_out"] == count
    assert list(read_back(tmp_path)) == list(images.ids)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    last = sorted(before)[-1]
    last.unlink()
    again = purify_to_folder(open_dataset(images, streaming=True), pipe, output_dir=tmp_path, **SETTINGS)
    assert again["files"] == summary["files"]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert after.keys() == before.keys() and [path for path in after if after[path] != before[path]] == [last]


def test_a_worker_gets_ready_once_for_all_shards_of_a_stream(pipe, tmp_path, monkeypatch):
    """Its decoding processes among them, of which there would be more with every shard."""
    opened = []
    open_pool = worker_module.open_pool
    monkeypatch.setattr(worker_module, "open_pool", lambda processes: opened.append(processes) or open_pool(processes))
    stream = open_dataset(some_images(20), streaming=True)
    options = {"rows_per_shard": 4, "num_workers": 1, **SETTINGS}
    assert len(purify_to_folder(stream, pipe, output_dir=tmp_path, **options)["files"]) == 5
    assert opened == [1]


def test_a_stream_without_rows_is_refused(pipe, tmp_path):
    stream = datasets.IterableDataset.from_generator(
        lambda: iter(()), features=datasets.Features({"image": datasets.Image()})
    )
    with pytest.raises(ValueError, match="has no rows in split 'train': at least one is needed"):
        purify_to_folder(stream, pipe, output_dir=tmp_path, **SETTINGS)


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("streaming", [False, True])
def test_from_and_to_other_file_systems(kind, streaming, pipe, source, expected, tmp_path, monkeypatch):
    """fsspec's memory stands for an object store: nothing can be renamed or locked there."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # else `datasets` opens no URL
    place = f"file://{tmp_path}" if kind == "file" else f"memory://{tmp_path.name}"
    fs, root = fsspec.core.url_to_fs(place)
    fs.put(str(source), f"{root}/source", recursive=True)
    given = {"dataset": f"{place}/source", "split": "train", "streaming": streaming}
    purify_to_folder(pipe=pipe, output_dir=f"{place}/out", rows_per_shard=16, **given, **SETTINGS)
    shard = f"{root}/out/train-00001-of-00004.parquet"
    before, _ = fs.cat_file(shard), fs.pipe_file(shard, b"damaged")
    purified = purify_dataset(pipe=pipe, output_dir=f"{place}/out", **given, **SETTINGS)
    assert fs.cat_file(shard) == before
    assert same({row["id"]: np.asarray(row["image"]) for row in purified}, expected)
    assert {"README.md", "run.json", "summary.json"} <= {
        path.rpartition("/")[2] for path in fs.ls(f"{root}/out", False)
    }
    with pytest.raises(ValueError, match="split is None.*URL"):
        purify_to_folder(f"{place}/source", pipe, output_dir=f"{place}/other", **SETTINGS)
    if kind == "memory":
        with pytest.raises(ValueError, match="output_dir is 'memory://.*'.*push_to_hub"):
            purify_to_folder(pipe=pipe, output_dir=f"{place}/out", push_to_hub="a/b", **given, **SETTINGS)


@pytest.mark.parametrize("error", [PermissionError("a wrong token"), HTTPError("no network")])
def test_whoever_may_not_push_learns_it_before_the_work(pipe, source, tmp_path, monkeypatch, error):
    asked = []

    def refused(self, repo_id, **options):
        asked.append((repo_id, options["repo_type"]))
        raise error

    monkeypatch.setattr(HfApi, "create_repo", refused)
    with pytest.raises(OSError, match="a wrong token|'a/b' cannot be reached on the Hub .*no network"):
        purify_to_folder(source, pipe, output_dir=tmp_path / "out", push_to_hub="a/b", **SETTINGS)
    assert asked == [("a/b", "dataset")] and not list((tmp_path / "out").glob("*.parquet"))
    other = {"seed": 1, "push_to_hub": "a/b"} | SETTINGS
    with pytest.raises(ValueError, match="holds a run whose seed is 0"):  # what is refused here makes no repository
        purify_to_folder(source, pipe, output_dir=tmp_path / "out", **other)
    assert len(asked) == 1


def test_what_others_have_at_a_url_is_not_written_over(pipe, source):
    """The source itself among it: a shard has the name of one of its files."""
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/protected", recursive=True)
    before = {path: memory.cat_file(path) for path in memory.find("/protected")}
    with pytest.raises(
        ValueError, match="output_dir is 'memory://protected', which holds 'train-00000.*must be empty"
    ):
        purify_to_folder("memory://protected", pipe, output_dir="memory://protected", split="train", **SETTINGS)
    assert {path: memory.cat_file(path) for path in memory.find("/protected")} == before
    memory.store.clear()
    with pytest.raises(ValueError, match="output_dir is '.*', which lies inside that of dataset"):
        purify_to_folder(f"file://{source}", pipe, output_dir=source / "out", split="train", **SETTINGS)


def test_urls_that_cannot_be_opened_here(pipe, source, monkeypatch):
    with pytest.raises(ValueError, match="output_dir is 'nowhere://a', but must be a URL that fsspec can open here"):
        purify_to_folder(source, pipe, output_dir="nowhere://a", **SETTINGS)

    def lacking(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacking)
    with pytest.raises(ValueError, match="output_dir is 's3://a', but must be a URL .* here: Install s3fs"):
        purify_to_folder(source, pipe, output_dir="s3://a", **SETTINGS)


@pytest.mark.parametrize("kind", ["folder", "dataset", "stream"])
@pytest.mark.parametrize("rows", [(0, 5), (0, 39)])
def test_two_rows_of_one_id_are_refused_however_far_apart(rows, kind, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "ROWS_AT_ONCE", 8)
    images = open_dataset(some_images(40))
    ids = list(images["id"])
    ids[rows[1]] = ids[rows[0]]
    images = images.remove_columns("id").add_column("id", ids)
    if kind == "folder":
        (tmp_path / "in").mkdir()
        images.to_parquet(tmp_path / "in/train-0.parquet")
    given = {"folder": tmp_path / "in", "dataset": images, "stream": images.to_iterable_dataset()}[kind]
    with pytest.raises(ValueError, match=f"{ids[0]}'.* (more than once|for two different images)"):
        purify_to_folder(given, pipe, output_dir=tmp_path / "out", rows_per_shard=10, **SETTINGS)
    assert not (tmp_path / "out/summary.json").exists()


# --------------------------------------------------------------------------------------------------------------- going on


def test_goes_on_with_what_is_missing(pipe, source, expected, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    paths = sorted(tmp_path.glob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[2].unlink()
    purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)
    assert [path for path in paths if path.stat().st_mtime_ns != before[path]] == [paths[2]]
    assert same(read_back(tmp_path), expected)


def test_a_damaged_shard_is_made_again(pipe, source, expected, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = sorted(tmp_path.glob("*.parquet"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)
    assert same(read_back(tmp_path), expected)


def test_micro_batches_and_threads_are_those_that_the_run_began_with(two_threads, pipe, tmp_path):
    source = some_images(6)
    purify_to_folder(source, pipe, output_dir=tmp_path, micro_batch_size=4, threads=1, shards=2, **SETTINGS)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    arithmetic = json.loads((tmp_path / "run.json").read_text())["arithmetic"]
    assert (arithmetic["micro_batch_size"], arithmetic["threads"]) == (4, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "whose seed is 0, but 1 is wanted now"),
        ({"diffusion_steps": 4}, "whose diffusion_steps is 3, but 4"),
        ({"pixel_guidance_scale": 2.0}, "whose pixel_guidance_scale is 0.0, but 2.0"),
        ({"image_size": 16}, "whose image_size is 8, but 16"),
        ({"fit": "tile"}, "whose fit is 'exact', but 'tile'"),
        ({"micro_batch_size": 8}, "whose micro_batch_size is 16, but 8"),
        ({"threads": 4}, "whose threads is 1, but 4"),
        ({"shards": 2}, "whose shards count is None, but 2"),
        ({"rows_per_shard": 17}, "whose rows_per_shard is 16, but 17"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refuses_to_go_on_with_other_settings(change, sentence, pipe, source, finished):
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match=f"holds a run {re.escape(sentence)}"):
        purify_to_folder(source, pipe, output_dir=finished, **{**SETTINGS, **change})


def test_goes_on_with_the_overlap_that_the_run_began_with(pipe, tmp_path):
    """An overlap of tiles that is given is compared, whether or not fit is; one that is not given is no other one."""
    go_on = partial(purify_to_folder, some_images(2, size=12), pipe, output_dir=tmp_path, **SETTINGS)
    go_on(fit="tile", tile_overlap=3)
    go_on(fit="tile")
    go_on()
    for fit in (None, "tile"):
        with pytest.raises(ValueError, match="whose tile_overlap is 3, but 5 is wanted now"):
            go_on(fit=fit, tile_overlap=5)


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff", b'{"arithmetic": 1}'])
def test_damaged_records(content, pipe, source, expected, finished, tmp_path):
    """That of a shard is made again with the shard; that of the run cannot be, so it is named."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".purify/shards/train-00001.json").write_bytes(content)
    purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)
    assert same(read_back(tmp_path), expected)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match="output_dir is '.*', whose run.json is damaged, but must hold it as it was"):
        purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)


def test_refuses_to_go_on_with_another_purifier(source, finished):
    with pytest.raises(ValueError, match="whose purifier content is"):
        purify_to_folder(source, quick_pipe(seed=1), output_dir=finished, **SETTINGS)
    pipe = quick_pipe()
    pipe.unet.to(torch.float64)
    with pytest.raises(ValueError, match="whose purifier content is|whose dtype is"):
        purify_to_folder(source, pipe, output_dir=finished, **SETTINGS)


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_refuses_to_go_on_with_other_columns(kind, pipe, tmp_path):
    images = open_dataset(some_images(4)).rename_column("label", "fine").rename_column("id", "key")
    data = images.add_column("coarse", [0, 0, 1, 1]).add_column("name", list("abcd"))
    if kind == "folder":
        (tmp_path / "source").mkdir()
        data.to_parquet(tmp_path / "source/train.parquet")
        data = tmp_path / "source"
    began = {"label_column": "fine", "id_column": "key"}
    purify_to_folder(data, pipe, output_dir=tmp_path / "out", **began, **SETTINGS)
    for change, sentence in (
        ({"label_column": "coarse"}, "label_column is 'fine', but 'coarse' is wanted now"),
        ({"id_column": "name"}, "id_column is 'key', but 'name' is wanted now"),
        ({"id_column": None}, "id_column is 'key', but None is wanted now"),
    ):
        with pytest.raises(ValueError, match=f"holds a run whose {sentence}"):
            purify_to_folder(data, pipe, output_dir=tmp_path / "out", **began | change, **SETTINGS)


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_refuses_to_go_on_with_another_source(kind, pipe, source, tmp_path):
    images = some_images(50)
    changed = images.images.copy()
    changed[31, 4, 4, 0] ^= 1
    folder = source_folder(tmp_path / "source", 50)
    purify_to_folder(folder if kind == "folder" else images, pipe, output_dir=tmp_path / "out", **SETTINGS)
    if kind == "folder":
        write_dataset(folder, images.with_images(changed), shards=3)
    with pytest.raises(ValueError, match="whose source content is"):
        given = folder if kind == "folder" else images.with_images(changed)
        purify_to_folder(given, pipe, output_dir=tmp_path / "out", **SETTINGS)


def test_refuses_to_go_on_with_another_torch(pipe, source, finished, tmp_path):
    run = json.loads((finished / "run.json").read_text())
    run["packages"] |= {"torch": "1.0", "matplotlib": "0.1"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="whose packages torch is '1.0'"):
        purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fit": "crop"}, r"fit is 'crop', but must be one of \('exact', 'resize', 'tile'\)"),
        ({"tile_overlap": 2}, "tile_overlap is 2, but must be left out where fit is 'exact'"),
        ({"tile_overlap": 8}, r"tile_overlap is 8, but must lie between 0 and image_size \(8\)"),
        ({"threads": 3}, "threads is 3, but must be a power of two"),
        ({"shards": 51}, "shards is 51, but the source has 50 rows: one to that many are accepted"),
        ({"shards": 5, "streaming": True, "dataset": "stream"}, "shards is 5, but the source has an unknown number"),
        ({"shards": 2, "rows_per_shard": 5}, "shards is 2 and rows_per_shard 5, but only one of them"),
        ({"num_workers": -1}, "num_workers is -1, but must be at least 0"),
        ({"processes": 0}, "processes is 0, but must be at least 1"),
        ({"address": "auto"}, "address is 'auto', but must be None where engine is 'local'"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0, but must be at least 1"),
        ({"image_size": -1}, "image_size is -1, but must be the side of a square"),
        ({"image_size": 9}, "image_size is 9, but must be a multiple of 2"),
        ({"preset": "best"}, "preset is 'best', but must be one of"),
        ({"seed": -1}, r"seed is -1, but must be a whole number in \[0, 2\*\*64\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_is_written(options, sentence, pipe, source, tmp_path):
    options = dict(options)
    given = open_dataset(source, streaming=True) if options.pop("dataset", None) else source
    with pytest.raises(ValueError, match=sentence):
        purify_to_folder(given, pipe, output_dir=tmp_path / "out", **{**SETTINGS, **options})
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_to(pipe, source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output_dir '.*file/out' cannot be written to \(not a directory\)"):
        purify_to_folder(source, pipe, output_dir=tmp_path / "file" / "out", **SETTINGS)
    with pytest.raises(ValueError, match="output_dir is '.*file'"):
        purify_to_folder(source, pipe, output_dir=tmp_path / "file", **SETTINGS)


def test_trouble_beside_the_output_is_not_blamed_on_it(tmp_path):
    beside = FileNotFoundError(errno.ENOENT, "No such file or directory", f"{tmp_path}/output of others/0.png")
    with pytest.raises(FileNotFoundError, match="output of others"), explained(Folder(tmp_path / "output")):
        raise beside


def test_the_source_and_files_of_others_stay_as_they_are(pipe, source, tmp_path):
    own = Path(shutil.copytree(source, tmp_path / "own"))
    other = Path(shutil.copytree(source, tmp_path / "other"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, dataset, said in (
        (own, own, "is that of dataset"),
        (own / "out", own, "lies inside that of dataset"),
        (tmp_path, own, "holds that of dataset"),
        (other, own, "which holds '"),
    ):
        with pytest.raises(ValueError, match=f"output_dir is .*{said}"):
            purify_to_folder(str(dataset), pipe, output_dir=output, **SETTINGS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ----------------------------------------------------------------------------------------------- sizes, and what is refused


def test_images_that_cannot_be_used_are_kept_aside(pipe, tmp_path):
    good = some_images(8).images
    whole = png(good[1])
    frames = [Image.fromarray(good[2]), Image.fromarray(good[3])]
    animation = io.BytesIO()
    frames[0].save(animation, format="GIF", save_all=True, append_images=frames[1:])
    deep = io.BytesIO()
    Image.fromarray((good[4, :, :, 0].astype(np.uint16) * 257)).save(deep, format="PNG")
    bomb = whole[:16] + (200_000).to_bytes(4, "big") * 2 + whole[24:]
    values = {
        "good": png(good[0]),
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "cmyk": png(good[5], "CMYK", format="JPEG"),
        "deep": deep.getvalue(),
        "animated": animation.getvalue(),
        "bomb": bomb,
        "text": b"not an image",
        "null": None,
        "grey": png(good[6], "L"),
    }
    rows = [{"bytes": value, "path": None} if value is not None else None for value in values.values()]
    source = datasets.Dataset.from_dict(
        {"id": list(values), "image": rows, "note": [f"of {name}" for name in values]},
        features=datasets.Features(
            {"id": datasets.Value("string"), "image": datasets.Image(decode=False), "note": datasets.Value("string")}
        ),
    )
    summary = purify_to_folder(source, pipe, output_dir=tmp_path, rows_per_shard=4, **SETTINGS)
    assert (summary["rows_in"], summary["rows_out"], summary["rejected"]) == (10, 2, 8)
    assert sum(summary["reasons"].values()) == 8
    assert list(read_back(tmp_path)) == ["good", "grey"]
    files = sorted(map(str, (tmp_path / "rejected").glob("*.parquet")))
    rejected = datasets.load_dataset("parquet", data_files=files, split="train")
    assert set(rejected["id"]) == set(values) - {"good", "grey"}
    for row in rejected.cast_column("image", datasets.Image(decode=False)):
        assert row["note"] == f"of {row['id']}" and row["rejection_reason"]
        assert (row["image"] and row["image"]["bytes"]) == values[row["id"]]
    assert datasets.load_dataset(str(tmp_path), split="train")["id"] == ["good", "grey"]

    before = {path: path.read_bytes() for path in (tmp_path / "rejected").iterdir()}
    next(iter(before)).unlink()
    assert purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)["files"] == summary["files"]
    assert {path: path.read_bytes() for path in (tmp_path / "rejected").iterdir()} == before


def test_when_nothing_can_be_used_it_says_so(pipe, tmp_path):
    source = datasets.Dataset.from_dict({"image": [b"x", b"y"]})
    with pytest.raises(ValueError, match="has no image that can be used: see .*rejected"):
        purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)


def test_mixed_sizes_are_resized(pipe, tmp_path):
    shapes = [(8, 8), (16, 12), (5, 9), (8, 31)]
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    source = datasets.Dataset.from_dict({"image": images})
    purified = purify_dataset(source, pipe, output_dir=tmp_path, fit="resize", **SETTINGS)
    assert [image.size for image in purified["image"]] == [(8, 8)] * 4
    assert purify_to_folder(source, pipe, output_dir=tmp_path, **SETTINGS)["resized"] == 3  # as it was begun
    assert json.loads((tmp_path / "summary.json").read_text())["resized"] == 3
    assert "| Resized | 3 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("streaming", [False, True])
def test_smaller_sizes_are_refused_unless_fit_is_given(streaming, pipe, tmp_path):
    source = open_dataset(some_images(3, size=4), streaming=streaming)
    sentence = r"dataset has images of 4x4, but the purifier works on 8x8: fit \(--fit\) must say what becomes of them"
    with pytest.raises(ValueError, match=sentence):
        purify_dataset(source, pipe, output_dir=tmp_path / "out", **SETTINGS)
    with pytest.raises(ValueError, match="dataset has images of 16x16"):
        purify_dataset(some_images(3, size=16), pipe, output_dir=tmp_path / "out", fit="exact", **SETTINGS)
    assert not (tmp_path / "out").exists()  # so that the same folder may be begun with one
    assert len(purify_dataset(source, pipe, output_dir=tmp_path / "out", fit="tile", **SETTINGS)) == 3
    assert len(purify_dataset(source, pipe, output_dir=tmp_path / "out", **SETTINGS)) == 3


def test_photographs_keep_their_size_and_each_is_a_file_of_its_own(pipe, tmp_path, capsys):
    """Nobody says what to do with them; what is done is said. Those finished before a stop stay."""
    draw = np.random.default_rng(0)
    photographs = [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in PHOTOGRAPHS]
    source = datasets.Dataset.from_dict({"image": photographs, "id": list("abc")})
    purified = purify_dataset(source, pipe, output_dir=tmp_path, **SETTINGS)
    said = capsys.readouterr().err
    assert "other sizes than 8x8, the purifier's, such as 40x61" in said and "keeps its size (fit: tile)" in said
    assert [image.size for image in purified["image"]] == [(40, 61), (90, 33), (64, 64)]
    assert len(list(tmp_path.glob("train-*-of-00003.parquet"))) == 3


PHOTOGRAPHS = [(61, 40, 3), (33, 90, 3), (64, 64, 3)]


def test_a_later_image_of_another_size_is_set_aside(pipe, tmp_path):
    images = [Image.new("RGB", (8, 8))] * 2 + [Image.new("RGB", (12, 9))]
    source = datasets.Dataset.from_dict({"image": images, "id": ["a", "b", "c"]})
    purified = purify_dataset(source, pipe, output_dir=tmp_path, **SETTINGS)
    assert purified["id"] == ["a", "b"]
    (refused,) = datasets.load_dataset("parquet", data_files=str(tmp_path / "rejected/*.parquet"), split="train")
    assert refused["id"] == "c" and refused["rejection_reason"] == "12x9 pixels and not 8x8"


def test_mixed_sizes_are_tiled(pipe, tmp_path):
    shapes = [(8, 8), (16, 12), (5, 9), (8, 31), (1, 2)]
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    source = datasets.Dataset.from_dict({"image": images, "id": list("abcde")})
    purified = purify_dataset(source, pipe, output_dir=tmp_path, fit="tile", **SETTINGS)
    assert [image.size for image in purified["image"]] == [(8, 8), (12, 16), (14, 8), (31, 8), (16, 8)]
    assert json.loads((tmp_path / "summary.json").read_text())["resized"] == 2  # those shorter than a tile
    # An image of the purifier's size is one tile, with the image's own id.
    alone = pipe([images[0]], ids=["a"], seed=0, diffusion_steps=3).images[0]
    assert np.array_equal(np.asarray(purified[0]["image"]), np.asarray(alone))


def test_a_purified_large_image_has_no_seams(pipe, tmp_path):
    """Steps across the lines where tiles begin and end are no larger than elsewhere."""
    flat = [Image.fromarray(np.full((64, 64, 3), 128, np.uint8)) for _ in range(8)]
    source = datasets.Dataset.from_dict({"image": flat})
    purified = purify_dataset(source, pipe, output_dir=tmp_path, fit="tile", **SETTINGS)
    images = np.stack([np.asarray(image, float) for image in purified["image"]])
    steps = np.abs(np.diff(images, axis=2)).mean((0, 1, 3))
    edges = sorted({edge - 1 for start in starts(64, 8, 2) for edge in (start, start + 8) if 0 < edge < 64})
    elsewhere = np.delete(steps, edges)
    assert steps[edges].max() <= 1.1 * elsewhere.max()


# ------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def purifier(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "purifier")
    return str(tmp_path / "purifier")


@pytest.fixture
def handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_command_line(purifier, source, expected, tmp_path, capsys, handlers):
    command = f"--purifier {purifier} --dataset {source} --split train --output {tmp_path}/out --diffusion_steps 3"
    assert main(f"{command} --shards 4".split()) == 0
    said = capsys.readouterr()
    assert "50 rows in, 50 out, 0 rejected" in said.out
    assert re.search(r"100%\|.*\| 50/50 \[.* images/s, 0 rejected\]", said.err)
    purified = read_back(tmp_path / "out")
    assert max(np.abs(purified[name].astype(int) - expected[name]).max() for name in expected) <= 1  # channels_last
    assert main(f"{command} --seed 1".split()) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "whose seed is 0, but 1 is wanted now" in said
    with pytest.raises(SystemExit) as usage:
        main(["--purifier", purifier])
    assert usage.value.code == 2


@pytest.mark.parametrize(
    "more, refused",
    [([], True), (["--preset", "unconditional"], True), (["--perceptual_guidance_scale", "1"], False)],
)
def test_a_perceptual_network_without_its_guide_is_refused(
    more, refused, purifier, source, tmp_path, capsys, handlers
):
    """The one that is no network is refused too, for another reason."""
    words = ["--purifier", str(purifier), "--dataset", str(source), "--output", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu", "--perceptual", "nowhere", *more]) == 1
    assert ("--perceptual is 'nowhere', but must be left out" in capsys.readouterr().err) is refused
    assert not (tmp_path / "out").exists()


def test_enlarged_images_of_a_run_in_tiles_are_not_told_of_tiles(purifier, tmp_path, capsys, handlers):
    draw, photos = np.random.default_rng(0), tmp_path / "photos"
    photos.mkdir()
    for number, shape in enumerate([(30, 20, 3), (17, 24, 3), (4, 5, 3)]):
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(photos / f"{number}.png")
    command = f"--purifier {purifier} --dataset {photos} --output {tmp_path}/out --diffusion_steps 3"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "1 images were not of the purifier's size and have been resized." in said and "--fit" not in said


def test_pictures_are_not_exported_to_a_url(purifier, source, tmp_path, monkeypatch, capsys, handlers):
    """Where a folder named `memory:` would have been made."""
    monkeypatch.chdir(tmp_path)
    where = ["--dataset", str(source), "--output", "out", "--export", "memory://pictures"]
    assert main(["--purifier", purifier, *where, "--diffusion_steps", "3"]) == 1
    assert "--export is 'memory://pictures', but must be a path of this machine" in capsys.readouterr().err
    assert not (tmp_path / "memory:").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "recorded", "total"), [("3", 3, 6), ("1 3", [1, 3], 4)])
def test_evaluations_on_the_command_line(given, recorded, total, purifier, source, tmp_path, handlers):
    command = f"--purifier {purifier} --dataset {source} --split train --output {tmp_path}/out --diffusion_steps 3"
    assert main(f"{command} --num_rounds 2 --num_inference_steps {given}".split()) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["num_inference_steps"] == recorded
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"{total} network evaluations per image in 2 round(s)" in card
    assert main(f"{command} --num_rounds 2 --num_inference_steps {given}".split()) == 0  # goes on


def test_a_signal_stops_cleanly_and_the_same_command_goes_on(purifier, tmp_path, capsys, handlers):
    source = source_folder(tmp_path / "source", 200)
    command = f"--purifier {purifier} --dataset {source} --output {tmp_path}/out --diffusion_steps 30".split()
    state = tmp_path / "out/.purify"

    def stop_after_the_first_shard():
        while not list((tmp_path / "out").glob("*.parquet")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_first_shard, daemon=True).start()
    assert main([*command, "--rows_per_shard", "16"]) == 130
    assert re.search(r"Stopped: \d+ finished shards stay in .*Give the same command again", capsys.readouterr().err)
    assert not list(state.glob("writing/*"))
    assert 1 <= len(list((tmp_path / "out").glob("*.parquet"))) < 13
    assert main(command) == 0
    assert list(read_back(tmp_path / "out")) == list(some_images(200).ids)


ON_THE_HUB = """
import sys
from purifying import quick_pipe
from jcdp_diffusers.purify.__main__ import main

source, folder = sys.argv[1:]
quick_pipe().push_to_hub("tester/purifier")
command = ["--purifier", "tester/purifier", "--diffusion_steps", "3", "--dataset"]
assert main([*command, source, "--output", f"{folder}/pushed", "--push_to_hub", "tester/learnable"]) == 0
assert main([*command, "tester/learnable", "--output", f"{folder}/cached"]) == 0
assert main([*command, "tester/learnable", "--split", "train", "--output", f"{folder}/streamed", "--streaming"]) == 0
"""


@pytest.mark.long
def test_from_the_hub_and_back(source, tmp_path):
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(source), str(tmp_path)],
            env=os.environ | hub.environment(tmp_path / "cache") | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        revision = hub.revision("models/tester/purifier")
    pushed = hub.repos["datasets/tester/learnable"]
    written = ["README.md", "run.json", "summary.json", "train-00000-of-00001.parquet"]
    assert sorted(set(pushed) - {".gitattributes"}) == written
    assert all(pushed[name] == (tmp_path / "pushed" / name).read_bytes() for name in written)
    run = json.loads(pushed["run.json"])
    assert (run["purifier"]["name"], run["purifier"]["revision"]) == ("tester/purifier", revision)
    assert str(tmp_path) not in pushed["run.json"].decode() + pushed["README.md"].decode()
    assert same(read_back(tmp_path / "cached"), read_back(tmp_path / "streamed"))


def test_a_network_that_cannot_purify_leaves_no_run(tmp_path):
    """With one on record, the right network would be refused as another one's."""
    wrong = quick_pipe()
    wrong.unet = UNet2DModel(**dict(tiny_unet(size=8).config) | {"num_class_embeds": 10})
    with pytest.raises(ValueError, match="unet is conditioned on classes"):
        purify_to_folder(some_images(3), wrong, output_dir=tmp_path / "out", **SETTINGS)
    seeing = JointConditionalPurificationPipeline(tiny_unet(size=8), DDPMScheduler(), LPIPSModel("alex"))
    with pytest.raises(ValueError, match="images are 8x8"):
        purify_to_folder(
            some_images(3), seeing, output_dir=tmp_path / "out", perceptual_guidance_scale=1.0, **SETTINGS
        )
    assert not (tmp_path / "out/run.json").exists()
    assert purify_to_folder(some_images(3), quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)["rows_out"] == 3
