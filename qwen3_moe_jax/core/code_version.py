"""A hash of this project's own code, for receipts and caches: the same code gives the same text."""

import hashlib
import os
from functools import cache
from pathlib import Path
from threading import Lock

SUFFIXES = {".py", ".wgsl", ".toml", ".json", ".c", ".h"}


_lock = Lock()


def code_version() -> str:
    """Returns sixteen hexadecimal digits over every source file of the package, by name and content.

    Threads that ask at the same time wait for the first: ``cache`` alone would let each read all files.
    """
    with _lock:
        return _of_files()


@cache
def _of_files() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    # A clone holds two sub-packages as links to the folders beside the package: a wheel holds the folders.
    folders = os.walk(package, followlinks=True)
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names):
        if path.suffix in SUFFIXES:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
