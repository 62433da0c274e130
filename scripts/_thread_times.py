"""What each thread of a process does while it starts: its processor seconds, and the lines where it was seen.

A thread of its own looks every few milliseconds. It needs the interpreter's lock for that: where it came
late, others have held the lock.
"""

import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

EVERY_SECONDS = 0.005
BIN_SECONDS = 0.25
SHOWN = 6
"""Lines of each thread."""

_PACKAGE = "qwen3_moe_jax"


@contextmanager
def watched() -> Generator[dict[str, object]]:
    """Watches all threads of this process; the dictionary is filled at the end."""
    found: dict[str, object] = {}
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over, found), name="watcher", daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _watch(over: threading.Event, found: dict[str, object]) -> None:
    began = before = time.perf_counter()
    used: dict[str, float] = {}
    busy: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    lines: dict[str, Counter[str]] = defaultdict(Counter)
    late = []
    while not over.wait(EVERY_SECONDS):
        now = time.perf_counter()
        late.append(now - before - EVERY_SECONDS)
        number = int((now - began) / BIN_SECONDS)
        frames = sys._current_frames()
        for thread in threading.enumerate():
            if thread.native_id is None:  # it begins
                continue
            name = f"{thread.name} {thread.native_id}"
            seconds = _processor_seconds(thread.native_id)
            used_now = seconds - used.get(name, seconds if number == 0 else 0.0)
            used[name] = seconds
            busy[name][number] += used_now
            frame = frames.get(thread.ident or 0)
            if frame is not None and used_now > 0.2 * (now - before):
                lines[name][_where(frame)] += 1
        before = now
    for name, bins in busy.items():
        total = sum(bins.values())
        if total > 0.02 and not name.startswith("watcher"):
            load = {i * BIN_SECONDS: round(bins[i] / BIN_SECONDS, 1) for i in sorted(bins)}
            load = {at: share for at, share in load.items() if share}
            found[name] = {"seconds": round(total, 2), "load": load, "seen": lines[name].most_common(SHOWN)}
    late.sort()
    found["watcher"] = {f"late by, {p} %": round(late[len(late) * p // 100], 4) for p in (50, 90, 99)}


def _processor_seconds(native_id: int) -> float:
    """Of a thread of this process: Linux's clock of one thread, as ``pthread_getcpuclockid`` names it."""
    try:
        return time.clock_gettime((~native_id << 3) | 6)
    except OSError:  # it has ended
        return 0.0


def _where(frame: FrameType | None) -> str:
    """The innermost line, and the innermost of this package."""
    assert frame is not None
    inner = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"
    while frame is not None and _PACKAGE not in frame.f_code.co_filename:
        frame = frame.f_back
    own = "" if frame is None else f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} > "
    return own + inner
