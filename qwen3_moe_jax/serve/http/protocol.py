"""uvicorn's HTTP protocol with bounds on headers: their size, their number, and the time they may take.

An ASGI layer is too late for this: it sees a request only when all its headers have come.
"""

import asyncio
import re
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qwen3_moe_jax.serve.settings import Settings

_BODIES = {
    408: b'{"error":{"message":"the headers did not come in time","type":"invalid_request_error"}}',
    431: b'{"error":{"message":"the headers are too large","type":"invalid_request_error"}}',
}
_PHRASES = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    settings: ClassVar[Settings] = Settings()

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        # what uvicorn relaxes for pipelining clients is refused here
        self.parser = httptools.HttpRequestParser(self)
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._deadline is None:
                self._start_deadline()
        super().data_received(data)
        is_too_long = self._head_bytes > 2 * self.settings.max_header_bytes + 4096
        if self._in_head and is_too_long and not self.transport.is_closing():
            self._refuse(431)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_deadline()
        self._take_host_of_target()
        super().on_headers_complete()

    def _take_host_of_target(self) -> None:
        """Of an absolute request target its own host counts, not the header's (RFC 9112, 3.2.2): that is what
        the guard looks at."""
        _, is_absolute, rest = self.url.partition(b"://")
        if is_absolute and not self.url.startswith(b"/"):
            authority = re.split(rb"[/?#]", rest, maxsplit=1)[0]
            others = [(name, value) for name, value in self.headers if name != b"host"]
            if len(self.headers) - len(others) <= 1:  # two are refused
                self.headers[:] = [*others, (b"host", authority)]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.settings.header_seconds, self._late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._in_head and not self.transport.is_closing():
            if self._head_bytes:
                self._refuse(408)
            else:
                self.transport.close()

    def _refuse(self, status: int) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer to an earlier request is on its way
            return
        body = _BODIES[status]
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (status, _PHRASES[status])
        self.transport.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        self.transport.close()
