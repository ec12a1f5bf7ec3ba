"""
Named tasks, run until all are done: in this process, in several, on the ranks of a launcher, or on a Ray cluster.

A task is idempotent and atomic: its file or record is there, whole, or it is not. So whatever dies in the middle, the
same command goes on with the tasks that are missing, and no engine needs to remember anything.

    engines.run(tasks, open_worker=open_worker)                                          # here, one after another
    engines.run(tasks, open_worker=open_worker, processes=8)                             # here, in eight processes
    torchrun --nproc_per_node 8 command                                                  # on eight ranks, in turn
    engines.run(tasks, open_worker=open_worker, engine="ray", address="auto")            # on a running Ray cluster
"""

import atexit
import contextlib
import datetime
import fcntl
import functools
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from .acceleration.allocation import keep_freed_memory
from .outputs import printable


ENGINES = ("local", "ray")
# What a user, a file or a machine can cause; anything else is a defect of ours and keeps its traceback.
FAILURES = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)
GIVE_UP_AFTER = 8  # tasks that fail one after another: a full disk fails them all
_LOSSES_OF_A_TASK = 10  # workers that may die at one task on Ray, before it is the task that is to blame
_SECONDS_BETWEEN_LOOKS = 1.0  # at the nodes of a Ray cluster
_WAIT_FOR_OTHERS = datetime.timedelta(days=60)  # a rank may wait for the longest task of another one

_inside_task = False
_locked: set[TextIO] = set()  # files of the locks that this process holds


class Task(Protocol):
    """What an engine runs."""

    name: str

    def is_done(self) -> bool:
        """Whether the task's file or record is there."""

    def run(self, worker: Any) -> Any:
        """Do the task with what `open_worker` returned, and leave its file or record, whole or not at all."""


def run(
    tasks: Iterable[Task],
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
        tasks (`Iterable[Task]`): In the order in which they are begun. Other processes get copies (by pickle). One
            process takes each task when the one before it is done.
        open_worker (`Callable`): Without arguments; called once in each process or actor that runs tasks. What it
            returns is handed to each of that process's tasks. Other processes get it by pickle.
        engine (`str`): `"local"`: this process, or several of this machine; under `torchrun` or `accelerate launch`,
            rank r runs every world-th missing task. `"ray"`: one actor per device of a Ray cluster; nodes may come
            and go.
        processes (`int`, *optional*): Local: how many processes, 1 by default. Ray: how many actors to ask for; by
            default as many as fit on the cluster at any time.
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
    check(engine, processes, address)
    rank, world = ranks()
    on_done = on_done or (lambda task, result: None)
    if engine == "local" and world == 1 and processes in (None, 1):
        worker = functools.cache(open_worker)
        for task in tasks:
            if not task.is_done():
                on_done(task, _run_task(task, worker()))
        return
    tasks = list(tasks)
    missing = first_rank_decides(lambda: [index for index, task in enumerate(tasks) if not task.is_done()])
    own = [tasks[index] for index in missing[rank::world]]
    tally = _Tally(len(missing), on_done)
    if engine == "ray":
        _run_on_ray(own, open_worker, address, processes, {"num_cpus": threads, "num_gpus": gpus}, tally)
    elif world > 1:
        _run_on_ranks(own, open_worker, tally)
    else:
        _run_in_processes(own, open_worker, processes, tally)
    tally.finish()


def check(engine: str, processes: int | None = None, address: str | None = None, device: Any = None) -> None:
    """
    ValueError for arguments that `run` cannot use, before anything else is done for them.

    Args:
        engine, processes, address: As for `run`.
        device (`torch.device` or `str`, *optional*): Of the workers, each of which sees a GPU of its own only.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, but must be one of {ENGINES}.")
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}, but must be at least 1.")
    if address is not None and engine != "ray":
        raise ValueError(f"address is {address!r}, but must be None where engine is {engine!r}.")
    kind, numbered, _ = str(device).partition(":")
    if numbered and (engine == "ray" or (processes or 1) > 1):
        raise ValueError(
            f"device is {str(device)!r}, but must be {kind!r} where engine is {engine!r} and processes {processes}: "
            "each worker has a device of its own."
        )
    _, world = ranks()
    if world > 1 and (engine != "local" or processes not in (None, 1)):
        raise ValueError(
            f"engine is {engine!r} and processes {processes}, but must be 'local' and 1 under a launcher that has "
            f"started {world} ranks."
        )


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
def folder_lock(path: Path, argument: str = "output_dir") -> Iterator[None]:
    """
    Keep other commands from a folder for as long as the block runs; the kernel frees the lock when this process dies.

    Inside an engine's task the lock is waited for, because tasks of one command may share a folder. The other ranks
    of a launcher do not take it: rank 0 does, for all of them.

    Args:
        path (`Path`): Of the lock's file, in an existing folder. It stays, and names whoever holds the lock.
        argument (`str`): What the folder is called where it is given.

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
                f"{argument} is {os.fspath(path.parent)!r}, but another command is at work there{known}: wait for its "
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
        _locked.add(file)
        try:
            yield
        finally:
            _locked.discard(file)
            file.truncate(0)


def _let_go() -> None:
    """In a forked process, such as one that loads data: its copies would hold the locks beyond its parent's death."""
    while _locked:
        _locked.pop().close()


os.register_at_fork(after_in_child=_let_go)


def say(text: str) -> None:
    """A line on stderr, above a progress bar where there is one; no terminal obeys what it holds."""
    tqdm.write(printable(text), file=sys.stderr)


class _Tally:
    """What has become of the tasks."""

    def __init__(self, total: int, on_done: Callable[[Task, Any], None]):
        self.total, self.on_done = total, on_done
        self.failures: list[tuple[str, Exception]] = []
        self.in_a_row = 0

    def done(self, task: Task, result: Any) -> None:
        self.in_a_row = 0
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
    before, _inside_task = _inside_task, True
    try:
        return task.run(worker)
    finally:
        _inside_task = before


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
    gpus, shown = _visible_gpus(), spawn.SimpleQueue()
    for number in range(processes):
        shown.put(gpus[number % len(gpus)] if gpus else None)
    # A process that dies of a signal can say nothing: it has left the name of its task here.
    at_work = tempfile.mkdtemp()
    pool = ProcessPoolExecutor(min(processes, len(tasks)), spawn, _begin_process, (open_worker, shown, at_work))
    others = set(multiprocessing.active_children())
    workers: set[BaseProcess] = set()
    try:
        futures = {}
        for task in tasks:
            futures[pool.submit(_run_in_process, task)] = task
            workers |= set(multiprocessing.active_children()) - others  # processes start as tasks are handed over
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                raise
            except _NotOpened as error:
                raise RuntimeError(str(error)) from error
            except FAILURES as error:
                tally.failed(futures[future], error)
            else:
                tally.done(futures[future], result)
    except BrokenProcessPool as error:  # a process may end while tasks are still handed over
        pool.shutdown()  # until then the processes that end with the one that died may lack an exit code
        raise RuntimeError(_end_of_a_process(workers, Path(at_work))) from error
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
    task_of = {process.pid: at_work / str(process.pid) for process in workers}
    # A process that was still starting when another died is ended with it, and had no task yet.
    ended = [
        process
        for process in workers
        if process.exitcode and (process.exitcode != -signal.SIGTERM or task_of[process.pid].exists())
    ]
    if not ended:  # whichever died first was gone before anyone could look
        return (
            "All processes ended while they started. Each begins by importing the script that was called, so a script "
            'must make this call below `if __name__ == "__main__":`.'
        )
    ended.sort(key=lambda process: (process.exitcode == -signal.SIGTERM, not task_of[process.pid].exists()))
    code, task = ended[0].exitcode, task_of[ended[0].pid]
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
    at = f"{task.read_text()}: its process" if task.exists() else "A process, before its first task,"
    return f"{at} was ended {how}: give the same command again, with fewer processes if memory is short."


class _NotOpened(Exception):
    """A worker could not be opened."""


_open_worker: Callable[[], Any]
_workers: list = []
_at_work: Path


def _begin_process(open_worker: Callable[[], Any], shown, at_work: str) -> None:
    global _open_worker, _at_work
    live_as_long_as_parent()
    keep_freed_memory()
    _open_worker, _at_work = open_worker, Path(at_work) / str(os.getpid())
    if (gpu := shown.get()) is not None:  # none has been used here yet
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _run_in_process(task: Task) -> Any:
    if not _workers:
        try:
            _workers.append(_open_worker())
        except FAILURES as error:
            raise _NotOpened(_sentence(error)) from error
    _at_work.write_text(task.name)
    return _run_task(task, _workers[0])


def _visible_gpus() -> list[str]:
    """The GPUs that this process sees. It counts them, so that a process need not load torch before its first task."""
    import torch

    if not (count := torch.cuda.device_count()):
        return []
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


class _RayWorker:
    """The actor: a worker that is opened once and kept. Ray shows it the GPUs that it has been given."""

    def open(self, open_worker: Callable[[], Any]) -> int:
        keep_freed_memory()
        self.worker = open_worker()
        return os.getpid()

    def run(self, task: Task, again: bool) -> Any:
        # Whoever had it before may have died between the end of the task and the answer.
        return None if again and task.is_done() else _run_task(task, self.worker)


def _run_on_ray(
    tasks: list[Task],
    open_worker: Callable[[], Any],
    address: str | None,
    actors: int | None,
    room: dict[str, float],
    tally: _Tally,
) -> None:
    """Run tasks on a cluster that is running already, or on one that is started here and ends with the tasks."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "engine is 'ray', but must be 'local' without Ray: pip install 'jcdp-diffusers[ray]'."
        ) from error
    from .devices import available_cores

    if not tasks:
        return
    joined = ray.is_initialized()
    if not joined:
        options = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is None and "RAY_ADDRESS" not in os.environ:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options |= {"address": "local", "num_cpus": max(available_cores(), math.ceil(room["num_cpus"]))}
            options |= {"include_dashboard": False}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if place := re.fullmatch(r"(.+):(\d+)", options["address"] or ""):  # Ray itself would try for minutes
                socket.create_connection((place[1], int(place[2])), timeout=10).close()
            ray.init(**options)
        except OSError as error:
            raise ValueError(f"address is {address!r}, but must be that of a running Ray cluster.") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set one of its own
    crew = _RayCrew(ray, open_worker, actors, room, tally)
    try:
        crew.run(tasks)
    finally:
        crew.end()
        if not joined:
            ray.shutdown()


class _RayCrew:
    """
    The actors of one call, and what each of them is at. An actor has one task at a time; when it dies, the task goes
    to the next one that is free, and a new actor is asked for, which starts on any node where it fits.
    """

    def __init__(self, ray, open_worker: Callable[[], Any], actors: int | None, room: dict[str, float], tally: _Tally):
        self.ray, self.actors, self.room, self.tally = ray, actors, room, tally
        self.open_worker = ray.put(open_worker)
        self.kind = ray.remote(_RayWorker).options(max_restarts=0, **room)
        self.at: dict = {}  # of each answer that is awaited: the actor, and its task or None while it opens
        self.idle: list = []
        self.said_no_room = False
        self.not_opened = 0  # actors that could not open the worker, and are not replaced
        self.losses: Counter = Counter()  # actors that died, by the name of their task; "" while they opened

    def run(self, tasks: list[Task]) -> None:
        waiting, looked = deque(tasks), -math.inf
        while left := len(waiting) + sum(task is not None for _, task in self.at.values()):
            if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                looked, wanted = time.monotonic(), max(1, (self.actors or self.places()) - self.not_opened)
            while len(self.at) + len(self.idle) < min(wanted, left):
                actor = self.kind.remote()
                self.at[actor.open.remote(self.open_worker)] = (actor, None)
            while waiting and self.idle:
                actor, task = self.idle.pop(), waiting.popleft()
                self.at[actor.run.remote(task, self.losses[task.name] > 0)] = (actor, task)
            answers, _ = self.ray.wait(list(self.at), timeout=_SECONDS_BETWEEN_LOOKS)
            for answer in answers:
                actor, task = self.at.pop(answer)
                if (again := self.hear(answer, actor, task)) is not None:
                    waiting.appendleft(again)

    def hear(self, answer, actor, task: Task | None) -> Task | None:
        """Take an actor's answer; the task, if it has to be done by another one."""
        try:
            result = self.ray.get(answer)
        except self.ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, (*FAILURES, ImportError)):
                raise
            if task is None:
                self.ray.kill(actor)  # its place is free for another
                self.cannot_open(error.cause)
                return None
            self.tally.failed(task, error.cause)
        except self.ray.exceptions.RayError as error:  # the actor has died, or its node
            name = "" if task is None else task.name
            self.losses[name] += 1
            if self.losses[name] < _LOSSES_OF_A_TASK:
                return task
            died = RuntimeError(
                f"{_LOSSES_OF_A_TASK} workers died at {name or 'opening'} (is memory short?), the last with: "
                f"{_sentence(error)[:300]}"
            )
            if task is None:
                raise died from error
            self.tally.failed(task, died)
            return None
        else:
            if task is not None:
                self.tally.done(task, result)
        self.losses[""] = 0
        self.idle.append(actor)
        return None

    def cannot_open(self, error: Exception) -> None:
        self.not_opened += 1
        if not self.at and not self.idle:
            raise RuntimeError(_sentence(error)) from error
        say(f"a worker could not be opened: {_sentence(error)}")

    def places(self) -> int:
        """How many actors fit on the nodes that are there."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        wanted = {"CPU": self.room["num_cpus"], "GPU": self.room["num_gpus"]}
        places = sum(
            min(int(node.get(kind, 0) / amount) for kind, amount in wanted.items() if amount > 0) for node in nodes
        )
        if places == 0 and not self.said_no_room:
            self.said_no_room = True
            say(f"no node of the Ray cluster has {wanted['CPU']} CPUs and {wanted['GPU']} GPUs: waiting for one")
        return places

    def end(self) -> None:
        """Free the places that the actors have; they are not asked, because a task leaves nothing half done."""
        for actor in [actor for actor, _ in self.at.values()] + self.idle:
            self.ray.kill(actor)


def live_as_long_as_parent() -> None:
    """End this process when the one that started it ends, in whatever way."""
    parent = multiprocessing.parent_process().sentinel

    def watch():
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def _rank_state():
    """
    Accelerate's state of this process. It talks over gloo whatever the device is: ranks exchange a few sentences and
    may wait for each other for hours, which NCCL is not made for.
    """
    from accelerate import PartialState

    state = PartialState(cpu=True, timeout=_WAIT_FOR_OTHERS)
    atexit.register(state.destroy_process_group)  # else its threads end the process with SIGABRT now and then
    return state


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())
