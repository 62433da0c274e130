"""How long this process has compiled programs, and whether it does so now, as JAX's own events tell it.

A program is traced, lowered and compiled (or read from the cache on disk); JAX reports the
beginning and the span of each step. The spans of an inner function lie within its caller's, so
the time is that of their union.
"""

from functools import cache

from jax import monitoring

from qwen3_moe_jax.core import interrupts

_EVENTS = "/jax/core/compile/"


class CompileClock:
    """The sum of the time spent on compilation; ``compile_clock`` gives the process's own."""

    def __init__(self):
        self._spans: list[tuple[float, float]] = []
        self._open = 0

    def seconds(self) -> float:
        """Seconds of compilation since the clock was made."""
        return sum(end - start for start, end in self._spans)

    def wait(self) -> str | None:
        """What an interrupted person waits for."""
        return "a program is being compiled" if self._open else None

    def began(self, event: str, value: float = 0.0, **_facts: object) -> None:
        """A step of a compilation has begun."""
        if event.startswith(_EVENTS):
            self._open += 1

    def ended(self, event: str, start_time: float, end_time: float, **_facts: object) -> None:
        """A step has ended; an inner one is told before the one that it is part of."""
        start, end = start_time, end_time
        if not event.startswith(_EVENTS):
            return
        self._open = max(self._open - 1, 0)
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
