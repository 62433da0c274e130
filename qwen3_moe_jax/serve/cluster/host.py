"""An engine of a cluster: the parts of a server in one process, with the engine in a child as everywhere."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator

import msgspec

from qwen3_moe_jax import loader
from qwen3_moe_jax.machine import threads
from qwen3_moe_jax.machine.environment import THREADS_VARIABLE
from qwen3_moe_jax.serve import headless
from qwen3_moe_jax.serve.cluster.wire import Ask, Piece, Taken, pieces
from qwen3_moe_jax.serve.engine import frames
from qwen3_moe_jax.serve.engine.places import devices_of
from qwen3_moe_jax.serve.http.app import make_api
from qwen3_moe_jax.serve.http.state import Service
from qwen3_moe_jax.serve.http.utilities import STALLED_SECONDS
from qwen3_moe_jax.serve.settings import Settings


class UnwellError(RuntimeError):
    """The engine does not answer any more; another process must take its place."""


class Host:
    """One engine.

    Attributes:
      name: what fronts know it by.
      service: its parts, once it is open.
    """

    service: Service

    def __init__(self, name: str, settings: Settings, start: frames.Start, *, cores: int | None = None):
        """Loads nothing yet.

        Args:
          name: what fronts know it by.
          settings: keys are the fronts' matter and are not asked for here.
          start: what to load; its model is looked for on this host.
          cores: that it may keep busy, for an engine on a CPU; None leaves it what it finds.
        """
        self.name, self._settings, self._start = name, settings, start
        self._stack = contextlib.AsyncExitStack()
        if cores is not None:
            share_of_cores(cores, start.mesh)

    async def open(self) -> None:
        """Returns when the engine is ready.

        Raises:
          ServeError, MemoryPlanError, ModelFileError, OptionError: it cannot start.
        """
        model = await asyncio.to_thread(loader.model_path, self._start.model)
        start = msgspec.structs.replace(self._start, model=str(model))
        self.service = await self._stack.enter_async_context(headless.engine(self._settings, start))
        self.app = make_api(self.service)
        if start.warm_up:
            self.service.grammars.launch()

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece]:
        """The pieces of an answer. A request that comes while the engine is started again waits for it.

        Raises:
          EngineLostError: there is no engine any more.
        """
        engine = self.service.engine
        await headless.until_up(engine)
        ready = engine.loaded()
        yield Taken(self.name, ready.context, sum(slots * context for slots, context in ready.rows))
        async with contextlib.aclosing(pieces(self.app, ask)) as found:
            async for piece in found:
                yield piece

    def check(self) -> None:
        """Raises UnwellError: the engine is not started again, or is silent while it should write."""
        engine = self.service.engine
        if engine.fault:
            raise UnwellError(engine.fault)
        silent = time.monotonic() - engine.last_token
        if engine.health == "ok" and engine.active and silent > STALLED_SECONDS:
            raise UnwellError(f"the engine has written nothing for {silent:.0f} s")

    async def close(self) -> None:
        """Ends the engine process; again is no fault."""
        await self._stack.aclose()


def share_of_cores(cores: int, mesh: str | None) -> None:
    """Keeps this process and its children to so many cores, unless the user has said how many."""
    os.environ.setdefault(threads.VARIABLE, str(cores))
    os.environ.setdefault(THREADS_VARIABLE, str(max(cores, devices_of(mesh))))
