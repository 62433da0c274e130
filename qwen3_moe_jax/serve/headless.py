"""The parts of a server, with an engine that runs, without its socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.serve.engine import frames
from qwen3_moe_jax.serve.engine.replicas import Engine
from qwen3_moe_jax.serve.http.state import Service
from qwen3_moe_jax.serve.run import ServeError, make_service, tell_of_template
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.text.chat_template import start_renderer


class EngineLostError(RuntimeError):
    """There is no engine any more."""


@contextlib.asynccontextmanager
async def engine(
    settings: Settings, start: frames.Start, say: Callable[[str], None] = terminal.note
) -> AsyncIterator[Service]:
    """The parts of a server, with an engine that is ready, without its socket; ``say`` is told of faults.

    Raises:
      ServeError, MemoryPlanError: it cannot start.
    """
    service = make_service(settings, start)
    start_renderer()
    service.engine.launch()
    try:
        await tell_of_template(service, say)
        await service.engine.first_ready.wait()
        if service.engine.ready is None:
            kind = MemoryPlanError if service.engine.fault_code == ExitCode.MEMORY else ServeError
            raise kind(service.engine.fault)
        yield service
    finally:
        await service.close()


async def until_up(engine: Engine) -> None:
    """Waits until the engine takes requests; one that died is being started again.

    Raises:
      EngineLostError: it is not started again.
    """
    while engine.health != "ok":
        if engine.fault or engine.is_draining:
            raise EngineLostError(f"{engine.fault or 'the engine ends'}: try again")
        await asyncio.sleep(0.05)
