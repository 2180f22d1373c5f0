"""Workers: threads that share a list of jobs and give what comes of it in the list's own order."""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREAD_BYTES = 144 << 20  # of address space: a stack, and what the C library sets aside for a thread


def in_order(
    job: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: Event | None = None
) -> Iterator[Result]:
    """`job` of each item, in the order of the items, on up to `workers` threads with one thread of torch each.

    A few items are taken ahead of the one that is waited for, so memory does not grow with their number. The
    first failure in that order is raised, the same for any number of workers; no item is begun after that, and
    `stop` is set, which jobs that take long should look at.
    """
    workers = startable(workers)
    with single_threads():
        yield from map(job, items) if workers < 2 else _ahead(job, items, workers, stop or Event())


class Backlog:
    """Calls that a thread of its own makes one after another, up to `ahead` of them behind its callers.

    What a call raises is raised by the later ones, which are not made. With `ahead` 0, or where a limit leaves no
    room for a thread, each is made at once. The thread ends when all calls are made.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._ahead = ahead if ahead and startable(2) > 1 else 0
        self._lock = Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._failure: BaseException | None = None

    def __call__(self, job: Callable[..., None], *args: object) -> None:
        if not self._ahead:
            self._make(job, *args)
            return
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(1)
            self._waiting.append(self._pool.submit(self._make, job, *args))
            while len(self._waiting) > self._ahead:
                self._waiting.popleft().result()

    def catch_up(self) -> None:
        """Wait until all calls are made."""
        with self._lock:
            self._end(cancel=False)
            self._waiting.clear()
            if self._failure is not None:
                raise self._failure

    def drop(self) -> None:
        """Make no more of them, and wait for the one that is being made."""
        with self._lock:
            self._end(cancel=True)
            self._waiting.clear()

    def _make(self, job: Callable[..., None], *args: object) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            job(*args)
        except BaseException as error:
            self._failure = error
            raise

    def _end(self, cancel: bool) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=cancel)
            self._pool = None


def default_workers() -> int:
    """One more than the processors of this process, so that none idles; nine at most, for each takes memory."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 + min(8, here)


def startable(workers: int) -> int:
    """As many, or 1 where a limit leaves no address space for so many threads.

    A thread that begins without memory dies unheard, and Python waits for ever for it to have begun.
    """
    if workers > 1 and hasattr(mmap, "MAP_PRIVATE"):
        try:  # taken and given back, never touched
            mmap.mmap(-1, workers * _THREAD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
        except OSError:
            return 1
    return workers


@contextmanager
def single_threads() -> Iterator[None]:
    """One thread of torch in each thread: more would wait for one another, and each result is the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ahead(job: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: Event) -> Iterator[Result]:
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                running.append(pool.submit(job, item))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            stop.set()
            for one in running:
                one.cancel()
