"""How long this process has waited for programs, and which one it waits for now.

A program is traced, lowered and compiled, or read from disk. ``programs.Program`` tells of its own; of
other jitted functions JAX reports the beginning and the span of each step. The spans of an inner
function lie within its caller's, so the time is that of their union. What is made in the background
(:func:`in_background`) nobody waits for: it does not count. Several threads may compile at once: each
counts its own open steps, and the spans have a lock.
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

from jax import monitoring

from qwen3_moe_jax.core import interrupts

_EVENTS = "/jax/core/compile/"

_thread = threading.local()


@contextmanager
def in_background() -> Generator[None]:
    """What this thread compiles meanwhile is not waited for."""
    before = _is_background()
    _thread.is_background = True
    try:
        yield
    finally:
        _thread.is_background = before


def _is_background() -> bool:
    return getattr(_thread, "is_background", False)


class CompileClock:
    """The sum of the time spent on compilation; ``compile_clock`` gives the process's own."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # by thread; only the thread itself changes its entry
        self._names: list[str] = []

    def seconds(self) -> float:
        """Seconds of compilation since the clock was made."""
        with self._lock:
            return sum(end - start for start, end in self._spans)

    def wait(self) -> str | None:
        """What an interrupted person waits for; without the lock, as a signal handler asks."""
        return "a program is being compiled" if self._names or any(self._open.copy().values()) else None

    def program(self) -> str | None:
        """The name of the program that is waited for."""
        return self._names[-1] if self._names else None

    @contextmanager
    def waiting(self, name: str) -> Generator[None]:
        """Meanwhile this thread waits for a program, which it makes itself or another thread does."""
        if _is_background():
            yield
            return
        start, own = time.time(), threading.get_ident()
        steps = self._open.get(own, 0)
        self._names.append(name)
        try:
            yield
        finally:
            self._names.remove(name)
            if steps:  # an interrupt between a step's beginning and its body leaves it open
                self._open[own] = steps
            else:
                self._open.pop(own, None)
            self._add(start, time.time())

    def began(self, event: str, value: float = 0.0, **_facts: object) -> None:
        """A step of a compilation has begun."""
        if event.startswith(_EVENTS) and not _is_background():
            own = threading.get_ident()
            self._open[own] = self._open.get(own, 0) + 1

    def ended(self, event: str, start_time: float, end_time: float, **_facts: object) -> None:
        """A step has ended; an inner one is told before the one that it is part of."""
        if not event.startswith(_EVENTS) or _is_background():
            return
        own = threading.get_ident()
        left = self._open.pop(own, 0) - 1
        if left > 0:
            self._open[own] = left
        self._add(start_time, end_time)

    def _add(self, start: float, end: float) -> None:
        with self._lock:
            while self._spans and self._spans[-1][0] >= start:
                self._spans.pop()
            if self._spans:
                start = max(start, self._spans[-1][1])
            if end > start:
                self._spans.append((start, end))


@cache
def compile_clock() -> CompileClock:
    """The process's clock, which runs from the first call on."""
    clock = CompileClock()
    monitoring.register_scalar_listener(clock.began)
    monitoring.register_event_time_span_listener(clock.ended)
    interrupts.WAITS.append(clock.wait)
    return clock
