"""The front's side of the engine: starts the child, starts it again when it dies, and routes what it says."""

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from qwen3_moe_jax.core.batch import TokenScore
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.serve.engine import frames

Health = Literal["loading", "ok", "draining", "dead"]

MAX_RESTARTS, RESTART_SECONDS = 3, 600.0
"""A child that dies more often than so many times in so many seconds is not started again."""


SECONDS_TO_LEAVE = 5.0
"""What the engine has to tell its other processes that it ends."""


class EngineError(RuntimeError):
    """The engine cannot answer now. ``code``: "unavailable", "queue_full", "invalid", "engine"."""

    def __init__(self, code: str, message: str):
        self.code = code
        super().__init__(message)


class EngineDiedError(EngineError):
    """The engine's process ended while it was answering."""

    def __init__(self):
        super().__init__("engine", "the engine stopped while it was answering")


@dataclass(frozen=True)
class Part:
    """New tokens of a sequence, why it ended, if it did, and the tokens' scores, if they were asked for."""

    tokens: list[int]
    finish_reason: str | None = None
    scores: list[TokenScore] | None = None

    @classmethod
    def joined(cls, parts: "Sequence[Part]") -> "Part":
        """Neighbours in one."""
        if len(parts) == 1:
            return parts[0]
        scored = [p.scores for p in parts if p.scores is not None]
        return cls(
            [token for p in parts for token in p.tokens],
            parts[-1].finish_reason,
            [score for scores in scored for score in scores] if scored else None,
        )


@dataclass
class Stream:
    """A job's events as they come; iterate once.

    Attributes:
      job: what was asked for.
      cached: tokens of the prompt that were in the cache, once it has begun; None before.
      is_written: some token has come.
      began: set when it has a slot, or has failed.
      deaths: how many engines died while it had a slot there.
      is_patient: its reader wants nothing before all is there, and then all at once.
    """

    job: frames.Submit
    cached: int | None = None
    is_over: bool = False
    is_written: bool = False
    deaths: int = 0
    is_patient: bool = False
    began: asyncio.Event = field(default_factory=asyncio.Event)
    _parts: deque[Part | EngineError] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> int:
        """Of the job."""
        return self.job.id

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return len(self.job.token_ids)

    def put(self, part: Part | EngineError) -> None:
        self._parts.append(part)
        self.is_written = True
        self.is_over |= isinstance(part, EngineError) or part.finish_reason is not None
        self.began.set()
        if self.is_over or not self.is_patient:
            self._news.set()

    def _next(self) -> Part | EngineError:
        """What came first; for a patient reader, all that came."""
        found = [self._parts.popleft()]
        while self.is_patient and self._parts and not isinstance(self._parts[0], EngineError):
            found.append(self._parts.popleft())
        parts = [part for part in found if not isinstance(part, EngineError)]
        return Part.joined(parts) if parts else found[0]

    async def __aiter__(self) -> AsyncIterator[Part]:
        while True:
            while not self._parts or (self.is_patient and not self.is_over):
                self._news.clear()
                await self._news.wait()
            part = self._next()
            if isinstance(part, EngineError):
                raise part
            yield part
            if part.finish_reason is not None:
                return


class EngineClient:
    """One engine process at a time.

    Attributes:
      start: what it is asked to load.
      ready: what the engine said when it was loaded; None before, and while another one is loading.
      counters: its latest gauges and counts.
      restarts: how often it was started again.
      fault: why there is no engine any more, in one line; empty while there is hope.
      last_token: ``time.monotonic()`` of the latest progress.
      reruns: how often a request of which nobody has seen a part may begin again elsewhere.
      say: told in one line when it is ready, and when it dies.
      on_news: called when the engine comes or goes; ``on_report`` after each of its reports.
      rescue: given the sequences of an engine that died; gives back those that end with an error.
    """

    reruns = 0

    def __init__(
        self,
        start: frames.Start,
        *,
        variables: Mapping[str, str] | None = None,
        ids: Iterator[int] | None = None,
    ):
        """Starts nothing yet.

        Args:
          start: what to load.
          variables: of the child's environment, beside this process' own.
          ids: numbers of jobs; one source for engines that share jobs.
        """
        self.ready: frames.Ready | None = None
        self.counters: dict[str, float] = {}
        self.restarts = 0
        self.fault, self.fault_code = "", 1
        self.is_draining = False
        self.last_token = time.monotonic()
        self.first_ready = asyncio.Event()
        self.start = start
        self.say: Callable[[str], None] = lambda text: None
        self.on_news: Callable[[], None] = lambda: None
        self.on_report: Callable[[], None] = lambda: None
        self.rescue: Callable[[Sequence[Stream]], Sequence[Stream]] = lambda streams: streams
        self._variables = dict(variables or {})
        self._ids = itertools.count(1) if ids is None else ids
        self._streams: dict[int, Stream] = {}
        self._asides: dict[int, asyncio.Future] = {}
        self._deaths: deque[float] = deque()
        self._process: subprocess.Popen | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task | None = None

    @property
    def health(self) -> Health:
        if self.is_draining:
            return "draining"
        if self.fault:
            return "dead"
        return "loading" if self.ready is None else "ok"

    @property
    def engines(self) -> Sequence["EngineClient"]:
        """Each engine process that there should be."""
        return (self,)

    @property
    def active(self) -> int:
        """Sequences that wait or run, as this side knows at once."""
        return len(self._streams)

    @property
    def active_tokens(self) -> int:
        """Prompt tokens of those that have not begun."""
        return sum(s.prompt_tokens for s in self._streams.values() if s.cached is None)

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return sum(s.cached is None for s in self._streams.values())

    @property
    def process_id(self) -> int | None:
        """Of the engine process."""
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Starts the engine, and a task that keeps it."""
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while not self.fault:
            await self._live()
            if self.fault or self.is_draining:
                break
            if self.start.processes is not None:  # those of the other processes have ended with it
                self.fault = "the engine died, and with it its processes on other hosts: start all again"
                break
            now = time.monotonic()
            self._deaths.append(now)
            while self._deaths[0] < now - RESTART_SECONDS:
                self._deaths.popleft()
            if len(self._deaths) > MAX_RESTARTS:
                self.fault = f"the engine died {len(self._deaths)} times in {RESTART_SECONDS:.0f} s"
                self.say(self.fault)
                break
            self.restarts += 1
            self.say(f"the engine died: it is started again, {len(self._deaths)} of {MAX_RESTARTS} times")
        self.first_ready.set()
        self.on_news()

    async def _live(self) -> None:
        """From a child's start to its end."""
        try:
            ours, process = self._spawn()
        except OSError as error:  # no more processes, no more descriptors
            self.fault = f"the engine's process cannot be started: {error.strerror}"
            self.say(self.fault)
            return
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            self._send(self.start)
            while (message := await frames.receive_async(reader)) is not None:
                self._route(message)
        finally:
            self.ready = None
            self._writer.close()
            if self.start.processes is not None:  # it takes its leave of the others
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.wait, SECONDS_TO_LEAVE)
            process.kill()
            self._fail_all()
            self.on_news()
        await asyncio.to_thread(process.wait)  # a driver takes its time, others go on

    def _spawn(self) -> tuple[socket.socket, subprocess.Popen]:
        """Starts the child; this side's end of the connection, and the process."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            command = [sys.executable, "-m", "qwen3_moe_jax.serve.engine.worker", str(theirs.fileno())]
            self._process = process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(**self._variables),
            )
            undo.pop_all()
        return ours, process

    def _end(self, process: subprocess.Popen) -> None:
        process.kill()
        process.wait()

    def _route(self, message: frames.ToFront) -> None:
        if isinstance(message, frames.Progress):
            self._progress(message)
            self.on_report()
        elif isinstance(message, frames.Ready):
            self.ready = message
            self.first_ready.set()
            self.say(_summary(message))
            self.on_news()
        elif isinstance(message, frames.Broken):
            self.fault, self.fault_code = message.message, message.code
        else:
            future = self._asides.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)

    def _progress(self, message: frames.Progress) -> None:
        self.counters = message.counters
        self.last_token = time.monotonic()
        for job, cached in message.began:
            if job in self._streams:
                self._streams[job].cached = cached
                self._streams[job].began.set()
        scored = {job: [TokenScore(*s) for s in scores] for job, scores in message.scored}
        for job, tokens, reason in message.wrote:
            self._give(job, Part(tokens, reason, scored.get(job)))
        for job, code, text in message.failed:
            self._give(job, EngineError(code, text))

    def _give(self, job: int, part: Part | EngineError) -> None:
        stream = self._streams.get(job)
        if stream is not None:
            stream.put(part)
            if stream.is_over:
                del self._streams[job]

    def _fail_all(self) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for stream in self.rescue(streams):
            stream.put(EngineDiedError())
        for future in self._asides.values():
            if not future.done():
                future.set_exception(EngineDiedError())
        self._asides.clear()

    def _send(self, message: msgspec.Struct) -> None:
        if self._writer is None or self._writer.is_closing():
            raise EngineError("unavailable", "the engine is not running")
        self._writer.write(frames.pack(message))

    def check(self) -> None:
        """Raises EngineError unless the engine takes requests."""
        if self.health != "ok":
            raise EngineError("unavailable", f"the model is {self.health}; try again later")

    def loaded(self) -> frames.Ready:
        """What the engine said when it was loaded.

        Raises:
          EngineError: none is loaded now.
        """
        if self.ready is None:
            raise EngineError("unavailable", f"the model is {self.health}; try again later")
        return self.ready

    def submit(self, token_ids: list[int], **fields: Any) -> Stream:
        """Asks for a sequence; fields as ``frames.Submit``.

        Raises:
          EngineError: the engine takes no requests now.
        """
        if not fields.get("is_resumed"):
            self.check()
        stream = Stream(frames.Submit(next(self._ids), token_ids=token_ids, **fields))
        self.take(stream)
        return stream

    def take(self, stream: Stream) -> None:
        """Asks for a sequence whose events go to ``stream``.

        Raises:
          EngineError: the engine is not running.
        """
        self._send(stream.job)
        if not self._streams:
            self.last_token = time.monotonic()  # it was idle: its silence begins now
        self._streams[stream.id] = stream

    def has(self, stream: Stream) -> bool:
        """Whether a sequence waits or runs here."""
        return stream.id in self._streams

    def cancel(self, stream: Stream) -> None:
        """Gives a sequence up; one that has ended is no fault."""
        if self._streams.pop(stream.id, None) is not None:
            with contextlib.suppress(EngineError):
                self._send(frames.Cancel(stream.id))

    def allow(self, stream: Stream, mask: bytes) -> None:
        """The tokens that a masked sequence may write next."""
        self._send(frames.Allow(stream.id, mask))

    async def score(self, token_ids: list[int], *, first: int, top: int) -> frames.Scored:
        """Log-probabilities; as ``frames.Score``."""
        return await self._ask(frames.Score(next(self._ids), token_ids, first, top))

    async def experts(self, token_ids: list[int]) -> list[list[int]]:
        """Tokens that chose each expert, layer by expert."""
        return (await self._ask(frames.Experts(next(self._ids), token_ids))).counts

    async def _ask(self, message: "frames.Score | frames.Experts") -> Any:
        self.check()
        future = self._asides[message.id] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            answer = await future
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):
                self._send(frames.Cancel(message.id))
            raise
        finally:
            self._asides.pop(message.id, None)
        if answer.error:
            raise EngineError("engine", answer.error)
        return answer

    async def close(self) -> None:
        """Ends the engine process; the front is ending too."""
        self.is_draining = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._process is not None and self._process.poll() is None:
            self._end(self._process)


def _summary(ready: frames.Ready) -> str:
    rows = " and ".join(f"{slots} slots of {context} tokens" for slots, context in ready.rows)
    return f"ready: {rows}, {ready.backend} on {ready.facts.get('device')}"
