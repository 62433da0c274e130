"""GET /openapi.json: what the endpoints take, from the same classes that check requests."""

from functools import cache
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3_moe_jax.serve.http import schemas

BODIES: dict[str, type[schemas.Body]] = {
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/completions": schemas.CompletionRequest,
    "/v1/responses": schemas.ResponsesRequest,
    "/v1/messages": schemas.MessagesRequest,
    "/v1/messages/count_tokens": schemas.CountTokensRequest,
    "/infill": schemas.InfillRequest,
    "/tokenize": schemas.TokenizeRequest,
    "/detokenize": schemas.DetokenizeRequest,
    "/apply-template": schemas.ApplyTemplateRequest,
    "/experts": schemas.ExpertsRequest,
}
READS = ("/v1/models", "/tokenizer_info", "/health", "/health/decode", "/livez", "/metrics", "/openapi.json")

_ERRORS = {
    "400": "the request is not valid",
    "401": "the API key is missing or wrong",
    "403": "Host or Origin is not allowed",
    "404": "there is no such model",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "415": "the body is no plain JSON",
    "429": "too many requests wait",
    "431": "the headers are too large",
    "500": "the engine failed",
    "501": "not served by this backend, or turned off",
    "503": "loading, draining, or dead",
}


@cache
def document() -> dict[str, Any]:
    """The description of the API (OpenAPI 3.1)."""
    bodies = BODIES.values()
    kinds: list[tuple[type[schemas.Body], JsonSchemaMode]] = [(kind, "validation") for kind in bodies]
    references, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    errors = {code: {"description": text} for code, text in _ERRORS.items()}
    answers = {"200": {"description": "the answer"}, **errors}
    paths: dict[str, Any] = {}
    for path, kind in BODIES.items():
        content = {"application/json": {"schema": references[kind, "validation"]}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"summary": kind.__doc__, "requestBody": body, "responses": answers}}
    for path in READS:
        paths[path] = {"get": {"responses": answers}}
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen3-moe serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {}), "securitySchemes": {"key": bearer}},
        "security": [{"key": []}, {}],
    }


async def openapi(request: Request) -> Response:
    """The description of the API."""
    return JSONResponse(document())
