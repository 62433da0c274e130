"""An engine without process, device and model: the real scheduler over a fake batch, in the front's own loop.

Tests of the front need no weights, and nothing in them takes time: a turn is taken when the loop is free, or
never while ``is_held``.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec

from qwen3_moe_jax.serve.engine import frames, reports
from qwen3_moe_jax.serve.engine.client import EngineClient
from qwen3_moe_jax.serve.engine.jobs import Event, Limits, Wrote
from qwen3_moe_jax.serve.engine.prefix import PrefixCache
from qwen3_moe_jax.serve.engine.replicas import Replicas
from qwen3_moe_jax.serve.engine.scheduler import Scheduler
from qwen3_moe_jax.testing.fake_batch import FakeBatch

FAKE_SLOTS = 4
"""Of each fake replica."""


class FakeEngine(EngineClient):
    """As ``EngineClient``.

    Attributes:
      scheduler: over a ``FakeBatch``.
      is_held: no turns are taken; change it in the loop's thread, or before ``launch``.
      holds_after: it is held when so many tokens have been written in all; None never.
    """

    def __init__(
        self,
        start: frames.Start,
        *,
        is_held: bool = False,
        holds_after: int | None = None,
        ids: Iterator[int] | None = None,
        **batch: Any,
    ):
        """``batch``: fields of the ``FakeBatch``."""
        super().__init__(start, ids=ids)
        self._batch = {"capacity": 1024, **batch}
        self.scheduler = self._make_scheduler()
        self.is_held, self.holds_after, self._written = is_held, holds_after, 0
        self._events: list[Event] = []

    def _make_scheduler(self) -> Scheduler:
        limits = Limits(self.start.max_queue, self.start.max_queue_tokens)
        return Scheduler(lambda: FakeBatch(**self._batch), limits=limits, prefixes=PrefixCache())

    def launch(self) -> None:
        """Ready at once."""
        batch = self.scheduler.batch
        rows = [(batch.slots, batch.capacity)]
        self.ready = frames.Ready(
            batch.capacity, batch.slots, rows, "fake", True, True, False, {"device": "none"}
        )
        self.first_ready.set()
        self.on_news()
        self._task = asyncio.create_task(self._run())

    def die(self) -> None:
        """As if its process had been killed: ``launch`` is the next one's start."""
        self.ready = None
        self.restarts += 1
        if self._task is not None:
            self._task.cancel()
        self.scheduler, self._events = self._make_scheduler(), []
        self._fail_all()
        self.on_news()

    async def _run(self) -> None:
        while True:
            is_idle = self.is_held or not self.scheduler.has_work or self.scheduler.is_held
            if not is_idle:
                self._events += self._turn()
            if self._events:
                running, queued = len(self.scheduler.running), len(self.scheduler.queue)
                counters: dict[str, float] = {"running": running, "queued": queued}
                self._progress(reports.progress_of(self._events, counters))
                self._events = []
                self.on_report()
            await asyncio.sleep(0.002 if is_idle else 0)

    def _turn(self) -> list[Event]:
        events = self.scheduler.turn(prompt_tokens=1 << 20, max_step=1)
        self._written += sum(len(e.tokens) for e in events if isinstance(e, Wrote))
        if self.holds_after is not None and self._written >= self.holds_after:
            self.is_held, self.holds_after = True, None
        return events

    def go_on(self) -> None:
        """Ends the holding; from any thread."""
        self.is_held = False

    def _send(self, message: msgspec.Struct) -> None:
        m: Any = message
        if isinstance(m, frames.Submit):
            self._events += self.scheduler.submit(reports.job_of(m))
        elif isinstance(m, frames.Cancel):
            self.scheduler.cancel(m.id)
        elif isinstance(m, frames.Allow):
            self.scheduler.allow(m.id, m.mask)
        else:
            asyncio.get_running_loop().call_soon(self._route, _aside(m))


def _aside(m: frames.Score | frames.Experts) -> frames.ToFront:
    """What a model that finds everything certain says."""
    if isinstance(m, frames.Experts):
        return frames.Counted(m.id, [[len(m.token_ids), 0]])
    own = m.token_ids[m.first :]
    return frames.Scored(m.id, [0.0] * len(own), [[(t, 0.0)][: m.top] for t in own])


def fake_replicas(start: frames.Start | None = None, count: int = 2, **options: Any) -> Replicas:
    """Fake engines as one; options as ``FakeEngine``."""
    start = start or frames.Start(None)
    return Replicas(lambda number, ids: FakeEngine(start, ids=ids, **{"slots": FAKE_SLOTS, **options}), count)
