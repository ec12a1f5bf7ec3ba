"""A data set purified by several workers: the bytes of one, whichever engine runs them and whatever happens to them."""

import contextlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from purifying import SETTINGS, quick_pipe, some_images, source_folder

from jcdp_diffusers import engines
from jcdp_diffusers.data import open_dataset
from jcdp_diffusers.purify.__main__ import main
from jcdp_diffusers.purify.dataset import open_purifier, purify_to_folder


datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_folder(tmp_path_factory.mktemp("source"), 90)


@pytest.fixture(scope="module")
def purifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("purifier")
    quick_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(source, purifier, tmp_path_factory):
    """The files that one worker writes, by name."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    purify_to_folder(source, opener(purifier, out), output_dir=out, threads=1, shards=9, **SETTINGS)
    return shards(out)


def opener(purifier, out):
    return partial(open_purifier, purifier, "cpu", output_dir=out)


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture
def quick_processes(monkeypatch):
    """Processes that share one import of the package; tests/test_engines.py has those that import all themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jcdp_diffusers.purify.dataset"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)


def test_two_processes_write_the_bytes_of_one(source, purifier, alone, tmp_path, quick_processes):
    options = {"output_dir": tmp_path, **SETTINGS}
    summary = purify_to_folder(source, opener(purifier, tmp_path), threads=1, shards=9, processes=2, **options)
    assert shards(tmp_path) == alone and summary["rows_out"] == 90
    (tmp_path / "train-00004-of-00009.parquet").write_bytes(b"damaged")
    purify_to_folder(source, opener(purifier, tmp_path), **options)
    assert shards(tmp_path) == alone


def test_cores_are_shared_out_among_processes(source, purifier, tmp_path, monkeypatch):
    """What a run with two processes begins with, where nobody says how many threads."""

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        purify_to_folder(source, opener(purifier, tmp_path), output_dir=tmp_path, processes=2, **SETTINGS)
    cores = len(os.sched_getaffinity(0))
    expected = 1 << (max(1, cores // 2).bit_length() - 1)
    assert f'"threads": {expected}' in (tmp_path / "run.json").read_text()


@pytest.mark.long  # tests/test_engines.py has the same of plain tasks
def test_ray_writes_the_bytes_of_one_though_a_node_is_lost(source, purifier, alone, tmp_path, two_nodes, capsys):
    command = f"--purifier {purifier} --dataset {source} --output {tmp_path}/out --diffusion_steps 3 --shards 9"

    def lose_a_node():
        while not list((tmp_path / "out").glob("*.parquet")):
            time.sleep(0.01)
        two_nodes.remove_node(two_nodes.lost, allow_graceful=False)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    ended = main([*command.split(), "--engine", "ray", "--address", two_nodes.address])
    thread.join()
    assert ended == 0, capsys.readouterr().err
    assert shards(tmp_path / "out") == alone
    assert "90 rows in, 90 out, 0 rejected" in capsys.readouterr().out


@pytest.mark.long  # tests/test_engines.py has the same of plain tasks
def test_ray_workers_that_cannot_open_the_purifier(source, tmp_path, two_nodes, capsys):
    command = f"--purifier {tmp_path}/nowhere --dataset {source} --output {tmp_path}/out --diffusion_steps 3"
    assert main([*command.split(), "--engine", "ray", "--address", two_nodes.address]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "nowhere" in said[-1] and not (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Ray's actors as far as a command can tell: in another working directory, and what they say is not seen."""

    def run(tasks, open_worker, address, actors, room, tally):
        open_worker, tasks = pickle.loads(pickle.dumps((open_worker, tasks)))
        with contextlib.chdir(tmp_path / "elsewhere"), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.ExitStack() as stack:
                worker = stack.enter_context(open_worker())
                done = [(task, engines._run_task(task, worker)) for task in tasks]
        for task, result in done:
            tally.done(task, result)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(engines, "_run_on_ray", run)


def test_ray_workers_take_paths_as_the_command_does_and_the_command_says_what_they_find(
    purifier, tmp_path, elsewhere, monkeypatch, capsys
):
    """Another data set lies under the same name where the workers are."""
    draw = np.random.default_rng(0)
    for place, count in ((tmp_path, 2), (tmp_path / "elsewhere", 3)):
        (place / "photos").mkdir()
        for number in range(count):
            picture = Image.fromarray(draw.integers(0, 256, (20, 13, 3), dtype=np.uint8))
            picture.save(place / f"photos/{number}.png")
    monkeypatch.chdir(tmp_path)
    command = f"--purifier {purifier} --dataset photos --output out --diffusion_steps 3 --engine ray --device cpu"
    assert main(command.split()) == 0
    said = capsys.readouterr()
    assert "2 rows in, 2 out" in said.out and "such as 13x20: each is purified in overlapping squares" in said.err
    assert (tmp_path / "out" / "summary.json").exists() and not (tmp_path / "elsewhere" / "out").exists()


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")])
def test_each_rank_has_a_gpu_of_its_own(device, purifier, tmp_path, monkeypatch):
    used = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: used[-1])
    monkeypatch.setattr("jcdp_diffusers.purify.dataset.place", lambda pipe, device, **options: used.append(device))
    open_purifier(purifier, device, output_dir=tmp_path)
    assert used == [3, "cuda:3"]


@pytest.fixture(scope="module")
def two_nodes():
    """A Ray cluster of two nodes with one processor each."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    handler = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.lost = cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    signal.signal(signal.SIGTERM, handler)
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.mark.long
def test_ranks_write_the_bytes_of_one_and_share_one_lock(source, purifier, alone, tmp_path):
    command = "--nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0 -m jcdp_diffusers.purify"
    options = f"--purifier {purifier} --dataset {source} --output {tmp_path}/out --diffusion_steps 3 --threads 1"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command.split(), *options.split(), "--shards", "9"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == alone
    assert done.stdout == f"90 rows in, 90 out, 0 rejected: {tmp_path}/out\n"


def test_a_second_command_on_the_folder_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    with engines.folder_lock(tmp_path / "out" / ".lock"):
        with pytest.raises(ValueError, match=rf"output_dir is '.*out'.* pid {os.getpid()}, command .*, since 2"):
            purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "run.json").exists()
    purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)


def test_an_opened_purifier_is_for_this_process_alone(source, tmp_path):
    sentence = (
        "pipe is an opened purifier, but must be a function that opens it where engine is 'local' and processes 2"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", processes=2, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_stream_of_unknown_length_is_for_one_process(purifier, tmp_path):
    stream = open_dataset(some_images(20), streaming=True)
    with pytest.raises(ValueError, match="processes 2.*'local' and 1"):
        purify_to_folder(stream, opener(purifier, tmp_path), output_dir=tmp_path, processes=2, **SETTINGS)
    purify_to_folder(stream, opener(purifier, tmp_path), output_dir=tmp_path, **SETTINGS)
