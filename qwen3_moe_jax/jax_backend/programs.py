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
import inspect
import logging
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
from jax.experimental import serialize_executable

from qwen3_moe_jax.jax_backend.cache_hits import cache_hits
from qwen3_moe_jax.jax_backend.collection import no_collection
from qwen3_moe_jax.jax_backend.compile_clock import compile_clock
from qwen3_moe_jax.jax_backend.program_arguments import Key, aval_of, memory_key, mesh_of
from qwen3_moe_jax.jax_backend.program_farm import farm, start_workers
from qwen3_moe_jax.jax_backend.program_key import digest, environment, fingerprint
from qwen3_moe_jax.jax_backend.program_request import encode, named
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.jax_backend.sharding import placed_on
from qwen3_moe_jax.kernels_pallas.implementations import Ran, recording, replay
from qwen3_moe_jax.machine.folders import STORE_VARIABLE, programs_folder, readable_cache

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
        folder = programs_folder()
        if folder is not None:
            use_store(ProgramStore(folder))
        elif os.environ.get(STORE_VARIABLE, "").lower() != "off" and (readable := readable_cache()):
            use_store(ProgramStore(readable / "programs", is_read_only=True))
        else:
            use_store(None)
    return _store is not None


def store() -> ProgramStore | None:
    """Where programs are kept now; None is nowhere."""
    return _store


def keeps_on_disk() -> bool:
    """Whether a program that is made now is there for the next process."""
    return _store is not None and not _store.is_read_only


def trouble() -> list[str]:
    """A line for each kind of failure of the cache on disk, and of processes that compile, so far."""
    return [*(_store.trouble if _store is not None else ()), *farm().trouble]


def start_compilers(missing: int, needed: int = 0, here: int = 1) -> None:
    """Lets other processes compile long programs from now on, where several are missing.

    Of no effect where programs are not kept on disk, for that is the way from them to this process.

    Args:
      missing: long programs that are not on disk.
      needed: bytes of the device's memory that this process is going to take.
      here: how many of them this process makes itself.
    """
    if missing and _store is not None and not _store.is_read_only:
        start_workers(_store, missing, needed, here)


def named_program(name: str) -> "Program":
    """The program that a request names, ``module:name``.

    Raises:
      ValueError: there is none in this package.
    """
    found = named(name)
    if not isinstance(found, Program):
        raise ValueError(f"{name} is no program")
    return found


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
      is_long: whether it takes seconds to compile, and other processes may do it (``program_farm``).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static_argnames: Sequence[str] = (),
        donate_argnames: Sequence[str] = (),
        compiler_options: Mapping[str, Any] | None = None,
        is_long: bool = False,
    ):
        """Args as those of ``jax.jit``. Static arguments need a ``fingerprint``."""
        functools.update_wrapper(self, function)
        self.function, self.name, self.is_long = function, function.__name__, is_long
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
        self._programs: dict[Key, _Entry] = {}
        self._lock = threading.Lock()
        _all.add(self)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As ``trace`` of a jitted function."""
        return self._jitted.trace(*args, **kwargs)

    def count(self) -> int:
        """Returns how many programs are in memory."""
        return sum(entry.program is not None for entry in list(self._programs.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._split(args, kwargs)
        key = memory_key(*arguments)
        if key is None or jax.config.jax_disable_jit:
            return self._jitted(*args, **kwargs)
        entry = self._programs.get(key) or self._new_entry(key)
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
        """All of ``prepare`` that is Python, which runs in one thread at a time: compilation is left.

        Of what other processes compile that is nothing.
        """
        if self.is_long and farm().count:
            return
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
        key = memory_key(*arguments)
        if key is None:
            raise TypeError(f"{self.name} is asked about with a trace's values: call it, or trace it")
        return self._programs.get(key) or self._new_entry(key)

    def _new_entry(self, key: Key) -> _Entry:
        with self._lock:
            return self._programs.setdefault(key, _Entry())

    def _made(self, entry: _Entry, arguments: _Arguments) -> _Compiled:
        """The program; the first thread makes it, others wait for that one."""
        if not (self.is_long and farm().count):
            self._known(entry, arguments)  # without the lock: others may lower it meanwhile
        with entry.compiling:
            if entry.program is None:
                with farm().turn() if self.is_long else nullcontext(True) as is_here:
                    if is_here or not self._is_made_elsewhere(entry, arguments):
                        self._known(entry, arguments)
                        if entry.program is None:
                            self._compile(entry, arguments)
            assert entry.program is not None
            return entry.program

    def _is_made_elsewhere(self, entry: _Entry, arguments: _Arguments) -> bool:
        """Takes the program from disk, where another process puts it first unless it is there."""
        with entry.finding:
            self._look_on_disk(entry, arguments)
            if entry.program is not None or entry.lowered is not None:
                return entry.program is not None
        start = time.perf_counter()
        _tell(self.name, None)
        if farm().make(lambda: self._request(arguments)):
            with entry.finding:
                entry.is_missing = False
                self._look_on_disk(entry, arguments, start)
        return entry.program is not None

    def _request(self, arguments: _Arguments) -> dict[str, Any] | None:
        """What another process is told to make; None for what it could not, or not keep."""
        key = self._disk_key_if_any(*arguments)
        if key is None or not keeps_on_disk():
            return None
        name = f"{self.function.__module__}:{self.function.__qualname__}"
        try:
            static, dynamic = map(encode, arguments)
        except TypeError:
            return None
        return {"program": name, "key": key, "static": static, "dynamic": dynamic}

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

    def _look_on_disk(self, entry: _Entry, arguments: _Arguments, asked_at: float | None = None) -> None:
        """Takes the program from disk, if it is there; another process was asked for it at ``asked_at``."""
        if entry.program is not None or entry.is_missing:
            return
        start = time.perf_counter() if asked_at is None else asked_at
        key = self._disk_key_if_any(*arguments)
        program = _load(key) if key else None
        entry.is_missing = program is None
        if program is not None:
            _tell(self.name, None)
            entry.program, entry.ran = program, program.ran
            source = "disk" if asked_at is None else "compiler"
            _tell(self.name, Made(self.name, source, time.perf_counter() - start))

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
        cache_hits.count = 0
        program = _Compiled(lowered.compile(), entry.ran or ())
        key = self._disk_key_if_any(*arguments)
        if key and not cache_hits.count:
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
            "arrays": [aval_of(leaf) for leaf in leaves],
            "environment": environment(),
        }
        return digest(facts)


def _load(key: str) -> _Compiled | None:
    if _store is None or (program := _store.get(key)) is None:
        return None
    own = jax.local_devices()[:1]  # programs of the default device are kept, and JAX would take all
    try:
        serialized, ran = pickle.loads(program)
        run = serialize_executable.deserialize_and_load(*serialized, execution_devices=own)
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
