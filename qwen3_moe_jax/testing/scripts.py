"""Texts that a scripted model says: answers, thinking, tool calls right and wrong, in both call formats."""

import json
from dataclasses import dataclass, field
from typing import Any

CODE = 'if a < b and c > d:\n    print("</tool_call>"[:3], {"k": [1, 2]})\n'
NESTED = json.dumps({"a": {"b": "</parameter> </function>"}})
TYPED = {"count": 7, "ratio": 0.5, "flag": True, "items": ["x", 2], "text": "7", "none": None}
HELLO = "Hello! I am a script, and every word of mine is known: 你好, grüß Gott, 🤖👩‍🚀."

TYPED_SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "text": {"type": "string"},
        "none": {"type": "null"},
    },
}


def hermes(name: str, arguments: dict[str, Any]) -> str:
    """A call as Qwen3 writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def coder(name: str, arguments: dict[str, Any]) -> str:
    """A call as Qwen3-Coder writes it."""
    as_text = lambda v: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
    values = "".join(f"<parameter={k}>\n{as_text(v)}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


@dataclass(frozen=True)
class Script:
    """What the model writes, and what a server must make of it.

    Attributes:
      text: as the model writes it.
      content: what a client sees as the answer; None where more than one answer is right.
      calls: names and arguments.
      reasoning: the thinking.
    """

    text: str
    content: str | None = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    reasoning: str = ""


@dataclass(frozen=True)
class Rule:
    """When a script is said without being named: every condition that is given must hold."""

    script: str
    role: str | None = None
    tool: str | None = None
    words: tuple[str, ...] = field(default=())


def _plain(text: str) -> Script:
    return Script(text, text)


def scripts(call_format: str) -> dict[str, Script]:
    """Every script by name; those that begin with ``bad_`` hold calls that are malformed on purpose.

    Args:
      call_format: "hermes" or "coder".
    """
    write = {"hermes": hermes, "coder": coder}[call_format]

    def call(*calls: tuple[str, dict], before: str = "", reasoning: str = "") -> Script:
        head = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
        text = head + before + "\n".join(write(name, arguments) for name, arguments in calls)
        return Script(text, before.rstrip("\n"), calls, reasoning)

    weather = lambda **arguments: ("get_current_weather", arguments)
    file = lambda path, content: ("write", {"path": path, "content": content})
    return {
        "hello": _plain(HELLO),
        "haiku": _plain(
            "An old silent pond\nA frog jumps into the pond\nSplash! Silence again\n\nAutumn moonlight\n"
        ),
        "after_tool": _plain("The tool answered, and so do I."),
        "magic": call(("magic_function", {"input": 3})),
        "magic_no_args": call(("magic_function_no_args", {})),
        "adder": call(("my_adder_tool", {"a": 1, "b": 2})),
        "greeting": call(("greeting_generator", {"answer_style": "pirate"})),
        "customer_ja": call(("unicode_customer", {"customer_name": "こんにちは株式会社"})),
        "customer": call(("unicode_customer", {"customer_name": "你好啊集团"})),
        "weather": call(weather(location="San Francisco, CA")),
        "get_weather": call(("get_weather", {"location": "San Francisco, CA"})),
        "two_calls": call(
            weather(location="Rome"),
            weather(location="Oslo", unit="celsius"),
            before="Two things at once.\n",
        ),
        "write_code": call(file("a.py", CODE)),
        "write_nested": call(file("b.json", NESTED)),
        "write_typed": call(("typed", TYPED)),
        "joke": _plain('{"setup": "Why do cats purr?", "punchline": "They run on batteries."}'),
        "joke_call": call(("Joke", {"setup": "Why do cats purr?", "punchline": "They run on electricity."})),
        "joke_json": _plain('{"setup": "A cat walks into a bar. Why?", "punchline": "For the milk."}'),
        "person": _plain('{"name": "Erick", "age": 27}'),
        "thinking": Script(
            "<think>\nFirst I think of 17, then of 4.\n</think>\n\nThe sum is 21.",
            "The sum is 21.",
            reasoning="First I think of 17, then of 4.",
        ),
        "think_tool": call(weather(location="Rome, IT"), reasoning="I need the weather in <b>Rome</b>."),
        "tags": _plain(
            "Not calls: <tool> <tools_call> a <b and <think without an end, <|im_start|> spelled out."
        ),
        "markup": _plain(
            "<img src=x onerror=alert(1)> [link](javascript:alert(1)) <svg onload=alert(1)> **bold** `code`\n"
            "```python\nprint(1)\n```\n"
        ),
        "longer": _plain(" ".join(f"word{i}" for i in range(60)) + "."),
        **_bad(write, file),
    }


def _bad(write, file) -> dict[str, Script]:
    one = lambda path, content: (file(path, content),)
    good = write("write", {"path": "g", "content": "good"})
    after = write("write", {"path": "h", "content": "i"})
    fence = "```json\n" + hermes("write", {"path": "j", "content": "k"}) + "\n```"
    return {
        "bad_no_open": Script(
            '{"name": "write", "arguments": {"path": "c", "content": "d"}}\n</tool_call>', None, one("c", "d")
        ),
        "bad_no_function_open": Script(
            "<function=write>\n<parameter=path>\nx\n</parameter>\n<parameter=content>\ny\n</parameter>\n"
            "</function>\n</tool_call>",
            None,
            one("x", "y"),
        ),
        "bad_cut": Script(
            '<tool_call>\n{"name": "write", "arguments": {"path": "e", "content": "half of', None
        ),
        "bad_json": Script("<tool_call>\n{'name': 'write', 'arguments': {'path': 'f'}}\n</tool_call>", None),
        "bad_unknown": Script(write("no_such_tool", {"q": 1}), None),
        "bad_then_good": Script(f"<tool_call>\n{{not json}}\n</tool_call>\n{good}", None, one("g", "good")),
        "bad_text_after": Script(f"{after}\nand some words after it", None, one("h", "i")),
        "bad_fence": Script(fence, None),
    }


RULES = (
    Rule("after_tool", role="tool"),
    Rule("magic_no_args", tool="magic_function_no_args"),
    Rule("magic", tool="magic_function"),
    Rule("adder", tool="my_adder_tool"),
    Rule("greeting", tool="greeting_generator"),
    Rule("customer_ja", words=("こんにちは株式会社",)),
    Rule("customer", tool="unicode_customer"),
    Rule("get_weather", tool="get_weather"),
    Rule("weather", tool="get_current_weather"),
    Rule("joke_call", tool="Joke"),
    Rule("joke_call", tool="joke"),
    Rule("joke_json", words=("joke", "JSON")),
    Rule("joke", words=("joke",)),
    Rule("haiku", words=("haiku",)),
)
"""The first that holds says the script, where no user message names one as ``[[NAME]]``."""
