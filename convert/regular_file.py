"""Reading a file that may be hostile, damaged, or changing while it is read.

``pread`` alone, never ``mmap``: a mapped file that is truncated kills the
process with SIGBUS, while ``pread`` returns fewer bytes, which becomes an
error that names the file.
"""

import os
import stat
from pathlib import Path

from qwen3_moe_jax.convert.errors import ModelFileError, printable


class RegularFile:
    """An open regular file with the size and the time stamp that it had when opened.

    Raises:
      ModelFileError: ``E_OPEN`` if it is missing, unreadable or not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self._fd = os.open(self.path, flags)
        except OSError as error:
            raise self.error("E_OPEN", f"cannot be opened: {error.strerror}") from error
        except ValueError as error:  # a NUL byte in the path
            raise self.error("E_OPEN", f"cannot be opened: {error}") from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise self.error("E_OPEN", f"is {kind}; name a .gguf file")
        self.size = found.st_size
        self._modified_ns = found.st_mtime_ns

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def error(
        self, code: str, problem: str, *, name: str | None = None, offset: int | None = None
    ) -> ModelFileError:
        """An error whose message starts with this file's path, and whose name is the path by default."""
        path = str(self.path)
        return ModelFileError(code, f"{printable(path, 300)}: {problem}", name=name or path, offset=offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (bytes) from the file, starting at byte ``offset``.

        Raises:
          ModelFileError: ``E_SHORT_READ`` if the file ends before, ``E_OPEN`` if
            the system cannot read it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self.error("E_OPEN", f"cannot be read: {error.strerror}", offset=offset) from error
            if count == 0:
                raise self.error(
                    "E_SHORT_READ",
                    f"ends {len(buffer) - done} bytes early; it had {self.size} bytes when it was opened",
                    offset=offset + done,
                )
            done += count

    def read(self, count: int, offset: int) -> bytes:
        """``count`` bytes from ``offset``. Errors as :meth:`read_into`."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise ``ModelFileError`` ``E_CHANGED`` if size or time stamp differ from when it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.size, self._modified_ns):
            raise self.error("E_CHANGED", "was changed while it was being read; load it again")
