"""A batch's requests on a cluster of Ray: an actor for each engine, on whichever host has room.

Ray's actors and not Ray Data: a batch's results go into one file, in the order in which they end, each on the
disk before its request counts as answered. Ray Data writes files of its own, block by block.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import ray  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]

from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.serve.batch.run import MAX_TRIES, OneEngine, Reply
from qwen3_moe_jax.serve.cluster.host import Host
from qwen3_moe_jax.serve.cluster.options import Options
from qwen3_moe_jax.serve.engine.client import MAX_RESTARTS, RESTART_SECONDS, EngineDiedError
from qwen3_moe_jax.serve.engine.frames import Ready, Start
from qwen3_moe_jax.serve.headless import EngineLostError
from qwen3_moe_jax.serve.http.errors import as_api_error
from qwen3_moe_jax.serve.run import ServeError
from qwen3_moe_jax.serve.settings import Settings

CONNECT_SECONDS = 10.0

MAX_CALLS = 1000
"""Calls that an actor takes at a time: more than it ever gets."""


class Actor:
    """An engine in a process of the cluster."""

    def __init__(self, settings: Settings, start: Start, cores: int | None):
        self._host = Host("", settings, start, cores=cores)

    async def open(self) -> Ready:
        """Loads the model. Raises what ``Host.open`` raises."""
        await self._host.open()
        self._engine = OneEngine(self._host.service)
        return self._host.service.engine.loaded()

    async def ask(self, url: str, body: bytes) -> tuple[Reply, float]:
        """As ``OneEngine``: an answer, and the seconds that programs have taken so far."""
        reply = await self._engine.ask(url, body)
        return reply, self._engine.program_seconds


class Worker:
    """One actor at a time, started again when it dies.

    Attributes:
      ready: what its engine said when it was loaded; None while there is none.
      fault: why there is none any more; empty while there is hope.
      active: requests that it has.
      program_seconds: that it has waited for programs.
    """

    def __init__(self, make: Callable[[], Any], on_news: Callable[[], None]):
        self._make, self._on_news = make, on_news
        self.ready: Ready | None = None
        self.fault = ""
        self.active, self.program_seconds = 0, 0.0
        self._actor: Any = None
        self._deaths: deque[float] = deque()
        self._died = asyncio.Event()

    async def keep(self) -> None:
        """Starts actors until there is no hope."""
        while not self.fault:
            self._died.clear()
            self._actor = self._make()
            try:
                self.ready = await self._actor.open.remote()
                self._on_news()
                await self._died.wait()
            except (
                RayTaskError
            ) as error:  # the model cannot be loaded there, which the next try would find too
                self.fault = " ".join(str(error.cause).split())
            except RayError:
                self._count_death()
            finally:
                self.ready = None
                ray.kill(self._actor)
                self._on_news()

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            self.fault = f"an engine died {len(self._deaths)} times in {RESTART_SECONDS:.0f} s"

    async def ask(self, url: str, body: bytes) -> Reply:
        """As ``Actor.ask``.

        Raises:
          RayError: the actor is gone.
        """
        actor = self._actor
        self.active += 1
        try:
            reply, self.program_seconds = await actor.ask.remote(url, body)
            return reply
        except RayError:
            if actor is self._actor and self.ready is not None:
                self.ready = None
                self._count_death()
                self._died.set()
            raise
        finally:
            self.active -= 1
            self._on_news()


class Workers:
    """The engines of a cluster as a batch asks them (``run.Answerer``)."""

    def __init__(self, count: int, make: Callable[[], Any], *, ahead: int):
        """Starts nothing yet.

        Args:
          count: engines.
          make: an actor.
          ahead: requests that each has beside those in its slots.
        """
        self._news = asyncio.Event()
        self._ahead = ahead
        self.workers = [Worker(make, self._news.set) for _ in range(count)]
        self.slots = 0

    @property
    def program_seconds(self) -> float:
        """Of the one that has waited longest."""
        return max(worker.program_seconds for worker in self.workers)

    async def first(self) -> Ready:
        """What the first engine says that is loaded.

        Raises:
          ServeError: none can be loaded.
        """
        try:
            worker = await self._free()
        except EngineLostError as error:
            raise ServeError(str(error)) from None
        assert worker.ready is not None  # it is free
        self.slots = worker.ready.slots * len(self.workers)
        return worker.ready

    async def ask(self, url: str, body: bytes) -> Reply:
        """As ``run.Answerer.ask``; a request whose engine dies goes to another one."""
        for _ in range(MAX_TRIES):
            worker = await self._free()
            with contextlib.suppress(RayError):
                return await worker.ask(url, body)
        error = as_api_error(EngineDiedError())
        assert error is not None  # it is one that clients are told of
        return Reply(error.status, "req_lost", error.body())

    async def _free(self) -> Worker:
        """The one with least to do, once one has room.

        Raises:
          EngineLostError: there is no hope for any.
        """
        while True:
            self._news.clear()
            able = [w for w in self.workers if w.ready is not None and w.active < w.ready.slots + self._ahead]
            if able:
                return min(able, key=lambda worker: worker.active)
            if all(worker.fault for worker in self.workers):
                faults = dict.fromkeys(worker.fault for worker in self.workers)
                raise EngineLostError("; ".join(faults))
            await self._news.wait()


@contextlib.asynccontextmanager
async def engines(
    options: Options, settings: Settings, start: Start, *, ahead: int
) -> AsyncIterator[Workers]:
    """The engines of the cluster that this process is connected to; one of them is ready.

    Raises:
      ServeError: none can be loaded.
    """
    actor = ray.remote(Actor).options(
        num_cpus=options.cpus,
        num_gpus=options.gpus,
        max_concurrency=MAX_CALLS,
        scheduling_strategy="SPREAD",
    )
    cores = None if options.gpus else options.cpus
    workers = Workers(options.replicas, lambda: actor.remote(settings, start, cores), ahead=ahead)
    tasks = [asyncio.ensure_future(worker.keep()) for worker in workers.workers]
    try:
        yield workers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def connected(address: str):
    """A connection to a cluster; gives its resources: GPU and CPU, of all hosts together.

    Raises:
      OptionError: there is no such cluster.
    """
    advice = "start one with 'ray start --head', and give its HOST:PORT"
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection(
                (host.strip("[]"), int(port)), CONNECT_SECONDS
            ).close()  # Ray tries for ever
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise OptionError(f"--ray {address}: no cluster answers ({text}): {advice}") from None
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def as_many_as_fit(options: Options, resources: dict[str, float], asked: int | None) -> Options:
    """The options with as many engines as are asked for, or as the cluster has room for.

    Raises:
      OptionError: it has not so much.
    """
    needed = {"GPU": options.gpus or 0, "CPU": options.cpus}
    room = min(int(resources.get(kind, 0) // count) for kind, count in needed.items() if count)
    if room < (asked or 1):
        have = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in needed)
        each = ", ".join(f"{count:g} {kind}" for kind, count in needed.items() if count)
        raise OptionError(f"--replicas {asked or 1}: an engine takes {each}; the cluster has {have}")
    return msgspec.structs.replace(options, replicas=asked or room)
