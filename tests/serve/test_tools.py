"""The parser of tool calls: both formats, every split, malformed calls, linear time."""

import json
import time

import pytest

from qwen3_moe_jax.serve.generation import Reasoning, joined
from qwen3_moe_jax.serve.tools import CallArguments, CallStart, Text, ToolParser
from qwen3_moe_jax.testing.scripts import TYPED_SCHEMA, scripts

STRINGS = {"type": "object", "properties": {}}
SCHEMAS = {
    name: STRINGS
    for name in (
        "write",
        "greeting_generator",
        "unicode_customer",
        "get_current_weather",
        "get_weather",
        "Joke",
        "magic_function_no_args",
    )
} | {
    "typed": TYPED_SCHEMA,
    "magic_function": {"properties": {"input": {"type": "integer"}}},
    "my_adder_tool": {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}


def parse(pieces):
    """Text and calls, joined."""
    parser, text, calls = ToolParser(SCHEMAS), [], []
    for delta in [d for piece in pieces for d in parser.push(piece)] + parser.finish():
        if isinstance(delta, Text):
            text.append(delta.text)
        elif isinstance(delta, CallStart):
            assert delta.index == len(calls)
            calls.append([delta.name, ""])
        else:
            assert isinstance(delta, CallArguments)
            calls[delta.index][1] += delta.text
    return "".join(text), calls


CASES = [(f, n) for f in ("hermes", "coder") for n in scripts(f)]


@pytest.mark.parametrize(("call_format", "name"), CASES)
def test_every_split_gives_what_the_whole_gives(call_format, name):
    script = scripts(call_format)[name]
    body = script.text.rsplit("</think>\n\n", 1)[-1]
    whole = parse([body])
    for at in range(1, len(body)):
        assert parse([body[:at], body[at:]]) == whole, repr(body[:at])
    assert parse(list(body)) == whole
    text, calls = whole
    if script.content is not None:
        assert text == script.content
    if script.content is not None or script.calls:
        assert [(n, json.loads(a)) for n, a in calls] == [(n, dict(a)) for n, a in script.calls]


@pytest.mark.parametrize("call_format", ["hermes", "coder"])
def test_arguments_come_before_the_call_is_complete(call_format):
    text = scripts(call_format)["write_code"].text
    parser, first = ToolParser(SCHEMAS), None
    for at, symbol in enumerate(text):
        if any(isinstance(d, CallArguments) and len(d.text) > 1 for d in parser.push(symbol)):
            first = at
            break
    deltas = ToolParser(SCHEMAS).push(text[: len(text) // 2])
    assert any(isinstance(d, CallArguments) and len(d.text) > 1 for d in deltas) or first < len(text) // 2


BROKEN = {
    "single quotes": ("<tool_call>\n{'name': 'write'}\n</tool_call>", []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', []),
    "arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "write"}</tool_call>', ['{"a": 1}']),
    "arguments as a string": (
        '<tool_call>{"name": "w", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ['{"a": 1}'],
    ),
    "no arguments": ('<tool_call>{"name": "w"}</tool_call>', ["{}"]),
    "null arguments": ('<tool_call>{"name": "w", "arguments": null}</tool_call>', ["{}"]),
    "never closed": ('<tool_call>{"name": "w", "arguments": {"a": 2}}', ['{"a": 2}']),
    "two in one pair of tags": (
        '<tool_call>{"name": "write", "arguments": {"a": 1}}\n'
        '{"name": "write", "arguments": {"a": 2}}</tool_call>',
        ['{"a": 1}', '{"a": 2}'],
    ),
    "one brace too many": ('<tool_call>{"name": "w", "arguments": {"a": 1}}}</tool_call>', ['{"a": 1}']),
    "values on one line": (
        "<tool_call><function=write><parameter=a>x < y</parameter></function></tool_call>",
        ['{"a": "x < y"}'],
    ),
    "an empty value": (
        "<function=write>\n<parameter=a>\n</parameter>\n</function>",
        ['{"a": ""}'],
    ),
    "function never closed": (
        "<tool_call>\n<function=write>\n<parameter=a>\nx\n</parameter>\n</tool_call>",
        ['{"a": "x"}'],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_models_get_wrong(name):
    text, wanted = BROKEN[name]
    shown, calls = parse([text])
    assert [a for _, a in calls] == wanted
    if not wanted:
        assert shown == text
    for at in range(1, len(text)):
        assert parse([text[:at], text[at:]]) == (shown, calls)


def test_a_call_after_a_broken_one_is_found():
    text = '<tool_call>\n{oops}\n</tool_call>\n<tool_call>{"name": "write", "arguments": {}}</tool_call>'
    shown, calls = parse([text])
    assert calls == [["write", "{}"]]
    assert "oops" in shown


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 90_000,
        "<tool_call>{" + "{" * 1_000_000,
        '<tool_call>{"name": "w", "arguments": {"a": "' + '\\"' * 500_000,
        "<function=write><parameter=a>" + "</parameter> " * 80_000,
        "<function=write>\n<parameter=a>\n" + "\n</parameter>\nx" * 60_000,
        "<" * 1_000_000,
        " " * 1_000_000,
    ],
    ids=["openers", "braces", "escapes", "closers", "closers on lines", "angles", "spaces"],
)
def test_work_is_linear(text):
    """Ten times the text takes about ten times as long; a square would take a hundred times."""

    def seconds(part):
        parser, began = ToolParser(SCHEMAS), time.process_time()
        for at in range(0, len(part), 7):
            parser.push(part[at : at + 7])
        parser.finish()
        return time.process_time() - began

    short = max(min(seconds(text[: len(text) // 10]) for _ in range(3)), 1e-3)
    assert seconds(text) < 40 * short


def test_what_comes_at_once_is_one_event():
    """A dispatch writes several tokens, and an event costs as much for one as for all of them."""
    calls = [CallArguments(0, "{"), CallArguments(1, "}")]
    deltas = [Reasoning("a"), Reasoning("b"), Text("c"), *calls, Text("d"), Text("e")]
    assert list(joined(deltas)) == [Reasoning("ab"), Text("c"), *calls, Text("de")]
