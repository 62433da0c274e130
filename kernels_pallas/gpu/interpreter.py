"""Pallas' interpreter of Hopper kernels on a CPU: its parameters, and threads for every warpgroup.

The interpreter runs each warpgroup of a block in a thread. At a barrier a warpgroup waits inside a callback,
which holds a thread of XLA's CPU client, and the operations of the others need threads of the same pool.
Where the pool is too small, all wait for ever, in C++, and no signal reaches Python. XLA makes the pool when
JAX starts: one thread for each core, or ``NPROC`` if that variable is set.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

THREADS = 16
"""More than any kernel here needs: its warpgroups (5 at most) and one more."""

_POOL_THREAD = "tf_XLAEigen"
"""The name that Linux shows for a thread of the pool."""


def interpreter(**options: Any) -> Any:
    """Parameters of Pallas' interpreter (``InterpretGPUParams``), and threads for it if JAX has not started.

    Call it before the first use of a JAX array.

    Args:
      options: of ``InterpretGPUParams``, such as ``detect_races=True``.

    Raises:
      NotImplementedError: this JAX has no interpreter for Mosaic GPU kernels.
      RuntimeError: JAX has started, with too few threads.
    """
    ask_for_threads()
    try:
        params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params")
    except ImportError as error:
        raise NotImplementedError(f"this JAX has no interpreter for Mosaic GPU kernels: {error}") from error
    return params.InterpretGPUParams(**options)


def ask_for_threads() -> None:
    """Raises ``NPROC`` to at least ``THREADS`` if JAX has not started; changes nothing if it has."""
    if not _has_started() and (_threads_to_come() or 0) < THREADS:
        os.environ["NPROC"] = str(THREADS)


def require_threads(warpgroups: int) -> None:
    """Raises RuntimeError if JAX has too few CPU threads to interpret a block of so many warpgroups."""
    ask_for_threads()
    threads = _threads() if _has_started() else _threads_to_come()
    if threads is not None and threads <= warpgroups:
        raise RuntimeError(
            f"JAX was started with {threads} CPU threads, and Pallas' interpreter needs {warpgroups + 1} "
            f"for {warpgroups} warpgroups: set the environment variable NPROC={THREADS} before JAX starts"
        )


def interpreter_option(interpret: Any, warpgroups: int) -> dict[str, Any]:
    """The keyword that ``plgpu.kernel`` takes for blocks of so many warpgroups; nothing without parameters.

    Raises:
      RuntimeError: as ``require_threads``.
    """
    if interpret is None:
        return {}
    require_threads(warpgroups)
    return {"interpret": interpret}


def _has_started() -> bool:
    """Whether JAX has made its clients."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _threads_to_come() -> int | None:
    """Threads of a client that starts now."""
    number = os.environ.get("NPROC", "")
    return int(number) if number.isdecimal() else os.cpu_count()


def _threads() -> int | None:
    """Threads of the client that has started; None where the system does not show them."""
    return [_name(task) for task in Path("/proc/self/task").glob("*")].count(_POOL_THREAD) or None


def _name(task: Path) -> str | None:
    """A thread's name; None if it has ended."""
    try:
        return (task / "comm").read_text().strip()
    except OSError:
        return None
