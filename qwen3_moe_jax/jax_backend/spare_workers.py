"""Processes for ``program_farm`` that are started before it is known what is missing, without importing JAX.

A worker imports for some seconds, and what a file needs is known after the start of a GPU. A store without a
single program says it at once: something will have to be compiled. Spares have imported what they need
by then, and have taken nothing of the card; those that are of no use end.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.environment import COMPILERS_VARIABLE as VARIABLE
from qwen3_moe_jax.machine.jax_devices import PREALLOCATE_VARIABLE
from qwen3_moe_jax.machine.threads import processors

MIN_PROCESSORS = 4

SPARES = 5
"""The long programs of a session of one sequence, the check of a file among them, are five."""

_lock = threading.Lock()
_spares: list[subprocess.Popen[bytes]] = []


def workers_asked() -> int | None:
    """How many workers the user allows (``QWEN3_MOE_COMPILERS``); None leaves it to the machine."""
    text = os.environ.get(VARIABLE, "").strip()
    return int(text) if text.isdigit() else None


def begin(folder: Path) -> None:
    """Starts spares for a store in ``folder``, if that has no program.

    Failures are left to whoever takes one.
    """
    few = processors() // 2 if processors() >= MIN_PROCESSORS else 0
    count = few if (asked := workers_asked()) is None else asked
    if os.name != "posix" or next(folder.glob("*.program"), None) is not None:
        return
    with _lock:
        try:
            _spares.extend(spawned() for _ in range(min(count, SPARES) - len(_spares)))
        except OSError:
            return


def spawned(command: list[str] | None = None) -> "subprocess.Popen[bytes]":
    """A worker that has been told nothing; ``command`` is run in place of one.

    Raises:
      OSError: it cannot be started.
    """
    # it has shapes and no weights: what it takes of a card is what it asks for
    changes = {PREALLOCATE_VARIABLE: "false", VARIABLE: "0"}
    return subprocess.Popen(
        command or [sys.executable, "-m", "qwen3_moe_jax.jax_backend.program_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(**changes),
    )


def count() -> int:
    """How many there are."""
    return len(_spares)


def taken() -> "subprocess.Popen[bytes] | None":
    """A spare that is the caller's from now on, or None."""
    with _lock:
        return _spares.pop() if _spares else None


def end() -> None:
    """Ends those that nobody has taken."""
    while (spare := taken()) is not None:
        spare.kill()
        spare.wait()
