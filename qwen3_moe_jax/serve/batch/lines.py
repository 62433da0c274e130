"""Lines of a batch in OpenAI's format: what each asks for, or what is wrong with it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.input_file import open_input
from qwen3_moe_jax.serve.http import json_body
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.settings import Settings

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
LONGEST_ID = 512
NO_LIMIT = 1024
"""New tokens that are expected of a line that sets no limit, before other lines say more."""

SETTINGS = Settings(max_json_depth=65)
"""A line is one level deeper than the body in it."""


@dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
      number: of the line, from 1.
      custom_id: the client's name of it; None where the line has none that can be used.
      url, body: of the request; the body is JSON.
      order: text by which requests that begin alike stand together.
      limit: new tokens at most; None where the request does not say.
      code, fault: what is wrong with the line, and in words; empty for a request.
    """

    number: int
    custom_id: str | None = None
    url: str = ""
    body: bytes = b""
    order: str = ""
    limit: int | None = None
    code: str = ""
    fault: str = ""

    @property
    def name(self) -> str | int:
        """What a result is known by: the custom_id, or the line's number without one."""
        return self.number if self.custom_id is None else self.custom_id


class _Fault(ValueError):
    def __init__(self, code: str, message: str, custom_id: str | None = None):
        self.code, self.custom_id = code, custom_id
        super().__init__(message)


def parse(number: int, data: bytes) -> Line:
    """The line as a request, or with what is wrong with it."""
    try:
        return _parsed(number, data)
    except _Fault as fault:
        return Line(number, fault.custom_id, code=fault.code, fault=str(fault))


def _parsed(number: int, data: bytes) -> Line:
    try:
        value = json_body.parse(data, SETTINGS)
    except ApiError as error:
        raise _Fault("invalid_json", error.message.replace("the body", "the line")) from None
    name = value.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
        raise _Fault("invalid_custom_id", f"custom_id must be a text of 1 to {LONGEST_ID} characters")
    if value.get("method", "POST") != "POST":
        raise _Fault("invalid_method", "method must be POST", name)
    if (url := value.get("url")) not in URLS:
        raise _Fault("invalid_url", f"url must be one of {', '.join(URLS)}", name)
    body = value.get("body")
    if not isinstance(body, dict):
        raise _Fault("invalid_body", "body must be a JSON object", name)
    if body.get("stream"):
        raise _Fault("invalid_body", "a line of a batch cannot stream: leave stream out of its body", name)
    return Line(number, name, url, json.dumps(body).encode(), _order(body), _limit(url, body))


def _order(body: dict[str, Any]) -> str:
    """What the prompt begins with first: tools, instructions, then messages or the prompt."""
    names = ("tools", "instructions", "messages", "input", "prompt")
    return json.dumps([body[name] for name in names if name in body], ensure_ascii=False)


def _limit(url: str, body: dict[str, Any]) -> int | None:
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    found = next((body[name] for name in names if type(body.get(name)) is int), None)
    return 16 if found is None and url == "/v1/completions" else found


def read(file: Iterable[bytes]) -> Iterator[Line]:
    """Every line that is not blank, in order."""
    for number, data in enumerate(file, 1):
        data = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
        if data.strip():
            yield parse(number, data)


def open_requests(path: str) -> IO[bytes]:
    """The file of requests, to read.

    Raises:
      OptionError: it cannot be read.
    """
    try:
        return open_input(path, advice="- reads standard input")
    except OSError as error:
        raise OptionError(str(error)) from error


def check(path: str) -> dict[str, int]:
    """Reads a file of requests to its end: names of results, and the number of each one's line.

    Raises:
      OptionError: two lines have one custom_id, or there is no line.
    """
    names: dict[str, int] = {}
    count = 0
    with open_requests(path) as file:
        for line in read(file):
            count += 1
            if line.custom_id is not None and names.setdefault(line.custom_id, line.number) != line.number:
                first = names[line.custom_id]
                raise OptionError(
                    f"{path}: lines {first} and {line.number} have one custom_id, "
                    f"{line.custom_id[:80]!r}: give each its own"
                )
    if not count:
        raise OptionError(f"{path} has no requests: write one JSON object per line")
    return names
