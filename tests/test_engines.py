"""Every task is done once, by whichever engine; what goes wrong is one sentence, and a lock names who holds it."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import engine_tasks
import pytest
import torch
from engine_tasks import Square, cannot_open, ends_at_once, open_worker, squares

from jcdp_diffusers import engines


EXPECTED = {number: number**2 for number in range(12)}


def tasks_in(folder, **ends: str) -> list[Square]:
    """Twelve tasks; `n5="error"` makes number 5 end so."""
    return [Square(folder, number, ends.get(f"n{number}", "")) for number in range(12)]


@pytest.mark.parametrize("processes", [1, 2])
def test_every_missing_task_is_run_once_by_workers_that_are_opened_once(processes, tmp_path):
    done = {}
    (tmp_path / "square-3").write_text("9")
    engines.run(
        tasks_in(tmp_path),
        open_worker=partial(open_worker, tmp_path),
        processes=processes,
        on_done=lambda task, result: done.update({task.number: result}),
    )
    assert squares(tmp_path) == EXPECTED
    log = [line.split(maxsplit=2) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(number) for number, _, _ in log) == [number for number in range(12) if number != 3]
    assert done == {number: number**2 for number in range(12) if number != 3}
    opened = (tmp_path / "opened").read_text().split()
    assert 1 <= len(opened) <= processes and len(set(opened)) == len(opened)
    assert {(pid, worker) for _, pid, worker in log} == {(pid, f"opened by {pid}") for pid in opened}
    assert (opened == [str(os.getpid())]) == (processes == 1)


def test_no_worker_is_opened_where_nothing_is_missing(tmp_path):
    engines.run(tasks_in(tmp_path), open_worker=partial(open_worker, tmp_path))
    for processes in (1, 2):
        engines.run(tasks_in(tmp_path), open_worker=cannot_open, processes=processes)


def test_one_process_stops_at_the_first_failure_and_goes_on_with_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="number is 5"):
        engines.run(tasks_in(tmp_path, n5="error"), open_worker=partial(open_worker, tmp_path))
    assert squares(tmp_path) == {number: number**2 for number in range(5)}
    engines.run(tasks_in(tmp_path), open_worker=partial(open_worker, tmp_path))
    assert squares(tmp_path) == EXPECTED


def test_several_processes_do_the_others_and_report_failures_in_a_sentence(tmp_path, capsys):
    tasks = tasks_in(tmp_path, n5="error", n7="error")
    with pytest.raises(RuntimeError, match=r"number is [57].*\(2 of 12 tasks failed") as raised:
        engines.run(tasks, open_worker=partial(open_worker, tmp_path), processes=2)
    assert "\n" not in str(raised.value)
    assert squares(tmp_path) == {number: number**2 for number in range(12) if number not in (5, 7)}
    assert sorted(capsys.readouterr().err.splitlines())[0].startswith("square-5 failed: number is 5")


def test_tasks_that_all_fail_are_not_all_tried(tmp_path):
    tasks = [Square(tmp_path, number, "error") for number in range(500)]
    with pytest.raises(RuntimeError, match=rf"\({engines.GIVE_UP_AFTER} of 500 tasks failed"):
        engines.run(tasks, open_worker=partial(open_worker, tmp_path), processes=2)


def test_a_worker_that_cannot_be_opened_is_a_sentence(tmp_path):
    with pytest.raises(RuntimeError, match="purifier is 'nowhere'"):
        engines.run(tasks_in(tmp_path), open_worker=cannot_open, processes=2)
    with pytest.raises(OSError, match="purifier is 'nowhere'"):
        engines.run(tasks_in(tmp_path), open_worker=cannot_open)


def test_a_process_that_is_killed_is_a_sentence_and_the_same_call_goes_on(tmp_path):
    with pytest.raises(RuntimeError, match=r"^square-5: its process was ended by signal 9 \(SIGKILL\)"):
        engines.run(tasks_in(tmp_path, n5="killed"), open_worker=partial(open_worker, tmp_path), processes=2)
    engines.run(tasks_in(tmp_path, n5="killed"), open_worker=partial(open_worker, tmp_path), processes=2)
    assert squares(tmp_path) == EXPECTED


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"engine": "spark"}, r"engine is 'spark', but must be one of \('local', 'ray'\)"),
        ({"processes": 0}, "processes is 0, but must be at least 1"),
        ({"address": "auto"}, "address is 'auto', but must be None where engine is 'local'"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_use(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        engines.run(tasks_in(tmp_path), open_worker=cannot_open, **options)


@pytest.mark.parametrize("how", [{"processes": 2}, {"engine": "ray"}], ids=str)
def test_several_workers_have_a_device_of_their_own(how):
    how = {"engine": "local"} | how
    with pytest.raises(ValueError, match="device is 'cuda:1', but must be 'cuda' where engine is"):
        engines.check(**how, device="cuda:1")
    for device in ("cuda", "cpu", torch.device("cuda")):
        engines.check(**how, device=device)
    engines.check("local", 1, device="cuda:1")


def launch(folder, ends: str, *launcher: str) -> dict[str, str]:
    """Two ranks; what each says."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", *launcher, engine_tasks.__file__, folder, ends],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in folder.glob("said-*")}


TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--main_process_port=0",
)


def test_a_process_that_ends_while_tasks_are_handed_over_is_a_sentence(tmp_path, monkeypatch):
    """As on a machine that is slow to hand them over: the second task comes when the processes are gone."""
    submit, handed = ProcessPoolExecutor.submit, []

    def late(pool, *args):
        if handed:
            assert isinstance(handed[0].exception(timeout=60), BrokenProcessPool)
        handed.append(submit(pool, *args))
        return handed[-1]

    monkeypatch.setattr(ProcessPoolExecutor, "submit", late)
    with pytest.raises(RuntimeError, match="before its first task, was ended with exit code 3"):
        engines.run(tasks_in(tmp_path), open_worker=ends_at_once, processes=2)
    assert len(handed) == 1


def test_the_process_that_died_at_its_task_is_named_and_not_those_that_ended_with_it(tmp_path):
    """One was still starting, which failed for want of the pool; one was told to end."""
    (tmp_path / "3").write_text("square-3")
    (tmp_path / "4").write_text("square-4")
    codes = {2: 1, 3: -signal.SIGSEGV, 4: -signal.SIGTERM, 5: 0}
    processes = [SimpleNamespace(pid=pid, exitcode=code) for pid, code in codes.items()]
    for order in itertools.permutations(processes):
        assert engines._end_of_a_process(order, tmp_path).startswith("square-3: its process was ended by signal 11")


def test_where_the_first_to_die_was_not_seen_the_others_are_not_blamed(tmp_path):
    """The pool has told the other to end while it started."""
    told_to_end = SimpleNamespace(pid=2, exitcode=-signal.SIGTERM)
    assert engines._end_of_a_process([told_to_end], tmp_path).startswith("All processes ended while they started.")


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.long)], ids=["torchrun", "accelerate"]
)
def test_ranks_of_a_launcher_take_turns_and_share_every_sentence(launcher, tmp_path):
    folder = tmp_path / "out"
    failure = "rank 0: number is 5, but must be another. (1 of 12 tasks failed, square-5 first.)"
    assert launch(folder, "error", *launcher) == {"said-0": failure, "said-1": failure}
    owners = {}
    for line in (folder / "log").read_text().splitlines():
        number, pid, _ = line.split(maxsplit=2)
        owners.setdefault(pid, set()).add(int(number))
    assert sorted(map(sorted, owners.values())) == [[0, 2, 4, 6, 8, 10], [1, 3, 7, 9, 11]]
    assert squares(folder) == {number: square for number, square in EXPECTED.items() if number != 5}


HOLDER = """
import sys, time
from pathlib import Path
from jcdp_diffusers.engines import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_lock_names_its_holder_and_is_free_when_the_holder_is_killed(tmp_path):
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"output_dir is .*host .*, pid {holder.pid}, command -c .*lock.*, since 2"):
        with engines.folder_lock(lock):
            pass
    assert json.loads(lock.read_text())["pid"] == holder.pid
    holder.kill()
    holder.wait()
    for _ in range(2):
        with engines.folder_lock(lock):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert lock.read_text() == ""


def test_a_forked_process_does_not_hold_the_lock_of_its_parent(tmp_path):
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings(), engines.folder_lock(tmp_path / "lock"):
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads here
        child = fork.Process(target=time.sleep, args=(100,), daemon=True)
        child.start()
    try:
        for _ in range(100):  # until it has closed its copy
            try:
                with engines.folder_lock(tmp_path / "lock"):
                    return
            except ValueError:
                time.sleep(0.05)
        pytest.fail("the child holds the lock")
    finally:
        child.kill()


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes of this machine, with one processor each; and the driver's own, without any."""
    from ray import cluster_utils  # takes seconds

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the workers, which import the tasks
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def test_ray_survives_a_lost_node_a_killed_worker_and_a_task_that_fails(cluster, tmp_path, capsys):
    """In the middle of 30 tasks one of two nodes goes; another one dies with its worker, and one fails."""
    other = cluster.add_node(num_cpus=1)
    ends = {5: "error", 8: "killed"}
    tasks = [Square(tmp_path, number, ends.get(number, ""), seconds=0.1) for number in range(30)]
    done = {}

    def on_done(task, result):
        done[task.number] = result
        if len(done) == 10:
            cluster.remove_node(other, allow_graceful=False)

    with pytest.raises(RuntimeError, match=r"^number is 5.*\(1 of 30 tasks failed, square-5 first"):
        engines.run(
            tasks,
            open_worker=partial(open_worker, tmp_path),
            engine="ray",
            address=cluster.address,
            on_done=on_done,
        )
    assert squares(tmp_path) == {number: number**2 for number in range(30) if number != 5}
    assert sorted(done) == [number for number in range(30) if number != 5]
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({pid for _, pid, *_ in log}) >= 2 and all(pid == words[-1] for _, pid, *words in log)
    assert (
        len((tmp_path / "opened").read_text().split()) <= 4
    )  # two, one in place of the killed, one asked for in vain
    assert "square-5 failed: number is 5, but must be another." in capsys.readouterr().err


@pytest.mark.long
def test_ray_workers_that_cannot_open_are_a_sentence(cluster, tmp_path):
    with pytest.raises(RuntimeError, match="^purifier is 'nowhere', but must be a folder.$"):
        engines.run(tasks_in(tmp_path), open_worker=cannot_open, engine="ray", address=cluster.address)


def test_ray_at_an_address_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="address is 'localhost:1'.*Ray"):
        engines.run(tasks_in(tmp_path), open_worker=cannot_open, engine="ray", address="localhost:1")


UNGUARDED = """
from functools import partial
from pathlib import Path
from engine_tasks import Square, open_worker
from jcdp_diffusers import engines
engines._visible_gpus = list  # which would load torch in each process
folder = Path({folder!r})
engines.run([Square(folder, n, "") for n in range(4)], open_worker=partial(open_worker, folder), processes=2)
"""


def test_a_script_without_a_guard_is_told_so_in_one_sentence(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED.format(folder=str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 1
    ways = ('below `if __name__ == "__main__":`', "was ended with exit code 1")  # whether their end could be seen
    # Not the last line: Python's resource tracker may write its own there, when a process was ended while it started.
    assert any(way in done.stderr for way in ways)
