"""How a stream ends whose engine is gone, told by who has seen no more of it than its bytes."""

import json
from typing import Any

from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.http.streams import data, event


class Watched:
    """A stream of events on its way to its client."""

    def __init__(self, path: str, request_id: str):
        self._path, self._request_id = path.rstrip("/"), request_id
        self._first, self._count = b"", 0

    def push(self, chunk: bytes) -> None:
        """Notes whole events that are sent."""
        if self._path.endswith("/responses"):
            self._first = self._first or chunk
            self._count += chunk.count(b"\ndata: ") + chunk.startswith(b"data: ")

    def failure(self, error: ApiError) -> bytes:
        """The last event, in the endpoint's protocol."""
        if self._path.endswith("/messages"):
            return event("error", error.anthropic_body(self._request_id))
        if self._path.endswith("/responses"):
            fields = {"response": self._response(error), "sequence_number": self._count}
            return event("response.failed", {"type": "response.failed", **fields})
        return data(error.body())

    def _response(self, error: ApiError) -> dict[str, Any]:
        """The response as its first event showed it, now failed."""
        lines = self._first.split(b"\n")
        shown = next((line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")), b"{}")
        response = json.loads(shown).get("response", {})
        return {**response, "status": "failed", "error": {"code": "server_error", "message": error.message}}
