"""Checks that passed, remembered between runs: a list of keys in a JSON file of the cache folder."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, cast

MAX_REMEMBERED = 1000
MAX_BYTES = 1 << 20


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
    """Adds a key; a cache that cannot be written only means that the check runs again."""
    keys = [*remembered(path), key][-MAX_REMEMBERED:]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                file.write(json.dumps(keys))
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
    except OSError:
        return
