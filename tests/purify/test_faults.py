"""What can go wrong while a data set is purified. Minutes: `make test-faults`."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from purifying import SETTINGS, quick_pipe, read_back, same, some_images, source_folder, work

from jcdp_diffusers.data import decoding, open_dataset, to_uint8, write_dataset
from jcdp_diffusers.purify import reader
from jcdp_diffusers.purify.dataset import open_purifier, purify_to_folder
from jcdp_diffusers.purify.worker_pool import in_order, open_pool


pytestmark = pytest.mark.long
datasets.disable_progress_bars()

ROWS = 600
SHARDS = 30
# Forks of a server that has imported everything start within milliseconds, so that a hundred kills take seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jcdp_diffusers.purify.dataset", "datasets"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_folder(tmp_path_factory.mktemp("source"), ROWS)


@pytest.fixture(scope="module")
def expected():
    torch.set_num_threads(1)
    images = some_images(ROWS)
    purified = quick_pipe()(images.tensor(), seed=0, ids=list(images.ids), diffusion_steps=3, output_type="pt").images
    return dict(zip(images.ids, to_uint8(purified)))


def start(source: Path, output_dir: Path, **options) -> multiprocessing.Process:
    process = CONTEXT.Process(target=work, args=(source, output_dir), kwargs={"shards": SHARDS, **options})
    process.start()
    return process


def check(output_dir: Path, expected: dict) -> None:
    """Every row once, in order, with the right pixels; summary and files agree; nothing left behind."""
    assert same(read_back(output_dir), expected)
    summary = json.loads((output_dir / "summary.json").read_text())
    assert (summary["rows_in"], summary["rows_out"], summary["rejected"]) == (len(expected), len(expected), 0)
    assert sorted(summary["files"]) == sorted(path.name for path in output_dir.glob("*.parquet"))
    assert not list((output_dir / ".purify/writing").iterdir())


def descendants(process: int) -> set[int]:
    """Of the processes that this test has started, those below one."""
    children = set()
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children.update(map(int, path.read_text().split()))
    return children.union(*map(descendants, children))


# -------------------------------------------------------------------------------------------------------- kills and losses


def test_a_hundred_random_kills_of_the_command(source, expected, tmp_path):
    """The command is killed at a random moment and given again at once, until a hundred have died: the lock is free."""
    draw = np.random.default_rng(0)
    kills, runs = 0, 0
    while kills < 100:
        output_dir = tmp_path / str(runs)
        worker = start(source, output_dir)
        while not (output_dir / "summary.json").exists():
            worker.join(draw.uniform(0, 0.8))
            if worker.is_alive():
                worker.kill()
                worker.join()
                kills += 1
            assert worker.exitcode in (0, -signal.SIGKILL)
            worker = start(source, output_dir)
        worker.join()
        last = start(source, output_dir)  # the command given again, on a folder that is finished
        last.join()
        assert last.exitcode == 0
        check(output_dir, expected)
        runs += 1
    print(f"{kills} kills in {runs} runs")


def ray_workers(at: str = "") -> list[int]:
    """Processes of this test's own Ray clusters that run an actor, `at` its method `.open` or `.run`."""
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::_RayWorker{at}".encode()):
                found.append(pid)
    return found


def test_fifty_kills_of_workers_and_ten_losses_of_nodes_on_ray(source, tmp_path):
    """Workers die by SIGKILL and nodes vanish at random moments, over several runs; all files are those of one worker."""
    from ray.cluster_utils import Cluster

    quick_pipe().save_pretrained(tmp_path / "purifier")
    slow = {"diffusion_steps": 150, "progress": False, "threads": 1, "shards": SHARDS}  # half a second a shard
    torch.set_num_threads(1)
    opened = open_purifier(
        tmp_path / "purifier", "cpu", output_dir=tmp_path / "alone"
    )  # in the type that workers take
    purify_to_folder(source, opened, output_dir=tmp_path / "alone", **slow)
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").glob("*.parquet")}
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    draw, out, worker = np.random.default_rng(0), None, None
    count, runs = {"kills": 0, "losses": 0}, 0

    def finished() -> int:
        """1 where a run has ended, with the files of one worker; 0 before the first."""
        if out is None:
            return 0
        assert worker.exitcode == 0
        assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == alone
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["rows_in"], summary["rows_out"]) == (ROWS, ROWS)
        return 1

    # Ray wants to be in the main thread where it adds nodes, so the purification has a process of its own.
    try:
        while count != {"kills": 50, "losses": 10}:
            if worker is None or not worker.is_alive():
                runs += finished()
                out = tmp_path / f"ray-{runs}"
                pipe = partial(open_purifier, tmp_path / "purifier", "cpu", output_dir=out)
                how = {"engine": "ray", "address": cluster.address, "num_workers": 0, "output_dir": out}
                worker = CONTEXT.Process(target=purify_to_folder, args=(source, pipe), kwargs=how | slow)
                worker.start()
            worker.join(draw.uniform(0, 4))
            if draw.uniform() < 1 / 5 and count["losses"] < 10:
                cluster.remove_node(nodes.pop(draw.integers(2)), allow_graceful=False)
                count["losses"] += 1
                worker.join(draw.uniform(0, 3))
                nodes.append(cluster.add_node(num_cpus=1))
            # Mostly at work: ten deaths in a row at opening end a run, as they should.
            elif count["kills"] < 50 and (pids := ray_workers("" if draw.uniform() < 1 / 5 else ".run")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    count["kills"] += 1
        worker.join()
        runs += finished()
    finally:
        cluster.shutdown()
    print(f"{count} in {runs} runs")


def test_a_full_disk_under_ray_is_a_sentence(source, small_disk, tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    out = small_disk / "out"
    pipe = partial(open_purifier, tmp_path / "purifier", "cpu", output_dir=out)
    sentence = r"^output_dir '.*out' cannot be written to \(no space left on device\): mend that and .* tasks failed"
    with pytest.raises(RuntimeError, match=sentence) as raised:
        purify_to_folder(source, pipe, output_dir=out, shards=SHARDS, threads=1, engine="ray", **SETTINGS)
    assert "\n" not in str(raised.value)
    assert list(out.glob("*.parquet"))


def test_the_command_is_killed_and_another_machine_goes_on(source, expected, tmp_path):
    """The folders move, so no path and no process of the first machine means anything any more."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(source, first / "source")
    worker = start(first / "source", first / "out", diffusion_steps=3)
    while len(list((first / "out").glob("*.parquet"))) < 3:
        time.sleep(0.01)
    worker.kill()
    worker.join()
    shutil.move(first, second)
    worker = start(second / "source", second / "out", shards=None)
    worker.join()
    assert worker.exitcode == 0
    check(second / "out", expected)


# ------------------------------------------------------------------------------------------------------- disks and sources


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred kilobytes; mounting one takes the rights of root."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=180k", "tmpfs", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk(small_disk, source, expected):
    out = small_disk / "out"
    with pytest.raises(
        OSError, match=r"output_dir '.*out' cannot be written to \(no space left on device\): mend that"
    ):
        purify_to_folder(source, quick_pipe(), output_dir=out, shards=SHARDS, **SETTINGS)
    finished = sorted(out.glob("*.parquet"))
    assert finished and not list((out / ".purify/writing").iterdir())
    before = [path.stat().st_mtime_ns for path in finished]
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    purify_to_folder(source, quick_pipe(), output_dir=out, **SETTINGS)
    assert [path.stat().st_mtime_ns for path in finished] == before
    check(out, expected)


def test_read_only_output(small_disk, source):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"output_dir '.*out' cannot be written to \(read-only file system\)"):
        purify_to_folder(source, quick_pipe(), output_dir=small_disk / "out", **SETTINGS)


def test_output_without_permission(source, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match=r"output_dir '.*out' cannot be written to \(permission denied\)"):
        purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "record"])
def test_a_finished_shard_is_damaged(damage, source, expected, tmp_path):
    out = tmp_path / "out"
    purify_to_folder(source, quick_pipe(), output_dir=out, shards=SHARDS, **SETTINGS)
    one, other = sorted(out.glob("*.parquet"))[3:5]
    content = one.read_bytes()
    if damage == "flip":
        one.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    elif damage == "cut":
        one.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        one.write_bytes(b"")
    elif damage == "swap":
        one.write_bytes(other.read_bytes())
    else:
        (out / ".purify/shards/train-00003.json").write_text("{")
    untouched = [path for path in out.glob("*.parquet") if path != one]
    before = [path.stat().st_mtime_ns for path in untouched]
    purify_to_folder(source, quick_pipe(), output_dir=out, **SETTINGS)
    assert [path.stat().st_mtime_ns for path in untouched] == before
    check(out, expected)


def test_of_a_file_that_is_too_large_for_an_image_only_the_name_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_FILE_BYTES", 10_000)
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 10_000)
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(some_images(3).images[number]).save(folder / f"{number}.png")
    for name, size in (("large.png", 20_000), ("broken.png", 9_000)):
        (folder / name).write_bytes(bytes(size))
    summary = purify_to_folder(folder, quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)
    assert (summary["rows_out"], summary["rejected"]) == (3, 2)
    (path,) = (tmp_path / "out/rejected").glob("*.parquet")
    found = {one["path"]: one["bytes"] for one in pq.read_table(path)["image"].to_pylist()}
    assert found == {"large.png": None, "broken.png": bytes(9_000)}


def test_the_source_changes_under_a_resume(tmp_path):
    source = source_folder(tmp_path / "source", 100)
    purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", shards=5, **SETTINGS)
    sorted((tmp_path / "out").glob("*.parquet"))[2].unlink()
    for count, seed in ((100, 1), (99, 0), (101, 0)):
        shutil.rmtree(source)
        write_dataset(source, some_images(count, seed=seed), shards=3)
        with pytest.raises(ValueError, match="whose source (content|rows) is"):
            purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)
    shutil.rmtree(source)
    source_folder(source, 100)
    purify_to_folder(source, quick_pipe(), output_dir=tmp_path / "out", **SETTINGS)


def test_a_stream_that_ends_elsewhere_the_second_time_is_noticed(tmp_path):
    """Its first rows are as they were, so nothing shows before its end."""

    def stream(count):
        return open_dataset(some_images(140).subset(range(count)), streaming=True)

    out = tmp_path / "out"
    purify_to_folder(stream(140), quick_pipe(), output_dir=out, rows_per_shard=20, **SETTINGS)
    (out / "train-00004-of-00007.parquet").unlink()
    with pytest.raises(ValueError, match="ends at row 95"):
        purify_to_folder(stream(95), quick_pipe(), output_dir=out, **SETTINGS)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see processes")
def test_decoding_processes_die_with_a_killed_worker(tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    source = source_folder(tmp_path / "source", 5000)
    command = f"-m jcdp_diffusers.purify --purifier {tmp_path}/purifier --dataset {source} --output {tmp_path}/out"
    worker = subprocess.Popen([sys.executable, *command.split(), "--num_workers=2"], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.05)
    helpers = descendants(worker.pid)
    assert len(helpers) >= 3  # two that decode, and the server that forked them
    worker.kill()
    worker.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in helpers):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_stops_it_with_a_sentence(signal_number, tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    source = source_folder(tmp_path / "source", 5000)
    command = f"-m jcdp_diffusers.purify --purifier {tmp_path}/purifier --dataset {source} --output {tmp_path}/out"
    worker = subprocess.Popen(
        [sys.executable, *command.split(), "--num_workers=2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in its background lets them, and what they start, ignore it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.05)
    os.killpg(worker.pid, signal_number)  # as a terminal or a scheduler does: to all processes of the job
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 130
    assert re.search(r"Stopped: \d+ finished shards stay in .*Give the same command again to go on", said), said
    assert "Traceback" not in said
    assert not list((tmp_path / "out/.purify/writing").iterdir())


def end_abruptly(_) -> None:
    os._exit(9)


def test_a_decoding_process_that_is_killed_is_reported_in_a_sentence():
    with (
        open_pool(1) as pool,
        pytest.raises(RuntimeError, match="num_workers processes decode and encode images, and"),
    ):
        list(in_order(pool, end_abruptly, [(0, (0,))]))
