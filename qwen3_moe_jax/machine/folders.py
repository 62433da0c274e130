"""Where this project keeps files of its own: compiled programs, passed checks, downloads, a history.

They are comforts: a machine without a home, with a folder that cannot be written or a disk that is
full, runs without them, and says so in one line; what is there already is read all the same.
``QWEN3_MOE_CACHE`` names another cache folder; ``QWEN3_MOE_CACHE=off`` keeps nothing.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "QWEN3_MOE_CACHE"
"""Environment variable: the folder for everything that can be made again, or "off"."""

APPLICATION = "qwen3_moe_jax"

MIN_FREE_BYTES = 64 << 20
"""A disk with less is taken for full: a compiled program has some megabytes."""

log = logging.getLogger("qwen3_moe_jax")


def cache_folder() -> Path | None:
    """The folder for what can be made again, whether or not it is there yet.

    ``$QWEN3_MOE_CACHE``, or the system's cache folder of the user (``$XDG_CACHE_HOME``, else
    ``~/.cache``, on Linux); None where there is no home, or with ``QWEN3_MOE_CACHE=off``.
    """
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted.lower() == "off":
        return None
    if wanted:
        return Path(os.path.abspath(os.path.expanduser(wanted)))
    return _absolute(platformdirs.user_cache_path)


def state_folder() -> Path | None:
    """The folder for what a user would miss (the history of a prompt); None where there is no home."""
    return _absolute(platformdirs.user_state_path)


def _absolute(ask: Callable[..., Path]) -> Path | None:
    """None for ``~`` that nothing stands for, or a relative ``$XDG_...``, which the standard ignores."""
    try:
        path = ask(APPLICATION, appauthor=False)
    except (RuntimeError, OSError):  # there is no home
        return None
    return path if path.is_absolute() else None


def writable_cache(name: str = "") -> Path | None:
    """The cache folder, or ``name`` in it, made if need be; None, after a line in the log, if it cannot."""
    folder = cache_folder()
    if folder is None:
        reason = "off" if os.environ.get(CACHE_VARIABLE) else "there is no home folder"
        return _without_cache(reason) if reason != "off" else None
    try:
        found = folder / name
        found.mkdir(parents=True, exist_ok=True)
        _try_to_write(found)
        return found
    except OSError as error:
        reason = error.strerror or error
        return _read_alone(folder, reason) if _has_content(folder) else _without_cache(f"{folder}: {reason}")


def readable_cache(name: str = "") -> Path | None:
    """As :func:`writable_cache`; where the folder cannot be written, the one that is there to be read."""
    if writable := writable_cache(name):
        return writable
    folder = cache_folder()
    return folder / name if folder is not None and _has_content(folder / name) else None


def _has_content(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is not None
    except OSError:
        return False


def check_writable(folder: str) -> None:
    """Says in the log, once, that a cache folder of the user's own choice cannot be written."""
    if "://" in folder:  # a bucket
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _try_to_write(Path(folder))
    except OSError as error:
        can = "can only be read" if _has_content(Path(folder)) else "cannot be used"
        reason = error.strerror or error
        _say_once(folder, f"the cache folder {folder} {can} ({reason}): other programs are compiled")


def _try_to_write(folder: Path) -> None:
    """Raises OSError unless files can be made in ``folder``, and its disk has room."""
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(f"less than {MIN_FREE_BYTES >> 20} MB are free")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))
        file.flush()


def _read_alone(folder: Path, reason: object) -> None:
    _say_once(
        "cache",
        f"the cache {folder} can only be read ({reason}): what it lacks is compiled and checked each time; "
        f"{CACHE_VARIABLE} names another folder",
    )


def _without_cache(reason: str) -> None:
    _say_once(
        "cache",
        f"no cache ({reason}): programs are compiled and checks made again each time; "
        f"{CACHE_VARIABLE} names another folder",
    )


_said: set[str] = set()


def _say_once(what: str, line: str) -> None:
    if what not in _said:
        _said.add(what)
        log.warning(line)


STORE_VARIABLE = "QWEN3_MOE_PROGRAMS"
"""Environment variable: "off" keeps no programs on disk but those in JAX's own cache."""


def programs_folder() -> Path | None:
    """Where compiled programs are written; None where they are not."""
    is_off = os.environ.get(STORE_VARIABLE, "").lower() == "off"
    folder = None if is_off else writable_cache()
    return None if folder is None else folder / "programs"
