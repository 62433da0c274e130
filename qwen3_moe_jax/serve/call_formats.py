"""One tool call as Qwen3 (JSON) and Qwen3-Coder (XML) write it, parsed as it comes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.serve.json_scan import ValueScan, after_space

OPEN, CLOSE, FUNCTION = "<tool_call>", "</tool_call>", "<function="
PARAMETER, END_PARAMETER, END_FUNCTION = "<parameter=", "</parameter>", "</function>"

MAX_NAME = 256
"""Characters of a tool's or a parameter's name."""


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


class NotACall(Exception):
    """What was taken for a call is none."""


def overlap(text: str, word: str) -> int:
    """How many characters at the end of ``text`` begin ``word`` without completing it."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)


ARGUMENTS = ("arguments", "parameters")


class HermesCall:
    """``{"name": ..., "arguments": ...}``, its two members in either order."""

    def __init__(self, parser: Any, schemas: Mapping[str, Any], *, known_only: bool = False):
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
                self._advance(text, out)
        except NotACall:
            if not self.has_begun:
                raise
            self._state = "closed"  # what was given out cannot be taken back: the call ends here
            self._end_arguments(out)
        return out, text[self._at :], self._state == "closed"

    def _advance(self, text: str, out: list[Delta]) -> None:
        if self._scan is not None:
            self._value(self._scan, text, out)
            return
        self._at = after_space(text, self._at)
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
                raise NotACall
            if symbol == "}":
                self._end_arguments(out)
            return at + 1
        raise NotACall

    def _value(self, scan: ValueScan, text: str, out: list[Delta]) -> None:
        end, is_over = scan.feed(text, self._at)
        piece, self._at = text[self._at : end], end
        is_arguments = self._state == "value" and self._key in ARGUMENTS
        if is_arguments and self.has_begun and scan.kind in ("object", "array"):
            out.append(CallArguments(self._index, piece))
            self._has_arguments = True
        else:
            self._part.append(piece)
        if is_over:
            self._scan = None
            self._ended(scan.kind, out)

    def _ended(self, kind: str, out: list[Delta]) -> None:
        value = "".join(self._part)
        if self._state == "key":
            self._key, self._state = _string(value), "colon"
            if self._known_only and not self.has_begun and self._key != "name":
                raise NotACall
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
            raise NotACall
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
        raise NotACall from None
    return value


def _arguments(value: str, kind: str) -> str:
    """Arguments as an object: some models write them as a string of JSON, or null."""
    if kind == "string":
        return _string(value).strip() or "{}"
    return "{}" if kind == "scalar" else value


class CoderCall:
    """``<function=NAME>``, parameters by tags, ``</function>``; values become JSON by the tool's schema."""

    def __init__(self, parser: Any, schemas: Mapping[str, Any], *, known_only: bool = False):
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
                raise NotACall
            return None
        name = name.strip().strip("\"'")
        if not name or len(name) > MAX_NAME or (self._known_only and name not in self._schemas):
            raise NotACall
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
            end = len(text) - overlap(text, self._end)
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
