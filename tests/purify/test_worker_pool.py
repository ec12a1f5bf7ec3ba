"""Work done ahead, in order, and never too far ahead."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jcdp_diffusers.purify.worker_pool import IN_FLIGHT, in_order, open_device_thread


@pytest.mark.parametrize("processes", [0, 3])
def test_results_come_in_order_and_a_bounded_number_ahead(processes):
    taken = []

    def items():
        for number in range(200):
            taken.append(number)
            yield f"label {number}", (number,)

    def square(number):
        time.sleep(0.001 * (number % 3))
        return number**2

    # Threads stand in for processes: the executor's interface is the same.
    pool = ThreadPoolExecutor(processes) if processes else None
    results = in_order(pool, square, items())
    for number in range(200):
        assert next(results) == (f"label {number}", number**2)
        assert len(taken) - number <= (IN_FLIGHT if processes else 1)
    assert next(results, None) is None


def test_an_error_reaches_whoever_asks_for_the_result():
    with ThreadPoolExecutor(2) as pool:
        results = in_order(pool, lambda number: 1 // number, ((number, (number,)) for number in (1, 0, 1)))
        assert next(results) == (1, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_an_accelerator_has_one_thread_and_a_cpu_none():
    with open_device_thread("cpu") as thread:
        assert thread is None
    with open_device_thread("cuda") as thread:
        names = {thread.submit(lambda: threading.current_thread().name).result() for _ in range(5)}
    assert len(names) == 1 and threading.current_thread().name not in names
