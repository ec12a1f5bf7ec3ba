"""What can go wrong while a data set is purified. Minutes: `pytest -m long tests/test_purify_faults.py`."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from purifying import SETTINGS, quick_pipe, read_back, same, some_images, source_folder, work

from jcdp_diffusers.data import open_dataset, to_uint8, write_dataset
from jcdp_diffusers.purify.dataset import purify_to_folder
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
    assert not list((output_dir / ".purify/claims").glob("[!.]*"))


def test_a_hundred_random_kills(source, expected, tmp_path):
    """Two workers at a time, one of which is killed at a random moment and replaced, until a hundred have died."""
    draw = np.random.default_rng(0)
    kills, runs = 0, 0
    while kills < 100:
        output_dir = tmp_path / str(runs)
        workers = [start(source, output_dir) for _ in range(2)]
        while not (output_dir / "summary.json").exists():
            time.sleep(draw.uniform(0, 0.8))
            victim = int(draw.integers(2))
            if workers[victim].is_alive():
                workers[victim].kill()
                workers[victim].join()
                kills += 1
            elif (output_dir / "summary.json").exists():
                break
            workers[victim] = start(source, output_dir)
        for worker in workers:
            worker.join()
        last = start(source, output_dir)  # the command given again, on a folder that is finished
        last.join()
        assert last.exitcode == 0
        check(output_dir, expected)
        runs += 1
    print(f"{kills} kills in {runs} runs")


def test_every_worker_is_killed_and_another_machine_goes_on(source, expected, tmp_path):
    """The folders move, so no path and no process of the first machine means anything any more."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(source, first / "source")
    worker = start(first / "source", first / "out", diffusion_steps=3)
    while len(list((first / "out").glob("*.parquet"))) < 3:
        time.sleep(0.01)
    worker.kill()
    worker.join()
    for claim in (first / "out/.purify/claims").iterdir():
        owner = json.loads(claim.read_text())
        claim.write_text(json.dumps(owner | {"machine": "the first"}))
    shutil.move(first, second)
    worker = start(second / "source", second / "out", shards=None, claim_timeout=1.0)
    worker.join()
    assert worker.exitcode == 0
    check(second / "out", expected)


def test_workers_race_for_the_same_shards(source, expected, tmp_path):
    """Claims are removed under the workers' hands, so that several make the same shard at the same time."""
    workers = [start(source, tmp_path / "out") for _ in range(4)]
    while any(worker.is_alive() for worker in workers):
        for claim in (tmp_path / "out/.purify/claims").glob("[0-9]*"):
            claim.unlink(missing_ok=True)
        time.sleep(0.02)
    assert [worker.exitcode for worker in workers] == [0] * 4
    check(tmp_path / "out", expected)


def test_workers_share_a_stream_whose_end_nobody_knows(source, expected, tmp_path):
    """Three workers, one of which is killed now and then and replaced; claims vanish under their hands, too."""
    options = {"as_stream": True, "shards": None, "rows_per_shard": 23, "claim_timeout": 2.0}
    draw = np.random.default_rng(0)
    workers = [start(source, tmp_path / "out", **options) for _ in range(3)]
    kills = 0
    while any(worker.is_alive() for worker in workers):
        for claim in (tmp_path / "out/.purify/claims").glob("[0-9]*"):
            if draw.uniform() < 0.1:
                claim.unlink(missing_ok=True)
        victim = int(draw.integers(3))
        if kills < 8 and draw.uniform() < 0.1 and workers[victim].is_alive():
            workers[victim].kill()
            workers[victim].join()
            workers[victim] = start(source, tmp_path / "out", **options)
            kills += 1
        time.sleep(0.05)
    assert [worker.exitcode for worker in workers] == [0] * 3
    check(tmp_path / "out", expected)


def test_clocks_jump(source, expected, tmp_path):
    """File times go to and fro by years while two workers are at it; nobody is stuck, nothing is lost."""
    workers = [start(source, tmp_path / "out", claim_timeout=2.0) for _ in range(2)]
    draw = np.random.default_rng(0)
    while any(worker.is_alive() for worker in workers):
        moment = time.time() + draw.uniform(-1, 1) * 3e8
        for path in (tmp_path / "out").rglob("*"):
            try:
                os.utime(path, (moment, moment))
            except FileNotFoundError:
                pass
        time.sleep(0.02)
    assert [worker.exitcode for worker in workers] == [0, 0]
    check(tmp_path / "out", expected)


def test_a_worker_that_stands_still_loses_its_shard_and_does_no_harm_when_it_wakes(source, expected, tmp_path):
    sleeper = start(source, tmp_path / "out", claim_timeout=1.0)
    while not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.01)
    os.kill(sleeper.pid, signal.SIGSTOP)
    other = start(source, tmp_path / "out", claim_timeout=1.0)
    other.join()
    assert other.exitcode == 0
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join()
    assert sleeper.exitcode == 0
    check(tmp_path / "out", expected)


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
    with pytest.raises(ValueError, match="ends at row 95, but has had more rows before"):
        purify_to_folder(stream(95), quick_pipe(), output_dir=out, **SETTINGS)


def run_torchrun(processes: int, purifier: Path, source: Path, output_dir: Path, *options: str) -> str:
    command = f"--nproc_per_node {processes} --rdzv_backend c10d --rdzv_endpoint localhost:0 -m jcdp_diffusers.purify"
    arguments = f"--purifier {purifier} --dataset {source} --output {output_dir} --diffusion_steps 3"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command.split(), *arguments.split(), *options],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_one_and_two_processes_of_torchrun_give_the_same_files(source, tmp_path):
    quick_pipe().save_pretrained(tmp_path / "purifier")
    for processes, cut in ((1, "--shards=30"), (2, "--rows_per_shard=23")):
        log = run_torchrun(processes, tmp_path / "purifier", source, tmp_path / str(processes), "--threads=1", cut)
        lines = re.findall(r"\[worker (\d+)\] 600 of 600 images", log)
        assert len(set(lines)) == processes  # each process says in a line of its own how far all of them are
    one, two = (read_back(tmp_path / str(processes)) for processes in (1, 2))
    assert same(one, two) and list(one) == list(some_images(ROWS).ids)


def descendants(process: int) -> set[int]:
    children = {
        int(pid) for path in Path(f"/proc/{process}/task").glob("*/children") for pid in path.read_text().split()
    }
    return children.union(*map(descendants, children))


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
    )
    while not list((tmp_path / "out").glob("*.parquet")):
        time.sleep(0.05)
    os.killpg(worker.pid, signal_number)  # as a terminal or a scheduler does: to all processes of the job
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 130
    assert re.search(r"Stopped: \d+ finished shards stay in .*Give the same command again to go on", said), said
    assert "Traceback" not in said
    assert not list((tmp_path / "out/.purify/claims").glob("[!.]*"))
    assert not list((tmp_path / "out/.purify/writing").iterdir())


def end_abruptly(_) -> None:
    os._exit(9)


def test_a_decoding_process_that_is_killed_is_reported_in_a_sentence():
    with (
        open_pool(1) as pool,
        pytest.raises(RuntimeError, match="num_workers processes decode and encode images, and"),
    ):
        list(in_order(pool, end_abruptly, [(0, (0,))]))
