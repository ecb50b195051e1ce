"""Daemon threads that run functions."""

import gc
import threading
import weakref
from concurrent.futures import wait

import pytest

from dpok_gym.utils.threads import DaemonExecutor


def test_results_and_errors_come_back() -> None:
    executor = DaemonExecutor(2, "test")
    assert executor.submit(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 1, 0).result()
    assert executor.submit(threading.current_thread).result().daemon
    executor.shutdown()
    with pytest.raises(RuntimeError, match="was shut down"):
        executor.submit(divmod, 7, 2)


def test_work_is_done_side_by_side() -> None:
    both = threading.Barrier(2, timeout=20)
    executor = DaemonExecutor(2, "test")
    for future in wait([executor.submit(both.wait) for _ in range(2)]).done:
        future.result()
    executor.shutdown()


def test_what_has_not_begun_is_called_off() -> None:
    busy, release, executor = threading.Event(), threading.Event(), DaemonExecutor(1, "test")
    begun = executor.submit(lambda: busy.set() or release.wait(20))
    assert busy.wait(20)
    later = executor.submit(release.wait, 20)
    executor.shutdown(wait=False, cancel_futures=True)
    release.set()
    assert begun.result()
    assert later.cancelled()


def test_threads_end_with_the_executor() -> None:
    executor = DaemonExecutor(1, "test")
    thread, reference = executor._threads[0], weakref.ref(executor)
    del executor
    gc.collect()
    assert reference() is None
    thread.join(20)
    assert not thread.is_alive()
