"""The server on a cluster of Ray: fronts and engines are deployments of Ray Serve, which starts them, watches
them and starts them again.

``serve run qwen3_moe_jax.serve.ray_app:build model=/models/X.gguf replicas=4``; every option is in
``cluster.options.Options``. A front chooses the replica where one has read the beginning of a prompt: each
replica tells Ray Serve that it has loaded a "model" of its own name, and a request names the one it is for
(https://docs.ray.io/en/latest/serve/model-multiplexing.html). Where that one is gone or full, and for a new
prompt, Ray Serve chooses. Its routers can be replaced, too, but by an interface that it calls alpha.
"""

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncGenerator, Mapping

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
from ray.serve.exceptions import RayServeException  # pyright: ignore[reportMissingImports]
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_moe_jax.serve.cluster.forward import LostError, make_front
from qwen3_moe_jax.serve.cluster.host import Host
from qwen3_moe_jax.serve.cluster.options import Options, options_of
from qwen3_moe_jax.serve.cluster.wire import Ask, Piece

FRONT, ENGINE = "Front", "Engine"
"""Names of the deployments."""

REQUEST_ID = b"x-request-id"

HEALTH_SECONDS, HEALTH_TIMEOUT_SECONDS = 10, 30
"""How often Ray Serve asks an engine for its health, and how long it waits."""


class Engine:
    """A replica of the engines: a server's parts, whose engine is a child of this process."""

    async def __init__(self, options: Options):  # pyright: ignore[reportGeneralTypeIssues]
        """Returns when the model is loaded. Raises what ``Host.open`` raises."""
        name = serve.get_replica_context().replica_id.unique_id
        cores = None if options.gpus else options.cpus
        self._host = Host(name, options.settings(), options.start(), cores=cores)
        try:
            await self._host.open()
        except BaseException:
            await self._host.close()
            raise
        await self._have(name)

    @serve.multiplexed(max_num_models_per_replica=1)
    async def _have(self, name: str) -> str:
        """Tells Ray Serve that requests for this name are for this replica."""
        return name

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece]:
        """As ``Host.answer``."""
        async with contextlib.aclosing(self._host.answer(ask)) as pieces:
            async for piece in pieces:
                yield piece

    async def check_health(self) -> None:
        """Raises UnwellError: Ray Serve takes another replica in its place."""
        self._host.check()

    async def __del__(self):
        await self._host.close()


class Replicas:
    """The engines as a front asks them (``forward.Engines``)."""

    def __init__(self, app: str, room: int):
        """``app``: the name of the application; ``room`` as ``forward.Engines``."""
        self._app, self.room = app, room
        self._handle = serve.get_deployment_handle(ENGINE, app_name=app)

    async def ask(self, ask: Ask, engine: str) -> AsyncGenerator[Piece]:
        """The pieces of an answer, by the replica of this name where that is possible."""
        handle = self._handle.options(stream=True, multiplexed_model_id=engine)
        answer = handle.answer.remote(ask)
        try:
            async for piece in answer:
                yield piece
        except (RayError, RayServeException) as error:
            raise LostError(type(error).__name__) from None
        except (GeneratorExit, asyncio.CancelledError):  # its client has gone
            answer.cancel()
            raise

    async def states(self) -> Mapping[str, int]:
        """How many engines there are in each state."""
        status = await asyncio.to_thread(serve.status)
        found = status.applications[self._app].deployments[ENGINE].replica_states
        return {getattr(state, "value", str(state)): count for state, count in found.items()}


def _front(options: Options) -> type:
    """The class of the fronts."""

    def app():
        engines = Replicas(serve.get_replica_context().app_name, math.ceil(options.room / options.fronts))
        return _with_ids_of_serve(make_front(engines, options.front_settings()))

    @serve.ingress(app)
    class Front:
        """Takes requests of HTTP."""

        def __init__(self, engines: object):
            """``engines``: makes them part of the application."""

    return Front


def _with_ids_of_serve(app: ASGIApp) -> ASGIApp:
    """Requests have the id that Ray Serve has given them, and that it tells the client in a header."""

    async def changed(scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(REQUEST_ID, b"").decode("latin-1")
        if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII):
            scope.setdefault("state", {})["request_id"] = given

        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [h for h in message.get("headers", ()) if h[0].lower() != REQUEST_ID]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, without)

    return changed


def _deployment_options(options: Options) -> dict[str, object]:
    """Of the engines. What waits for them is bounded by the fronts (``Forward.check_room``)."""
    if options.max_replicas is None:
        number: dict[str, object] = {"num_replicas": options.replicas}
    else:
        scale = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        number = {"autoscaling_config": {**scale, "target_ongoing_requests": options.target}}
    return {
        **number,
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": options.gpus},
        "max_ongoing_requests": options.waves,
        "graceful_shutdown_timeout_s": options.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS,
    }


def build(args: dict[str, object]) -> "serve.Application":
    """The application, for ``serve run`` and for a file of ``serve deploy``.

    Args:
      args: names and values of ``cluster.options.Options``.

    Raises:
      OptionError: one of them is not known, or has a value that it cannot have.
    """
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    options = options_of(args, cluster_gpus=gpus)
    engines = serve.deployment(Engine, name=ENGINE, **_deployment_options(options)).bind(options)
    front = serve.deployment(
        _front(options),
        name=FRONT,
        num_replicas=options.fronts,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=options.max_queue + options.room + 64,  # and who asks how it goes
        graceful_shutdown_timeout_s=options.drain_timeout,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return front.bind(engines)
