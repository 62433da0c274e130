"""Checks that passed, remembered between runs: a list of keys in a JSON file of the cache folder.

Processes that write at once take turns by a lock on a file beside it, which the system drops with them.
"""

import json
import os
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

MAX_REMEMBERED = 1000
MAX_BYTES = 1 << 20

SECONDS_FOR_A_TURN = 10.0
"""A turn takes milliseconds. A process that is stopped in its own keeps nobody from the work: a key may be
lost then, and its check runs again."""

PAUSE = 0.005
"""Seconds between two looks at the lock."""


def remembered(path: Path) -> list[str]:
    """Keys that have passed; an unreadable file has none."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:  # a pipe would wait for ever
            return []
        keys: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    items = cast("list[Any]", keys) if isinstance(keys, list) else []
    return [key for key in items if isinstance(key, str)]


def remember(path: Path, key: str) -> None:
    """Adds a key to those that any process has added; a cache that cannot be written means one check more."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as turn:
            lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=SECONDS_FOR_A_TURN, mode=0o600)
            with suppress(OSError, NotImplementedError):  # waited too long; a place or system without locks
                turn.enter_context(lock.acquire(poll_interval=PAUSE))
            _write(path, [*remembered(path), key][-MAX_REMEMBERED:])
    except OSError:
        return


def _write(path: Path, keys: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(json.dumps(keys))
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
