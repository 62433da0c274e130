"""How a long job says how far it is: one callback, and two ways to show it.

Library code takes ``progress: ProgressCallback | None`` and calls it with bytes
done and bytes in all. Only a program's edge chooses what to do with it:
:func:`show_progress` draws a bar with GB/s and time left on a terminal (with
``rich``) and prints plain lines elsewhere.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

QUIET_SECONDS = 1.0
"""Jobs shorter than this show nothing."""

LINE_SECONDS = 5.0
"""Time between two plain lines."""


class ProgressCallback(Protocol):
    """Told after each piece of work; always from the thread that started the job."""

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are finished."""


def format_bytes(count: float) -> str:
    """A number of bytes for people: ``"18.56 GB"``, ``"14.2 MB"``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def show_progress(label: str, stream: TextIO | None = None) -> Iterator[ProgressCallback]:
    """Shows the progress of one job on ``stream`` (standard error): a bar on a terminal, else lines."""
    stream = stream or sys.stderr
    reporter = _bar(label, stream) if stream.isatty() else _lines(label, stream)
    with reporter as callback:
        yield callback


@contextmanager
def _lines(label: str, stream: TextIO) -> Iterator[ProgressCallback]:
    start = time.monotonic()
    last = start + QUIET_SECONDS - LINE_SECONDS

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last = now
        rate = done / (now - start)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        line = f"{label}: {format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s{left}"
        print(line, file=stream, flush=True)

    yield report


@contextmanager
def _bar(label: str, stream: TextIO) -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(file=stream), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(label, total=None, visible=False)

        def report(done: int, total: int) -> None:
            visible = time.monotonic() - start > QUIET_SECONDS
            bar.update(task, completed=done, total=total, visible=visible)
            bar.refresh()

        yield report
