"""
Named tasks, run until all are done: in this process, in several, on the ranks of a launcher, or on a Ray cluster.

A task is idempotent and atomic: its file or record is there, whole, or it is not. So whatever dies in the middle, the
same command goes on with the tasks that are missing, and no engine needs to remember anything.

    engines.run(tasks, open_worker=open_worker)                                          # here, one after another
    engines.run(tasks, open_worker=open_worker, processes=8)                             # here, in eight processes
    torchrun --nproc_per_node 8 command                                                  # on eight ranks, in turn
    engines.run(tasks, open_worker=open_worker, engine="ray", address="auto")            # on a running Ray cluster
"""

import contextlib
import datetime
import fcntl
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .acceleration.allocation import keep_freed_memory


ENGINES = ("local", "ray")
# What a user, a file or a machine can cause; anything else is a defect of ours and keeps its traceback.
FAILURES = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)
GIVE_UP_AFTER = 8  # tasks that fail one after another: a full disk fails them all
_WAIT_FOR_OTHERS = datetime.timedelta(days=60)  # a rank may wait for the longest task of another one

_inside_task = False


class Task(Protocol):
    """What an engine runs."""

    name: str

    def is_done(self) -> bool:
        """Whether the task's file or record is there."""

    def run(self, worker: Any) -> Any:
        """Do the task with what `open_worker` returned, and leave its file or record, whole or not at all."""


def run(
    tasks: Sequence[Task],
    *,
    open_worker: Callable[[], Any],
    engine: str = "local",
    processes: int | None = None,
    address: str | None = None,
    on_done: Callable[[Task, Any], None] | None = None,
    threads: int = 1,
    gpus: float = 0,
) -> None:
    """
    Run the tasks that are not done, and return when all are.

    One process stops at the first task that fails. Several go on with the other tasks and report the failures at the
    end, unless `GIVE_UP_AFTER` tasks fail one after another.

    Args:
        tasks (`Sequence[Task]`): In the order in which they are begun. Other processes get copies (by pickle).
        open_worker (`Callable`): Without arguments; called once in each process or actor that runs tasks. What it
            returns is handed to each of that process's tasks. Other processes get it by pickle.
        engine (`str`): `"local"`: this process, or several of this machine; under `torchrun` or `accelerate launch`,
            rank r runs every world-th missing task. `"ray"`: one actor per device of a Ray cluster; nodes may come
            and go.
        processes (`int`, *optional*): Local: how many processes, 1 by default. Ray: how many actors to ask for; by
            default as many as the cluster has room for at any time.
        address (`str`, *optional*): Of a running Ray cluster, `"auto"` for this machine's. By default a cluster on
            this machine is started for the call.
        on_done (`Callable`, *optional*): Called with a task and what its `run` returned, here, as soon as it is done.
            A rank calls it for its own tasks.
        threads (`int`): Processors of an actor on Ray, which is what a worker computes with.
        gpus (`float`): Of an actor on Ray, 0 or 1; a fraction shares a GPU.

    Raises:
        ValueError: For arguments that cannot be used.
        RuntimeError: If tasks fail or a worker process dies, with the first failure in one sentence.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, but must be one of {ENGINES}.")
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}, but must be at least 1.")
    if address is not None and engine != "ray":
        raise ValueError(f"address is {address!r}, but must be None where engine is {engine!r}.")
    rank, world = ranks()
    if world > 1 and (engine != "local" or processes not in (None, 1)):
        raise ValueError(
            f"engine is {engine!r} and processes {processes}, but must be 'local' and 1 under a launcher that has "
            f"started {world} ranks."
        )
    missing = first_rank_decides(lambda: [index for index, task in enumerate(tasks) if not task.is_done()])
    own = [tasks[index] for index in missing[rank::world]]
    tally = _Tally(len(missing), on_done)
    if engine == "ray":
        raise NotImplementedError
    elif world > 1:
        _run_on_ranks(own, open_worker, tally)
    elif (processes or 1) > 1:
        _run_in_processes(own, open_worker, processes, tally)
    elif own:
        worker = open_worker()
        for task in own:
            tally.done(task, _run_task(task, worker))
    tally.finish()


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks that a launcher has started; (0, 1) without one or in a task."""
    if _inside_task or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    state = _rank_state()
    return state.process_index, state.num_processes


def first_rank_decides(function: Callable[[], Any]) -> Any:
    """
    Call a function on rank 0 and return its result on all ranks, which wait for it.

    Args:
        function (`Callable`): Without arguments; its result is pickled. Where it raises one of `FAILURES`, the other
            ranks raise it, too.
    """
    rank, world = ranks()
    if world == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    outcome = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except FAILURES as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """
    Keep other commands from a folder for as long as the block runs; the kernel frees the lock when this process dies.

    Inside an engine's task the lock is waited for, because tasks of one command may share a folder. The other ranks
    of a launcher do not take it: rank 0 does, for all of them.

    Args:
        path (`Path`): Of the lock's file, in an existing folder. It stays, and names whoever holds the lock.

    Raises:
        ValueError: Another command holds the lock; the sentence names its host, pid, command and start.
    """
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if _inside_task else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = json.loads(file.read() or "{}")
            known = "".join(f", {name} {value}" for name, value in holder.items())
            raise ValueError(
                f"output_dir is {os.fspath(path.parent)!r}, but another command is at work there{known}: wait for its "
                "end, or stop it."
            ) from None
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "command": shlex.join(sys.argv),
            "since": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def say(text: str) -> None:
    """A line on stderr, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)


class _Tally:
    """What has become of the tasks."""

    def __init__(self, total: int, on_done: Callable[[Task, Any], None] | None):
        self.total, self.on_done = total, on_done
        self.failures: list[tuple[str, Exception]] = []
        self.in_a_row = 0

    def done(self, task: Task, result: Any) -> None:
        self.in_a_row = 0
        if self.on_done is not None:
            self.on_done(task, result)

    def failed(self, task: Task, error: Exception) -> None:
        self.failures.append((task.name, error))
        self.in_a_row += 1
        if self.in_a_row >= GIVE_UP_AFTER:
            self.finish()
        say(f"{task.name} failed: {_sentence(error)}")

    def finish(self) -> None:
        if not self.failures:
            return
        name, error = self.failures[0]
        raise RuntimeError(
            f"{_sentence(error)} ({len(self.failures)} of {self.total} tasks failed, {name} first.)"
        ) from error


def _run_task(task: Task, worker: Any) -> Any:
    global _inside_task
    _inside_task = True
    try:
        return task.run(worker)
    finally:
        _inside_task = False


def _run_on_ranks(own: list[Task], open_worker: Callable[[], Any], tally: _Tally) -> None:
    """This rank's tasks; then every rank knows the failures of all."""
    from accelerate.utils import gather_object

    try:
        if own:
            worker = open_worker()
        for task in own:
            try:
                result = _run_task(task, worker)
            except FAILURES as error:
                tally.failed(task, error)
            else:
                tally.done(task, result)
    except FAILURES as error:  # the worker could not be opened, or too many tasks failed
        tally.failures = tally.failures or [(f"rank {ranks()[0]}", error)]
    tally.failures = gather_object(tally.failures)


def _run_in_processes(tasks: list[Task], open_worker: Callable[[], Any], processes: int, tally: _Tally) -> None:
    """Several processes of this machine, each with a GPU of its own where there are any."""
    if not tasks:
        return
    spawn = multiprocessing.get_context("spawn")  # a forked copy of torch's thread pools may hang
    numbers = spawn.SimpleQueue()
    for number in range(processes):
        numbers.put(number)
    # A process that dies of a signal can say nothing: it has left the name of its task here.
    at_work = tempfile.mkdtemp()
    pool = ProcessPoolExecutor(min(processes, len(tasks)), spawn, _begin_process, (open_worker, numbers, at_work))
    others = set(multiprocessing.active_children())
    try:
        futures = {pool.submit(_run_in_process, task): task for task in tasks}
        workers = set(multiprocessing.active_children()) - others
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool as error:
                pool.shutdown()  # until then the processes that end with the one that died may lack an exit code
                raise RuntimeError(_end_of_a_process(workers, Path(at_work))) from error
            except _NotOpened as error:
                raise RuntimeError(str(error)) from error
            except FAILURES as error:
                tally.failed(futures[future], error)
            else:
                tally.done(futures[future], result)
    except BaseException:
        # A task may take long, and leaves nothing half done.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(at_work)


def _end_of_a_process(workers: Iterable[BaseProcess], at_work: Path) -> str:
    """Which task a process died at, and how; the pool has ended the other processes by SIGTERM since."""
    ended = [process for process in workers if process.exitcode]
    ended.sort(key=lambda process: process.exitcode == -signal.SIGTERM)
    code, task = ended[0].exitcode, at_work / str(ended[0].pid)
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
    at = f"{task.read_text()}: its process" if task.exists() else "A process, before its first task,"
    return f"{at} was ended {how}: give the same command again, with fewer processes if memory is short."


class _NotOpened(Exception):
    """A worker could not be opened."""


_open_worker: Callable[[], Any]
_workers: list = []
_at_work: Path


def _begin_process(open_worker: Callable[[], Any], numbers, at_work: str) -> None:
    global _open_worker, _at_work
    live_as_long_as_parent()
    keep_freed_memory()
    _open_worker, _at_work = open_worker, Path(at_work) / str(os.getpid())
    _take_gpu(numbers.get())


def _run_in_process(task: Task) -> Any:
    if not _workers:
        try:
            _workers.append(_open_worker())
        except FAILURES as error:
            raise _NotOpened(_sentence(error)) from error
    _at_work.write_text(task.name)
    return _run_task(task, _workers[0])


def _take_gpu(number: int) -> None:
    """Show this process one of the GPUs only; it must not have used any yet."""
    import torch

    if (count := torch.cuda.device_count()) > 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % count]


def live_as_long_as_parent() -> None:
    """End this process when the one that started it ends, in whatever way."""
    parent = multiprocessing.parent_process().sentinel

    def watch():
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rank_state():
    """
    Accelerate's state of this process. It talks over gloo whatever the device is: ranks exchange a few sentences and
    may wait for each other for hours, which NCCL is not made for.
    """
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=_WAIT_FOR_OTHERS)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())
