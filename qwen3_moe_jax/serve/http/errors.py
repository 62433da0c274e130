"""Errors as clients read them. Nothing of the machine, of keys or of prompts is in them."""

import re
from typing import Any

import pydantic
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3_moe_jax.serve.engine.client import EngineError
from qwen3_moe_jax.serve.grammar import SchemaError, TooManyGrammarsError
from qwen3_moe_jax.text.chat_template import MessageError, TemplateError

RETRY_SECONDS = 2
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
KINDS |= {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}

_UNSAFE = re.compile(r"0x[0-9a-fA-F]{6,}|(?:/[\w.\-]+){2,}|<[\w.]+ object at [^>]*>")


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        self.status, self.code, self.param = status, code, param
        self.message = _UNSAFE.sub("...", message)[:1000]
        super().__init__(self.message)

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """In Anthropic's form."""
        fields = {"type": self.kind, "message": self.message}
        return {"type": "error", "error": fields, "request_id": request_id}

    def headers(self) -> dict[str, str]:
        found = {"retry-after": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def full() -> ApiError:
    """Too many requests wait."""
    return ApiError(429, "the server is busy: too many requests wait; try again later", code="queue_full")


_ENGINE = {"unavailable": 503, "queue_full": 429, "invalid": 400, "engine": 500}


def as_api_error(error: Exception) -> ApiError | None:
    """What a client is told of an error; None for a bug of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(_ENGINE.get(error.code, 500), str(error), code=error.code)
    if isinstance(error, pydantic.ValidationError):
        return _of_validation(error)
    if isinstance(error, SchemaError):
        return ApiError(
            400, f"the schema cannot be used: {error}", code="invalid_schema", param="response_format"
        )
    if isinstance(error, TooManyGrammarsError):
        return ApiError(429, "too many answers are constrained; try again later", code="queue_full")
    if isinstance(error, MessageError | TemplateError):
        return ApiError(400, str(error), code="invalid_messages", param="messages")
    return None


def _of_validation(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).endswith("]"))[:100]
    return ApiError(
        400, f"{place}: {first['msg']}" if place else first["msg"], code="invalid_value", param=place
    )


def respond(request: Request, error: Exception) -> Response:
    """The response to an error; a bug of ours says no more than that it is one."""
    found = as_api_error(error) or ApiError(500, "the server failed", code="internal")
    request_id = request.state.request_id
    is_anthropic = request.url.path.rstrip("/").endswith(("/messages", "/count_tokens"))
    body = found.anthropic_body(request_id) if is_anthropic else found.body()
    return JSONResponse(body, found.status, found.headers())
