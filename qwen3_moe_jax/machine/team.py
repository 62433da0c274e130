"""Processes that share the work of NumPy code: the same function in each, arrays in memory that all see.

Threads of many short NumPy calls wait for the interpreter's lock: more than four are slower than four.
Processes do not. They are forks of one that has no threads, so they have its objects without a copy, and
only results are sent. A team's members run the same code side by side: each computes its share of what
``each`` is given, and all of them go on when the last is done.
"""

import math
import mmap
import os
import pickle
import selectors
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from qwen3_moe_jax.machine.threads import ALONE, Workers

T = TypeVar("T")
R = TypeVar("R")

ALIGNMENT = 4096

PIPE_BYTES = 1 << 20


class TeamError(RuntimeError):
    """A member has ended without a result."""


def forked(count: int, function: Callable[[int], R]) -> list[R]:
    """``function(number)`` in each of ``count`` processes, forks of this one, which must have no threads.

    Raises:
      TeamError: one of them was ended.
      Exception: what the first that failed raised; the others are ended.
    """
    readers: dict[int, tuple[int, int, list[bytes]]] = {}
    results: dict[int, R] = {}
    try:
        for number in range(count):
            reader, process = _fork(number, function, list(readers))
            readers[reader] = number, process, []
        with selectors.DefaultSelector() as selector:
            for reader in readers:
                selector.register(reader, selectors.EVENT_READ)
            while len(results) < count:
                for key, _ in selector.select():
                    number, _, parts = readers[key.fd]
                    if part := os.read(key.fd, PIPE_BYTES):
                        parts.append(part)
                        continue
                    selector.unregister(key.fd)
                    results[number] = _result(b"".join(parts))
    finally:
        for reader, (_, process, _) in readers.items():
            os.close(reader)
            _end(process)
    return [results[number] for number in range(count)]


def _fork(number: int, function: Callable[[int], Any], others: Sequence[int]) -> tuple[int, int]:
    """Where the result of a new process can be read, and its id."""
    reader, writer = os.pipe()
    parent, process = os.getpid(), os.fork()
    if process:
        os.close(writer)
        return reader, process
    status = 1
    try:
        for other in (reader, *others):
            os.close(other)
        try:
            found = pickle.dumps((True, function(number)), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # whatever it is: it is raised again where it was asked for
            found = pickle.dumps((False, error))
        if os.getppid() == parent:
            with os.fdopen(writer, "wb") as file:
                file.write(found)
            status = 0
    finally:
        os._exit(status)  # nothing of the process that was copied is to be run


def _result(data: bytes) -> Any:
    if not data:
        raise TeamError("a process that shares the reference's work was ended: is main memory full?")
    is_found, value = pickle.loads(data)
    if not is_found:
        raise value
    return value


def _end(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, 9)
    os.waitpid(process, 0)


class Meeting:
    """Where the members of a team wait for each other; made before they are forked."""

    def __init__(self, count: int):
        self.count, self._parent = count, os.getpid()
        self._arrived, self._goes_on = os.pipe(), [os.pipe(), os.pipe()]
        self._times = 0

    def wait(self, number: int) -> None:
        """Returns when every member is here.

        Raises:
          TeamError: whoever asked for the work is gone.
        """
        if os.getppid() != self._parent:
            raise TeamError("nobody waits for this work")
        # two in turn: who is fast must not take what was meant for another the time before
        here, gone_on = self._goes_on[self._times % 2]
        self._times += 1
        if number:
            os.write(self._arrived[1], b"1")
            os.read(here, 1)
            return
        missing = self.count - 1
        while missing:
            missing -= len(os.read(self._arrived[0], missing))
        os.write(gone_on, b"1" * (self.count - 1))

    def close(self) -> None:
        """Closes the pipes."""
        for end in (*self._arrived, *self._goes_on[0], *self._goes_on[1]):
            os.close(end)


class Team(Workers):
    """One member's view of a team: ``Workers`` whose others are processes that run the same code.

    Every member asks for the same arrays in the same order, so that all find them in the same place.

    Attributes:
      number: which member this is.
    """

    def __init__(self, meeting: Meeting, number: int, arena: mmap.mmap):
        """Takes what was made before the fork.

        Args:
          meeting: of all.
          number: which member this is.
          arena: memory that all see; the arrays of ``empty`` lie there, one after the other, again and again.
        """
        super().__init__(1)
        self.count, self.number = meeting.count, number
        self._meeting, self._arena, self._next = meeting, arena, 0

    def each(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """As ``Workers.each``: this member's share, and then the others' is there, too."""
        for item in list(items)[self.number :: self.count]:
            function(item)
        self._meeting.wait(self.number)

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """As ``Workers.empty``; it is used again when as much as the arena holds was asked for after it."""
        nbytes = array_nbytes(shape, dtype)
        if self._next + nbytes > len(self._arena):
            self._next = 0
        found = np.ndarray(shape, dtype, self._arena, self._next)
        self._next += nbytes
        return found

    def parts(self, count: int) -> list[slice]:
        stride = -(-count // self.count)
        return [slice(start, start + stride) for start in range(0, count, stride)]

    def beside(self, count: int) -> Workers:
        return ALONE

    def kept(self, array: np.ndarray) -> np.ndarray:
        return array.copy()


def array_nbytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes that an array takes of an arena."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def as_a_team(count: int, arena_nbytes: int, function: Callable[[Team], R]) -> R:
    """``function`` in every member of a new team; what the first of them returns.

    Raises:
      as :func:`forked`.
    """
    meeting, arena = Meeting(count), mmap.mmap(-1, arena_nbytes)

    def member(number: int) -> R | None:
        found = function(Team(meeting, number, arena))
        return None if number else found

    try:
        first, *_ = forked(count, member)
    finally:
        meeting.close()
        arena.close()
    assert first is not None
    return first
