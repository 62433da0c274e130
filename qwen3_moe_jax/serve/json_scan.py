"""JSON values found in text as it comes, in linear time: where a value ends, never what it means."""

import re

_IN_STRING = re.compile(r'[^"\\]*')
_OUTSIDE = re.compile(r'[^"{}\[\]]*')
_SCALAR = re.compile(r"[^,}\]\s]*")
SPACE = re.compile(r"\s*")


class ValueScan:
    """Finds the end of one JSON value that is fed in pieces.

    Attributes:
      kind: "object", "array", "string" or "scalar", once its first character has come.
    """

    def __init__(self):
        self.kind: str | None = None
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str, start: int) -> tuple[int, bool]:
        """Goes on at ``start``, which must be the value's first character in the first call.

        Returns:
          Where the value, or the text, ends, and whether the value does.
        """
        if start >= len(text):
            return start, False
        if self.kind is None:
            self.kind = {"{": "object", "[": "array", '"': "string"}.get(text[start], "scalar")
        if self.kind == "scalar":
            end = _SCALAR.match(text, start).end()
            return end, end < len(text)
        return self._feed_nested(text, start)

    def _feed_nested(self, text: str, at: int) -> tuple[int, bool]:
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            at = (_IN_STRING if self._in_string else _OUTSIDE).match(text, at).end()
            if at == len(text):
                break
            at += 1
            if self._step(text[at - 1]):
                return at, True
        return at, False

    def _step(self, symbol: str) -> bool:
        """Takes a symbol of structure; True if it ends the value."""
        if symbol == "\\":
            self._is_escaped = True
        elif symbol == '"':
            self._in_string = not self._in_string
            return not self._in_string and not self._depth
        elif symbol in "{[":
            self._depth += 1
        else:
            self._depth -= 1
            return not self._depth
        return False
