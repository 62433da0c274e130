"""What every request passes before it is routed: Host, Origin, keys, sizes, deadlines.

One ASGI layer, so that no route can be without it. It reads the whole body, within its limits, and leaves
it in ``scope["state"]["body"]``; what ``receive`` gives afterwards is the client's going away.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_moe_jax.serve.http import errors
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.settings import Settings

PUBLIC = frozenset({"/health", "/livez"})
"""Paths that need no key."""

METHODS_WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


class Guard:
    """The ASGI layer."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        *,
        body_limit: Callable[[], int],
        public: frozenset[str] = PUBLIC,
        seen: Callable[[str, int], None] = lambda path, status: None,
    ):
        """Guards ``app``.

        Args:
          body_limit: bytes of a body now.
          public: paths that need no key for GET and HEAD.
          seen: told of each request's path and status.
        """
        self._app, self._settings, self._body_limit, self._seen = app, settings, body_limit, seen
        self._public = public
        self._hosts = {"localhost", socket.gethostname().lower(), settings.host.lower()}
        self._hosts |= {h.lower() for h in settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        state = scope.setdefault("state", {})
        state.setdefault("request_id", f"req_{secrets.token_hex(12)}")
        headers = _headers(scope)
        origin = headers.get("origin") if headers.get("origin") in self._settings.origins else None
        send = self._finishing(scope, send, state["request_id"], origin)
        try:
            self._check_head(scope, headers)
            state["key"] = self._check_key(scope, headers)
            state["body"] = await self._body(scope, headers, receive)
        except ApiError as error:
            await errors.respond(Request(scope), error)(scope, receive, send)
            return
        if origin and scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": _preflight()})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send)

    def _finishing(self, scope: Scope, send: Send, request_id: str, origin: str | None) -> Send:
        """Adds the headers of every response."""

        async def finish(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._seen(scope["path"], message["status"])
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                if origin:
                    extra += [(b"access-control-allow-origin", origin.encode()), (b"vary", b"origin")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        return finish

    # -- the head

    def _check_head(self, scope: Scope, headers: Mapping[str, str]) -> None:
        raw = scope["headers"]
        if len(raw) > self._settings.max_headers:
            raise ApiError(431, f"more than {self._settings.max_headers} headers")
        if sum(len(name) + len(value) for name, value in raw) > self._settings.max_header_bytes:
            raise ApiError(431, f"headers of more than {self._settings.max_header_bytes} bytes")
        names = [name for name, _ in raw]
        for single in (b"host", b"content-length", b"authorization", b"transfer-encoding"):
            if names.count(single) > 1:
                raise ApiError(400, f"the header {single.decode()} is there twice")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(400, "both Content-Length and Transfer-Encoding")
        self._check_host(headers.get("host"))
        self._check_origin(scope, headers)

    def _check_host(self, host: str | None) -> None:
        """A name that is not this server's is a page that makes a browser call here (DNS rebinding)."""
        name = host_name(host)
        if name is None:
            raise ApiError(403, "the Host header is missing or malformed")
        if name in self._hosts or name.endswith(".localhost"):
            return
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            raise ApiError(403, "this server does not answer for that Host (--allow-host)") from None
        if not address.is_loopback and self._settings.host in ("127.0.0.1", "::1", "localhost"):
            raise ApiError(403, "this server does not answer for that Host (--allow-host)")

    def _check_origin(self, scope: Scope, headers: Mapping[str, str]) -> None:
        origin = headers.get("origin")
        if origin in self._settings.origins:
            return
        if origin is not None:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or parts.netloc != headers.get("host"):
                raise ApiError(403, "this Origin may not call the server (--allow-origin)")
        is_read = scope["method"] in ("GET", "HEAD")
        if headers.get("sec-fetch-site") == "cross-site" and not (is_read and scope["path"] == "/"):
            raise ApiError(403, "a page of another site may not call the server (--allow-origin)")

    def _check_key(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """The name of the key that was brought, for queue and cache; "" where none is needed."""
        keys = self._settings.api_keys
        if not keys:
            return ""
        if scope["method"] in ("GET", "HEAD") and scope["path"] in self._public:
            return ""
        if scope["method"] == "OPTIONS" and headers.get("origin") in self._settings.origins:
            return ""  # a browser asks without a key
        given = headers.get("x-api-key") or ""
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given = token.strip()
        found = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(found):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return hashlib.sha256(keys[found.index(True)].encode()).hexdigest()[:16]

    # -- the body

    async def _body(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> bytes:
        if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise ApiError(415, "Content-Encoding: send the body as it is")
        limit = self._body_limit()
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise ApiError(400, "Content-Length is no number")
        if int(length) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes")
        if scope["method"] in METHODS_WITH_BODY:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "Content-Type must be application/json")
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                return await _read(receive, limit)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time") from None


async def _read(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client went away")
        body += message.get("body", b"")
        if len(body) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _preflight() -> list[tuple[bytes, bytes]]:
    allowed = b"authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
    return [
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", b"600"),
    ]


def host_name(host: str | None) -> str | None:
    """The name in a Host header, lower case, without port and final dot; None if it is malformed."""
    if not host or len(host) > 255 or any(c in host for c in "@/\\ ,?#"):
        return None
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        if not bracket or (port and not (port.startswith(":") and port[1:].isdigit())):
            return None
        return name.lower()
    name, colon, port = host.partition(":")
    if (colon and not port.isdigit()) or not name:
        return None
    return name.lower().removesuffix(".")
