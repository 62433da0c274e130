"""A server in a thread of this process, with its engine in a child: what tests and benches talk to."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.serve.engine.frames import Start
from qwen3_moe_jax.serve.engine.replicas import Engine
from qwen3_moe_jax.serve.http.state import Service
from qwen3_moe_jax.serve.run import Server, make_service
from qwen3_moe_jax.serve.settings import Settings


def quick_start(path, **options) -> Start:
    """An engine that starts quickly: nothing is checked or compiled beforehand. Options as ``Start``."""
    defaults = {"backend": "jax", "gate": False, "warm_up": False, "slots": 4, "context": 1024}
    return Start(str(path), **{**defaults, **options})


@dataclass
class Running:
    """A server that answers.

    Attributes:
      url: where.
      service: its parts; to be touched from ``loop`` alone, or only read.
    """

    url: str
    port: int
    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop


@contextlib.contextmanager
def running(
    settings: Settings,
    start: Start,
    *,
    wait: bool = True,
    engine: Engine | None = None,
    replicas: int = 1,
) -> Iterator[Running]:
    """A server until the block ends.

    Args:
      wait: for its engine to be ready.
      engine: in place of a child process.
      replicas: how many child processes.
    """
    service = make_service(settings, start, replicas)
    service.engine = engine or service.engine
    made: dict[str, Any] = {}
    has_begun = threading.Event()

    async def main() -> None:
        made["loop"], made["server"] = asyncio.get_running_loop(), Server(service)
        task = asyncio.ensure_future(made["server"].run())
        if wait:
            await service.engine.first_ready.wait()
        while not (made["server"].is_listening or task.done()):
            await asyncio.sleep(0.005)
        has_begun.set()
        await task

    def work() -> None:
        """As the command does: requests that are open at the end are cancelled, then the loop is closed."""
        try:
            asyncio.run(main())
        finally:
            has_begun.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    has_begun.wait(300)
    server, loop = made["server"], made["loop"]
    try:
        yield Running(f"http://127.0.0.1:{server.port}", server.port, service, server, loop)
    finally:
        for _ in range(2):
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(server.stop)
        thread.join(30)
