"""Files that a command writes: the exact name, whole or not at all, refused before the work where possible.

A regular file is written beside its place and renamed, so that a full disk or Ctrl-C leaves
what was there. A device or a pipe (``/dev/stdout``) is written as it stands.
"""

import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen3_moe_jax.core import speaker
from qwen3_moe_jax.core.errors import OutputFileError


def check_output(path: str | os.PathLike[str], suffixes: tuple[str, ...] = ()) -> str:
    """The path, if a file can be written there.

    Args:
      path: of the file.
      suffixes: what the name may end with, in small letters; any if there are none.

    Raises:
      OutputFileError: the folder is not there or not writable, the path is a folder, or the name
        promises a format that is not written.
    """
    if not os.fspath(path):
        raise OutputFileError("is empty: is a variable of the shell unset?")
    if "\0" in os.fspath(path):
        raise OutputFileError(f"{path} cannot be written: there is a NUL in the name")
    path = Path(path)
    try:
        _check_place(path, suffixes)
    except OSError as error:
        if isinstance(error, OutputFileError):
            raise
        raise OutputFileError(f"{str(path)[:80]} cannot be written: {error.strerror}") from error
    return str(path)


def _check_place(path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.is_absolute():
        os.getcwd()  # a working folder that was deleted is still a folder, in which nothing can be made
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputFileError(f"{path}: the name must end with {', '.join(suffixes)}")
    if path.is_dir():
        raise OutputFileError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise OutputFileError(f"{path}: there is no folder {path.parent}: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputFileError(f"{path} cannot be written: no permission")


@contextmanager
def open_output(path: str | os.PathLike[str]) -> Generator[BinaryIO, None, None]:
    """A file to write; when the block ends well it stands at ``path``, unless this process is silent.

    Raises:
      OutputFileError: it cannot be written; what was at ``path`` is still there.
    """
    try:
        with _opened(Path(os.devnull if speaker.is_silent() else path)) as file:
            yield file
    except OSError as error:
        raise OutputFileError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO, None, None]:
    is_special = path.exists() and not path.is_file()
    if is_special or not os.access(path.parent, os.W_OK):
        with open(path, "wb") as file:
            yield file
        return
    target = path.resolve()  # a link stays a link
    # without the target's own name, which may be as long as a name can be
    temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o7777)
        _replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _replace(temporary: Path, target: Path) -> None:
    """Puts the whole file in its place; what is mounted there, as a container's file is, is written over."""
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        with open(temporary, "rb") as whole, open(target, "wb") as file:
            shutil.copyfileobj(whole, file)
        temporary.unlink()


def save_arrays(path: str | os.PathLike[str], **arrays: np.ndarray) -> None:
    """Writes arrays in NumPy's ``.npz`` format to exactly this path.

    Raises:
      OutputFileError: it cannot be written.
    """
    save_seekable(path, lambda file: _save_npz(file, arrays))


def _save_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    numpy: Any = np  # its stub takes no array whose name is only known at run time
    numpy.savez_compressed(file, **arrays)


def save_seekable(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Writes a format whose writer goes back in its file; one that cannot go back gets it in one piece."""
    with open_output(path) as file:
        if file.seekable() and os.path.isfile(file.name):
            write(file)
            return
        buffer = io.BytesIO()
        write(buffer)
        file.write(buffer.getbuffer())
