"""Reading a file that may be hostile, damaged, or changing while it is read.

``pread`` alone, never ``mmap``: a mapped file that is truncated kills the
process with SIGBUS, while ``pread`` returns fewer bytes, which becomes an
error that names the file. Systems without it (Windows) seek and read under a
lock, with the same errors.
"""

import errno
import os
import stat
import threading
from pathlib import Path

from qwen3_moe_jax.convert.errors import ModelFileError, printable

_OPTIONAL_FLAGS = ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY", "O_NOINHERIT")
"""Flags that some systems have. Without O_NONBLOCK, opening a FIFO would wait for a writer; without
O_BINARY, Windows ends a file at its first byte 26 and drops carriage returns."""

_SHOWN = 300
"""Characters of a path in a message."""

MAX_READ_BYTES = 1 << 30
"""Of one call: Windows and macOS refuse, and Linux cuts, what is 2 GiB or more."""


def _open_flags() -> int:
    flags = os.O_RDONLY
    for name in _OPTIONAL_FLAGS:
        flags |= getattr(os, name, 0)
    return flags


class Descriptor:
    """The number of an open file, closed once by however many threads: the number may be another file's next.

    Attributes:
      number: -1 once it is closed.
    """

    def __init__(self, number: int):
        self.number = number
        self._closing = threading.Lock()

    def close(self) -> None:
        """A second call does nothing."""
        with self._closing:
            number, self.number = self.number, -1
        if number >= 0:
            os.close(number)


def check_file_name(path: Path) -> None:
    """Refuses a name that no file can have: too long, with a NUL, or in a folder that may not be searched.

    Raises:
      ModelFileError: ``E_OPEN``, with both ends of a long name. A file that is only missing is no fault here.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise _cannot_be_opened(path, error) from error


def _cannot_be_opened(path: Path, error: OSError | ValueError) -> ModelFileError:
    problem = getattr(error, "strerror", None) or str(error)
    problem = "a NUL in its name" if "\0" in str(path) else problem  # Python's words change with its version
    shown = printable(str(path), 80 if getattr(error, "errno", None) == errno.ENAMETOOLONG else _SHOWN)
    return ModelFileError("E_OPEN", f"{shown}: cannot be opened: {problem}", name=str(path))


class RegularFile:
    """An open regular file with the size and the time stamp that it had when opened.

    Raises:
      ModelFileError: ``E_OPEN`` if it is missing, unreadable or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._position = threading.Lock()
        try:
            self._descriptor = Descriptor(os.open(self.path, _open_flags()))
        except (OSError, ValueError) as error:
            raise _cannot_be_opened(self.path, error) from error
        found = os.fstat(self._descriptor.number)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise self.error("E_OPEN", f"is {kind}; name a .gguf file")
        self.size = found.st_size
        self._modified_ns = found.st_mtime_ns

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._descriptor.close()

    def error(
        self, code: str, problem: str, *, name: str | None = None, offset: int | None = None
    ) -> ModelFileError:
        """An error whose message starts with this file's path, and whose name is the path by default."""
        path = str(self.path)
        return ModelFileError(code, f"{printable(path, _SHOWN)}: {problem}", name=name or path, offset=offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes) from the file, starting at byte ``offset``.

        Raises:
          ModelFileError: ``E_SHORT_READ`` if the file ends before, ``E_OPEN`` if
            the system cannot read it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = self._read_some(buffer[done : done + MAX_READ_BYTES], offset + done)
            except OSError as error:
                raise self.error("E_OPEN", f"cannot be read: {error.strerror}", offset=offset) from error
            if count == 0:
                raise self.error(
                    "E_SHORT_READ",
                    f"ends {len(buffer) - done} bytes early; it had {self.size} bytes when it was opened",
                    offset=offset + done,
                )
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        """Bytes that one call of the system reads; 0 at the end of the file."""
        preadv = getattr(os, "preadv", None)
        if preadv is not None:
            return preadv(self._descriptor.number, [buffer], offset)
        with self._position:
            os.lseek(self._descriptor.number, offset, os.SEEK_SET)
            found = os.read(self._descriptor.number, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def read(self, count: int, offset: int) -> bytes:
        """``count`` bytes from ``offset``. Errors as :meth:`read_into`."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise ``ModelFileError`` ``E_CHANGED`` if size or time stamp differ from when it was opened."""
        try:
            now = os.fstat(self._descriptor.number)
        except OSError as error:  # closed meanwhile
            raise self.error("E_OPEN", f"cannot be read: {error.strerror}") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self._modified_ns):
            raise self.error("E_CHANGED", "was changed while it was being read; load it again")
