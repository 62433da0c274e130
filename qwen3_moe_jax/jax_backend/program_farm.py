"""Processes that compile programs beside this one, which takes them from the store on disk.

Mosaic compiles one kernel at a time in a process: three kernels of an H100 that were begun together took
24 s, one after the other. Workers (``program_worker``) are started where several long programs are missing,
and end when nothing has been asked of them for a while, or with this process. The first program that is asked
for while this process compiles none is compiled here: a worker takes some seconds to start.

Whatever fails costs time alone: what a worker does not make is compiled here.
"""

import atexit
import contextlib
import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from qwen3_moe_jax.jax_backend import spare_workers
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.program_key import changes_programs
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.jax_backend.spare_workers import MIN_PROCESSORS
from qwen3_moe_jax.machine.cuda import free_on_card
from qwen3_moe_jax.machine.headroom import available_main_memory
from qwen3_moe_jax.machine.threads import processors

MAX_WORKERS = 14

PROCESSORS_LEFT = 2
"""For this process, and for the libraries' own threads."""

HOST_BYTES = 1500 << 20
"""Main memory of a worker: JAX, CUDA's libraries and a compiler at work."""

DEVICE_BYTES = 800 << 20
"""Device memory of a worker: its context, its kernels, and what a trial of an operation takes."""

IDLE_SECONDS = 10.0
"""A worker that nothing was asked of for so long ends."""

START_SECONDS, MAKE_SECONDS = 90.0, 300.0
"""A worker that has not answered after so long is given up."""

LOOK_SECONDS = 0.2
"""How often a thread that waits for a program looks whether it is still wanted."""


class Abandoned(RuntimeError):
    """A program that nobody wants any more."""


@dataclass
class _Job:
    """A program that is asked for; ``error`` is "" if it is in the store."""

    request: Mapping[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    error: str = "no process was left to compile it"

    def end(self, error: str) -> None:
        self.error = error
        self.done.set()


class _Asking(threading.local):
    """How the programs of this thread are asked for: see :func:`asking`."""

    is_over: Callable[[], bool] = staticmethod(lambda: False)
    may_be_here = True


_asking = _Asking()


@contextlib.contextmanager
def asking(*, is_over: Callable[[], bool], may_be_here: bool = True) -> Generator[None]:
    """How this thread asks for programs meanwhile.

    Args:
      is_over: whether they are wanted no more: then ``Abandoned`` is raised.
      may_be_here: whether this process compiles one itself while it compiles no other.
    """
    before = _asking.is_over, _asking.may_be_here
    _asking.is_over, _asking.may_be_here = is_over, may_be_here
    try:
        yield
    finally:
        _asking.is_over, _asking.may_be_here = before


class Farm:
    """Workers and the programs that they are asked for, first come, first served.

    Attributes:
      trouble: a line for each kind of failure so far.
    """

    def __init__(self):
        self.trouble: list[str] = []
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._workers: set[_Worker] = set()
        self._is_here = False
        self._is_closed = False

    @property
    def count(self) -> int:
        """Workers that there are."""
        return len(self._workers)

    def start(self, count: int, hello: Mapping[str, Any], command: list[str] | None = None) -> None:
        """Starts workers until there are ``count``; of no effect when closed.

        Args:
          count: at least so many.
          hello: the first line that each is told.
          command: what is run in place of a worker.
        """
        with self._changed:
            missing = 0 if self._is_closed else count - len(self._workers)
            for _ in range(missing):
                try:
                    worker = _Worker(hello, command)
                except OSError as error:
                    self._note(f"a process cannot be started ({error.strerror})")
                    return
                self._workers.add(worker)
                threading.Thread(target=self._run, args=(worker,), name="compiler", daemon=True).start()

    @contextlib.contextmanager
    def turn(self) -> Generator[bool]:
        """Whether this thread is to compile here what it wants next: meanwhile no other is told so."""
        with self._changed:
            is_here = not self._workers or (_asking.may_be_here and not self._is_here)
            is_own = is_here and bool(self._workers)
            self._is_here = self._is_here or is_own
        try:
            yield is_here
        finally:
            if is_own:
                self._is_here = False

    def make(self, request: Callable[[], Mapping[str, Any] | None]) -> bool:
        """Waits until a worker has put a program into the store.

        Args:
          request: gives what ``program_worker.make`` takes, or None for what no other process can make.

        Returns:
          Whether it is there; else this process has to compile it.

        Raises:
          Abandoned: it is wanted no more.
        """
        if not self._workers or (found := request()) is None:
            return False
        with self._changed:
            if not self._workers:
                return False
            job = _Job(found)
            self._jobs.append(job)
            self._changed.notify()
        while not job.done.wait(LOOK_SECONDS):
            if _asking.is_over():
                self._withdraw(job)
                raise Abandoned("this program is not wanted any more")
        return not job.error

    def end_idle(self) -> None:
        """Ends workers that have nothing to do, which hold memory, and returns when they are gone."""
        with self._changed:
            idle = [] if self._jobs else [worker for worker in self._workers if not worker.is_busy]
            for worker in idle:
                self._workers.discard(worker)
            self._changed.notify_all()
        for worker in idle:
            worker.end()

    def close(self) -> None:
        """Ends all workers; what is asked for has failed, and is compiled here."""
        with self._changed:
            self._is_closed = True
            workers, self._workers = list(self._workers), set()
            self._end_jobs()
            self._changed.notify_all()
        for worker in workers:
            worker.end()

    def _run(self, worker: "_Worker") -> None:
        """A worker's thread: gives it one job after the other."""
        error = worker.start()
        while not error and (job := self._next(worker)) is not None:
            said = worker.ask(job.request, MAKE_SECONDS)
            error = said if worker.is_gone else ""
            self._note(said)
            job.end(said)
        worker.end()
        with self._changed:
            is_wanted = worker in self._workers
            self._workers.discard(worker)
            if not self._workers:
                self._end_jobs()
        if error and is_wanted:
            self._note(error)

    def _next(self, worker: "_Worker") -> _Job | None:
        """The next job, or None: nothing came for a while, or the worker was ended."""
        until = time.monotonic() + IDLE_SECONDS
        with self._changed:
            worker.is_busy = False
            while worker in self._workers:
                if self._jobs:
                    worker.is_busy = True
                    return self._jobs.popleft()
                if not self._changed.wait(until - time.monotonic()):
                    self._workers.discard(worker)
            return None

    def _withdraw(self, job: _Job) -> None:
        with self._changed, contextlib.suppress(ValueError):  # it is under way
            self._jobs.remove(job)

    def _end_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft().end("no process is left to compile it")

    def _note(self, what: str) -> None:
        line = f"a program was not compiled beside the others: {what}"
        with self._changed:
            if what and line not in self.trouble and not self._is_closed:
                self.trouble.append(line)


class _Worker:
    """One process; its thread alone asks it."""

    def __init__(self, hello: Mapping[str, Any], command: list[str] | None):
        self.is_busy, self.is_gone = True, False
        self._hello = hello
        spare = None if command else spare_workers.taken()
        self._process = spare or spare_workers.spawned(command)

    def start(self) -> str:
        """Waits until it is ready; returns what is wrong, or nothing."""
        return self.ask(self._hello, START_SECONDS)

    def ask(self, message: Mapping[str, Any], seconds: float) -> str:
        """Sends a line and waits for the answer's ``error``."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
            if not select.select([stdout], [], [], seconds)[0]:
                return self._given_up(f"a process did not answer for {seconds:.0f} s")
            line = stdout.readline()
            return str(json.loads(line)["error"]) if line else self._given_up("a process ended")
        except (OSError, ValueError, TypeError, KeyError):  # ended, or it says what no worker says
            return self._given_up("a process ended")

    def _given_up(self, why: str) -> str:
        self.is_gone = True
        return why

    def end(self) -> None:
        """Kills it: a program that it makes is whole in the store, or absent."""
        self.is_gone = True
        self._process.kill()
        self._process.wait()


_farm = Farm()
atexit.register(_farm.close)
atexit.register(spare_workers.end)


def farm() -> Farm:
    """The one of this process."""
    return _farm


def start_workers(store: ProgramStore, missing: int, needed: int, here: int) -> None:
    """Starts as many workers for this machine's default device as ``workers_for`` says."""
    if count := workers_for(jax.local_devices()[0], missing, needed, here):
        settings = {name: value for name, value in jax.config.values.items() if _is_plain(name, value)}
        place = {"store": str(store.folder.absolute()), "max_bytes": store.max_bytes}
        _farm.start(count, {**place, "settings": settings})


def _is_plain(name: str, value: Any) -> bool:
    """Whether a setting of JAX is one that programs depend on and JSON can hold."""
    return changes_programs(name) and (value is None or isinstance(value, bool | int | float | str))


def workers_for(device: Device, missing: int, needed: int = 0, here: int = 1) -> int:
    """How many workers make so many long programs.

    Args:
      device: that programs are for.
      missing: long programs that are not on disk.
      needed: bytes of the device's memory that this process is going to take.
      here: how many of them this process makes itself.
    """
    if os.name != "posix":
        return 0
    if (asked := spare_workers.workers_asked()) is not None:
        return min(asked, missing)
    if device.platform != "gpu" or processors() < MIN_PROCESSORS:
        return 0
    host = available_main_memory()
    card = free_on_card(getattr(device, "local_hardware_id", None))
    stats = device.memory_stats() or {}  # a pool that was taken at the start is no longer the card's
    needed = max(0, needed - max(0, stats.get("pool_bytes", 0) - stats.get("bytes_in_use", 0)))
    by_host = MAX_WORKERS if host is None else host // 2 // HOST_BYTES
    by_card = 0 if card is None else (card - needed) // DEVICE_BYTES
    return max(0, min(missing - here, MAX_WORKERS, processors() - PROCESSORS_LEFT, by_host, by_card))
