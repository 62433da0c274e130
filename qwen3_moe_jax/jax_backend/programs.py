"""Jitted functions whose compiled programs outlive the process.

A :class:`Program` is used as the jitted function would be. The first call with new shapes or
static arguments looks for the compiled program on disk (``jax.experimental.serialize_executable``)
and traces nothing when it is there: a decode step that takes 11 s to trace, lower and compile
loads in 0.04 s with the same bits. Its key has everything that could make it wrong
(:func:`environment`), so a stale program is never found.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import os
import pickle
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import serialize_executable

from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.kernels_pallas.implementations import Ran, recording, replay
from qwen3_moe_jax.machine.folders import writable_cache
from qwen3_moe_jax.machine.xla_flags import flags_file

_Key = tuple[tuple[Hashable, ...], Any, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A compiled program, and what was recorded of its ops while it was traced."""

    run: jax.stages.Compiled
    ran: tuple[Ran, ...]


@dataclasses.dataclass(frozen=True)
class Made:
    """How a program came to be: its name, "disk" or "compiler", and seconds of waiting."""

    name: str
    source: str
    seconds: float


Listener = Callable[[str, Made | None], None]
"""Told a program's name before it is made (None), and again with what was done."""

STORE_VARIABLE = "QWEN3_MOE_PROGRAMS"
"""Environment variable: "off" keeps no programs on disk but those in JAX's own cache."""

_listeners: list[Listener] = []
_store: ProgramStore | None = None
_is_chosen = False
_all: "weakref.WeakSet[Program]" = weakref.WeakSet()


def use_store(store: ProgramStore | None) -> None:
    """Sets where programs are kept from now on; None keeps them in memory alone."""
    global _store, _is_chosen
    _store, _is_chosen = store, True


def use_default_store() -> bool:
    """Keeps programs in the user's cache folder unless :func:`use_store` has said where.

    Returns:
      Whether they are kept on disk: JAX's own cache is of no use then.
    """
    if not _is_chosen:
        folder = None if os.environ.get(STORE_VARIABLE, "").lower() == "off" else writable_cache()
        use_store(ProgramStore(folder / "programs") if folder is not None else None)
    return _store is not None


def forget() -> None:
    """Drops every program in memory, JAX's too: for code that changes while it runs, and for memory maps."""
    for program in _all:
        program.clear()
    jax.clear_caches()


def listen(listener: Listener) -> Callable[[], None]:
    """Adds a listener to every program that is made. Returns a function that removes it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


class Program:
    """A function, jitted, whose programs are loaded from disk where they are there.

    Attributes:
      name: for progress and for the key.
      function: the traced function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static_argnames: Sequence[str] = (),
        donate_argnames: Sequence[str] = (),
        compiler_options: Mapping[str, Any] | None = None,
    ):
        """Args as those of ``jax.jit``. Static arguments need a :func:`fingerprint`."""
        functools.update_wrapper(self, function)
        self.function, self.name = function, function.__name__
        self._static = tuple(static_argnames)
        self._signature = inspect.signature(function)
        self._settings = {"donate": sorted(donate_argnames), "options": dict(compiler_options or {})}
        self._jitted = jax.jit(
            function,
            static_argnames=self._static,
            donate_argnames=tuple(donate_argnames),
            compiler_options=dict(compiler_options) if compiler_options else None,
        )
        self._programs: dict[_Key, Future[_Compiled]] = {}
        self._lock = threading.Lock()
        _all.add(self)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As ``trace`` of a jitted function."""
        return self._jitted.trace(*args, **kwargs)

    def count(self) -> int:
        """Returns how many programs are in memory."""
        return len(self._programs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_disable_jit or _is_traced((args, kwargs)):
            return self._jitted(*args, **kwargs)
        static, dynamic = self._split(args, kwargs)
        program = self._get(static, dynamic)
        replay(program.ran)
        return program.run(**dynamic)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Makes the program for these arguments without running it; arrays may be ``ShapeDtypeStruct``."""
        replay(self._get(*self._split(args, kwargs)).ran)

    def is_ready(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments would wait for nothing."""
        static, dynamic = self._split(args, kwargs)
        future = self._programs.get(_memory_key(static, dynamic))
        return future is not None and future.done()

    def clear(self) -> None:
        """Forgets every program in memory."""
        with self._lock:
            self._programs.clear()

    def _split(self, args: Any, kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        static = {name: given[name] for name in self._static}
        return static, {name: value for name, value in given.items() if name not in static}

    def _get(self, static: dict[str, Any], dynamic: dict[str, Any]) -> _Compiled:
        """The program; the first caller makes it, others wait for that one."""
        key = _memory_key(static, dynamic)
        with self._lock:
            future = self._programs.get(key)
            is_mine = future is None
            if future is None:
                future = self._programs[key] = Future()
        if is_mine:
            try:
                future.set_result(self._make(static, dynamic))
            except BaseException as error:
                with self._lock:
                    self._programs.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _make(self, static: dict[str, Any], dynamic: dict[str, Any]) -> _Compiled:
        _tell(self.name, None)
        start = time.perf_counter()
        key = self._disk_key_if_any(static, dynamic)
        program, source = (_load(key) if key else None), "disk"
        if program is None:
            with recording() as record:
                lowered = self._jitted.lower(**static, **dynamic)
            _cache_hits.count = 0
            program, source = _Compiled(lowered.compile(), tuple(record)), "compiler"
            if key and not _cache_hits.count:
                _save(key, program)
        _tell(self.name, Made(self.name, source, time.perf_counter() - start))
        return program

    def _disk_key_if_any(self, static: dict[str, Any], dynamic: dict[str, Any]) -> str | None:
        if _store is None:
            return None
        try:
            return self.disk_key(static, dynamic)
        except TypeError:  # an intervention's function, say: such a program is for this process alone
            return None

    def disk_key(self, static: dict[str, Any], dynamic: dict[str, Any]) -> str:
        """Returns the SHA-256, in hexadecimal, of everything that the program depends on."""
        leaves, tree = jax.tree.flatten(dynamic)
        facts = {
            "program": f"{self.function.__module__}.{self.function.__qualname__}",
            "settings": self._settings,
            "static": {name: fingerprint(value) for name, value in static.items()},
            "tree": str(tree),
            "arrays": [_aval(leaf) for leaf in leaves],
            "environment": environment(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class _CacheHits(threading.local):
    """Programs that this thread has taken from JAX's own cache: serialized once more they lack functions
    on a CPU (JAX 0.11.2: "Function ... not found" when it runs)."""

    count = 0


_cache_hits = _CacheHits()


def _on_event(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _cache_hits.count += 1


jax.monitoring.register_event_listener(_on_event)


def _is_traced(values: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def _memory_key(static: dict[str, Any], dynamic: dict[str, Any]) -> _Key:
    leaves, tree = jax.tree.flatten(dynamic)
    settings = tuple(getattr(jax.config, name) for name in _TRACE_SETTINGS)
    return (*static.values(), *settings), tree, tuple(_aval(leaf) for leaf in leaves)


def _aval(leaf: Any) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype and weakness of an argument: what a compiled program demands of it."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
        return tuple(leaf.shape), str(leaf.dtype), bool(getattr(leaf, "weak_type", False))
    aval = jax.typeof(leaf)
    return tuple(aval.shape), str(aval.dtype), bool(aval.weak_type)


def _load(key: str) -> _Compiled | None:
    program = _store.get(key) if _store is not None else None
    if _store is None or program is None:
        return None
    try:
        serialized, ran = pickle.loads(program)
        return _Compiled(serialize_executable.deserialize_and_load(*serialized), ran)
    except Exception as error:  # whatever a foreign or stale file does: it is compiled anew
        _store.trouble.append(f"a compiled program could not be loaded and is made again: {error}")
        _store.delete(key)
        return None


def _save(key: str, program: _Compiled) -> None:
    if _store is None:
        return
    try:
        content = pickle.dumps((serialize_executable.serialize(program.run), program.ran))
    except Exception:
        return  # a comfort: not every program or backend can be serialized
    _store.put(key, content)


def _tell(name: str, made: Made | None) -> None:
    for listener in list(_listeners):
        listener(name, made)


def fingerprint(value: Any) -> Any:
    """Returns ``value`` as plain lists, strings and numbers, the same in every process.

    Raises:
      TypeError: nothing says what this value is made of.
    """
    match value:
        case enum.Enum():
            return [type(value).__qualname__, value.name]
        case None | bool() | int() | float() | str():
            return value
        case np.dtype() | type():
            return str(value)
        case Mapping():
            return ["map", *sorted([str(k), fingerprint(v)] for k, v in value.items())]
        case frozenset() | set():
            return ["set", *sorted(json.dumps(fingerprint(v), default=str) for v in value)]
        case list() | tuple():
            return [fingerprint(v) for v in value]
        case np.ndarray() | jax.Array():
            array = np.asarray(value)
            return ["array", array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
        case functools.partial():
            return ["partial", fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
        case _:
            return _fingerprint_of_object(value)


def _fingerprint_of_object(value: Any) -> list[Any]:
    if not (getattr(value, "__module__", None) or "").startswith(_OWN):
        raise TypeError(f"{type(value).__qualname__} has no fingerprint: its programs are not kept on disk")
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.compare and f.name not in ("parent", "name")]
        return [type(value).__qualname__, *([n, fingerprint(getattr(value, n))] for n in fields)]
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return [value.__module__, value.__qualname__]
    raise TypeError(f"{value!r} has no fingerprint: its programs are not kept on disk")


_OWN = __name__.partition(".")[0]
"""The package whose code is part of every key: what a function or class of others does is not known."""

_TRACE_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_debug_nans",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
"""JAX's settings that change what a function is traced to, when they change between two calls."""

_WITHOUT_EFFECT = ("cache", "dump", "log", "traceback", "explain", "profiler", "check_tracer_leaks")
"""Words in the names of JAX's settings that do not change a program."""


def environment() -> dict[str, Any]:
    """Returns what this process and machine add to a key: versions, device, driver, settings, code."""
    settings = {
        name: str(value)
        for name, value in sorted(jax.config.values.items())
        if not any(word in name for word in _WITHOUT_EFFECT)
    }
    return {**_fixed_environment(), "settings": settings}


@functools.cache
def _fixed_environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": sys.version,
        "machine": [platform.system(), platform.machine(), _processor() if device.platform == "cpu" else ""],
        "device": [device.platform, device.device_kind, str(getattr(device, "compute_capability", ""))],
        "cores": getattr(device, "core_count", os.cpu_count()),
        "runtime": device.client.platform_version,
        "driver": _first_line("/proc/driver/nvidia/version"),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC")],
        "flags in a file": flags_file(os.environ.get("XLA_FLAGS", "")).decode(errors="replace"),
        "code": code_version(),
    }


_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().partition("\n")[0]
    except OSError:
        return ""


def _processor() -> str:
    """The processor's model and instructions, which XLA compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "|".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
