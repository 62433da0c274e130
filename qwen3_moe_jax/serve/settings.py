"""Every limit of the server, in one place, with its default."""

from dataclasses import dataclass, fields

MIB = 1 << 20

MAX_N = 16
"""Answers to one request."""

MAX_LOGPROBS = 20
"""Rivals of a token whose log-probabilities a request may ask for (``Runner.token_scores``)."""


@dataclass(frozen=True)
class Settings:
    """What the HTTP front keeps to. Sizes in bytes, times in seconds.

    Attributes:
      name: what the model is called; None is the file's own name.
      api_keys: keys of which a request must bring one; none, and every request is served.
      hosts: names that a Host header may have beside loopback and numeric addresses.
      origins: web pages that may call the API from a browser beside the server's own page.
      metrics: whether GET /metrics answers.
      page: whether GET / shows the chat page.
      strict_fields: refuse fields that are not known, instead of counting them.
      strict_model: refuse other model names than ``name``.
      max_body: of a request; scaled up with the context (``body_limit``).
      max_headers, max_header_bytes: of a request.
      header_seconds, body_seconds: in which headers and body must have come.
      send_seconds: a client that takes nothing for so long is dropped.
      keep_alive_seconds: a stream that is silent for so long gets a comment.
      queue_seconds: a request waits so long for a slot.
      max_queue, max_queue_tokens: requests and prompt tokens that wait for a slot.
      drain_seconds: after SIGTERM running answers have so long to end.
      max_stops, max_stop_bytes: of one request.
      max_json_depth, max_int_digits: of a request's JSON.
      max_schema, max_schema_depth, max_pattern: of a JSON schema and of the patterns in it.
      schema_seconds: CPU time in which a schema must be compiled.
      canonical_tokens: where a grammar leaves one text, only its own tokens may come; else any that spell it.
      max_grammars: answers that are constrained at a time, those that wait included.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    name: str | None = None
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    metrics: bool = False
    page: bool = True
    strict_fields: bool = False
    strict_model: bool = False
    max_body: int = 8 * MIB
    max_headers: int = 100
    max_header_bytes: int = 16 << 10
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    queue_seconds: float = 300.0
    max_queue: int = 256
    max_queue_tokens: int = MIB
    drain_seconds: float = 30.0
    max_stops: int = 16
    max_stop_bytes: int = 256
    max_json_depth: int = 64
    max_int_digits: int = 20
    max_schema: int = 256 << 10
    max_schema_depth: int = 64
    max_pattern: int = 4 << 10
    schema_seconds: float = 1.0
    max_grammars: int = 64
    canonical_tokens: bool = True

    def body_limit(self, context: int) -> int:
        """Bytes of a request's body: room for a context full of text, 64 bytes per token."""
        return max(self.max_body, 64 * context)

    def describe(self) -> str:
        """One line for each field, for the log at the start; keys are counted, not shown."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown["api_keys"] = f"{len(self.api_keys)} keys" if self.api_keys else "none: every request is served"
        return "\n".join(f"  {name} = {value}" for name, value in shown.items())
