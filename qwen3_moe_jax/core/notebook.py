"""Progress in notebooks: one bar that is written over in its cell, and taken away at the end."""

import html
import importlib
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from qwen3_moe_jax.convert.progress import ProgressCallback, format_bytes
from qwen3_moe_jax.core import terminal

SECONDS = 0.2
"""Between two updates."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def progress(shown: "ProgressCallback | bool | None", label: str) -> Any:
    """A context manager that gives the callback of a job.

    Args:
      shown: a callback of the caller's; True for a bar; False for nothing; None for a bar in notebooks alone.
      label: what is done.
    """
    if shown is None:
        shown = in_notebook()
    if callable(shown) or not shown:
        return nullcontext(shown or None)
    return show_progress(label) if in_notebook() else terminal.show_progress(label)


@contextmanager
def show_progress(label: str) -> Generator[ProgressCallback, None, None]:
    """A bar in the cell's output, once the job takes longer than a second."""
    display: Any = importlib.import_module("IPython.display").display
    estimate, due = terminal.Estimate(), terminal.QUIET_SECONDS
    handle: Any = None
    began = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal handle, due
        _, rate, left = estimate(done, total)
        now = time.monotonic() - began
        if now < due:
            return
        due = now + SECONDS
        bar = _Bar(label, done, total, terminal.rate_text(rate, left))
        if handle is None:
            handle = display(bar, display_id=True)
        else:
            handle.update(bar)

    try:
        yield report
    finally:
        if handle is not None:
            handle.update(_Bar("", 0, 0, ""))


class _Bar:
    """What a notebook shows, as HTML, or as text where it can show none."""

    def __init__(self, label: str, done: int, total: int, rate: str):
        self._text = f"{label}: {format_bytes(done)} of {format_bytes(total)}{rate}" if label else ""
        self._done, self._total = done, total

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        if not self._text:
            return ""
        bar = f'<progress value="{self._done}" max="{self._total}"></progress>'
        return f"<div>{bar} {html.escape(self._text)}</div>"
