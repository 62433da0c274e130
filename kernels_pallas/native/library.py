"""The loaded library: its handlers registered with XLA, its threads started, or the reason why not."""

import ctypes
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from qwen3_moe_jax.kernels_pallas.native.compiler import build
from qwen3_moe_jax.kernels_pallas.native.forms import Form, choose_form

HANDLERS = ("qwen3_moe_matmul", "qwen3_moe_experts", "qwen3_moe_layers")


@dataclass(frozen=True)
class Loaded:
    """Attributes:
    form: the name of the instruction set's form.
    threads: that work on a call.
    handle: the library itself.
    """

    form: str
    threads: int
    handle: ctypes.CDLL = field(repr=False, compare=False)


_lock = threading.Lock()
_found: Loaded | str | None = None


def start(folder: Path | None = None, threads: int = 1) -> Loaded | str:
    """Loads the library once per process, compiling it if need be.

    Args:
      folder: where it is kept; None compiles it for this process alone.
      threads: that work on a call, the calling one included.

    Returns:
      What was loaded (by the first call), or why it cannot be.
    """
    global _found
    with _lock:
        if _found is None:
            try:
                _found = _load(folder, threads)
            except (NotImplementedError, OSError) as error:
                _found = str(error)
        return _found


def require() -> Loaded:
    """What is loaded, or will be now.

    Raises:
      NotImplementedError: this machine does not run it; says why.
    """
    platform = jax.default_backend()
    if platform != "cpu":
        raise NotImplementedError(f"it runs on the CPU, and JAX's device is a {platform}")
    found = start()
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


def reader() -> Callable[[np.ndarray], int] | None:
    """A function that sums uint64 words with all threads, modulo 2 ** 64; None where no library is loaded."""
    if not isinstance(_found, Loaded):
        return None
    read = _found.handle.qwen3_moe_read
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    return lambda words: int(read(words.ctypes.data, words.size))


def _load(folder: Path | None, threads: int) -> Loaded:
    form, version = choose_form(), _api_version()
    with tempfile.TemporaryDirectory(prefix="qwen3-moe-native-") as scratch:
        library = _open(form, folder, Path(scratch))
    if not library.qwen3_moe_set_version(*version):
        major, minor = version
        raise NotImplementedError(f"XLA's foreign functions have version {major}.{minor}, which is not known")
    count = library.pool_start(threads)
    for name in HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return Loaded(form.name, count, library)


def _open(form: Form, folder: Path | None, scratch: Path) -> ctypes.CDLL:
    """The library of ``folder``, or one for this process alone: a folder may be read-only, full or noexec."""
    try:
        path = build(form, folder or scratch)
    except OSError:
        path = build(form, scratch)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return ctypes.CDLL(str(shutil.copy(path, scratch / "again.so")))


def _api_version() -> tuple[int, int]:
    """The version of XLA's foreign functions that the installed jaxlib declares."""
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    try:
        text = header.read_text()
    except OSError as error:
        raise NotImplementedError(f"jaxlib's {header.name} cannot be read: {error.strerror}") from error
    found = [re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.M) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise NotImplementedError(f"jaxlib's {header.name} names no version")
    return int(found[0][1]), int(found[1][1])
