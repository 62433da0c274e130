"""Checks that passed, remembered between runs: a list of keys in a JSON file of the cache folder.

Processes that write at once take turns by a lock on a file beside it, which the system drops with them.
"""

import importlib
import json
import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

MAX_REMEMBERED = 1000
MAX_BYTES = 1 << 20

SECONDS_FOR_A_TURN = 10.0
"""A turn takes milliseconds. A process that is stopped in its own keeps nobody from the work: a key may be
lost then, and its check runs again."""

PAUSE = 0.005


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _turn(path.with_name(f"{path.name}.lock")):
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


@contextmanager
def _turn(path: Path) -> Generator[None]:
    """Within the block no other process is, for as long as SECONDS_FOR_A_TURN; none is refused."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    lock = os.open(path, flags, 0o600)
    try:
        end = time.monotonic() + SECONDS_FOR_A_TURN
        while not _is_taken(lock) and time.monotonic() < end:
            time.sleep(PAUSE)
        yield
    finally:
        os.close(lock)


def _is_taken(lock: int) -> bool:
    """Tries to lock an open file; True, too, where the system or the place of the file has no locks."""
    try:
        for name in ("fcntl", "msvcrt"):
            try:
                module: Any = importlib.import_module(name)
            except ImportError:
                continue
            if name == "fcntl":
                module.flock(lock, module.LOCK_EX | module.LOCK_NB)
            else:
                module.locking(lock, module.LK_NBLCK, 1)
            break
    except (BlockingIOError, PermissionError):  # of the one and of the other: another process has it
        return False
    except OSError:
        return True
    return True
