"""Compiled programs on disk: one file per program, whole or absent, in a folder of the user's own.

A file holds machine code that this process will run, so the folder must belong to the user, or to
root, and no other may write to it; what fails a check counts as absent. A file is::

    magic, 8 bytes | SHA-256 of the rest, 32 bytes | the program
"""

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = b"q3moeP01"
DIGEST_BYTES = 32
SUFFIX, UNFINISHED = ".program", ".part"
STALE_SECONDS = 3600.0
"""An unfinished file of this age is of a process that was killed."""

MAX_BYTES = 2 * 2**30
"""Room for the programs of several models and settings: those of one are 5 to 60 MB."""

log = logging.getLogger(__name__)


@dataclass
class ProgramStore:
    """Programs by key in one folder; the ones that were used longest ago make room for new ones.

    Every method keeps on working when the disk does not: a store is a comfort, and a program
    that cannot be read or written is compiled.

    Attributes:
      folder: made on the first ``put``, with mode 0700.
      max_bytes: of all files together.
      is_read_only: programs are read and none is written.
      trouble: one line for each kind of failure so far, for the user to read once.
    """

    folder: Path
    max_bytes: int = MAX_BYTES
    is_read_only: bool = False
    trouble: list[str] = field(default_factory=list)

    def get(self, key: str) -> bytes | None:
        """Returns the program of ``key``, or None: absent, damaged, or in a folder of somebody else's."""
        path = self._path(key)
        try:
            if not os.path.lexists(path) or not self._is_private():
                return None
            content = self._read(path)
        except OSError as error:
            self._note(f"cannot be read ({error.strerror})")
            return None
        with contextlib.suppress(OSError):  # a place that cannot be written
            os.utime(path)  # used now: others go first
        head = len(MAGIC) + DIGEST_BYTES
        program = content[head:]
        if content[:head] != MAGIC + hashlib.sha256(program).digest():
            self._note("had a damaged file, which is made again")
            self.delete(key)
            return None
        return program

    def _read(self, path: Path) -> bytes:
        """The bytes of a file; none of a link, a pipe, a device, or what is too large to be a program."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            status = os.fstat(file.fileno())
            is_program = stat.S_ISREG(status.st_mode) and status.st_size <= self.max_bytes
            return file.read() if is_program else b""

    def has(self, key: str) -> bool:
        """Whether ``key`` has a file; ``get`` may find that it is damaged."""
        return self._path(key).exists()

    def put(self, key: str, program: bytes) -> bool:
        """Writes a program under ``key``: whole, or not at all. Returns whether it is there now."""
        content = MAGIC + hashlib.sha256(program).digest() + program
        if self.is_read_only or len(content) > self.max_bytes:
            return False
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private():
                return False
            self._make_room(len(content))
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=UNFINISHED, delete=False) as file:
                try:
                    file.write(content)
                    file.flush()
                    os.replace(file.name, self._path(key))
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            self._note(f"cannot be written ({error.strerror})")
            return False
        return True

    def delete(self, key: str) -> None:
        """Removes the program of ``key``, if it is there and can be removed."""
        if self.is_read_only:
            return
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._note(f"cannot be written ({error.strerror})")

    def nbytes(self) -> int:
        """Returns the bytes of all programs."""
        return sum(size for _, size, _ in self._files())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _is_private(self) -> bool:
        """Whether the folder is one that nobody else could have written to."""
        status = os.lstat(self.folder)
        is_own = stat.S_ISDIR(status.st_mode) and (os.name == "nt" or status.st_uid in (0, os.geteuid()))
        if not is_own:
            self._note("is not a folder of this user: it is not used")
            return False
        if os.name != "nt" and status.st_mode & 0o022:
            os.chmod(self.folder, 0o700)  # files written before may be anybody's
            for path, _, _ in self._files():
                path.unlink(missing_ok=True)
            self._note("was open to other users: it is closed and emptied now")
        return True

    def _files(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of last use of every program, the oldest first."""
        found: list[tuple[Path, int, float]] = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def _make_room(self, nbytes: int) -> None:
        for path in self.folder.glob(f"*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):  # another thread or process has finished it
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        files = self._files()
        total = sum(size for _, size, _ in files) + nbytes
        for path, size, _ in files:
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _note(self, what: str) -> None:
        line = f"the cache of compiled programs {self.folder} {what}"
        if line not in self.trouble:
            self.trouble.append(line)
            log.info(line)
