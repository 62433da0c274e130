"""Runs that threads make before a clause asks for them: most of a run's time is compilation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any


class Ahead:
    """Calls functions in threads. One that fails fails again, and is reported, where a clause asks for it."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        self._calls: list[Future] = []

    @classmethod
    @contextmanager
    def open(cls, threads: int) -> Iterator["Ahead"]:
        """Threads that end with the block; what has not begun then is left out."""
        ahead = cls(threads)
        try:
            yield ahead
        finally:
            ahead._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, functions: Iterable[Callable[[], Any]]) -> None:
        """Calls each, in this order as threads become free."""
        self._calls += [self._pool.submit(function) for function in functions]

    def start_after(self, first: Callable[[], Any], functions: Iterable[Callable[[], Any]]) -> None:
        """Calls ``first`` while nothing else runs that is asked for here, then each."""

        def begin() -> None:
            try:
                first()
            finally:
                self.start(functions)

        self._calls.append(self._pool.submit(begin))

    def wait(self) -> None:
        """Returns when nothing runs: for what is going to be timed."""
        while pending := [call for call in self._calls if not call.done()]:
            wait(pending)
