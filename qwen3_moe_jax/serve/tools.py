"""Tool calls in a model's text, as it comes: Qwen3's JSON and Qwen3-Coder's XML by one incremental parser.

The parser forgives what models do: a call without ``<tool_call>``, a call that is never closed, several in
one pair of tags, a broken one before a good one, ``<`` and ``>`` and whole tags in arguments. What is no
call stays text. Arguments come out while the model writes them. Where the text is cut makes no difference
to the joined result, and the work is linear in its length.
"""

from collections.abc import Mapping
from typing import Any

from qwen3_moe_jax.serve.call_formats import (
    CLOSE,
    FUNCTION,
    OPEN,
    CallArguments,
    CallStart,
    CoderCall,
    Delta,
    HermesCall,
    NotACall,
    Text,
    overlap,
    tool_schemas,
)

__all__ = ["CallArguments", "CallStart", "Delta", "Text", "ToolParser", "tool_schemas"]

MAX_HEAD, MAX_FAILURES, LONG_FAILURE = 1 << 16, 64, 256
"""A call must have a name within so many characters. After so many calls that were none, and were longer than
LONG_FAILURE each, the rest is text: reading what was held a second time would else be a square."""


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
        self._call: HermesCall | CoderCall | None = None
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
            self._start_call(HermesCall(self, self._schemas, known_only=True), self._take_space() + "{")
        elif self._held or is_last:
            self._state = self._in_text

    def _in_text(self, is_last: bool) -> None:
        words = (OPEN, FUNCTION) if self._failures < MAX_FAILURES else ()
        at, word = min(((_find(self._held, w), w) for w in words), default=(len(self._held), ""))
        if at == len(self._held):  # neither is there
            kept = 0 if is_last else max((overlap(self._held, w) for w in words), default=0)
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
            self._start_call(CoderCall(self, self._schemas, known_only=True), self._take_space() + "<")
        elif is_last:
            self._say(self._take_space())

    def _after_open(self, is_last: bool) -> None:
        """In ``<tool_call>``: one format or the other, or neither."""
        head = self._held.lstrip()
        self._raw.append(self._held[: len(self._held) - len(head)])
        self._held = head
        if head.startswith("{"):
            self._start_call(HermesCall(self, self._schemas))
        elif head.startswith(FUNCTION):
            self._start_call(CoderCall(self, self._schemas))
        elif is_last or not FUNCTION.startswith(head):
            self._give_up()

    def _start_call(self, call: "HermesCall | CoderCall", lead: str | None = None) -> None:
        """``lead``: what becomes text if this is no call; it includes the first character held."""
        if lead is not None:
            self._lead, self._raw = lead, []
            self._out_of_raw = 1
        else:
            self._out_of_raw = 0
        self._call, self._state = call, self._in_call

    _out_of_raw = 0

    def _in_call(self, is_last: bool) -> None:
        held, call = self._held, self._call
        assert call is not None  # ``_start_call`` sets both
        try:
            deltas, rest, is_over = call.feed(held)
        except NotACall:
            self._give_up()
            return
        self._out += deltas
        self._held = rest
        if not call.has_begun:
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
            self._start_call(HermesCall(self, self._schemas, known_only=True), "{")
        elif head.startswith(FUNCTION):
            self._start_call(CoderCall(self, self._schemas, known_only=True), "<")
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
