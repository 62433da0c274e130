"""The work itself: requests to the server's endpoints, as many at a time as keep every slot busy."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp

from qwen3_moe_jax.core import interrupts
from qwen3_moe_jax.serve.batch.estimate import Estimate
from qwen3_moe_jax.serve.batch.lines import Line
from qwen3_moe_jax.serve.batch.order import ordered
from qwen3_moe_jax.serve.batch.results import Result, Results, result
from qwen3_moe_jax.serve.batch.source import Source
from qwen3_moe_jax.serve.headless import until_up
from qwen3_moe_jax.serve.http.app import make_app
from qwen3_moe_jax.serve.http.state import Service
from qwen3_moe_jax.serve.settings import Settings

MAX_TRIES = 3
"""A request during which the engine dies is asked again so often."""

NO_TIMEOUT = 1e9
"""Seconds: nobody waits at the other end."""

MAX_BODY = 64 << 20
"""Bytes of one request."""

SECONDS_TO_SAY = 0.2


def batch_settings(name: str | None = None) -> Settings:
    """A server's settings without what protects it from clients."""
    maximum = 2**31
    return Settings(
        name=name,
        page=False,
        max_body=MAX_BODY,
        body_seconds=NO_TIMEOUT,
        queue_seconds=NO_TIMEOUT,
        max_queue=maximum,
        max_queue_tokens=maximum,
    )


@dataclass(frozen=True)
class Reply:
    """What an endpoint says."""

    status: int
    request_id: str
    body: Any

    @property
    def error_code(self) -> str | None:
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error.get("code") if isinstance(error, dict) else None

    @property
    def failed(self) -> bool:
        """Whether the engine died, or takes nothing now: it is worth another try."""
        return self.status == 503 or self.error_code == "engine"

    @property
    def new_tokens(self) -> int:
        usage = self.body.get("usage") if isinstance(self.body, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        return usage.get("completion_tokens", usage.get("output_tokens", 0))


async def call(app: ASGIApp, url: str, body: bytes) -> Reply:
    """One request to the application, as a client on this machine would send it."""
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    head: dict[str, Any] = {}
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        found = next(messages, None)
        if found is None:  # the client stays
            await asyncio.Event().wait()
        return found or {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if not head:  # Starlette answers for a bug of ours, and then raises it too
            raise
    names = {name.lower(): value for name, value in head["headers"]}
    return Reply(head["status"], names[b"x-request-id"].decode(), json.loads(b"".join(parts)))


class Answerer(Protocol):
    """Who answers a batch's requests."""

    @property
    def slots(self) -> int:
        """Requests at a time."""
        ...

    @property
    def program_seconds(self) -> float:
        """What it has waited for programs."""
        ...

    async def ask(self, url: str, body: bytes) -> Reply:
        """An answer, after some tries where engines die.

        Raises:
          EngineLostError: nobody is left.
        """
        ...


class OneEngine:
    """The engine of a service of this process."""

    def __init__(self, service: Service):
        """``service``: its engine has started."""
        self._engine, self._app = service.engine, make_app(service)
        self.slots = service.engine.loaded().slots

    @property
    def program_seconds(self) -> float:
        return self._engine.counters.get("program_seconds", 0.0) / len(self._engine.engines)

    async def ask(self, url: str, body: bytes) -> Reply:
        """As ``Answerer.ask``."""
        for _ in range(MAX_TRIES - 1):
            reply = await self._ask(url, body)
            if not reply.failed:
                return reply
        return await self._ask(url, body)

    async def _ask(self, url: str, body: bytes) -> Reply:
        await until_up(self._engine)
        return await call(self._app, url, body)


class Work:
    """One run over a source."""

    def __init__(
        self,
        answerer: Answerer,
        results: Results,
        estimate: Estimate,
        *,
        ahead: int = 0,
        say: Callable[[Estimate, Results], None] = lambda estimate, results: None,
    ):
        """A run that has not begun.

        Args:
          answerer: it takes requests.
          results: lines that are there are not answered again.
          estimate: of what is to be done.
          ahead: requests beside those that have a slot.
          say: told how far it is, now and then.
        """
        self._answerer, self._results, self._estimate = answerer, results, estimate
        self._say = say
        self._at_once = answerer.slots + ahead
        self._ready: asyncio.Queue[Result | None] = asyncio.Queue()

    async def run(self, source: Source) -> None:
        """Answers every line.

        Raises:
          EngineLostError: the engine died too often; what is answered is written.
          OutputFileError: the results cannot be written.
        """
        try:
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self._write())
                saying = group.create_task(self._tell())
                await self._answer_all(source)
                self._ready.put_nowait(None)
                await writing
                self._note_programs()
                saying.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _answer_all(self, source: Source) -> None:
        room = asyncio.Semaphore(self._at_once)
        async with asyncio.TaskGroup() as group:
            async for line in self._todo(source):
                if line.code:
                    self._ready.put_nowait(_refused(line))
                    self._estimate.end(line, 0)
                    continue
                await room.acquire()
                self._estimate.begin(line)
                group.create_task(self._answer(line)).add_done_callback(lambda _: room.release())

    async def _todo(self, source: Source) -> AsyncIterator[Line]:
        while window := await source.window():
            for line in ordered(line for line in window if line.name not in self._results.names):
                yield line

    async def _answer(self, line: Line) -> None:
        reply = await self._answerer.ask(line.url, line.body)
        self._estimate.end(line, reply.new_tokens)
        response = {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body}
        identity = reply.request_id.removeprefix("req_")
        self._ready.put_nowait(result(line.custom_id, response=response, identity=identity))

    async def _write(self) -> None:
        """All that is ready goes to the disk together; what is ready at the end, however it comes, too."""
        try:
            is_over = False
            while not is_over:
                values = [await self._ready.get(), *self._rest()]
                is_over = None in values
                await asyncio.shield(asyncio.to_thread(self._results.write, _some(values)))
        finally:
            self._results.write(_some(self._rest()))

    def _rest(self) -> list[Result | None]:
        return [self._ready.get_nowait() for _ in range(self._ready.qsize())]

    async def _tell(self) -> None:
        while True:
            self._note_programs()
            self._say(self._estimate, self._results)
            await asyncio.sleep(SECONDS_TO_SAY)

    def _note_programs(self) -> None:
        known = self._estimate.program_seconds
        self._estimate.program_seconds = max(known, self._answerer.program_seconds)


def _some(values: Sequence[Result | None]) -> list[Result]:
    return [value for value in values if value is not None]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended a group of tasks."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _refused(line: Line) -> Result:
    error = {"code": line.code, "message": line.fault, "param": None, "line": line.number}
    return result(line.custom_id, error=error, identity=f"line_{line.number}")


def until_interrupted(work: Callable[[], Any]) -> bool:
    """Runs a coroutine function; whether a signal (``interrupts.endings``) ended it. A second one ends the
    process."""

    async def main() -> bool:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())
        for number in interrupts.endings():
            with contextlib.suppress(NotImplementedError, RuntimeError):
                loop.add_signal_handler(number, _stop, task, number)
        try:
            await task
        except asyncio.CancelledError:
            return True
        return False

    return asyncio.run(main())


def _stop(task: asyncio.Future[Any], number: int) -> None:
    asyncio.get_running_loop().remove_signal_handler(number)
    task.cancel()
