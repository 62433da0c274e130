"""What an answer must match: JSON schemas and tool calls as masks over the vocabulary, by llguidance.

Grammars are compiled here, in the front, within limits of size, depth and time; the engine is given bits.
"""

import asyncio
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.serve.text_model import TextModel

if TYPE_CHECKING:
    import llguidance

_PATTERN_KEYS = ("pattern",)


class SchemaError(ValueError):
    """The schema cannot be used; the text names the keyword."""


class Constraint:
    """One answer's place in a grammar."""

    def __init__(self, matcher: "llguidance.LLMatcher", mask_bytes: int):
        self._matcher = matcher
        self._mask_bytes = mask_bytes

    def copy(self) -> "Constraint":
        """The same grammar at the same place."""
        return Constraint(self._matcher.deep_copy(), self._mask_bytes)

    @property
    def is_over(self) -> bool:
        """Whether nothing may come."""
        self._matcher.compute_bitmask()  # what is wrong with a grammar shows only now
        return self._matcher.is_error() or self._matcher.is_stopped() or self._matcher.is_accepting()

    def take(self, token: int) -> None:
        """Goes on after a token that the mask allowed."""
        self._matcher.consume_token(token)

    def mask(self, also: int | None = None) -> bytes:
        """Bits of the tokens that may come next; ``also`` is one more.

        Raises:
          SchemaError: the grammar became too complex.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise SchemaError("the schema is too complex for this answer")
        bits += bytes(max(0, self._mask_bytes - len(bits)))
        if also is not None:
            bits[also // 8] |= 1 << also % 8
        return bytes(bits[: self._mask_bytes])

    def everything(self) -> bytes:
        """Bits that allow every token."""
        return b"\xff" * self._mask_bytes


class _Vocabulary:
    """The tokenizer as llguidance wants it."""

    def __init__(self, model: TextModel):
        t = model.tokenizer
        self.eos_token_id = t.eos_id if t.eos_id is not None else min(t.stop_ids)
        self.bos_token_id = t.bos_id
        ids = range(model.vocab_size)
        self.tokens = [t.token_bytes(i) for i in ids]
        special = [i for i in ids if not self.tokens[i] or i in t.stop_ids]
        for i in special:
            self.tokens[i] = t.token_bytes(i, show_control=True) or f"<|unused_{i}|>".encode()
        self.special_token_ids = special
        self._encode = t.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


class Grammars:
    """Compiles schemas and tool choices for one model."""

    def __init__(self, model: TextModel, settings: Settings):
        self._model, self._settings = model, settings
        self._mask_bytes = -(-model.vocab_size // 32) * 4
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> "llguidance.LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(self._model)
        stops = sorted(self._model.tokenizer.stop_ids)
        wrapper = TokenizerWrapper(vocabulary)
        return LLTokenizer(wrapper, n_vocab=self._model.vocab_size, eos_token=stops)

    @property
    def _limits(self) -> "llguidance.LLParserLimits":
        from llguidance import LLParserLimits

        return LLParserLimits(max_grammar_size=200_000, max_lexer_states=50_000, verbose_errors=False)

    async def json_schema(self, schema: Mapping[str, Any]) -> Constraint:
        """A constraint to JSON that a schema accepts.

        Raises:
          SchemaError: a keyword that is not supported, or a schema over its limits.
        """
        self._check(schema)
        found = await self._compiled(lambda ll: ll.grammar_from_json_schema(json.dumps(schema)))
        if found.is_over:
            raise SchemaError("it accepts nothing: a $ref that leads to itself?")
        return found

    async def json_object(self) -> Constraint:
        """A constraint to any JSON object."""
        return await self.json_schema({"type": "object"})

    async def regex(self, pattern: str) -> Constraint:
        """A constraint to what a regular expression matches."""
        self._check_pattern(pattern)
        return await self._compiled(lambda ll: ll.grammar_from_regex(pattern))

    async def calls(self, schemas: Mapping[str, Mapping[str, Any]], *, many: bool) -> Constraint:
        """A constraint to one call of one of these tools, or to several."""
        for schema in schemas.values():
            self._check(schema)
        rules = _CALL_RULES[self._model.call_format]
        lark = "\n".join(rules(list(schemas.items()), many))
        return await self._compiled(lambda ll: ll.grammar_from_lark(lark))

    async def _compiled(self, make: Any) -> Constraint:
        try:
            async with asyncio.timeout(self._settings.schema_seconds + 30 * (not self._has_tokenizer)):
                matcher = await asyncio.to_thread(self._compile, make)
        except TimeoutError:
            raise SchemaError("the schema takes too long to compile") from None
        return Constraint(matcher, self._mask_bytes)

    @property
    def _has_tokenizer(self) -> bool:
        return "_tokenizer" in self.__dict__

    def _compile(self, make: Any) -> "llguidance.LLMatcher":
        from llguidance import LLMatcher

        with self._lock:
            tokenizer = self._tokenizer
        try:
            matcher = LLMatcher(tokenizer, make(LLMatcher), log_level=0, limits=self._limits)
        except (ValueError, RecursionError) as error:
            raise SchemaError(_one_line(error)) from None
        if matcher.is_error():
            raise SchemaError(_one_line(matcher.get_error()))
        return matcher

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


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or "the schema is not valid"


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
