"""A GPU that is not there, with a clock of its own: the real batch, scheduler and loop of an engine take the
times that an H100 was measured to take, so that what a server does can be foretold and held by a test.

Tokens have no meaning. What counts is when programs are asked for, when they run and who waits for them:

- the device runs one program after the other, in the order in which the host asked for them;
- asking costs the host time, and a program with a condition lets the host wait: one that reads prompts until
  its layers have run, one of the decode kernel until those before it have run, a loop of tokens of more
  sequences than that takes until its end.
"""

import math
import queue
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import batching, generate, one_token, slots
from qwen3_moe_jax.jax_backend.generate import MAX_STEPS, StepResult
from qwen3_moe_jax.serve.engine import frames, worker
from qwen3_moe_jax.serve.engine.scheduler import Scheduler

DECODE = {1: 1.56e-3, 2: 2.0e-3, 4: 2.9e-3, 8: 4.6e-3, 16: 9.0e-3, 32: 11.9e-3, 64: 18.3e-3}
"""Seconds of a token of so many sequences: Qwen3-30B-A3B, Q4_K_M, on an H100."""

PROMPTS = (15.1e-3, 16.6e-6)
"""Seconds of a program that reads prompts, and of each of its tokens: the line through 512 and 2,048 of one
sequence."""

MIXED = 15e-3
"""Seconds more where it also writes a token of 64 slots, layer by layer."""

CHOICE = 0.5e-3
"""Seconds of a program's end behind its last condition: logits and the choice of tokens."""

ASKING, TAKING, ADMITTING, HEARING = 0.5e-3, 0.3e-3, 1.0e-3, 0.1e-3
"""Seconds of the host: to ask for a program, to read its result, to take a request in, to read a frame."""

TELLING = (0.3e-3, 10e-6)
"""Seconds of the host for a report, and for each of its events."""


@dataclass
class State:
    """What programs change of ``generate.DecodeState``: numbers of each slot."""

    cache: Any
    allowed: np.ndarray
    capacity: int
    length: np.ndarray
    filled: np.ndarray
    limit: np.ndarray
    finished: np.ndarray

    def is_deleted(self) -> bool:
        return False

    def copy(self) -> "State":
        arrays = {name: getattr(self, name).copy() for name in ("length", "filled", "limit", "finished")}
        return replace(self, **arrays)


@dataclass
class Card:
    """The device, and the time.

    Attributes:
      now: of the host.
      free: when the device has run all that it was asked for.
      busy: seconds of its work.
    """

    now: float = 0.0
    free: float = 0.0
    busy: float = 0.0
    ends: dict[int, float] = field(default_factory=dict)

    def run(self, seconds: float, *, blocks: float) -> float:
        """Adds a program that waits with the host for all before it, or until ``blocks`` before its end."""
        self.now += ASKING
        begin = max(self.now, self.free)
        self.free, self.busy = begin + seconds, self.busy + seconds
        self.now = max(self.now, self.free - blocks)
        return self.free

    def install(self, patch: Any) -> None:
        """Puts itself in the place of the programs; ``patch`` is pytest's monkeypatch."""
        patch.setattr(generate, "prefill", self.prefill)
        patch.setattr(generate, "decode", self.decode)
        patch.setattr(one_token, "decode_one", self.decode_one)
        patch.setattr(slots, "admit", self.admit)
        patch.setattr(slots, "release", self.release)
        patch.setattr(batching, "jax", SimpleNamespace(device_get=self.get, tree=jax.tree))

    def batch(self, count: int, context: int) -> batching.Batch:
        """Empty slots."""
        shape = SimpleNamespace(shape=(1, count))
        numbers = [np.zeros(count, np.int64) for _ in range(3)]
        state = State(
            SimpleNamespace(k=shape),
            np.zeros((count, 1), np.int32),
            context,
            length=numbers[0],
            filled=numbers[1],
            limit=numbers[2],
            finished=np.ones(count, bool),
        )
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=1000))
        is_one_launch = lambda rows: rows <= 16
        decoder: Any = SimpleNamespace(has_kernel=True, model=model, is_one_launch=is_one_launch)
        return batching.Batch(decoder, {}, state)  # type: ignore[arg-type]

    def admit(self, state: State, slot: int, tokens: Any, length: int, limit: int, *rest: Any) -> State:
        self.now += ADMITTING
        state = state.copy()
        state.length[slot], state.limit[slot], state.filled[slot] = length, limit, rest[2]
        state.finished[slot] = False
        return state

    def release(self, state: State, slot: int) -> State:
        state = state.copy()
        state.finished[slot] = True
        return state

    def decode(self, decoder: Any, params: Any, state: State, steps: int, *, rows: int, **_: Any) -> Any:
        if rows > 16:
            return self._write(state, rows, steps, lambda seconds: 0.0)
        return self._write(state, rows, steps, lambda seconds: seconds)

    def decode_one(self, decoder: Any, params: Any, state: State, *, rows: int, **_: Any) -> Any:
        return self._write(state, rows, 1, lambda seconds: math.inf)

    def _write(self, state: State, rows: int, steps: int, blocks: Callable[[float], float]) -> Any:
        """``blocks``: of its seconds, how long before its end the host goes on."""
        before, state = state.length, state.copy()
        ready = ~state.finished & (state.filled == state.length - 1)
        ready[rows:] = False
        added = np.where(ready, np.minimum(steps, state.limit - state.length), 0)
        seconds = DECODE[rows] * int(added.max(initial=1))
        return self._after(state, before, added, added, self.run(seconds, blocks=blocks(seconds)))

    def prefill(
        self, decoder: Any, params: Any, state: State, slots: np.ndarray, *, chunk: int, rows: int, **_: Any
    ) -> Any:
        before, state = state.length, state.copy()
        added = np.zeros_like(state.length)
        if rows:
            added += ~state.finished & (state.filled == state.length - 1)
        moved = added.copy()
        ends = np.minimum(state.filled[slots] + chunk, state.length[slots])
        moved[slots] = ends - state.filled[slots]
        added[slots] = ends == state.length[slots]
        seconds = PROMPTS[0] + PROMPTS[1] * chunk * len(slots) + (MIXED if rows else 0.0)
        return self._after(state, before, added, moved, self.run(seconds, blocks=CHOICE))

    def _after(self, state: State, before: Any, added: Any, moved: Any, end: float) -> tuple[State, Any]:
        state.length, state.filled = state.length + added, state.filled + moved
        state.finished |= state.length >= state.limit
        tokens = np.full((len(before), MAX_STEPS), 7)
        found: tuple[Any, ...] = (
            tokens,
            state.length.copy(),
            state.finished.copy(),
            np.zeros(len(before), bool),
        )
        result = StepResult(*found)
        self.ends[id(result)] = end
        return state, result

    def get(self, result: StepResult) -> StepResult:
        """As ``jax.device_get``."""
        self.now = max(self.now, self.ends.pop(id(result))) + TAKING
        return result


class Over(Exception):
    """Nobody asks for anything more."""


@dataclass
class Inbox:
    """Requests that come at their times."""

    card: Card
    arrivals: deque[tuple[float, frames.Submit]]

    def get(self, *, block: bool) -> frames.Submit:
        if not self.arrivals:
            raise Over if block else queue.Empty
        if block:
            self.card.now = max(self.card.now, self.arrivals[0][0])
        if self.arrivals[0][0] > self.card.now:
            raise queue.Empty
        self.card.now += HEARING
        return self.arrivals.popleft()[1]


@dataclass
class Seen:
    """What clients see.

    Attributes:
      asked, times: when each asked, and when its tokens came.
      tokens: in all.
      seconds, idle: from the first request to the last token, and the share in which the device had nothing
        to do.
    """

    asked: dict[int, float]
    times: dict[int, list[float]]
    tokens: int
    seconds: float
    idle: float

    @property
    def first(self) -> list[float]:
        """Seconds to the first tokens, sorted."""
        return sorted(self.times[n][0] - at for n, at in self.asked.items())

    def gaps(self, numbers: Iterable[int], begin: float = 0.0) -> list[float]:
        """Seconds between what comes to some of them from a time on, sorted."""
        pairs = [p for n in numbers for p in zip(self.times[n], self.times[n][1:], strict=False)]
        return sorted(b - a for a, b in pairs if b >= begin)


def request(number: int, prompt: int, tokens: int) -> frames.Submit:
    """A prompt of so many tokens, and how many are wanted."""
    return frames.Submit(number, "", [5] * prompt, Sampling(), tokens, [])


class Server:
    """An engine's loop on a card, from one play to the next."""

    def __init__(self, patch: Any, slots: int, context: int, step_ms: float = 50.0):
        """``patch``: pytest's monkeypatch."""
        self.card = Card()
        self.card.install(patch)
        patch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: self.card.now))
        patch.setattr(frames, "send", self._send)
        scheduler = Scheduler(lambda: self.card.batch(slots, context))
        engine: Any = SimpleNamespace(
            scheduler=scheduler,
            device_kind="gpu",
            programs=0,
            turn=scheduler.turn,
            reading=worker._reading_times(scheduler.batch, range(slots), context),
            counters=dict,
            tidy=lambda: None,
        )
        self._inbox = Inbox(self.card, deque())
        self._loop = worker.Loop(engine, None, self._inbox, step_ms)  # type: ignore[arg-type]

    def _send(self, _: Any, report: frames.Progress) -> None:
        self.card.now += TELLING[0] + TELLING[1] * len(report.wrote)
        for number, tokens, _reason in report.wrote:
            self._times.setdefault(number, []).append(self.card.now)
            self._tokens += len(tokens)

    def play(self, arrivals: Sequence[tuple[float, frames.Submit]]) -> Seen:
        """Requests at their times from now on, until all are answered."""
        begin, busy = self.card.now, self.card.busy
        self._times: dict[int, list[float]] = {}
        self._tokens = 0
        moved = sorted(((begin + at, r) for at, r in arrivals), key=lambda pair: pair[0])
        self._inbox.arrivals.extend(moved)
        try:
            while True:
                self._loop.go_on()
        except Over:
            pass
        begin = moved[0][0]
        seconds = max(times[-1] for times in self._times.values()) - begin
        asked = {r.id: at for at, r in moved}
        return Seen(asked, self._times, self._tokens, seconds, 1 - (self.card.busy - busy) / seconds)
