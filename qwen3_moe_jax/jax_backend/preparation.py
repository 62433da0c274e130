"""Programs made beside the work of a session, so that nobody waits for one that could have been ready.

``Preparation`` has threads of its own. What the first tokens need is looked for on disk, or compiled, while
weights are loaded: the wait is the longer of the two, not their sum. Tracing and lowering are Python, which
runs in one thread at a time: one thread does them, program after program, and others compile meanwhile.
Where several programs are missing on a GPU, other processes do both (``program_farm``).
The rest is made while the model is idle: a CPU that compiles cannot compute as fast, and beside a thread that
lowers, the one that feeds a GPU waits for the interpreter's lock at each of its calls: an H100 wrote 61
tokens per second meanwhile in place of 620. A batch on a GPU, which may never be idle, goes on. Programs
that no later process will find are not made ahead.

A compilation cannot be interrupted: ``close`` lets the one under way end, and begins no other.
"""

import os
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial

from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.compile_clock import in_background
from qwen3_moe_jax.jax_backend.program_farm import MAX_WORKERS, asking, farm
from qwen3_moe_jax.jax_backend.settings import own_settings
from qwen3_moe_jax.jax_backend.wanted import Wanted, long_of, missing_of
from qwen3_moe_jax.machine.threads import SHORT_TURN, cores, shares_the_lock

IDLE_SECONDS = 1.0
"""A model that has written nothing for so long is idle: a command that ends, ends before."""

LOOK_SECONDS = 0.5
"""How often a thread that waits looks whether the process ends."""

FIRST_THREADS = 4
"""That load or compile what the first tokens need, beside the one that traces and lowers."""

NICENESS = 10
"""Of the thread that makes what nobody waits for."""

_all: "weakref.WeakSet[Preparation]" = weakref.WeakSet()


def is_compiling() -> bool:
    """Whether some model's programs are being compiled in the background now."""
    return any(preparation.is_compiling for preparation in _all)


def finish(seconds: float) -> None:
    """Waits so long, at most, for programs that are being compiled and that later processes will find.

    Without that a command that ends sooner than its compiler would leave the program to the next one, which
    ends too soon as well: each would write beside a compiler, at a third of its rate.
    """
    end = time.monotonic() + seconds
    for preparation in _all:
        preparation.finish(end - time.monotonic())


class Preparation:
    """Makes the programs of one session in the background.

    Attributes:
      wanted: all of them.
      are_kept: whether they are kept for later processes.
      goes_on: whether those that were not begun are made when the first token is there.
    """

    goes_on = True

    def __init__(self, wanted: Sequence[Wanted], *, only_when_idle: bool = True, are_kept: bool = True):
        """Takes the list of programs.

        Args:
          wanted: all of them.
          only_when_idle: compile nothing while the model computes, except what the first tokens need.
          are_kept: whether programs are kept for later processes as others are; those of a mesh are not.
        """
        self.wanted = list(wanted)
        self._only_when_idle, self.are_kept = only_when_idle, are_kept
        self._changed = threading.Condition()
        self._busy, self._used_at, self._is_closed = 0, time.monotonic(), False
        self._compiling = 0
        self._worker: threading.Thread | None = None
        self._lowering = ThreadPoolExecutor(1, thread_name_prefix="lowering")
        self._makers: ThreadPoolExecutor | None = None
        self._others: ThreadPoolExecutor | None = None
        _all.add(self)

    @property
    def is_compiling(self) -> bool:
        """Whether one is being compiled, by any of its threads."""
        return self._compiling > 0

    @property
    def made(self) -> int:
        """How many are in memory."""
        return sum(wanted.is_ready for wanted in self.wanted)

    def begin(self, first: Sequence[Wanted], *, compiles: bool, may_be_here: bool = True) -> None:
        """Makes what the first tokens need, now and side by side.

        Args:
          first: what takes longest first; where other processes compile, this one makes the first of them.
          compiles: also what is not on disk.
          may_be_here: whether this process does so though others are there.
        """
        for number, wanted in enumerate(first):
            is_here = may_be_here and number == 0
            self._lowering.submit(self._begin, wanted, compiles, may_be_here=is_here)

    def begin_elsewhere(self, more: Sequence[Wanted]) -> None:
        """Lets other processes make programs, where there are any; this one goes on with its work."""
        programs.start_compilers(len(long_of(missing_of(more))), here=0)
        if farm().count:
            self._others = self._others or ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="programs")
            for wanted in more:
                self._others.submit(self._make, wanted, True, may_be_here=False)

    @property
    def _first(self) -> ThreadPoolExecutor:
        """Threads that make programs, or wait for the processes that do; asked for by one thread."""
        if self._makers is None:
            count = MAX_WORKERS + 2 if farm().count else FIRST_THREADS
            self._makers = ThreadPoolExecutor(count, thread_name_prefix="programs")
        return self._makers

    def make_all(self) -> None:
        """Makes all programs, side by side, and returns when they are there or have failed."""
        programs.start_compilers(len(long_of(missing_of(self.wanted))))
        with suppress(RuntimeError):  # closed
            begun = [self._lowering.submit(self._begin, wanted, True) for wanted in self.wanted]
            wait([made for made in (b.result() for b in begun) if made is not None])

    def load_stored(self) -> None:
        """Takes what is on disk into memory, one for each core at a time, and returns when it is there.

        A tenth of a second of one core each, in which a session that takes them one by one computes nothing.
        """
        with ThreadPoolExecutor(cores(), thread_name_prefix="programs") as pool:
            list(pool.map(partial(self._make, compiles=False), self.wanted))

    def _begin(self, wanted: Wanted, compiles: bool, may_be_here: bool = True) -> Future[None] | None:
        """Leaves one to the others: to load it, or when it is lowered, to compile it."""
        with in_background(), own_settings(), suppress(Exception):  # it fails again where it is called
            if compiles and not self._is_over() and not wanted.is_stored:
                wanted.lower()
        with suppress(RuntimeError):  # closed meanwhile
            return None if self._is_closed else self._first.submit(self._make, wanted, compiles, may_be_here)

    @property
    def makes_the_rest(self) -> bool:
        """Whether ``go_on`` makes programs: a later process must find them on disk."""
        return bool(self.goes_on and self.wanted and self.are_kept and programs.keeps_on_disk())

    def go_on(self) -> None:
        """The first token is there: the others may be made."""
        if not self.makes_the_rest:
            return
        with self._changed:  # the first tokens of two streams may come at once
            if self._worker is None:
                self._worker = threading.Thread(target=self._make_the_rest, name="programs")
                self._worker.start()

    @contextmanager
    def working(self) -> Generator[None]:
        """Meanwhile the model computes."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._used_at = time.monotonic()
                self._changed.notify_all()

    def close(self, *, wait: bool = False) -> None:
        """Begins no other program. ``wait``: for the one that is being compiled, too."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for pool in (self._lowering, self._makers, self._others):  # in the order in which they give work on
            if pool is not None:
                pool.shutdown(wait=wait, cancel_futures=True)
        if wait and self._worker is not None:
            self._worker.join()

    def finish(self, seconds: float) -> None:
        """Waits so long, at most, for those that are being compiled; for none that no later process finds."""
        with self._changed:
            if self.are_kept and programs.keeps_on_disk():
                self._changed.wait_for(lambda: not self._compiling, max(0.0, seconds))

    def _make_the_rest(self) -> None:
        with suppress(OSError, AttributeError):  # a system without priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        for wanted in self.wanted:
            self._make_one_of_the_rest(wanted, compiles=False)
        if self._may_go_on():
            programs.start_compilers(len(long_of(missing_of(self.wanted))))
        make = partial(self._make_one_of_the_rest, compiles=True)
        if farm().count:
            with ThreadPoolExecutor(farm().count, thread_name_prefix="programs") as pool:
                list(pool.map(make, self.wanted))
        for wanted in self.wanted:
            make(wanted)

    def _make_one_of_the_rest(self, wanted: Wanted, *, compiles: bool) -> None:
        if not wanted.is_ready and self._may_go_on():
            with shares_the_lock(SHORT_TURN):
                self._make(wanted, compiles, may_be_here=not farm().count)

    def _may_go_on(self) -> bool:
        """Waits until nothing has been computed for a while, where that matters; False when closed.

        It does not where other processes compile.
        """
        with self._changed:
            while not self._is_over() and self._only_when_idle and not farm().count:
                left = self._used_at + IDLE_SECONDS - time.monotonic()
                if not self._busy and left <= 0:
                    break
                self._changed.wait(LOOK_SECONDS if self._busy else min(left, LOOK_SECONDS))
            return not self._is_over()

    def _is_over(self) -> bool:
        """Closed, or the interpreter ends, which waits for this thread."""
        return self._is_closed or not threading.main_thread().is_alive()

    def _make(self, wanted: Wanted, compiles: bool, may_be_here: bool = True) -> None:
        """Whatever fails here fails again where the program is called, and is said there."""
        if self._is_over():
            return
        with (
            in_background(),
            own_settings(),
            asking(is_over=self._is_over, may_be_here=may_be_here),
            suppress(Exception),
        ):
            if not wanted.load() and compiles:
                self._compile(wanted)

    def _compile(self, wanted: Wanted) -> None:
        with self._changed:
            self._compiling += 1
        try:
            wanted.make()
        finally:
            with self._changed:
                self._compiling -= 1
                self._changed.notify_all()
