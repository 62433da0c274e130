"""Ctrl-C: an exception for most commands, a flag for an answer that is being written.

Three things make Python's own way unreliable here. A KeyboardInterrupt that lands in a
callback of the garbage collector (JAX has one) or in a finalizer is printed and lost: it
is sent again. One that lands between two statements of a conversation could lose half a
turn: :func:`as_flag` lets the loop ask at each token. And while C++ compiles a program no
Python code of the main thread runs: a thread that hears the signal at once says what is
waited for, and a second Ctrl-C ends the program.

SIGTERM and SIGHUP end a command at once: what is written stays, files that are not whole go, a terminal gets
its settings back (:class:`Ended`). A program that is being compiled is not waited for.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode

SECONDS_UNANSWERED = 0.5
"""An interrupt that has had no effect for so long is explained."""

SECONDS_TO_END = 3.0
"""A signal of ``ENDS`` that has had no effect for so long ends the process without tidying up."""

RETRY_SECONDS = 0.02
"""A swallowed interrupt is sent again after this time, when the callback that swallowed it has ended."""

WAITS: list[Callable[[], str | None]] = []
"""Each names what the process is busy with ("a program is being compiled"), or gives None."""

SLACK_SECONDS = 0.1
"""An answer so long before the watcher heard of the interrupt belongs to it: two threads hear of it."""

ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Somebody ends this program, or its terminal was closed."""


class Ended(SystemExit):
    """A signal of ``ENDS`` came; the exit code is what a shell says of it."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(128 + number)


_flag: threading.Event | None = None
_answered_at = 0.0
_leave: Callable[[], None] | None = None
_left_by: KeyboardInterrupt | Ended | None = None


def _answer() -> None:
    global _answered_at
    _answered_at = time.monotonic()


@contextmanager
def handled() -> Generator[None, None, None]:
    """Handles SIGINT and ``ENDS`` while the block runs, unless they are ignored or not ours to handle."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _on_interrupt)
    previous = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: _resend_swallowed(unraisable, previous)
    ends = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, _on_end)
    try:
        with _watched():
            yield
    finally:
        sys.unraisablehook = previous
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in ends:
            signal.signal(number, signal.SIG_DFL)


def endings() -> tuple[int, ...]:
    """Signals at which a server, or a batch, comes to an orderly end: Ctrl-C and ``ENDS``, less a SIGHUP that
    is ignored (``nohup``)."""
    heard = [n for n in ENDS if n == signal.SIGTERM or signal.getsignal(n) is not signal.SIG_IGN]
    return (signal.SIGINT, *heard)


@contextmanager
def as_flag() -> Generator[Callable[[], bool], None, None]:
    """Within the block the first Ctrl-C only sets a flag, which the block's value reads; a second raises."""
    global _flag
    _flag = flag = threading.Event()
    try:
        yield flag.is_set
    finally:
        _flag = None
        if flag.is_set():
            _answer()


@contextmanager
def at_the_end_of(leave: Callable[[], None]) -> Generator[None, None, None]:
    """Within the block a signal only calls ``leave``, which is to end it; its exception is raised after that.

    For a library with an event loop: raised anywhere in it, an exception would end one of its callbacks, and
    the library would report that and go on. The loop may take the wake-up descriptor, as ``asyncio`` does.
    """
    global _leave, _left_by
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    descriptor = signal.set_wakeup_fd(-1)
    _leave, _left_by = leave, None
    try:
        yield
    finally:
        _leave = None
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        if _left_by is not None:
            raise _left_by


def _on_interrupt(_number: int, _frame: Any) -> None:
    if _flag is not None and not _flag.is_set():
        _flag.set()
        return
    _raise(KeyboardInterrupt())


def _on_end(number: int, _frame: Any) -> None:
    _raise(Ended(number))


def _raise(error: KeyboardInterrupt | Ended) -> None:
    global _left_by
    _answer()
    if _leave is None:
        raise error
    _left_by = _left_by if isinstance(_left_by, Ended) else error
    _leave()


def _resend_swallowed(unraisable: Any, previous: Callable[[Any], None]) -> None:
    """An interrupt that a callback or a finalizer could not let through comes again."""
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt | Ended):
        previous(unraisable)
        return
    number = error.number if isinstance(error, Ended) else signal.SIGINT
    timer = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


@contextmanager
def _watched() -> Generator[None, None, None]:
    """A thread that hears of signals while the main thread is in C++; none where the system gives no more.

    Nor on Windows, which cannot wait for a pipe: there an interrupt is heard when C++ has ended.
    """
    if os.name == "nt" or not hasattr(os, "set_blocking"):
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        os.close(writer)
        os.close(reader)
        yield
        return
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread, which reads to the end
        thread.join()
        os.close(reader)


def _watch(reader: int) -> None:
    """Explains an interrupt that has no effect; ends the program at the next one."""
    waits_since = None
    while heard := os.read(reader, 1):
        pressed = time.monotonic()
        if heard[0] in ENDS:
            is_quiet = not select.select([reader], [], [], SECONDS_TO_END)[0]
            if is_quiet and _answered_at < pressed - SLACK_SECONDS:
                os._exit(128 + heard[0])
            continue
        if waits_since is not None and _answered_at < waits_since:
            terminal.note("")
            os._exit(ExitCode.INTERRUPTED)
        if select.select([reader], [], [], SECONDS_UNANSWERED)[0]:
            continue
        waits_since = None
        if _answered_at < pressed - SLACK_SECONDS:
            waits_since = pressed
            terminal.note("", f"{_wait()}: waiting for its end; Ctrl-C again ends the program at once")


def _wait() -> str:
    return next((text for wait in WAITS if (text := wait())), "a step is under way")
