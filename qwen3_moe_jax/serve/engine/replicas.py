"""Several engines with one model behind the interface of one.

All that waits is in one queue here, so turns and bounds are the whole server's, and an engine that gets free
takes what comes next. Each engine gets as many sequences as it has slots, and a few more, which it begins
without waiting for this side. A sequence goes to the engine that has its prefix, unless that one has much
more to do than another.

When an engine dies, its sequences of which no token has come go back to the queue, before the others; the
rest end with an error. The engine is started again as one alone would be (``EngineClient``).
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwen3_moe_jax.serve.engine import frames
from qwen3_moe_jax.serve.engine.affinity import SentBlocks, blocks_of, worth
from qwen3_moe_jax.serve.engine.client import EngineClient, EngineDiedError, EngineError, Health, Stream
from qwen3_moe_jax.serve.engine.jobs import FairQueue
from qwen3_moe_jax.serve.engine.prefix import UNIT

AHEAD = 8
"""An engine gets one sequence more than it has slots, and another for each so many slots."""

MAX_DEATHS = 2
"""A sequence that had a slot in more engines that died is thought to be the cause, and ends with an error."""


class Replicas:
    """As ``EngineClient``: its ``engines`` each have the whole model.

    Attributes:
      is_draining: what is new is refused; what waits still runs.
    """

    reruns = MAX_DEATHS

    def __init__(self, make: Callable[[int, "itertools.count[int]"], EngineClient], count: int):
        """Starts nothing yet.

        Args:
          make: of an engine's number, from 0 on, and of the source of all jobs' numbers: the engine.
        """
        self.is_draining = self._is_closing = False
        self.first_ready = asyncio.Event()
        self._ids = itertools.count(1)
        self._queue: FairQueue[frames.Submit] = FairQueue()
        self._waiting: dict[int, Stream] = {}
        self._say: Callable[[str], None] = lambda text: None
        self.engines: Sequence[EngineClient] = tuple(make(n, self._ids) for n in range(count))
        self._sent = {engine: SentBlocks() for engine in self.engines}
        self._not_launched = list(self.engines)
        for engine in self.engines:
            engine.on_news, engine.on_report = self._on_news, self._dispatch
            engine.rescue = lambda streams, engine=engine: self._rescue(engine, streams)

    # -- what they are together

    @property
    def start(self) -> frames.Start:
        return self.engines[0].start

    @property
    def _sound(self) -> list[EngineClient]:
        return [e for e in self.engines if e.health == "ok"]

    @property
    def health(self) -> Health:
        """Of the best of them."""
        states = {e.health for e in self.engines}
        if self.is_draining:
            return "draining"
        return "ok" if "ok" in states else "loading" if "loading" in states else "dead"

    @property
    def fault(self) -> str:
        """Why there is no engine any more; empty while there is hope."""
        faults = [e.fault for e in self.engines]
        return "; ".join(dict.fromkeys(faults)) if all(faults) else ""

    @property
    def fault_code(self) -> int:
        return self.engines[0].fault_code

    @property
    def ready(self) -> frames.Ready | None:
        """What all that run can do: slots in all, the context of each."""
        found = [e.ready for e in self.engines if e.ready is not None]
        if not found:
            return None
        rows = [row for ready in found for row in ready.rows]
        lengths = sorted({context for _, context in rows})
        return frames.Ready(
            context=min(r.context for r in found),
            slots=sum(r.slots for r in found),
            rows=[(sum(n for n, context in rows if context == length), length) for length in lengths],
            backend=found[0].backend,
            has_prefixes=all(r.has_prefixes for r in found),
            has_masks=all(r.has_masks for r in found),
            has_scores=all(r.has_scores for r in found),
            facts=found[0].facts,
        )

    @property
    def counters(self) -> dict[str, float]:
        """Sums of theirs, and what waits here."""
        found: dict[str, float] = {}
        for engine in self.engines:
            for name, value in engine.counters.items():
                found[name] = found.get(name, 0) + value
        found["queued"] = found.get("queued", 0) + len(self._queue)
        found["queued_tokens"] = found.get("queued_tokens", 0) + self._queue.tokens
        return found

    @property
    def restarts(self) -> int:
        return sum(e.restarts for e in self.engines)

    @property
    def last_token(self) -> float:
        """Of the one that has been silent longest, of those with something to do."""
        return min((e.last_token for e in self.engines if e.active), default=time.monotonic())

    @property
    def active(self) -> int:
        return len(self._waiting) + sum(e.active for e in self.engines)

    @property
    def active_tokens(self) -> int:
        return self._queue.tokens + sum(e.active_tokens for e in self.engines)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + sum(e.waiting for e in self.engines)

    @property
    def say(self) -> Callable[[str], None]:
        return self._say

    @say.setter
    def say(self, say: Callable[[str], None]) -> None:
        self._say = say
        for number, engine in enumerate(self.engines, 1):
            engine.say = lambda text, n=number: say(f"replica {n} of {len(self.engines)}: {text}")

    # -- life

    def launch(self) -> None:
        """Starts the first engine; the others when that one is ready: what it has compiled they load."""
        self._not_launched.pop(0).launch()

    def _on_news(self) -> None:
        first = self.engines[0]
        if self._not_launched and (first.ready or first.fault):
            others, self._not_launched = self._not_launched, []
            for engine in others:
                engine.launch()
        for engine in self.engines:
            if engine.ready is None:
                self._sent[engine].clear()
            else:
                self._sent[engine].capacity = sum(n * context for n, context in engine.ready.rows) // UNIT
        if self.ready is not None or self.fault:
            self.first_ready.set()
        if self.fault:
            self._end_all(EngineDiedError())
        self._dispatch()

    async def close(self) -> None:
        """Ends all engine processes; the front is ending too."""
        self.is_draining = self._is_closing = True
        self._end_all(EngineDiedError())
        await asyncio.gather(*(e.close() for e in self.engines))

    def _end_all(self, error: EngineError) -> None:
        """What waits here ends."""
        while (job := self._queue.pop()) is not None:
            self._waiting.pop(job.id).put(error)

    # -- sequences

    def check(self) -> None:
        """As ``EngineClient.check``: of any of them."""
        if self.health != "ok":
            raise EngineError("unavailable", f"the model is {self.health}; try again later")

    def loaded(self) -> frames.Ready:
        """As ``EngineClient.loaded``, of all that run."""
        ready = self.ready
        if ready is None:
            raise EngineError("unavailable", f"the model is {self.health}; try again later")
        return ready

    def submit(self, token_ids: list[int], **fields: Any) -> Stream:
        """As ``EngineClient.submit``; it goes on to an engine when its turn has come.

        Raises:
          EngineError: no engine takes requests now.
        """
        if not fields.get("is_resumed"):
            self.check()
        if self.fault or self._is_closing:
            raise EngineDiedError
        stream = Stream(frames.Submit(next(self._ids), token_ids=token_ids, **fields))
        self._put(stream)
        self._dispatch()
        return stream

    def _put(self, stream: Stream) -> None:
        self._waiting[stream.id] = stream
        self._queue.push(stream.job)

    def _dispatch(self) -> None:
        """Gives engines what they have room for, in the queue's order."""
        while self._queue and (able := [e for e in self._sound if _has_room(e)]):
            job = self._queue.pop()
            assert job is not None  # the queue is not empty
            blocks = blocks_of(job.token_ids, job.scope)
            engine = self._best(able, blocks)
            try:
                engine.take(self._waiting[job.id])
            except EngineError:  # it has just died, which is news in a moment
                job.is_resumed = True
                self._queue.push(job)
                return
            del self._waiting[job.id]
            self._sent[engine].add(blocks)

    def _best(self, engines: Sequence[EngineClient], blocks: Sequence[int]) -> EngineClient:
        """The one that has the longest prefix, or the least to do."""
        match = {e: self._sent[e].match(blocks) for e in engines}
        return min(engines, key=lambda e: (e.active - worth(match[e]), -match[e], e.active))

    def _rescue(self, engine: EngineClient, streams: Sequence[Stream]) -> list[Stream]:
        """Queues what can begin again; the sequences that cannot."""
        for stream in streams:
            stream.deaths += stream.cached is not None
        is_hopeless = self._is_closing or bool(self.fault)
        ends = lambda s: is_hopeless or s.is_written or s.deaths > MAX_DEATHS
        for stream in reversed([s for s in streams if not ends(s)]):
            stream.cached, stream.job.is_resumed = None, True
            self._put(stream)
        return [s for s in streams if ends(s)]

    def cancel(self, stream: Stream) -> None:
        """As ``EngineClient.cancel``."""
        if self._waiting.pop(stream.id, None) is not None:
            self._queue.remove(stream.id)
        for engine in self.engines:
            engine.cancel(stream)
        self._dispatch()

    def allow(self, stream: Stream, mask: bytes) -> None:
        """As ``EngineClient.allow``; of a sequence whose engine died, nothing."""
        for engine in self.engines:
            if engine.has(stream):
                engine.allow(stream, mask)

    # -- asides

    async def score(self, token_ids: list[int], *, first: int, top: int) -> frames.Scored:
        """As ``EngineClient.score``."""
        return await self._ask(lambda engine: engine.score(token_ids, first=first, top=top))

    async def experts(self, token_ids: list[int]) -> list[list[int]]:
        """As ``EngineClient.experts``."""
        return await self._ask(lambda engine: engine.experts(token_ids))

    async def _ask(self, ask: Callable[[EngineClient], Any]) -> Any:
        """Of the engine with the least to do; of another one where that dies."""
        for _ in range(MAX_DEATHS):
            self.check()
            try:
                return await ask(min(self._sound, key=lambda e: e.active))
            except EngineDiedError:
                continue
        self.check()
        return await ask(min(self._sound, key=lambda e: e.active))


Engine = EngineClient | Replicas
"""What the front asks: one engine, or several as one."""


def _has_room(engine: EngineClient) -> bool:
    slots = engine.ready.slots if engine.ready else 0
    return engine.active < slots + 1 + slots // AHEAD
