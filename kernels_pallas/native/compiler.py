"""Makes the shared library of the C code: once for each machine and version of the code, kept on disk.

The compiler is the ``ziglang`` package, clang in a wheel, so that nobody needs one of the system; where it
is not installed, the system's ``cc``. The file's name has a hash of everything that it depends on, it is
written whole or not at all, and the folder is the user's own, closed to others: what is in it will be run.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from qwen3_moe_jax.kernels_pallas.native.forms import Form

SOURCES = Path(__file__).with_name("csrc")
MAX_SECONDS = 300.0
MIN_FREE_BYTES = 64 << 20
"""What the compiler keeps beside its work, of zig's parts of the system's library, is less."""

FLAGS = ("-std=gnu11", "-O3", "-g0", "-fPIC", "-shared", "-ffp-contract=on", "-fno-math-errno", "-pthread")
"""A product and a sum of one expression may become one instruction; nothing is reordered."""

WITHOUT_LIBRARIES = ("-nostdlib",)
"""For zig, which else makes parts of the system's library first: two thirds of the time. What the code needs
of it is in the process that loads it."""


def build(form: Form, folder: Path) -> Path:
    """The library of a form in ``folder``, compiled if it is not there.

    Raises:
      NotImplementedError: there is no compiler, or it fails; says why.
      OSError: it is not there, and the folder cannot be written, has no room, or is not to be trusted.
    """
    command, version = _compiler()
    key = _key(form, version)
    path = folder / f"native-{form.name}-{key}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    if not path.exists():
        if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            raise OSError(f"{folder} has no room")
        _make([*command, *_flags(form, command)], path)
    return path


def _make(command: list[str], path: Path) -> None:
    """Compiles; with zig first without the system's library, whose headers alone may be missing."""
    if _is_zig(command):
        try:
            return _compile([*command, *WITHOUT_LIBRARIES], path)
        except NotImplementedError:
            pass
    _compile(command, path)


def _is_zig(command: list[str]) -> bool:
    return command[1:4] == ["-m", "ziglang", "cc"]


def _compiler() -> tuple[list[str], str]:
    """The command, and its version for the key."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"], f"ziglang {metadata.version('ziglang')}"
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found], f"{os.path.realpath(found)} {os.stat(found).st_mtime_ns}"
    raise NotImplementedError("there is no compiler: pip install ziglang")


def _flags(form: Form, command: list[str]) -> list[str]:
    return [*FLAGS, *(form.zig_flags if _is_zig(command) else form.flags), f"-D{form.macro}"]


def _key(form: Form, version: str) -> str:
    # without the form's set of features, whose order differs from process to process
    facts = (
        form.name,
        form.macro,
        form.flags,
        form.zig_flags,
        version,
        FLAGS,
        WITHOUT_LIBRARIES,
        platform.libc_ver(),
    )
    digest = hashlib.sha256(repr(facts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _check_private(folder: Path) -> None:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{folder} is not a folder of this user: no code is taken from it")
    if status.st_mode & 0o022:
        for path in folder.glob("native-*.so"):
            path.unlink(missing_ok=True)  # written before may be anybody's
        os.chmod(folder, 0o700)


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as scratch:
        made = Path(scratch) / path.name
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        # zig keeps what it makes of the system's library; it belongs to nobody else
        own = {"ZIG_LOCAL_CACHE_DIR": scratch, "ZIG_GLOBAL_CACHE_DIR": scratch}
        try:
            done = subprocess.run(
                [*command, *sources, "-o", str(made)],
                env=os.environ | own,
                capture_output=True,
                text=True,
                timeout=MAX_SECONDS,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotImplementedError(f"the compiler does not run: {error}") from error
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise NotImplementedError(f"its C code does not compile here: {first.strip()}")
        os.replace(made, path)
