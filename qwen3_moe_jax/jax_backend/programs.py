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
import io
import json
import os
import pickle
import platform
import sys
import threading
import time
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

_Key = tuple[tuple[Hashable, ...], Any, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Made:
    """How a program came to be: its name, "disk" or "compiler", and seconds of waiting."""

    name: str
    source: str
    seconds: float


Listener = Callable[[str, Made | None], None]
"""Told a program's name before it is made (None), and again with what was done."""

_listeners: list[Listener] = []
_store: ProgramStore | None = None


def use_store(store: ProgramStore | None) -> None:
    """Sets where programs are kept from now on; None keeps them in memory alone."""
    global _store
    _store = store


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
        self._programs: dict[_Key, Future[jax.stages.Compiled]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_disable_jit or _is_traced((args, kwargs)):
            return self._jitted(*args, **kwargs)
        static, dynamic = self._split(args, kwargs)
        return self._get(static, dynamic)(**dynamic)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Makes the program for these arguments without running it; arrays may be ``ShapeDtypeStruct``."""
        self._get(*self._split(args, kwargs))

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

    def _get(self, static: dict[str, Any], dynamic: dict[str, Any]) -> jax.stages.Compiled:
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

    def _make(self, static: dict[str, Any], dynamic: dict[str, Any]) -> jax.stages.Compiled:
        _tell(self.name, None)
        start = time.perf_counter()
        key = self._disk_key_if_any(static, dynamic)
        compiled, source = (_load(key) if key else None), "disk"
        if compiled is None:
            compiled, source = self._jitted.lower(**static, **dynamic).compile(), "compiler"
            if key:
                _save(key, compiled)
        _tell(self.name, Made(self.name, source, time.perf_counter() - start))
        return compiled

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


def _load(key: str) -> jax.stages.Compiled | None:
    program = _store.get(key) if _store is not None else None
    if _store is None or program is None:
        return None
    try:
        return serialize_executable.deserialize_and_load(*pickle.load(io.BytesIO(program)))
    except Exception as error:  # whatever a foreign or stale file does: it is compiled anew
        _store.trouble.append(f"a compiled program could not be loaded and is made again: {error}")
        _store.delete(key)
        return None


def _save(key: str, compiled: jax.stages.Compiled) -> None:
    if _store is None:
        return
    try:
        program = pickle.dumps(serialize_executable.serialize(compiled))
    except (ValueError, NotImplementedError, TypeError, AttributeError):
        return  # not every program or backend can be serialized: JAX's own cache may have it
    _store.put(key, program)


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
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.compare and f.name not in ("parent", "name")]
        return [type(value).__qualname__, *([n, fingerprint(getattr(value, n))] for n in fields)]
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return [value.__module__, value.__qualname__]
    raise TypeError(f"{type(value).__qualname__} has no fingerprint: programs with it are not kept on disk")


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
