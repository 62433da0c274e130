"""A folder that appears complete or not at all.

What is written goes to a hidden folder beside the wanted one. Only when every
file and folder in it has been synced to the disk is it renamed, and then the
parent is synced: a crash at any moment leaves the wanted name absent or whole.
A lock file, held by the operating system for as long as the process lives,
keeps two writers apart, and lets the next run remove what a killed one left.
"""

import errno
import importlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from qwen3_moe_jax.convert.errors import ModelFileError, printable

SPACE_MARGIN = 1.1
"""A disk must have this many times the bytes that will be written."""

_QUIET_CHECKS = 5
_QUIET_SECONDS = 0.02
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
# tensorstore, which orbax writes with, raises ValueErrors with the system's text in them.
_NO_SPACE_TEXTS = ("RESOURCE_EXHAUSTED", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_FAILED_WRITE_TEXT = "Error writing"


class OutputError(RuntimeError):
    """A folder cannot be written.

    Attributes:
      code: ``E_EXISTS`` (something is there), ``E_BUSY`` (another process writes
        it), ``E_DISK_FULL``, ``E_READ_ONLY`` or ``E_OUTPUT`` (anything else).
    """

    def __init__(self, code: str, message: str):
        self.code = code
        super().__init__(f"{code}: {printable(message)}")


@contextmanager
def output_folder(out: str | os.PathLike[str], need: int) -> Generator[Path]:
    """Gives a temporary folder to fill; when the block ends well it becomes ``out``.

    Args:
      out: the wanted folder; may exist if it is empty. Its parent must exist.
      need: bytes that will be written.

    Raises:
      OutputError: ``out`` cannot be written; nothing is left behind.
    """
    out = Path(os.path.abspath(out))
    try:
        with _locked(out):
            _refuse_existing(out)
            _remove_stale(out)
            _check_space(out, need)
            yield from _write(out)
    except (OutputError, ModelFileError):
        raise
    except Exception as error:
        explained = _explained(error, out, need)
        if explained is None:
            raise
        raise explained from error


def _write(out: Path) -> Generator[Path]:
    """Makes the temporary folder, yields it, then syncs and renames it; removes it on any error."""
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(8)}")
    try:
        os.mkdir(temporary)
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, out)
    except BaseException:
        _remove_for_good(temporary)
        raise
    _sync(out.parent)


def _remove_for_good(folder: Path) -> None:
    """Removes a folder that writes which failed late, in threads nobody can wait for, may make again."""
    for _ in range(_QUIET_CHECKS):
        remove_tree(folder)
        time.sleep(_QUIET_SECONDS)
    remove_tree(folder)


@contextmanager
def _locked(out: Path) -> Generator[None]:
    path = out.with_name(f".{out.name}.lock")
    descriptor = _take_lock(path, out)
    try:
        yield
    finally:
        os.unlink(path)
        os.close(descriptor)


def _take_lock(path: Path, out: Path) -> int:
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError as error:
        raise OutputError("E_OUTPUT", "packed checkpoints are written on Linux and macOS") from error
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file before it lets go: the one locked may be gone by now.
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError("E_BUSY", f"another process is writing {out}; wait for it to end") from error
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _refuse_existing(out: Path) -> None:
    try:
        mode = os.lstat(out).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise OutputError("E_EXISTS", f"{out} is there and is not a folder; name another")
    if os.listdir(out):
        raise OutputError("E_EXISTS", f"the folder {out} is not empty; name another or remove it first")


def _remove_stale(out: Path) -> None:
    """Removes the temporary folders of writers that were killed; the lock says that none is alive."""
    name = re.compile(rf"\.{re.escape(out.name)}\.tmp-[0-9a-f]{{16}}")
    for entry in os.listdir(out.parent):
        if name.fullmatch(entry):
            remove_tree(out.parent / entry)


def _check_space(out: Path, need: int) -> None:
    if shutil.disk_usage(out.parent).free < need * SPACE_MARGIN:
        raise _disk_full(out, need)


def _disk_full(out: Path, need: int) -> OutputError:
    wanted, free = int(need * SPACE_MARGIN), shutil.disk_usage(out.parent).free
    return OutputError(
        "E_DISK_FULL",
        f"{out} needs {wanted} bytes ({wanted / 1e9:.2f} GB) and the disk has {free} free; "
        "make room or name a folder on another disk",
    )


def _explained(error: Exception, out: Path, need: int) -> OutputError | None:
    """What the system's error means for a person; None if it is no error of the system."""
    if _means_disk_full(error):
        return _disk_full(out, need)
    if isinstance(error, ValueError) and _FAILED_WRITE_TEXT in str(error):
        return OutputError("E_OUTPUT", f"cannot write {out}: {error}")
    if not isinstance(error, OSError):
        return None
    if error.errno in _NOT_ALLOWED:
        return OutputError(
            "E_READ_ONLY", f"cannot write in {out.parent}: {error.strerror}; name another folder"
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return OutputError("E_EXISTS", f"the folder {out} was filled meanwhile; name another")
    if not out.parent.is_dir():
        return OutputError("E_OUTPUT", f"there is no folder {out.parent}; make it first")
    return OutputError("E_OUTPUT", f"cannot write {out}: {error}")


def _means_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(text in str(error) for text in _NO_SPACE_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder under ``folder``, and ``folder`` itself, to the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Removes a folder if it is there, also while threads of a stopped writer still add files to it."""
    if folder.is_symlink():
        os.unlink(folder)
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
    shutil.rmtree(folder)
