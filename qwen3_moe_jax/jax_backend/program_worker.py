"""Compiles programs in a process of its own and leaves them in the store on disk; see ``program_farm``.

Mosaic compiles one kernel at a time in a process, and tracing and lowering are Python: several processes
compile several programs at once. This one never sees a weight: it makes programs from shapes.

Lines of JSON on stdin and stdout. First ``{"store", "max_bytes", "settings"}``, the folder of the store and
JAX's settings in the parent; its answer, as every one, is ``{"error"}``, an empty text for success. Then
requests: ``{"program": "module:name", "key", "static", "dynamic"}``, with arguments as of
``program_request.encode`` and the key that the store has to have the program under. A request whose
arguments have another key here is refused, and so is what names something of another package. The process
ends when stdin does, also while it compiles: whoever asked is gone.
"""

import contextlib
import importlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

MAX_WORDS = 300
"""Characters of an error that are told."""

SPARE_SECONDS = 120.0
"""A process that is told nothing for so long after its start ends."""


def main() -> None:
    """Answers requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a compiler prints is no answer
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    with contextlib.suppress(Exception):  # it fails again, and is told
        _import()
    handle = _start
    while True:
        try:
            line = lines.get(timeout=SPARE_SECONDS if handle is _start else None)
        except queue.Empty:  # a spare that nobody has a use for
            return
        error = _answer(handle, line)
        os.write(answers, json.dumps({"error": error}).encode() + b"\n")
        if error and handle is _start:
            return
        handle = make


def _read(lines: "queue.SimpleQueue[bytes]") -> None:
    """A thread that hears the end of the parent while the other one compiles."""
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


def _answer(handle: Any, line: bytes) -> str:
    """What was wrong, or nothing."""
    try:
        handle(json.loads(line))
    except Exception as error:  # whatever a compiler raises: the parent compiles it then
        return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_WORDS]
    return ""


def _import() -> None:
    """What takes longest, before the parent knows what it needs; of a card nothing is taken yet."""
    importlib.import_module("qwen3_moe_jax.jax_backend.session_programs")
    importlib.import_module("qwen3_moe_jax.jax_backend.model")  # Flax
    importlib.import_module("qwen3_moe_jax.kernels_pallas.decode_step.api")  # Mosaic


def _start(hello: dict[str, Any]) -> None:
    """Starts JAX as the parent has, and imports what programs are made of."""
    import jax

    from qwen3_moe_jax.jax_backend import programs
    from qwen3_moe_jax.jax_backend.native import Native
    from qwen3_moe_jax.jax_backend.program_store import ProgramStore
    from qwen3_moe_jax.machine.jax_devices import jax_devices
    from qwen3_moe_jax.machine.kernels import AUTO

    for name, value in hello["settings"].items():
        if jax.config.values.get(name) != value:
            jax.config.update(name, value)
    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of it is not written again
    programs.use_store(ProgramStore(Path(hello["store"]), hello["max_bytes"]))
    device = jax_devices()[0]
    Native.begin(device, AUTO, has_dtype=False).reason()  # a CPU's functions, which programs may call


def make(request: dict[str, Any]) -> None:
    """Makes one program.

    Raises:
      ValueError: it names something of another package, or the arguments have another key.
      OSError: it was made and could not be kept.
    """
    from qwen3_moe_jax.jax_backend import programs
    from qwen3_moe_jax.jax_backend.program_request import decode
    from qwen3_moe_jax.jax_backend.settings import own_settings

    with own_settings():
        program = programs.named_program(request["program"])
        static, dynamic = decode(request["static"]), decode(request["dynamic"])
        if program.disk_key(static, dynamic) != request["key"]:
            raise ValueError("this process would make another program")
        program.prepare(**static, **dynamic)
        if not program.is_stored(**static, **dynamic):
            raise OSError((*programs.trouble(), "it could not be kept")[0])
        program.clear()  # nobody runs it here


if __name__ == "__main__":
    main()
