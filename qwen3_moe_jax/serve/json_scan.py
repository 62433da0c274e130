"""JSON values found in text as it comes, in linear time: where a value ends, never what it means."""

import re

_IN_STRING = re.compile(r'[^"\\]*')
_OUTSIDE = re.compile(r'[^"{}\[\]]*')
_SCALAR = re.compile(r"[^,}\]\s]*")
_SPACE = re.compile(r"\s*")


def _end_of(run: re.Pattern[str], text: str, at: int) -> int:
    """Where a run of characters that begins at ``at`` ends; it may be empty."""
    found = run.match(text, at)
    return at if found is None else found.end()


def after_space(text: str, at: int) -> int:
    """The first place from ``at`` on that is no white space."""
    return _end_of(_SPACE, text, at)


class ValueScan:
    """Finds the end of one JSON value that is fed in pieces.

    Attributes:
      kind: "object", "array", "string" or "scalar"; empty before its first character has come.
    """

    def __init__(self):
        self.kind = ""
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
        if not self.kind:
            self.kind = {"{": "object", "[": "array", '"': "string"}.get(text[start], "scalar")
        if self.kind == "scalar":
            end = _end_of(_SCALAR, text, start)
            return end, end < len(text)
        return self._feed_nested(text, start)

    def _feed_nested(self, text: str, at: int) -> tuple[int, bool]:
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            at = _end_of(_IN_STRING if self._in_string else _OUTSIDE, text, at)
            if at == len(text):
                break
            at += 1
            if self._advance(text[at - 1]):
                return at, True
        return at, False

    def _advance(self, symbol: str) -> bool:
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
