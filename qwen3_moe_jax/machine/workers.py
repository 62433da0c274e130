"""Threads that share the work on a large matrix: NumPy computes without the interpreter's lock."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")

MOST_WORKERS = 4
"""More would only wait for the interpreter's lock: four dequantize 1.7 times as fast as one."""

SWITCH_SECONDS = 0.0005
"""How long a thread of Python code may keep the lock from others while ``shares_the_lock`` is entered."""


class Workers:
    """Calls a function for several items, on some threads; with one, in the thread that asks.

    A function that runs here must not ask for workers itself: all of them may be waiting then.

    Attributes:
      count: how many threads.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="worker") if count > 1 else None

    @classmethod
    def one_a_core(cls) -> "Workers":
        """As many as the machine has cores, up to MOST_WORKERS."""
        return cls(min(MOST_WORKERS, os.cpu_count() or 1))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of ``items``."""
        return map(function, items) if self._pool is None else self._pool.map(function, items)


ALONE = Workers(1)
"""The thread that asks."""


@contextmanager
def shares_the_lock() -> Iterator[None]:
    """Threads of short NumPy calls get on beside one that is pure Python, as the tracing of a program is.

    By default such a thread gives the interpreter's lock away after 5 ms, and each call of the others
    waits as long.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
