"""The front of a cluster: an application that has its requests answered by engines of other processes.

A request goes to the engine that has read its beginning, as ``affinity`` has it for the engines of one host,
unless that one has much more to do; else whoever carries the requests chooses. Where an engine is lost, a
request of which the client has seen nothing is asked again; a stream that has begun ends with the error event
of its protocol.
"""

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen3_moe_jax.serve.cluster.beginnings import blocks_of_body
from qwen3_moe_jax.serve.cluster.wire import Ask, Head, Last, Piece, Taken
from qwen3_moe_jax.serve.engine.affinity import SentBlocks, worth
from qwen3_moe_jax.serve.engine.client import EngineDiedError
from qwen3_moe_jax.serve.engine.prefix import UNIT
from qwen3_moe_jax.serve.http import errors
from qwen3_moe_jax.serve.http.app import public_paths
from qwen3_moe_jax.serve.http.broken import Watched
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.http.guard import Guard
from qwen3_moe_jax.serve.http.streams import ClientGone, until_gone
from qwen3_moe_jax.serve.settings import Settings

MAX_TRIES = 3
"""A request that loses so many engines is thought to be the cause, and ends with an error."""

OK = "RUNNING"
"""The state of an engine that takes requests."""


class LostError(RuntimeError):
    """The engine that had a request, or should have got it, is gone."""


class Engines(Protocol):
    """What carries requests to engines: all that it is given, however many wait.

    Attributes:
      room: requests that the engines have at a time; of several fronts, this one's share of them.
    """

    room: int

    def ask(self, ask: Ask, engine: str) -> AsyncGenerator[Piece]:
        """The pieces of an answer by the engine of this name, if it is there and has room, or by another.

        Raises:
          LostError
        """
        ...

    async def states(self) -> Mapping[str, int]:
        """How many engines there are in each state; ``OK`` is one of them."""
        ...


@dataclass
class Known:
    """An engine that has answered.

    Attributes:
      active: requests from here that it works on.
    """

    sent: SentBlocks = field(default_factory=SentBlocks)
    active: int = 0


class Forward:
    """The application. A guard is before it.

    Attributes:
      known: engines by their names.
      context: tokens that a sequence may have; 0 until an engine has said so.
      active: requests that have a place here: engines have them, or they wait for one.
    """

    def __init__(self, engines: Engines, settings: Settings):
        self._engines, self._settings = engines, settings
        self.known: dict[str, Known] = {}
        self.context = self.active = 0

    def check_room(self) -> None:
        """Raises ApiError, 429, where as many wait as may.

        What waits is counted here, from its arrival on. Who carries requests knows what has come to an
        engine only afterwards: a count there takes many that come at once for more than they are, or fewer.
        """
        taken = sum(known.active for known in self.known.values())
        if self.active >= max(self._engines.room, taken) + self._settings.max_queue:
            raise errors.full()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        query = scope.get("query_string", b"")
        ask = Ask(scope["method"], scope["path"], query, state["body"], state["key"], state["request_id"])
        try:
            await until_gone(receive, self._forward(ask, _Reply(ask, send)))
        except ApiError as error:
            await errors.respond(Request(scope), error)(scope, receive, send)
        except ClientGone:
            return

    async def _forward(self, ask: Ask, reply: "_Reply") -> None:
        place = Place(self)
        try:
            is_whole = await self._tries(ask, reply, place)
        finally:
            place.give_back()  # before the client can know that its answer has ended
        await (reply.end() if is_whole else reply.fail(_died()))

    async def _tries(self, ask: Ask, reply: "_Reply", place: "Place") -> bool:
        """Takes an engine's answer into ``reply``: whether it is whole, or a stream that broke off.

        Raises:
          ApiError: it is neither.
        """
        blocks = blocks_of_body(ask.body, ask.key) if ask.body else []
        for number in range(1, MAX_TRIES + 1):
            reply.begin()
            try:
                async with contextlib.aclosing(self._pieces(ask, blocks)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Last) and reply.is_stream:
                            place.give_back()  # its last event goes out
                        await reply.take(piece)
            except LostError:
                if not reply.is_whole and reply.has_begun:
                    return False
                if not reply.is_whole:
                    continue
            if number == MAX_TRIES or not reply.failed:
                return True
        raise _died()

    async def _pieces(self, ask: Ask, blocks: Sequence[int]) -> AsyncGenerator[Piece]:
        """As ``Engines.ask``, of the engine that has the request's beginning."""
        name, known = self._best(blocks), None
        async with contextlib.aclosing(self._engines.ask(ask, name)) as pieces:
            try:
                taken = await self._first(pieces)
                name = taken.engine
                known = self._noted(taken, blocks)
                yield taken
                async for piece in pieces:
                    yield piece
            except LostError:
                self.known.pop(name, None)
                raise
            finally:
                if known is not None:
                    known.active -= 1

    async def _first(self, pieces: AsyncGenerator[Piece]) -> Taken:
        try:
            async with asyncio.timeout(self._settings.queue_seconds):
                taken = await anext(pieces)
        except TimeoutError:
            raise ApiError(503, "no engine took the request in time; try again later") from None
        assert isinstance(taken, Taken)  # an engine says first who it is
        return taken

    def _best(self, blocks: Sequence[int]) -> str:
        """The engine that has most of a prompt, unless another one has much less to do; "" is any."""
        match = {name: known.sent.match(blocks) for name, known in self.known.items()}
        best = max(match, key=lambda name: (match[name], -self.known[name].active), default="")
        if not best or not match[best]:
            return ""
        least_active = min(known.active for known in self.known.values())
        return best if self.known[best].active - worth(match[best]) <= least_active else ""

    def _noted(self, taken: Taken, blocks: Sequence[int]) -> Known:
        known = self.known.setdefault(taken.engine, Known())
        known.sent.capacity = taken.positions // UNIT
        known.sent.add(blocks)
        known.active += 1
        self.context = taken.context
        return known


class Place:
    """Of a request, from its arrival until its answer has ended."""

    def __init__(self, forward: Forward):
        """Raises ApiError, 429, where there is none."""
        forward.check_room()
        forward.active += 1
        self._forward: Forward | None = forward

    def give_back(self) -> None:
        """Ends it; again is no fault."""
        if self._forward is not None:
            self._forward.active -= 1
            self._forward = None


def _died() -> ApiError:
    found = errors.as_api_error(EngineDiedError())
    assert found is not None  # it is one that clients are told of
    return found


class _Reply:
    """A reply on its way to its client: what streams at once, the rest when it is whole.

    Attributes:
      has_begun: the client has got something.
      is_whole: nothing follows.
    """

    def __init__(self, ask: Ask, send: Send):
        self._ask, self._send = ask, send
        self._watched = Watched(ask.path, ask.request_id)
        self.has_begun = False
        self.begin()

    def begin(self) -> None:
        """Nothing is known of it."""
        self._engine = ""
        self._head: Head | None = None
        self._body: list[bytes] = []
        self.is_whole = False

    @property
    def is_stream(self) -> bool:
        """Whether its client gets it while it is written."""
        return self._head is not None and self._head.is_stream

    @property
    def failed(self) -> bool:
        """Whether the engine's process died, or it takes nothing now: another one may do better."""
        if self.has_begun or self._head is None or self._head.status not in (500, 503):
            return self._head is None
        try:
            error = json.loads(b"".join(self._body))["error"]
            return self._head.status == 503 or error.get("code") != "internal"
        except (ValueError, KeyError, AttributeError):
            return False

    async def take(self, piece: Piece) -> None:
        """The next piece."""
        if isinstance(piece, Taken):
            self._engine = piece.engine
            return
        if isinstance(piece, Head):
            self._head = piece
            return
        self.is_whole = isinstance(piece, Last)
        body = piece.body if isinstance(piece, Last) else piece
        if not self.is_stream:
            self._body.append(body)
            return
        self._watched.push(body)
        await self._start()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _start(self) -> None:
        if self.has_begun:
            return
        self.has_begun = True
        head = self._head or Head(500, [])
        headers = [*head.headers, (b"x-engine", self._engine.encode())]
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def end(self) -> None:
        """All has come."""
        if self._head is None:
            raise _died()
        await self._start()
        await self._send({"type": "http.response.body", "body": b"".join(self._body)})

    async def fail(self, error: ApiError) -> None:
        """Its engine is lost in the middle of a stream."""
        await self._send(
            {"type": "http.response.body", "body": self._watched.failure(error), "more_body": True}
        )
        await self._send({"type": "http.response.body", "body": b""})


def _routes(forward: Forward, engines: Engines) -> list[Route]:
    """What a front answers itself."""

    async def livez(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def health(request: Request) -> Response:
        states = dict(await engines.states())
        is_ok = states.get(OK, 0) > 0
        requests = {name: known.active for name, known in forward.known.items()}
        found = {"status": "ok" if is_ok else "loading", "engines": states, "requests": requests}
        return JSONResponse(found, 200 if is_ok else 503)

    async def metrics(request: Request) -> Response:
        return errors.respond(request, ApiError(501, "the cluster has the metrics: a front has none"))

    answers = {"/livez": livez, "/health": health, "/health/decode": health, "/metrics": metrics}
    return [Route(path, call, methods=["GET"]) for path, call in answers.items()]


async def _on_fault(request: Request, error: Exception) -> Response:
    return errors.respond(request, error)


def make_front(engines: Engines, settings: Settings) -> ASGIApp:
    """The application of a front, with its guard. Without API keys it serves this machine alone."""
    forward = Forward(engines, settings)
    app = Starlette(routes=_routes(forward, engines), exception_handlers={Exception: _on_fault})
    app.router.default = forward
    app.router.redirect_slashes = False
    guard = Guard(
        app,
        settings,
        body_limit=lambda: settings.body_limit(forward.context),
        public=public_paths(settings),
    )
    return guard if settings.api_keys else _this_machine_alone(guard)


def _this_machine_alone(app: ASGIApp) -> ASGIApp:
    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_local(scope.get("client")):
            scope.setdefault("state", {})["request_id"] = ""
            error = ApiError(403, "without an API key this machine alone is served: give api_key_file")
            await errors.respond(Request(scope), error)(scope, receive, send)
            return
        await app(scope, receive, send)

    return checked


def _is_local(client: tuple[str, int] | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
