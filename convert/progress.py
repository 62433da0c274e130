"""How a long job says how far it is: one callback, which knows nothing of terminals.

Library code takes ``progress: ProgressCallback | None`` and calls it with bytes
done and bytes in all. Only a program's edge chooses what to do with it:
``core.terminal.show_progress`` draws a bar or prints lines.
"""

from collections.abc import Callable
from typing import Protocol


class ProgressCallback(Protocol):
    """Told after each piece of work; always from the thread that started the job."""

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are finished."""


def format_bytes(count: float) -> str:
    """A number of bytes for people: ``"18.56 GB"``, ``"14.2 MB"``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def at_first(action: Callable[[], object], progress: ProgressCallback | None = None) -> ProgressCallback:
    """A callback that calls ``action`` when something is done for the first time, and ``progress`` always."""
    begun = False

    def told(done: int, total: int) -> None:
        nonlocal begun
        if done and not begun:
            begun = True
            action()
        if progress:
            progress(done, total)

    return told
