"""A request's JSON, strictly: no NaN, no repeated keys, no endless numbers or nesting, no half characters."""

import json
import re
from typing import Any

from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.settings import Settings

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(body: bytes, settings: Settings) -> dict[str, Any]:
    """The object in a body.

    Raises:
      ApiError: 400, it is none, or goes over a limit.
    """
    if _depth(body) > settings.max_json_depth:
        raise ApiError(400, f"the JSON is nested deeper than {settings.max_json_depth}", code="invalid_json")

    def integer(text: str) -> int:
        if len(text) > settings.max_int_digits:
            raise ValueError("a number has too many digits")
        return int(text)

    # a call for each number of a prompt of token ids takes longer than all else: only where one is long
    is_long = re.search(rb"[0-9]{%d}" % settings.max_int_digits, body)
    try:
        value = json.loads(
            body,
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_int=integer if is_long else None,
        )
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise ApiError(400, "the JSON is no valid UTF-8 text", code="invalid_json") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is no valid JSON: {error.msg}, {place}", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _depth(body: bytes) -> int:
    depth = deepest = 0
    for match in _TOKENS.finditer(body):
        symbol = match.group()
        if symbol in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif symbol in b"]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
