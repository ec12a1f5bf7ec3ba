"""Processes that decode and encode images, and a thread that feeds an accelerator, while others work."""

import contextlib
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..engines import live_as_long_as_parent


IN_FLIGHT = 32  # pieces of work at most, so that memory does not depend on the length of the source


def open_pool(processes: int) -> ProcessPoolExecutor:
    """Processes that decode and encode images."""
    # A fork of this process would copy the threads of torch in whatever state they are; this server has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jcdp_diffusers.purify.tiling"])
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_process)


def open_device_thread(device_type: str) -> contextlib.AbstractContextManager[ThreadPoolExecutor | None]:
    """
    A thread that keeps an accelerator busy while this one prepares and stores images; None on a CPU, which gains
    nothing by it, and where a thread of its own would have another number of threads to compute with.
    """
    return contextlib.nullcontext() if device_type == "cpu" else ThreadPoolExecutor(1)


def in_order(
    pool: Executor | None, function: Callable, items: Iterable[tuple[Any, tuple]], in_flight: int = IN_FLIGHT
) -> Iterator[tuple[Any, Any]]:
    """
    Apply a function to a few items ahead of whoever asks for the results.

    Args:
        pool (`Executor`, *optional*): None works at once, in this process.
        function (`Callable`): Of the second part of each item, as arguments.
        items (`Iterable[tuple]`): Pairs; the first part is handed through.
        in_flight (`int`): How many are worked on or wait at most.

    Yields:
        `tuple`: First part of an item, and the result, in the order of the items.
    """
    if pool is None:
        for label, arguments in items:
            yield label, function(*arguments)
        return
    items, flying = iter(items), deque()
    try:
        while True:
            for label, arguments in itertools.islice(items, in_flight - len(flying)):
                flying.append((label, pool.submit(function, *arguments)))
            if not flying:
                return
            label, future = flying.popleft()
            yield label, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "num_workers processes decode and encode images, and one of them was killed (is memory short?): give the "
            "same command again, with fewer of them."
        ) from error
    finally:
        for _, future in flying:
            future.cancel()


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    live_as_long_as_parent()
