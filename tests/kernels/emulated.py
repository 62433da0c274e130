"""Handlers of the CPU's own products on a processor that this machine lacks: ARM, by qemu-user.

The C code is compiled for the processor with the flags that its users get, and ``replay.c`` makes one call as
XLA would. Nothing but the compiler is needed for that; to run it, ``qemu-aarch64`` and ARM's C library
(Debian: qemu-user, libc6-arm64-cross, which ``scripts/test`` installs).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.kernels_pallas.native import compiler, forms, library
from tests.conftest import NATIVE_FOLDER

NEON = next(form for form in forms.FORMS if form.name == "neon")
DRIVER = Path(__file__).with_name("replay.c")
LIBRARIES = Path("/usr/aarch64-linux-gnu")
TARGET = "aarch64-linux-gnu.2.28"
"""With the number of the oldest C library that a program is to run with."""


def _compile(out: Path, *sources: Path) -> None:
    """``out``, with the flags that an ARM user's library gets, but for that of a library."""
    command = [sys.executable, "-m", "ziglang", "cc"]
    flags = [flag for flag in compiler._flags(NEON, command) if flag != "-shared"]
    command += ["-target", TARGET, *flags, f"-I{compiler.SOURCES}", *map(str, sources), "-o", str(out)]
    with tempfile.TemporaryDirectory() as scratch:
        own = {"ZIG_LOCAL_CACHE_DIR": scratch, "ZIG_GLOBAL_CACHE_DIR": scratch}
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def replayer() -> Path:
    """The program for ARM, compiled once for each version of the code."""
    sources = [*sorted(compiler.SOURCES.glob("*.c")), DRIVER]
    key = hashlib.sha256(repr((NEON.zig_flags, compiler.FLAGS)).encode())
    for source in (*sorted(compiler.SOURCES.iterdir()), DRIVER):
        key.update(source.read_bytes())
    path = NATIVE_FOLDER / f"replay-neon-{key.hexdigest()[:16]}"
    if not path.exists():
        NATIVE_FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        _compile(made, *sources)
        made.rename(path)
    return path


def emulator() -> list[str] | None:
    """The command that runs a program of ARM, or None where it or ARM's C library is not installed."""
    found = shutil.which("qemu-aarch64")
    return [found, "-L", str(LIBRARIES)] if found and LIBRARIES.is_dir() else None


def _packed(arrays: Sequence[np.ndarray]) -> bytes:
    parts = [np.int64(len(arrays)).tobytes()]
    for array in arrays:
        numbers = [array.ndim, *array.shape, array.nbytes]
        parts += [np.asarray(numbers, np.int64).tobytes(), np.ascontiguousarray(array).tobytes()]
    return b"".join(parts)


def _sizes(results: Sequence[jax.ShapeDtypeStruct]) -> bytes:
    numbers = [len(results)]
    for one in results:
        numbers += [len(one.shape), *one.shape, one.dtype.itemsize * int(np.prod(one.shape))]
    return np.asarray(numbers, np.int64).tobytes()


def emulated_calls(threads: int) -> Any:
    """A context in which ``jax.ffi.ffi_call`` runs handlers in the emulator: outside of jitted programs."""
    program = [*(emulator() or []), str(replayer())]
    minor = str(library._api_version()[1])

    def ffi_call(name: str, results: Any, **_: Any) -> Callable[..., Any]:
        several = list(results) if isinstance(results, (list, tuple)) else [results]

        def call(*arguments: Any) -> Any:
            given = _packed([np.asarray(x) for x in arguments]) + _sizes(several)
            done = subprocess.run([*program, name, minor, str(threads)], input=given, capture_output=True)
            assert done.returncode == 0, (done.returncode, done.stderr)
            found, start = [], 0
            for one in several:
                count = int(np.prod(one.shape))
                values = np.frombuffer(done.stdout, one.dtype, count, start)
                found.append(jnp.asarray(values.reshape(one.shape)))
                start += count * one.dtype.itemsize
            return found if isinstance(results, (list, tuple)) else found[0]

        return call

    return mock.patch.object(jax.ffi, "ffi_call", ffi_call)
