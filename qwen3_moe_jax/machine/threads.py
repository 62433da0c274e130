"""Threads that share the work on a large matrix, and how many each product of NumPy starts itself.

NumPy computes without the interpreter's lock, so several products run side by side. OpenBLAS
starts a thread per core for every product, and they spin while they wait. Four products at a time
on four cores are sixteen threads that take turns: the reference's runs of a small model then cost
five times their arithmetic. So whoever runs products side by side keeps each on one thread.
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

VARIABLE = "QWEN3_MOE_CORES"
"""Cores that a process may keep busy: several of one server share a machine."""

T = TypeVar("T")
R = TypeVar("R")

MAX_WORKERS = 4
"""More would wait for the interpreter's lock: with 16 on 16 processors a check of a file took 33 s, not 4."""

SHORT_TURN = 5e-5
"""For so long a thread of Python code keeps the lock from one that feeds a device, while that matters."""

SWITCH_SECONDS = 0.0005
"""How long a thread of Python code may keep the lock from others while ``shares_the_lock`` is entered."""


def cores() -> int:
    """Cores that this process may keep busy: those of its affinity mask, one for each pair of hyper-threads,
    no more than its control group's share of processor time, and no more than ``QWEN3_MOE_CORES``."""
    allowed = _affinity()
    whole = {_siblings(cpu) for cpu in allowed}
    return max(1, math.ceil(min(len(whole), _cpu_quota(), _asked())))


def processors() -> int:
    """As :func:`cores`, with every hyper-thread: processes that wait for memory share a core well."""
    return max(1, math.ceil(min(len(_affinity()), _cpu_quota(), _asked())))


def _asked() -> float:
    """What ``QWEN3_MOE_CORES`` allows; infinity where it is no number above 0."""
    text = os.environ.get(VARIABLE, "").strip()
    return int(text) if text.isdecimal() and int(text) else math.inf


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The threads of this one's core as the kernel writes them, or its own number."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cpu_quota(root: Path = Path("/")) -> float:
    """Cores that the control groups of this process allow (cpu.max, cpu.cfs_quota_us); or infinity."""
    quota = math.inf
    for folder in _cgroup_folders(root):
        try:
            if (folder / "cpu.max").exists():
                limit, period = (folder / "cpu.max").read_text().split()
            else:
                limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if limit.strip() not in ("max", "-1"):
                quota = min(quota, int(limit) / int(period))
        except (OSError, ValueError):
            continue
    return quota


def _cgroup_folders(root: Path) -> list[Path]:
    """The control group of this process and those above it, of both versions; as a container sees them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inside = mount / path.lstrip("/")
        found += [inside, *(parent for parent in inside.parents if parent.is_relative_to(mount)), mount]
    return found


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
    def one_a_processor(cls, maximum: int = MAX_WORKERS) -> "Workers":
        """As many as this process may keep busy, up to ``maximum``."""
        return cls(min(maximum, processors()))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of ``items``; a call sees the context of who asks, as NumPy's ``errstate``."""
        if self._pool is None:
            return map(function, items)
        return self._pool.map(partial(_run_in, function), [(copy_context(), item) for item in items])

    def each(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """Calls a function that writes what it finds into arrays of ``empty``."""
        for _ in self.map(function, items):
            pass

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array that ``each`` fills."""
        return np.empty(shape, dtype)

    def parts(self, count: int) -> list[slice]:
        """Of so many rows those that one of them takes at a time, where a row's work is small."""
        return [slice(0, count)]

    def beside(self, count: int) -> "Workers":
        """Workers for so many calls that themselves ask for these."""
        return ALONE if self.count == 1 else Workers(count)

    def kept(self, array: np.ndarray) -> np.ndarray:
        """The array, or a copy where memory of ``empty`` is used again."""
        return array


def _run_in(function: Callable[[T], R], call: tuple[Context, T]) -> R:
    """Each call has a copy of the context: one cannot be entered twice at a time."""
    context, item = call
    return context.run(function, item)


ALONE = Workers(1)
"""The thread that asks."""


class _AtMost:
    """A number of the whole process that several threads lower at once: the smallest that is asked for holds.

    Each thread for itself would put back what it found, which another thread may have lowered: the number
    would stay low for ever, or rise while somebody needs it low.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._asked: list[float] = []
        self._before = 0.0

    @contextmanager
    def __call__(
        self, number: float, read: Callable[[], float], write: Callable[[float], object]
    ) -> Generator[None]:
        """Meanwhile it is at most ``number``; after the last one it is what it was before the first."""
        with self._lock:
            if not self._asked:
                self._before = read()
            self._asked.append(number)
            write(min(self._before, *self._asked))
        try:
            yield
        finally:
            with self._lock:
                self._asked.remove(number)
                write(min([self._before, *self._asked]))


_at_most_seconds, _at_most_threads = _AtMost(), _AtMost()


@contextmanager
def shares_the_lock(seconds: float = SWITCH_SECONDS) -> Generator[None, None, None]:
    """Threads of short NumPy calls get on beside one that is pure Python, as the tracing of a program is.

    By default such a thread gives the interpreter's lock away after 5 ms, and each call of the others
    waits as long.

    Args:
      seconds: for so long it may keep the lock, or for less where that was so before.
    """
    with _at_most_seconds(seconds, sys.getswitchinterval, sys.setswitchinterval):
        yield


_SETTER, _GETTER = "scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"
"""OpenBLAS's functions under the names that NumPy's own builds give them."""


@contextmanager
def one_thread_per_product() -> Generator[None, None, None]:
    """NumPy's products stay on the thread that asks; nothing changes where NumPy has another BLAS."""
    library = _openblas()
    if library is None:
        yield
        return
    setter = getattr(library, _SETTER)
    with _at_most_threads(1, getattr(library, _GETTER), lambda count: setter(int(count))):
        yield


def threads_per_product() -> int | None:
    """Threads of one product, or None where NumPy has another BLAS."""
    library = _openblas()
    return None if library is None else int(getattr(library, _GETTER)())


def _openblas() -> ctypes.CDLL | None:
    """The OpenBLAS that NumPy's wheel brought and has loaded."""
    home = Path(np.__file__).parent
    for folder in (home.with_name("numpy.libs"), home / ".dylibs"):
        for path in folder.glob("*openblas*"):
            library = ctypes.CDLL(str(path))
            if hasattr(library, _SETTER) and hasattr(library, _GETTER):
                return library
    return None
