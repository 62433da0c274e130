"""A request to an engine of another process, and its answer in pieces, whatever carries them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp


@dataclass(frozen=True)
class Ask:
    """A request that the guard of a front has let in.

    Attributes:
      key: the name of its API key (``Guard``), for the queue and the prefix cache.
    """

    method: str
    path: str
    query: bytes
    body: bytes
    key: str
    request_id: str


@dataclass(frozen=True)
class Taken:
    """The first piece: an engine works on it.

    Attributes:
      engine: its name.
      context: tokens that a sequence may have there.
      positions: tokens that all its rows hold.
    """

    engine: str
    context: int
    positions: int


@dataclass(frozen=True)
class Head:
    """The second piece; the body follows."""

    status: int
    headers: list[tuple[bytes, bytes]]

    @property
    def is_stream(self) -> bool:
        """Whether the body comes while it is written."""
        return any(n.lower() == b"content-type" and b"event-stream" in v for n, v in self.headers)


@dataclass(frozen=True)
class Last:
    """The rest of the body: the answer has ended."""

    body: bytes


Piece = Taken | Head | bytes | Last


async def pieces(app: ASGIApp, ask: Ask) -> AsyncGenerator[Head | bytes | Last]:
    """What an application that has no guard of its own answers; what has come together is one piece.

    Who closes the generator is a client that goes away.
    """
    found: list[Head | bytes] = []
    news, never, has_ended = asyncio.Event(), asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        await never.wait()  # the body is in the state already
        return {}

    async def send(message: Any) -> None:
        nonlocal has_ended
        if message["type"] == "http.response.start":
            found.append(Head(message["status"], list(message["headers"])))
        else:
            has_ended |= not message.get("more_body")
            if message.get("body") or has_ended:
                found.append(message.get("body", b""))
        news.set()

    task = asyncio.ensure_future(app(_scope(ask), receive, send))
    task.add_done_callback(lambda _: news.set())
    try:
        while found or not task.done():
            if not found:
                news.clear()
                await news.wait()
                continue
            if isinstance(found[0], Head):
                yield found.pop(0)
                continue
            body, found[:] = b"".join(part for part in found if isinstance(part, bytes)), []
            yield Last(body) if has_ended else body
        with contextlib.suppress(Exception):  # Starlette answers for a bug of ours, and then raises it too
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scope(ask: Ask) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": ask.method,
        "scheme": "http",
        "path": ask.path,
        "raw_path": ask.path.encode(),
        "root_path": "",
        "query_string": ask.query,
        "headers": [(b"content-type", b"application/json")],
        "state": {"request_id": ask.request_id, "key": ask.key, "body": ask.body},
    }
