"""Where requests come from: a file, in windows, or standard input, as it comes."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import IO, Protocol

from qwen3_moe_jax.serve.batch.lines import Line, open_requests, read

WINDOW = 4096
"""Lines that are put in order together: what is held in memory."""


class Source(Protocol):
    """Gives lines in windows."""

    async def window(self) -> list[Line]:
        """The next lines; none at the end."""
        ...

    def close(self) -> None: ...


class FileSource:
    """A file's lines; ``close`` it."""

    def __init__(self, path: str):
        """Raises OptionError: it cannot be read."""
        self._file = open_requests(path)
        self._lines: Iterator[Line] = read(self._file)

    async def window(self) -> list[Line]:
        return await asyncio.to_thread(lambda: list(itertools.islice(self._lines, WINDOW)))

    def close(self) -> None:
        self._file.close()


class StreamSource:
    """Lines of a pipe, read by a thread: a window is what has come while the last one was answered.

    A custom_id that came before is a fault of its line, which then has no name but its number.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._queue: asyncio.Queue[Line | None] = asyncio.Queue(WINDOW)
        self._names: dict[str, int] = {}
        self._thread: threading.Thread | None = None
        self._is_over = False

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        def put(line: Line | None) -> None:
            putting = self._queue.put(line)
            try:
                asyncio.run_coroutine_threadsafe(putting, loop).result()
            except (RuntimeError, CancelledError):  # the loop has ended: nobody takes it any more
                putting.close()

        try:
            for line in read(self._file):
                put(self._checked(line))
        finally:
            put(None)

    def _checked(self, line: Line) -> Line:
        first = self._names.setdefault(line.custom_id, line.number) if line.custom_id is not None else None
        if first in (None, line.number):
            return line
        fault = f"line {first} has the same custom_id, {str(line.custom_id)[:80]!r}: give each its own"
        return replace(line, custom_id=None, code="duplicate_custom_id", fault=fault)

    async def window(self) -> list[Line]:
        if self._thread is None:
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._read, args=(loop,), daemon=True)
            self._thread.start()
        found: list[Line] = []
        while not self._is_over and (not found or not self._queue.empty()) and len(found) < WINDOW:
            line = await self._queue.get()
            if line is None:
                self._is_over = True
            else:
                found.append(line)
        return found

    def close(self) -> None:
        """The pipe is the program's own; nothing is to be closed."""
