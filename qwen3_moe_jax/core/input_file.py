"""Files that an option names to be read: regular files alone.

A pipe without a writer would wait for ever, and a device such as ``/dev/zero`` has no end.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qwen3_moe_jax.convert.errors import printable

_SHOWN = 300
"""Characters of a path in a message."""


def open_input(path: str | os.PathLike[str], *, advice: str = "name a file") -> BinaryIO:
    """The file, to read.

    Args:
      path: of the file.
      advice: what to do in place of naming a pipe or a device.

    Raises:
      OSError: it is not there, not readable or not a regular file; the message is one line that names it.
    """
    try:
        return open(path, "rb", opener=_without_waiting)
    except ValueError as error:  # a NUL in the name, or a character that no name can have
        raise OSError(f"{_name(path)} cannot be read: {error}") from error
    except OSError as error:
        problem = error.strerror or f"{error}; {advice}"
        raise OSError(f"{_name(path)} cannot be read: {problem}") from error


def read_input(path: str | os.PathLike[str], *, advice: str = "name a file") -> bytes:
    """All bytes of the file. Errors as :func:`open_input`."""
    with open_input(path, advice=advice) as file:
        try:
            return file.read()
        except OSError as error:
            raise OSError(f"{_name(path)} cannot be read: {error.strerror}") from error


def read_text(path: str | os.PathLike[str], *, advice: str = "name a file") -> str:
    """The file's text; line ends stay as they are.

    Raises:
      OSError: as :func:`open_input`.
      ValueError: it is not UTF-8.
    """
    return decoded(read_input(path, advice=advice), _name(path))


def decoded(data: bytes, name: str) -> str:
    """The text that ``data`` is. Raises ValueError, with ``name``, for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start})") from error


def _name(path: str | os.PathLike[str]) -> str:
    return printable(str(Path(path)), _SHOWN)


def _without_waiting(path: str, flags: int) -> int:
    """Opens for ``open``. Raises OSError for a pipe, a device, a socket or a folder."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
