"""What an answer must match: JSON schemas and tool calls as masks over the vocabulary, by llguidance.

Sizes and depths are checked here, in the front; grammars are compiled and masks computed by
``grammar_worker``, in processes that can be killed. The engine is given bits.
"""

import asyncio
import json
import re
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.serve import grammar_worker
from qwen3_moe_jax.serve.engine.frames import read_frame_async, with_length
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.serve.text_model import TextModel

_PATTERN_KEYS = ("pattern",)

START_SECONDS = 120.0
"""In which the process that holds the vocabulary must have started."""

WALL_SECONDS = 30.0
"""Backstop for what is bounded by CPU time: a child that is starved for so long is given up."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(grammar_worker.Mask).decode


class SchemaError(ValueError):
    """The schema cannot be used; the text names the keyword."""


class TooManyGrammarsError(RuntimeError):
    """So many answers are constrained already that no other one can be."""


class _Child:
    """A process with one grammar; it ends when nobody holds this any more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._lock = asyncio.Lock()
        self.copies = 0
        weakref.finalize(self, writer.close)

    async def ask(self, message: msgspec.Struct, gone: str) -> grammar_worker.Mask:
        """Sends a message and waits for the mask.

        Raises:
          SchemaError: it says what is wrong, or has been killed (``gone``).
        """
        async with self._lock:
            self._writer.write(with_length(_encode(message)))
            try:
                async with asyncio.timeout(WALL_SECONDS):
                    body = await read_frame_async(self._reader)
            except TimeoutError:
                body = None
        if body is None:
            raise SchemaError(gone)
        answer = _decode(body)
        if answer.error:
            raise SchemaError(answer.error)
        return answer


class Constraint:
    """One answer's place in a grammar."""

    def __init__(self, child: _Child, first: grammar_worker.Mask, mask_bytes: int):
        self._child, self._now, self._mask_bytes = child, first, mask_bytes
        self._first = first
        self._number = child.copies
        child.copies += 1

    def copy(self) -> "Constraint":
        """The same grammar from its beginning."""
        return Constraint(self._child, self._first, self._mask_bytes)

    @property
    def is_over(self) -> bool:
        """Whether nothing has to come."""
        return self._now.is_over

    async def take(self, tokens: Sequence[int]) -> None:
        """Goes on after tokens that the mask allowed.

        Raises:
          SchemaError: the grammar became too complex.
        """
        message = grammar_worker.Take(self._number, list(tokens))
        self._now = await self._child.ask(message, "the schema is too complex for this answer")

    def mask(self, also: int | None = None) -> bytes:
        """Bits of the tokens that may come next; ``also`` is one more."""
        bits = bytearray(self._now.bits[: self._mask_bytes])
        bits += bytes(self._mask_bytes - len(bits))
        if also is not None:
            bits[also // 8] |= 1 << also % 8
        return bytes(bits)

    def everything(self) -> bytes:
        """Bits that allow every token."""
        return b"\xff" * self._mask_bytes


class Grammars:
    """Compiles schemas and tool choices for one model."""

    def __init__(self, model: TextModel, settings: Settings, path: str):
        """``path``: of the model's file, which the process that holds the vocabulary reads again."""
        self._model, self._settings, self._path = model, settings, path
        self._mask_bytes = -(-model.vocab_size // 32) * 4
        self._starting: asyncio.Task[socket.socket] | None = None
        self._process: subprocess.Popen | None = None
        self._children: weakref.WeakSet[_Child] = weakref.WeakSet()

    @property
    def active(self) -> int:
        """Processes with a grammar now."""
        return len(self._children)

    def launch(self) -> "asyncio.Task[socket.socket]":
        """Starts the process that holds the vocabulary, unless it runs."""
        is_dead = self._process is not None and self._process.poll() is not None
        if self._starting is None or is_dead or (self._starting.done() and self._starting.exception()):
            self._starting = asyncio.ensure_future(self._start())
        return self._starting

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", grammar_worker.__name__, str(theirs.fileno()), self._path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(),
            )
        ours.setblocking(False)
        async with asyncio.timeout(START_SECONDS):
            if await asyncio.get_running_loop().sock_recv(ours, 1) != b"r":
                raise RuntimeError("the process for grammars does not start")
        return ours

    def close(self) -> None:
        """Ends the process that holds the vocabulary; the front is ending too."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    async def json_schema(self, schema: Mapping[str, Any]) -> Constraint:
        """A constraint to JSON that a schema accepts.

        Raises:
          SchemaError: a keyword that is not supported, or a schema over its limits.
        """
        self._check(schema)
        found = await self._compiled("json", json.dumps(schema))
        if found.is_over:
            raise SchemaError("it accepts nothing: a $ref that leads to itself?")
        return found

    async def json_object(self) -> Constraint:
        """A constraint to any JSON object."""
        return await self.json_schema({"type": "object"})

    async def calls(self, schemas: Mapping[str, Mapping[str, Any]], *, many: bool) -> Constraint:
        """A constraint to one call of one of these tools, or to several."""
        for schema in schemas.values():
            self._check(schema)
        rules = _CALL_RULES[self._model.call_format]
        return await self._compiled("lark", "\n".join(rules(list(schemas.items()), many)))

    async def _compiled(self, kind: str, source: str) -> Constraint:
        """In a child of its own.

        Raises:
          SchemaError: it cannot be used.
          TooManyGrammarsError: as many as may be are there.
        """
        if len(self._children) >= self._settings.max_grammars:
            raise TooManyGrammarsError
        child = await self._child()
        s = self._settings
        message = grammar_worker.Compile(kind, source, s.schema_seconds, s.canonical_tokens)
        first = await child.ask(message, "the schema takes too long, or too much memory, to compile")
        return Constraint(child, first, self._mask_bytes)

    async def _child(self) -> _Child:
        control = await asyncio.shield(self.launch())
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(control, [b"f"], [theirs.fileno()])
        child = _Child(*await asyncio.open_connection(sock=ours, limit=1 << 20))
        self._children.add(child)
        return child

    def _check(self, schema: object) -> None:
        """Size, depth and patterns, before anything looks at the meaning."""
        if not isinstance(schema, Mapping):
            raise SchemaError("the schema must be an object")
        size = len(json.dumps(schema))
        if size > self._settings.max_schema:
            raise SchemaError(f"the schema takes {size} bytes, more than {self._settings.max_schema}")
        waiting: list[tuple[object, int]] = [(schema, 1)]
        while waiting:
            value, depth = waiting.pop()
            if depth > self._settings.max_schema_depth:
                raise SchemaError(f"the schema is nested deeper than {self._settings.max_schema_depth}")
            if isinstance(value, Mapping):
                for key in _PATTERN_KEYS:
                    if isinstance(value.get(key), str):
                        self._check_pattern(value[key])
                waiting += [(v, depth + 1) for v in value.values()]
            elif isinstance(value, Sequence) and not isinstance(value, str):
                waiting += [(v, depth + 1) for v in value]

    def _check_pattern(self, pattern: str) -> None:
        if len(pattern.encode()) > self._settings.max_pattern:
            raise SchemaError(f"pattern: longer than {self._settings.max_pattern} bytes")
        depth = deepest = 0
        for symbol in re.sub(r"\\.", "", pattern):
            depth += (symbol == "(") - (symbol == ")")
            deepest = max(deepest, depth)
        if deepest > self._settings.max_schema_depth:
            raise SchemaError(f"pattern: groups are nested deeper than {self._settings.max_schema_depth}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _start(count: int, many: bool) -> str:
    one = " | ".join(f"call_{i}" for i in range(count))
    return f'start: ({one}) ("\\n" ({one}))*' if many else f"start: {one}"


def _hermes_rules(schemas: list[tuple[str, Mapping[str, Any]]], many: bool) -> list[str]:
    lines = [_start(len(schemas), many)]
    for i, (name, schema) in enumerate(schemas):
        head = _quoted('<tool_call>\n{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": ')
        body = json.dumps({"type": "object", **schema})
        lines.append(f"call_{i}: {head} %json {body} {_quoted('}' + chr(10) + '</tool_call>')}")
    return lines


def _coder_rules(schemas: list[tuple[str, Mapping[str, Any]]], many: bool) -> list[str]:
    """Required parameters in their order, then any of the others; values by their schema, strings as text."""
    lines = [_start(len(schemas), many), r"TEXT: /[^<]*/"]
    for i, (name, schema) in enumerate(schemas):
        required = set(schema.get("required") or ())
        parts = []
        for j, (key, value) in enumerate((schema.get("properties") or {}).items()):
            lines.append(_coder_parameter(f"p_{i}_{j}", key, value, schema))
            parts.append(f"p_{i}_{j}" if key in required else f"p_{i}_{j}?")
        head = _quoted(f"<tool_call>\n<function={name}>\n")
        lines.append(
            f"call_{i}: {head} {' '.join(parts)} {_quoted('</function>' + chr(10) + '</tool_call>')}"
        )
    return lines


def _coder_parameter(rule: str, key: str, schema: Any, whole: Mapping[str, Any]) -> str:
    head, tail = _quoted(f"<parameter={key}>\n"), _quoted("\n</parameter>\n")
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if isinstance(schema, Mapping) and isinstance(schema.get("enum"), list):
        as_text = [v if isinstance(v, str) else json.dumps(v) for v in schema["enum"]]
        value = "(" + " | ".join(map(_quoted, as_text)) + ")"
    elif kind in (None, "string"):
        value = "TEXT"
    else:
        definitions = {k: whole[k] for k in ("$defs", "definitions") if k in whole}
        value = "%json " + json.dumps({**schema, **definitions})
    return f"{rule}: {head} {value} {tail}"


_CALL_RULES = {"hermes": _hermes_rules, "coder": _coder_rules}
