"""Threads that Python does not wait for when it ends."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

Work = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]  # None ends a thread


class DaemonExecutor(Executor):
    """Runs functions in daemon threads.

    ``concurrent.futures.ThreadPoolExecutor`` waits at Python's end for what still runs, even after
    ``shutdown(wait=False)``. A request that hangs would delay the end by its time-out. Here it is a second at most.

    Args:
        max_workers: number of threads, at least 1.
        name: their name, before a number.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._work: Work = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for number in range(max_workers):
            thread = threading.Thread(target=_run, args=[self._work], name=f"{name}-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        # The threads know the queue and not the executor, so they end with it.
        self._end = weakref.finalize(self, _end, self._work, max_workers)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Returns the result of ``function(*args, **kwargs)``, as ``ThreadPoolExecutor`` does."""
        if not self._end.alive:
            raise RuntimeError("the executor was shut down")
        future: Future[Any] = Future()
        self._work.put((future, partial(function, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads once they have done their work, as in ``ThreadPoolExecutor``."""
        if cancel_futures:
            try:
                while item := self._work.get_nowait():
                    item[0].cancel()
            except Empty:
                pass
        self._end()
        if wait:
            for thread in self._threads:
                thread.join()


_running: set[Future[Any]] = set()


def _run(work: Work) -> None:
    while item := work.get():
        future, call = item
        if future.set_running_or_notify_cancel():
            _running.add(future)
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            _running.discard(future)
        del item, future, call  # a thread that waits must not keep images in memory


def is_busy() -> bool:
    """Returns whether a thread of a :class:`DaemonExecutor` is at work."""
    return bool(_running)


@atexit.register
def _let_end() -> None:
    # Python stops daemon threads by force, and code in C++ that is stopped so may abort the process.
    wait(set(_running), timeout=1)


def _end(work: Work, n_threads: int) -> None:
    for _ in range(n_threads):
        work.put(None)
