"""Tool calls in a model's text, as it comes: Qwen3's JSON and Qwen3-Coder's XML by one incremental parser.

The parser forgives what models do: a call without ``<tool_call>``, a call that is never closed, several in
one pair of tags, a broken one before a good one, ``<`` and ``>`` and whole tags in arguments. What is no
call stays text. Arguments come out while the model writes them. Where the text is cut makes no difference
to the joined result, and the work is linear in its length.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.serve.json_scan import SPACE, ValueScan

OPEN, CLOSE, FUNCTION = "<tool_call>", "</tool_call>", "<function="
PARAMETER, END_PARAMETER, END_FUNCTION = "<parameter=", "</parameter>", "</function>"

MAX_NAME = 256
"""Characters of a tool's or a parameter's name."""

MAX_HEAD, MAX_FAILURES, LONG_FAILURE = 1 << 16, 64, 256
"""A call must have a name within so many characters. After so many calls that were none, and were longer than
LONG_FAILURE each, the rest is text: reading what was held a second time would else be a square."""


@dataclass(frozen=True)
class Text:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments: JSON text."""

    index: int
    text: str


Delta = Text | CallStart | CallArguments


def tool_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """Schema of the arguments of each tool, by name; tools in OpenAI's form or as bare functions."""
    functions = [t.get("function", t) for t in tools or ()]
    return {f["name"]: f.get("parameters") or f.get("input_schema") or {} for f in functions}


class _Bad(Exception):
    """What was taken for a call is none."""


class ToolParser:
    """Splits an answer into text and calls.

    Attributes:
      count: calls that have begun.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]):
        """``schemas``: of the arguments of each tool that may be called."""
        self._schemas = schemas
        self._held = ""
        self._space: list[str] = []  # white space that a call after it would swallow
        self._lead = ""  # what is text for certain if a call turns out to be none
        self._raw: list[str] = []  # what may hold a good call if this one turns out to be none
        self._call: _HermesCall | _CoderCall | None = None
        self._state = self._at_start
        self._out: list[Delta] = []
        self._failures = 0
        self.count = 0

    def push(self, text: str) -> list[Delta]:
        """What this piece completes."""
        self._held += text
        self._run(is_last=False)
        return self._take()

    def finish(self) -> list[Delta]:
        """What was held back when the answer ended."""
        self._run(is_last=True)
        if self._call is not None:
            if self._call.has_begun:
                self._out += self._call.finish()
            else:
                self._say(self._lead + "".join(self._raw) + self._held)
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _say(self, text: str) -> None:
        if text:
            self._out.append(Text(text))

    def _run(self, *, is_last: bool) -> None:
        """States go on while they use up what is held, or change."""
        while True:
            state, before = self._state, len(self._held)
            state(is_last)
            if self._state == state and (len(self._held) == before or not self._held):
                return

    # -- states: each looks at what is held, uses up what it understands, and may choose another state

    def _skip_space(self) -> None:
        head = self._held.lstrip()
        self._space.append(self._held[: len(self._held) - len(head)])
        self._held = head

    def _take_space(self) -> str:
        text, self._space = "".join(self._space), []
        return text

    def _at_start(self, is_last: bool) -> None:
        """Before the first word: a bare JSON call may come."""
        self._skip_space()
        if self._held.startswith("{"):
            self._start_call(_HermesCall(self, self._schemas, known_only=True), self._take_space() + "{")
        elif self._held or is_last:
            self._state = self._in_text

    def _in_text(self, is_last: bool) -> None:
        words = (OPEN, FUNCTION) if self._failures < MAX_FAILURES else ()
        at, word = min(((_find(self._held, w), w) for w in words), default=(len(self._held), ""))
        if at == len(self._held):  # neither is there
            kept = 0 if is_last else max((_overlap(self._held, w) for w in words), default=0)
            at, word = len(self._held) - kept, ""
        text = self._held[:at].rstrip()
        if text:
            self._say(self._take_space() + text)
        self._space.append(self._held[len(text) : at])
        self._held = self._held[at:]
        if word == OPEN:
            self._lead, self._raw = self._take_space() + OPEN, []
            self._held = self._held[len(OPEN) :]
            self._state = self._after_open
        elif word == FUNCTION:
            self._start_call(_CoderCall(self, self._schemas, known_only=True), self._take_space() + "<")
        elif is_last:
            self._say(self._take_space())

    def _after_open(self, is_last: bool) -> None:
        """In ``<tool_call>``: one format or the other, or neither."""
        head = self._held.lstrip()
        self._raw.append(self._held[: len(self._held) - len(head)])
        self._held = head
        if head.startswith("{"):
            self._start_call(_HermesCall(self, self._schemas))
        elif head.startswith(FUNCTION):
            self._start_call(_CoderCall(self, self._schemas))
        elif is_last or not FUNCTION.startswith(head):
            self._give_up()

    def _start_call(self, call: "_HermesCall | _CoderCall", lead: str | None = None) -> None:
        """``lead``: what becomes text if this is no call; it includes the first character held."""
        if lead is not None:
            self._lead, self._raw = lead, []
            self._out_of_raw = 1
        else:
            self._out_of_raw = 0
        self._call, self._state = call, self._in_call

    _out_of_raw = 0

    def _in_call(self, is_last: bool) -> None:
        held = self._held
        try:
            deltas, rest, is_over = self._call.feed(held)
        except _Bad:
            self._give_up()
            return
        self._out += deltas
        self._held = rest
        if not self._call.has_begun:
            self._keep_raw(held[: len(held) - len(rest)])
        if is_over:
            self._call, self._raw, self._state = None, [], self._after_call

    def _keep_raw(self, text: str) -> None:
        if text:
            self._raw.append(text[self._out_of_raw :])
            self._out_of_raw = 0
        if sum(map(len, self._raw[-1:])) and self._length_of_raw() > MAX_HEAD:
            self._give_up()

    def _length_of_raw(self) -> int:
        if len(self._raw) > 64:
            self._raw = ["".join(self._raw)]
        return sum(map(len, self._raw))

    def _after_call(self, is_last: bool) -> None:
        """Closing tags, another call in the same tags, or text; white space between them is dropped."""
        head = self._held = self._held.lstrip()
        if head.startswith(CLOSE):
            self._held = head[len(CLOSE) :]
        elif head.startswith("{"):
            self._start_call(_HermesCall(self, self._schemas, known_only=True), "{")
        elif head.startswith(FUNCTION):
            self._start_call(_CoderCall(self, self._schemas, known_only=True), "<")
        elif head.startswith("}"):
            self._held = head[1:]  # one brace too many
        elif head and (is_last or not any(w.startswith(head) for w in (CLOSE, FUNCTION))):
            self._state = self._in_text

    def _give_up(self) -> None:
        """What was taken for a call becomes text, which may hold a good one further on."""
        raw = "".join(self._raw)
        self._failures += len(raw) > LONG_FAILURE
        self._say(self._lead)
        self._held = raw + self._held[self._out_of_raw :]
        self._lead, self._raw, self._out_of_raw = "", [], 0
        self._call, self._state = None, self._in_text


def _find(text: str, word: str) -> int:
    """Where ``word`` is, or the end of the text."""
    at = text.find(word)
    return len(text) if at < 0 else at


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of ``text`` begin ``word`` without completing it."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)


ARGUMENTS = ("arguments", "parameters")


class _HermesCall:
    """``{"name": ..., "arguments": ...}``, its two members in either order."""

    def __init__(self, parser: ToolParser, schemas: Mapping[str, Any], *, known_only: bool = False):
        self.has_begun = False
        self._parser, self._schemas, self._known_only = parser, schemas, known_only
        self._index = -1
        self._state = "open"
        self._key = ""
        self._part: list[str] = []  # of a key or of a value that is kept
        self._scan: ValueScan | None = None
        self._early = ""  # arguments that came before the name

    def feed(self, text: str) -> tuple[list[Delta], str, bool]:
        """The deltas, the text that is left over, and whether the call has ended."""
        out: list[Delta] = []
        self._at = 0
        try:
            while self._at < len(text) and self._state != "closed":
                self._step(text, out)
        except _Bad:
            if not self.has_begun:
                raise
            self._state = "closed"  # what was given out cannot be taken back: the call ends here
            self._end_arguments(out)
        return out, text[self._at :], self._state == "closed"

    def _step(self, text: str, out: list[Delta]) -> None:
        if self._scan is not None:
            self._value(text, out)
            return
        self._at = SPACE.match(text, self._at).end()
        if self._at < len(text):
            self._at = self._structure(text, self._at, out)

    def _structure(self, text: str, at: int, out: list[Delta]) -> int:
        symbol = text[at]
        if self._state == "open":
            self._state = "key"
            return at + 1
        if self._state == "key" and symbol == '"':
            self._scan, self._part = ValueScan(), []
            return at
        if self._state == "colon" and symbol == ":":
            self._state = "value"
            return at + 1
        if self._state == "value":
            self._scan, self._part = ValueScan(), []
            return at
        if self._state == "next" and symbol in ",}":
            self._state = "key" if symbol == "," else "closed"
            if symbol == "}" and not self.has_begun:
                raise _Bad
            if symbol == "}":
                self._end_arguments(out)
            return at + 1
        raise _Bad

    def _value(self, text: str, out: list[Delta]) -> None:
        end, is_over = self._scan.feed(text, self._at)
        piece, self._at = text[self._at : end], end
        is_arguments = self._state == "value" and self._key in ARGUMENTS
        if is_arguments and self.has_begun and self._scan.kind in ("object", "array"):
            out.append(CallArguments(self._index, piece))
            self._has_arguments = True
        else:
            self._part.append(piece)
        if is_over:
            kind, self._scan = self._scan.kind, None
            self._ended(kind, out)

    def _ended(self, kind: str, out: list[Delta]) -> None:
        value = "".join(self._part)
        if self._state == "key":
            self._key, self._state = _string(value), "colon"
            if self._known_only and not self.has_begun and self._key != "name":
                raise _Bad
            return
        self._state = "next"
        if self._key == "name" and not self.has_begun:
            self._begin(_string(value) if kind == "string" else "", out)
        elif self._key in ARGUMENTS and value:
            self._early = _arguments(value, kind)
            if self.has_begun:
                self._end_arguments(out)

    _has_arguments = False

    def _begin(self, name: str, out: list[Delta]) -> None:
        if not name or len(name) > MAX_NAME or (self._known_only and name not in self._schemas):
            raise _Bad
        self.has_begun, self._index = True, self._parser.count
        self._parser.count += 1
        out.append(CallStart(self._index, name))

    def _end_arguments(self, out: list[Delta]) -> None:
        """Arguments that could not go out as they came; a call without any has none."""
        if not self._has_arguments:
            out.append(CallArguments(self._index, self._early or "{}"))
            self._has_arguments = True

    def finish(self) -> list[Delta]:
        """The end of the answer inside the call: what came is all there is."""
        out: list[Delta] = []
        if self._state != "value" or self._key not in ARGUMENTS:
            self._end_arguments(out)
        return out


def _string(text: str) -> str:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        raise _Bad from None
    return value


def _arguments(value: str, kind: str) -> str:
    """Arguments as an object: some models write them as a string of JSON, or null."""
    if kind == "string":
        return _string(value).strip() or "{}"
    return "{}" if kind == "scalar" else value


class _CoderCall:
    """``<function=NAME>``, parameters by tags, ``</function>``; values become JSON by the tool's schema."""

    def __init__(self, parser: ToolParser, schemas: Mapping[str, Any], *, known_only: bool = False):
        self.has_begun = False
        self._parser, self._schemas, self._known_only = parser, schemas, known_only
        self._index = -1
        self._properties: Mapping[str, Any] = {}
        self._state = self._in_name
        self._end = ""  # what ends the value
        self._pending: list[str] = []  # a value's end, if what follows agrees
        self._types: frozenset[str] = frozenset()
        self._parts: list[str] = []
        self._has_parameters = False
        self._is_over = False
        self._out: list[Delta] = []

    def feed(self, text: str) -> tuple[list[Delta], str, bool]:
        """The deltas, the text that is left over, and whether the call has ended."""
        while text and not self._is_over:
            state, rest = self._state, self._state(text)
            if rest is None or (len(rest) == len(text) and self._state == state):
                break  # more has to come
            text = rest
        out, self._out = self._out, []
        return out, text, self._is_over

    def _write(self, text: str) -> None:
        if text:
            self._out.append(CallArguments(self._index, text))

    def _in_name(self, text: str) -> str | None:
        name, found, rest = text[len(FUNCTION) :].partition(">")
        if not found:
            if len(name) > MAX_NAME or "\n" in name:
                raise _Bad
            return None
        name = name.strip().strip("\"'")
        if not name or len(name) > MAX_NAME or (self._known_only and name not in self._schemas):
            raise _Bad
        self.has_begun, self._index = True, self._parser.count
        self._parser.count += 1
        self._properties = self._schemas.get(name, {}).get("properties") or {}
        self._out.append(CallStart(self._index, name))
        self._write("{")
        self._state = self._between
        return rest

    def _between(self, text: str) -> str | None:
        """Before a parameter or the end of the function."""
        head = text.lstrip()
        if head.startswith(PARAMETER):
            return self._open_parameter(head)
        if head.startswith(END_FUNCTION) or head.startswith(CLOSE):
            self._close()
            return head[len(END_FUNCTION) :] if head.startswith(END_FUNCTION) else head
        if head and not any(w.startswith(head) for w in (PARAMETER, END_FUNCTION, CLOSE)):
            self._close()  # never closed: what follows is text
            return head
        return head if len(head) < len(text) else None

    def _close(self) -> None:
        self._write("}")
        self._is_over = True

    def _open_parameter(self, head: str) -> str | None:
        key, found, rest = head[len(PARAMETER) :].partition(">")
        if not found:
            return None if len(key) <= MAX_NAME else self._skip(head)
        if not rest:
            return None  # the value's first character decides what ends it
        key = key.strip().strip("\"'")
        self._types = _types(self._properties.get(key))
        self._write((", " if self._has_parameters else "") + json.dumps(key, ensure_ascii=False) + ": ")
        self._has_parameters, self._parts = True, []
        if self._is_streamed:
            self._write('"')
        self._end = "\n" + END_PARAMETER if rest.startswith("\n") else END_PARAMETER
        self._state = self._at_value
        return rest

    def _skip(self, head: str) -> str:
        self._close()
        return head

    @property
    def _is_streamed(self) -> bool:
        return self._types <= {"string"}

    def _at_value(self, text: str) -> str | None:
        """At a value's beginning: a newline there is not part of it."""
        if self._end.startswith(text) and len(text) < len(self._end):
            return None
        self._state = self._in_value
        return text if text.startswith(self._end) else text.removeprefix("\n")

    def _in_value(self, text: str) -> str | None:
        at = text.find(self._end)
        if at < 0:
            end = len(text) - _overlap(text, self._end)
            self._add(text[:end])
            return text[end:]
        self._add(text[:at])
        self._pending = [self._end]
        self._state = self._after_value
        return text[at + len(self._end) :]

    def _after_value(self, text: str) -> str | None:
        """A closing tag ends the value only where a parameter or the function's end follows."""
        head = text.lstrip()
        if any(head.startswith(w) for w in (PARAMETER, END_FUNCTION, CLOSE)):
            self._end_value()
            self._state = self._between
            return text
        if not head or any(w.startswith(head) for w in (PARAMETER, END_FUNCTION, CLOSE)):
            self._pending.append(text[: len(text) - len(head)])
            return head
        self._add("".join(self._pending) + text[: len(text) - len(head)])
        self._pending = []
        self._state = self._in_value
        return head

    def _add(self, piece: str) -> None:
        if not piece:
            return
        if self._is_streamed:
            self._write(json.dumps(piece, ensure_ascii=False)[1:-1])
        else:
            self._parts.append(piece)

    def _end_value(self) -> None:
        self._pending = []
        self._write('"' if self._is_streamed else _as_json("".join(self._parts), self._types))

    def finish(self) -> list[Delta]:
        """The end of the answer inside the call: a value that was complete gets its end."""
        if self.has_begun and self._state == self._after_value:
            self._end_value()
            self._state = self._between
        if self.has_begun and self._state == self._between and not self._is_over:
            self._close()
        out, self._out = self._out, []
        return out


def _types(schema: object) -> frozenset[str]:
    """The JSON types that a schema allows at its top; empty where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    declared = schema.get("type")
    found = {declared} if isinstance(declared, str) else set(declared or ())
    for key in ("anyOf", "oneOf"):
        for option in schema.get(key) or ():
            found |= _types(option)
    if "enum" in schema and not found:
        names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
        found = {names.get(type(v), "object") for v in schema["enum"]}
    return frozenset(str(t) for t in found)


_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def _as_json(value: str, types: frozenset[str]) -> str:
    """A value as JSON text: what the types allow, or else a string."""
    text = _PYTHON_WORDS.get(value.strip(), value.strip())
    try:
        parsed = json.loads(text, parse_constant=lambda _: {}[0])
    except (ValueError, KeyError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    if "string" in types and not _fits(parsed, types - {"string"}):
        return json.dumps(value, ensure_ascii=False)
    return text


def _fits(value: object, types: frozenset[str]) -> bool:
    kind = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number", str: "string"}
    name = kind.get(type(value), "null")
    return name in types or (name == "integer" and "number" in types)
