"""Whether this process speaks to people: of several that run one model, one alone writes texts and files."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

_is_silent = False


def silence(is_silent: bool = True) -> None:
    """From now on this process writes nothing but its errors."""
    global _is_silent
    _is_silent = is_silent


def is_silent() -> bool:
    """Whether another process speaks."""
    return _is_silent


@contextmanager
def aloud() -> Generator[None]:
    """Within the block this process speaks."""
    before = _is_silent
    silence(False)
    try:
        yield
    finally:
        silence(before)


def keep_output() -> None:
    """Keeps standard output for results: what libraries in C++ say there (gloo: it is connected) is lost."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
        number = os.dup(sys.stdout.fileno())
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # a stream without a file
        return
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = open(number, "w", encoding=encoding, errors=errors)  # noqa: SIM115
