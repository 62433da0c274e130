"""The routes, and the ASGI application."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler

from qwen3_moe_jax.serve.http import chat, completions, errors, openapi, utilities
from qwen3_moe_jax.serve.http import messages as anthropic
from qwen3_moe_jax.serve.http import responses as openai_responses
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.http.guard import PUBLIC, Guard
from qwen3_moe_jax.serve.http.site import PAGE_PATHS, page
from qwen3_moe_jax.serve.http.state import Service
from qwen3_moe_jax.serve.http.streams import ClientGone
from qwen3_moe_jax.serve.settings import Settings

Endpoint = Callable[[Request], Awaitable[Response]]

POSTS: dict[str, Endpoint] = {
    "/v1/chat/completions": chat.chat_completions,
    "/v1/completions": completions.completions,
    "/v1/responses": openai_responses.responses,
    "/v1/messages": anthropic.messages,
    "/v1/messages/count_tokens": anthropic.count_tokens,
    "/infill": completions.infill,
    "/tokenize": utilities.tokenize,
    "/detokenize": utilities.detokenize,
    "/apply-template": utilities.apply_template,
    "/experts": utilities.experts,
}
GETS: dict[str, Endpoint] = {
    "/v1/models": utilities.models,
    "/v1/models/{name:path}": utilities.model,
    "/tokenizer_info": utilities.tokenizer_info,
    "/health": utilities.health,
    "/health/decode": utilities.health_decode,
    "/livez": utilities.livez,
    "/metrics": utilities.metrics,
    "/openapi.json": openapi.openapi,
}


def _routes(table: dict[str, Endpoint], method: str) -> list[Route]:
    """Each path, and OpenAI's also without its /v1."""
    found = [Route(path, call, methods=[method]) for path, call in table.items()]
    short = [(p.removeprefix("/v1"), c) for p, c in table.items() if p.startswith("/v1/")]
    return found + [Route(path, call, methods=[method]) for path, call in short]


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    return errors.respond(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such path", 405: "this path has no such method"}
    return errors.respond(request, ApiError(error.status_code, words.get(error.status_code, "refused")))


async def _root(request: Request) -> Response:
    if request.app.state.service.settings.page:
        return await page(request)
    return JSONResponse({"status": "ok"})


def make_app(service: Service) -> ASGIApp:
    """The application with its guard."""
    app = make_api(service)
    known = {route.path for route in app.routes if isinstance(route, Route)}

    def seen(path: str, status: int) -> None:
        service.metrics.requests.labels(path if path in known else "other", str(status)).inc()

    return Guard(
        app,
        service.settings,
        body_limit=lambda: service.settings.body_limit(service.context),
        public=public_paths(service.settings),
        seen=seen,
    )


def public_paths(settings: Settings) -> frozenset[str]:
    """Paths that need no key."""
    return PUBLIC | frozenset(PAGE_PATHS if settings.page else ())


def make_api(service: Service) -> Starlette:
    """The application without its guard: who calls it leaves key, body and request_id in the state."""
    from qwen3_moe_jax.serve.engine.client import EngineError
    from qwen3_moe_jax.serve.grammar import SchemaError, TooManyGrammarsError

    handlers: dict[Any, ExceptionHandler] = {HTTPException: _on_http_error}
    kinds = (ApiError, EngineError, SchemaError, TooManyGrammarsError, ValueError, ClientGone, Exception)
    handlers |= dict.fromkeys(kinds, _on_error)
    pages = PAGE_PATHS if service.settings.page else ()
    routes = _routes(POSTS, "POST") + _routes(GETS, "GET")
    routes += [
        Route("/", _root, methods=["GET"]),
        *(Route(p, page, methods=["GET"]) for p in pages if p != "/"),
    ]
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.service = service
    return app
