"""Reads forward through an untrusted file; nothing is taken that the file does not have."""

import struct
from typing import Any

from qwen3_moe_jax.convert.regular_file import RegularFile

WINDOW = 128 * 1024
"""Bytes that are read at once."""

_U64 = struct.Struct("<Q")


class Cursor:
    """Reads forward through a file; every read is checked against what is left of it."""

    def __init__(self, file: RegularFile):
        self.file = file
        self._start = 0  # file offset of the window
        self._window = b""
        self._at = 0  # position in the window

    @property
    def offset(self) -> int:
        return self._start + self._at

    @property
    def remaining(self) -> int:
        return self.file.size - self.offset

    def require(self, count: int, what: str) -> None:
        """Raise ``E_SHORT_READ`` unless ``count`` more bytes are in the file."""
        if count > self.remaining:
            raise self.file.error(
                "E_SHORT_READ",
                f"{what} needs {count} bytes and {self.remaining} of the file's {self.file.size} are left; "
                "the file is cut short or damaged",
                offset=self.offset,
            )

    def _fill(self, count: int) -> None:
        """Have ``count`` bytes (that :meth:`require` has granted) at ``_at``."""
        if count <= len(self._window) - self._at:
            return
        start = self.offset
        self._window = b""  # never two at once
        self._window = self.file.read(min(max(count, WINDOW), self.file.size - start), start)
        self._start, self._at = start, 0

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        self._fill(count)
        self._at += count
        return self._window[self._at - count : self._at]

    def number(self, code: str, what: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size, what))[0]

    def take_strings(self, count: int, limit: int, what: str, code: str) -> list[bytes]:
        """Up to ``count`` length-prefixed strings, as many as lie in the window, at least one."""
        self.require(8, what)
        self._fill(8)
        (length,) = _U64.unpack_from(self._window, self._at)
        if length > limit:
            raise self.file.error(
                code, f"{what} has {length} bytes; at most {limit} are allowed", offset=self.offset
            )
        self.require(8 + length, what)
        self._fill(8 + length)
        window, at, end = self._window, self._at, len(self._window)
        strings: list[bytes] = []
        append, unpack = strings.append, _U64.unpack_from  # 300,000 times for a vocabulary and its merges
        for _ in range(count):
            if at + 8 > end:
                break
            (length,) = unpack(window, at)
            stop = at + 8 + length
            if length > limit or stop > end:
                break
            append(window[at + 8 : stop])
            at = stop
        self._at = at
        return strings
