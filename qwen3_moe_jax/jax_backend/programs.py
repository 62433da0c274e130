"""Jitted functions whose compiled programs outlive the process.

A :class:`Program` is used as the jitted function would be. The first call with new shapes or
static arguments looks for the compiled program on disk (``jax.experimental.serialize_executable``)
and traces nothing when it is there: a decode step that takes 11 s to trace, lower and compile
loads in 0.04 s with the same bits. Its key has everything that could make it wrong
(:func:`program_key.environment`), so a stale program is never found.

Programs of a mesh of devices are compiled in every process: they are not kept here.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from qwen3_moe_jax.jax_backend.collection import no_collection
from qwen3_moe_jax.jax_backend.compile_clock import compile_clock
from qwen3_moe_jax.jax_backend.program_key import TRACE_SETTINGS, environment, fingerprint
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.jax_backend.sharding import Shards, placed_on
from qwen3_moe_jax.kernels_pallas.implementations import Ran, recording, replay
from qwen3_moe_jax.machine.folders import readable_cache, writable_cache

_Key = tuple[tuple[Hashable, ...], Any, tuple[Any, ...]]
_Arguments = tuple[dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A compiled program, and what was recorded of its ops while it was traced."""

    run: jax.stages.Compiled
    ran: tuple[Ran, ...]


@dataclasses.dataclass
class _Entry:
    """How far a program is: nothing, or found on disk, or traced, or lowered, or compiled.

    Attributes:
      finding: held by the thread that looks on disk, traces or lowers.
      compiling: held by the thread that compiles.
      ran: known as soon as it is found or traced.
    """

    finding: Any = dataclasses.field(default_factory=threading.RLock)
    compiling: Any = dataclasses.field(default_factory=threading.RLock)
    is_missing: bool = False
    traced: jax.stages.Traced | None = None
    lowered: jax.stages.Lowered | None = None
    ran: tuple[Ran, ...] | None = None
    program: _Compiled | None = None


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

log = logging.getLogger(__name__)

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
      Whether there is such a place: JAX's own cache is of no use then.
    """
    if not _is_chosen:
        is_off = os.environ.get(STORE_VARIABLE, "").lower() == "off"
        writable = None if is_off else writable_cache()
        folder = None if is_off else writable or readable_cache()
        is_read_only = writable is None
        use_store(None if folder is None else ProgramStore(folder / "programs", is_read_only=is_read_only))
    return _store is not None


def keeps_on_disk() -> bool:
    """Whether a program that is made now is there for the next process."""
    return _store is not None and not _store.is_read_only


def trouble() -> list[str]:
    """A line for each kind of failure of the cache on disk so far."""
    return [] if _store is None else list(_store.trouble)


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
        """Args as those of ``jax.jit``. Static arguments need a ``fingerprint``."""
        functools.update_wrapper(self, function)
        self.function, self.name = function, function.__name__
        self._static = tuple(static_argnames)
        self._signature = inspect.signature(function)
        self._settings = {"donate": sorted(donate_argnames), "options": dict(compiler_options or {})}
        self._jit = functools.partial(
            jax.jit,
            static_argnames=self._static,
            donate_argnames=tuple(donate_argnames),
            compiler_options=dict(compiler_options) if compiler_options else None,
        )
        self._jitted = self._jit(function)
        self._programs: dict[_Key, _Entry] = {}
        self._lock = threading.Lock()
        _all.add(self)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As ``trace`` of a jitted function."""
        return self._jitted.trace(*args, **kwargs)

    def count(self) -> int:
        """Returns how many programs are in memory."""
        return sum(entry.program is not None for entry in list(self._programs.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_disable_jit or _is_traced((args, kwargs)):
            return self._jitted(*args, **kwargs)
        arguments = self._split(args, kwargs)
        entry = self._entry(arguments)
        program = entry.program
        if program is None:
            with compile_clock().waiting(self.name):
                program = self._made(entry, arguments)
        replay(program.ran)
        return program.run(**arguments[1])

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Makes the program for these arguments without running it; arrays may be ``ShapeDtypeStruct``."""
        arguments = self._split(args, kwargs)
        replay(self._made(self._entry(arguments), arguments).ran)

    def load(self, *args: Any, **kwargs: Any) -> bool:
        """As ``prepare`` where the program is on disk or in memory; else does nothing. Returns which."""
        arguments = self._split(args, kwargs)
        entry = self._entry(arguments)
        with entry.finding:
            self._look_on_disk(entry, arguments)
            return entry.program is not None

    def lower(self, *args: Any, **kwargs: Any) -> None:
        """All of ``prepare`` that is Python, which runs in one thread at a time: compilation is left."""
        arguments = self._split(args, kwargs)
        entry = self._entry(arguments)
        self._known(entry, arguments)
        with entry.finding:
            if entry.program is None:
                self._lowered(entry)

    def is_stored(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the program for these arguments is on disk."""
        key = self._disk_key_if_any(*self._split(args, kwargs))
        return _store is not None and key is not None and _store.has(key)

    def ran(self, *args: Any, **kwargs: Any) -> tuple[Ran, ...]:
        """What the program for these arguments runs: of the one on disk, else by tracing it.

        A trace is kept: compiling it later does not trace again. Nothing is waited for that is compiled.
        """
        arguments = self._split(args, kwargs)
        return self._known(self._entry(arguments), arguments)

    def is_ready(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments would wait for nothing."""
        return self._entry(self._split(args, kwargs)).program is not None

    def clear(self) -> None:
        """Forgets every program in memory."""
        with self._lock:
            self._programs.clear()

    def _split(self, args: Any, kwargs: Any) -> _Arguments:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        static = {name: given[name] for name in self._static}
        return static, {name: value for name, value in given.items() if name not in static}

    def _entry(self, arguments: _Arguments) -> _Entry:
        key = _memory_key(*arguments)
        entry = self._programs.get(key)
        if entry is None:
            with self._lock:
                entry = self._programs.setdefault(key, _Entry())
        return entry

    def _made(self, entry: _Entry, arguments: _Arguments) -> _Compiled:
        """The program; the first thread makes it, others wait for that one."""
        self._known(entry, arguments)
        with entry.compiling:
            if entry.program is None:
                self._compile(entry, arguments)
            assert entry.program is not None
            return entry.program

    def _known(self, entry: _Entry, arguments: _Arguments) -> tuple[Ran, ...]:
        with entry.finding:
            self._look_on_disk(entry, arguments)
            if entry.ran is None:
                static, dynamic = arguments
                with recording() as record, no_collection():
                    entry.traced = self._traced(static, dynamic)
                entry.ran = tuple(record)
            return entry.ran

    def _traced(self, static: dict[str, Any], dynamic: dict[str, Any]) -> jax.stages.Traced:
        """The function's trace; where its arguments lie on a mesh, with results that lie there as they do.

        A state's next step is a call of the same program: it has to find the state as the last one did.
        """
        traced = self._jitted.trace(**static, **dynamic)
        mesh = mesh_of(static, dynamic)
        if mesh is None:
            return traced
        shardings = placed_on(mesh, traced.out_info)  # JAX keeps the trace: nothing is traced twice
        return self._jit(self.function, out_shardings=shardings).trace(**static, **dynamic)

    def _look_on_disk(self, entry: _Entry, arguments: _Arguments) -> None:
        if entry.program is not None or entry.is_missing:
            return
        start = time.perf_counter()
        key = self._disk_key_if_any(*arguments)
        program = _load(key) if key else None
        entry.is_missing = program is None
        if program is not None:
            _tell(self.name, None)
            entry.program, entry.ran = program, program.ran
            _tell(self.name, Made(self.name, "disk", time.perf_counter() - start))

    @staticmethod
    def _lowered(entry: _Entry) -> jax.stages.Lowered:
        if entry.lowered is None:
            assert entry.traced is not None
            with no_collection():
                entry.lowered, entry.traced = entry.traced.lower(), None
        return entry.lowered

    def _compile(self, entry: _Entry, arguments: _Arguments) -> None:
        _tell(self.name, None)
        start = time.perf_counter()
        with entry.finding:
            lowered = self._lowered(entry)
        _cache_hits.count = 0
        program = _Compiled(lowered.compile(), entry.ran or ())
        key = self._disk_key_if_any(*arguments)
        if key and not _cache_hits.count:
            _save(key, program)
        with entry.finding:
            entry.program, entry.lowered = program, None
        _tell(self.name, Made(self.name, "compiler", time.perf_counter() - start))

    def _disk_key_if_any(self, static: dict[str, Any], dynamic: dict[str, Any]) -> str | None:
        if _store is None or mesh_of(static, dynamic):
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
    settings = tuple(getattr(jax.config, name) for name in TRACE_SETTINGS)
    return (*static.values(), *settings), tree, tuple((*_aval(leaf), _sharding(leaf)) for leaf in leaves)


def mesh_of(static: Mapping[str, Any], dynamic: Mapping[str, Any]) -> Mesh | None:
    """The mesh that a program's arguments name, or lie on; None on one device."""
    for value in static.values():
        shards = value if isinstance(value, Shards) else getattr(value, "shards", None)
        if isinstance(shards, Shards):
            return shards.mesh
    shardings = filter(None, map(_sharding, jax.tree.leaves(dynamic)))
    return next((s.mesh for s in shardings if isinstance(s.mesh, Mesh)), None)


def _sharding(leaf: Any) -> NamedSharding | None:
    """Where an argument lies, if that is on several devices."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def _aval(leaf: Any) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype and weakness of an argument: what a compiled program demands of it."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
        return tuple(leaf.shape), str(leaf.dtype), bool(getattr(leaf, "weak_type", False))
    aval = jax.typeof(leaf)
    return tuple(aval.shape), str(aval.dtype), bool(aval.weak_type)


def _load(key: str) -> _Compiled | None:
    if _store is None or (program := _store.get(key)) is None:
        return None
    try:
        serialized, ran = pickle.loads(program)
        # only programs of the default device are kept, and JAX would take all that there are
        run = serialize_executable.deserialize_and_load(*serialized, execution_devices=jax.devices()[:1])
        return _Compiled(run, ran)
    except Exception as error:  # whatever a foreign or stale file does: it is compiled anew
        _store.trouble.append(f"a compiled program could not be loaded and is made again: {error}")
        _store.delete(key)
        return None


def _save(key: str, program: _Compiled) -> None:
    if _store is None:
        return
    try:
        content = pickle.dumps((serialize_executable.serialize(program.run), program.ran))
    except Exception as error:  # a comfort: not every program or backend can be serialized
        log.info(f"a compiled program cannot be kept on disk: {error}")
        return
    _store.put(key, content)


def _tell(name: str, made: Made | None) -> None:
    for listener in list(_listeners):
        listener(name, made)
