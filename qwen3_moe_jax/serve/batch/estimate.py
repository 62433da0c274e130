"""How far a batch is and how long it still takes, from the work of its lines and not from their number."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qwen3_moe_jax.serve.batch.lines import NO_LIMIT, Line
from qwen3_moe_jax.serve.batch.order import BYTES_PER_TOKEN

PROMPT_COST = 1 / 16
"""What reading a token takes beside writing one, in a batch; the rate is measured in such units."""

KNOWN_SHARE, KNOWN_LINES = 0.05, 4
"""The time left is told after so much of the work and so many answers: before, it is a guess."""


@dataclass
class _Sum:
    """Lines, bytes of their bodies, their limits, and how many have none."""

    lines: int = 0
    nbytes: int = 0
    limits: int = 0
    unlimited: int = 0

    def add(self, line: Line, sign: int = 1) -> None:
        self.lines += sign
        self.nbytes += sign * len(line.body)
        self.limits += sign * (line.limit or 0)
        self.unlimited += sign * (line.limit is None)


class Estimate:
    """Counts lines as they begin and end.

    Attributes:
      total: lines to do; None where the input has no known end.
      done: lines that have their result.
      new_tokens: written by them.
      program_seconds: of its time so far, what the engine has waited for programs; no part of a rate.
    """

    def __init__(self, todo: Iterable[Line] | None = None, clock: Callable[[], float] = time.monotonic):
        """Args: todo: every line; None where they are not known."""
        self._clock, self._began = clock, clock()
        self._all, self._begun, self._answered = _Sum(), _Sum(), _Sum()
        lines = None if todo is None else 0
        for line in todo or ():
            lines = (lines or 0) + 1
            if not line.code:
                self._all.add(line)
        self.total = lines
        self.done = self.new_tokens = self._limited_tokens = self._unlimited_tokens = 0
        self.program_seconds = 0.0
        self._mark: tuple[float, float] | None = None

    def start(self) -> None:
        """Sets the clock to 0: what came before (loading) says nothing of the rate."""
        self._began = self._clock()

    def begin(self, line: Line) -> None:
        """A line is being answered."""
        self._begun.add(line)

    def end(self, line: Line, new_tokens: int) -> None:
        """A line has its result, with so many tokens written."""
        self.done += 1
        if line.code:
            return
        self._begun.add(line, -1)
        self._answered.add(line)
        self.new_tokens += new_tokens
        if line.limit is None:
            self._unlimited_tokens += new_tokens
        else:
            self._limited_tokens += new_tokens
        if self._mark is None:
            self._mark = self._clock(), self._work_done()

    def _work(self, part: _Sum) -> float:
        """Of these lines, in tokens written: limits are used up as those of the answers were."""
        known = self._answered
        used = self._limited_tokens / known.limits if known.limits else 1.0
        length = self._unlimited_tokens / known.unlimited if known.unlimited else NO_LIMIT
        written = part.limits * used + part.unlimited * length
        return part.nbytes / BYTES_PER_TOKEN * PROMPT_COST + written

    def _work_done(self) -> float:
        """Lines that are being answered count as half done."""
        return self._work(self._answered) + self._work(self._begun) / 2

    def seconds_left(self) -> float | None:
        """By the rate since the first answer, for before it programs were compiled; None if not known."""
        if self.total is None or self._mark is None or self._answered.lines < KNOWN_LINES:
            return None
        seconds, work = self._clock() - self._mark[0], self._work_done() - self._mark[1]
        whole, done = self._work(self._all), self._work_done()
        if seconds <= 0 or work <= 0 or done < KNOWN_SHARE * whole:
            return None
        return max(0.0, (whole - done) * seconds / work)

    @property
    def rate(self) -> float | None:
        """New tokens per second of all lines that have ended; None before the first."""
        seconds = self._clock() - self._began - self.program_seconds
        return self.new_tokens / seconds if self.new_tokens and seconds > 0 else None

    def figures(self) -> str:
        """What the lines took that ended; nothing if none did."""
        if self.rate is None:
            return ""
        took = duration(self._clock() - self._began)
        waited = f" (programs: {duration(self.program_seconds)})" if self.program_seconds >= 0.5 else ""
        return f"; {self.new_tokens:,} new tokens in {took}{waited}, {_per_second(self.rate)}"

    def in_words(self, errors: int) -> str:
        """One line."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of} lines"]
        if errors:
            parts.append(f"{errors:,} of them errors")
        if self.rate is not None:
            parts.append(_per_second(self.rate))
        left = self.seconds_left()
        if left is not None and self.done != self.total:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


def _per_second(rate: float) -> str:
    return f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s"


def duration(seconds: float) -> str:
    """A time in the two largest units that it has."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
