"""Server-sent events, and work that ends when its client goes away."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen3_moe_jax.serve.settings import Settings

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def data(value: Any) -> bytes:
    """An event without a name."""
    return b"data: " + _encode(value) + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """An event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + _encode(value) + b"\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, unless the client goes away first: then it is cancelled.

    Raises:
      ClientGone: the client went away.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task, watch)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Events as they come. A client that is gone, or takes nothing for too long, ends them.

    A stream that is silent gets a comment now and then, so that nothing between the two gives up.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], settings: Settings, headers: dict[str, str] | None = None
    ):
        super().__init__(None, 200, {"cache-control": "no-store", **(headers or {})}, "text/event-stream")
        self.raw_headers = [h for h in self.raw_headers if h[0] != b"content-length"]
        self._events, self._settings = events, settings
        self._sending_since: float | None = None
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        lock = asyncio.Lock()
        write = asyncio.ensure_future(self._write(send, lock))
        others = [asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._watch(send, lock))]
        try:
            await asyncio.wait({write, *others}, return_when=asyncio.FIRST_COMPLETED)
            if write.done():
                write.result()
        finally:
            await _cancel(write, *others)
            with contextlib.suppress(Exception):
                await self._events.aclose()

    async def _write(self, send: Send, lock: asyncio.Lock) -> None:
        async for chunk in self._events:
            await self._send(send, lock, chunk)
        async with lock:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, lock: asyncio.Lock, chunk: bytes) -> None:
        async with lock:
            self._sending_since = self._sent_at = asyncio.get_running_loop().time()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sending_since = None

    async def _watch(self, send: Send, lock: asyncio.Lock) -> None:
        """Returns when the client takes nothing; comments while there is nothing to say."""
        loop, s = asyncio.get_running_loop(), self._settings
        self._sent_at = loop.time()
        while True:
            await asyncio.sleep(min(s.send_seconds, s.keep_alive_seconds) / 4)
            now = loop.time()
            if self._sending_since is not None and now - self._sending_since > s.send_seconds:
                return
            if self._sending_since is None and now - self._sent_at > s.keep_alive_seconds:
                await self._send(send, lock, COMMENT)
