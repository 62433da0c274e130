"""From settings to a running server, and back: start, drain, end."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence

import msgspec
import uvicorn

from qwen3_moe_jax.core import interrupts, terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.serve.engine import frames, relay
from qwen3_moe_jax.serve.engine.client import EngineClient
from qwen3_moe_jax.serve.engine.places import Place, places_for
from qwen3_moe_jax.serve.engine.replicas import Engine, Replicas
from qwen3_moe_jax.serve.grammar import Grammars
from qwen3_moe_jax.serve.http.app import make_app
from qwen3_moe_jax.serve.http.metrics import Metrics
from qwen3_moe_jax.serve.http.protocol import BoundedProtocol
from qwen3_moe_jax.serve.http.state import Service, in_thread
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.serve.text_model import TextModel
from qwen3_moe_jax.text.chat_template import start_renderer

BACKLOG = 2048

UNBOUNDED = 1 << 62

SECONDS_TO_LOOK = 0.2
"""How often it is looked whether the engine's other processes are there."""


class ServeError(RuntimeError):
    """The server cannot start as asked."""


def check_address(settings: Settings) -> None:
    """Refuses to serve everybody on the network without a key.

    Raises:
      OptionError: the address is not this machine's alone, and there is no key.
    """
    if settings.api_keys:
        return
    try:
        is_local = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_local = settings.host == "localhost"
    if not is_local:
        raise OptionError(
            f"--host {settings.host} can be reached by others: give --api-key-file, or use 127.0.0.1"
        )


def make_service(settings: Settings, start: frames.Start, replicas: int = 1) -> Service:
    """The parts of a server; the engines, one for each replica, are not started yet.

    Raises:
      ModelFileError: the model cannot be read.
      OptionError: the model does not take so long a context; there are too few GPUs.
      MemoryPlanError: main memory does not hold so many replicas.
    """
    relay.check(start, replicas)
    model = TextModel(start.model, name=settings.name)
    if start.context is not None and start.context > model.context:
        raise OptionError(f"a context of {start.context} tokens: this model takes from 2 to {model.context}")
    path = str(start.model or embedded_model())
    engine = EngineClient(start) if replicas == 1 else _replicas(start, places_for(start, replicas))
    return Service(settings, engine, model, Grammars(model, settings, path), Metrics())


def _replicas(start: frames.Start, places: Sequence[Place]) -> Engine:
    """Engines of which each has one of the places; what waits is bounded here."""

    def make(number: int, ids: Iterator[int]) -> EngineClient:
        place = places[number]
        own = msgspec.structs.replace(
            start, slot_bytes=place.slot_bytes, max_queue=UNBOUNDED, max_queue_tokens=UNBOUNDED
        )
        return EngineClient(own, variables=place.variables, ids=ids)

    return Replicas(make, len(places))


class _WithoutTracebacks(logging.Filter):
    """Logs say that a request failed, not with which values."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and not os.environ.get("QWEN3_MOE_DEBUG"):
            kind = record.exc_info[0]
            if kind in (GeneratorExit, asyncio.CancelledError):
                return False  # a request that was given up, by the second signal, say
            record.msg, record.args = f"a request failed: {kind.__name__ if kind else 'unknown'}", ()
            record.exc_info = record.exc_text = None
        return True


class _Notes(logging.Handler):
    """Logs go the way of all that is no result: escaped, and dropped where nobody can read them."""

    def emit(self, record: logging.LogRecord) -> None:
        terminal.note(*f"{record.levelname.lower()}: {self.format(record)}".splitlines())


def _log_to_notes() -> None:
    """Sends what uvicorn logs to standard error; its own handlers need one that is open."""
    log = logging.getLogger("uvicorn")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        handler = _Notes()
        handler.addFilter(_WithoutTracebacks())
        log.addHandler(handler)
    log.propagate = False


async def tell_of_template(service: Service, say: Callable[[str], None]) -> None:
    """Says, while the model is loaded, that its template renders no chat; plain prompts need none."""
    fault = await in_thread(service.model.template_fault)
    if fault is not None:
        say(f"warning: chats will be refused: {fault}")


class Server:
    """One server in the running event loop.

    Attributes:
      port: what it listens on, once it has started.
    """

    def __init__(self, service: Service, say: Callable[[str], None] = lambda text: None):
        self.service, self._say = service, say
        settings = service.settings
        protocol = type("Protocol", (BoundedProtocol,), {"settings": settings})
        config = uvicorn.Config(
            make_app(service),
            http=protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            timeout_keep_alive=int(settings.header_seconds) or 1,
            timeout_graceful_shutdown=1,
            backlog=BACKLOG,
        )
        self._uvicorn = uvicorn.Server(config)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._socket = _listen(settings.host, settings.port)
        self.port: int = self._socket.getsockname()[1]
        _log_to_notes()

    @property
    def is_listening(self) -> bool:
        """Whether connections are accepted."""
        return self._uvicorn.started

    async def run(self) -> int:
        """Serves until ``stop``; the exit code."""
        engine = self.service.engine
        start_renderer()
        engine.say = self._say
        engine.launch()
        if engine.start.warm_up:
            self.service.grammars.launch()
        telling = asyncio.ensure_future(tell_of_template(self.service, self._say))
        serving = asyncio.ensure_future(self._serve())
        failed = asyncio.ensure_future(self._has_failed())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({serving, stopping, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done() and engine.fault and engine.ready is None:
                raise ServeError(engine.fault)
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            for task in (failed, stopping, telling):
                task.cancel()
            await self.service.close()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        return 0

    async def _serve(self) -> None:
        await self._uvicorn._serve([self._socket])

    async def _has_failed(self) -> None:
        """Returns when there is no engine and was none; or none any more, if it was in several processes."""
        engine = self.service.engine
        await engine.first_ready.wait()
        if engine.ready is not None and engine.start.processes is None:
            await asyncio.Event().wait()
        while not engine.fault:
            await asyncio.sleep(SECONDS_TO_LOOK)

    def stop(self) -> None:
        """The first call drains, the second ends at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _drain(self) -> None:
        """Refuses what is new, and lets answers end for a while."""
        engine, seconds = self.service.engine, self.service.settings.drain_seconds
        engine.is_draining = True
        self._say(f"draining: {engine.active} answers have {seconds:g} s to end")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while engine.active and not self._hurry.is_set():
                    await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)  # last events are on their way


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # two servers may bind one port; the second to listen is told
    except OSError as error:
        listener.close()
        raise ServeError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    listener.set_inheritable(False)
    return listener


def serve(settings: Settings, start: frames.Start, replicas: int = 1) -> int:
    """Serves until SIGTERM, SIGHUP or Ctrl-C; returns the exit code.

    Raises:
      ServeError: it cannot start.
      OptionError, ModelFileError, MemoryPlanError: as ``check_address`` and ``make_service``.
    """
    check_address(settings)
    service = make_service(settings, start, replicas)
    say = lambda text: terminal.note(*text.splitlines())

    async def main() -> int:
        server = Server(service, say)
        loop = asyncio.get_running_loop()
        for number in interrupts.endings():
            loop.add_signal_handler(number, server.stop)
        say(
            f"{service.name} on http://{settings.host}:{server.port} (loading); limits:\n"
            f"{settings.describe()}" + (f"\n  replicas = {replicas}" if replicas > 1 else "")
        )
        return await server.run()

    return asyncio.run(main())
