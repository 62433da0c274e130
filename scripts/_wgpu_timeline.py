"""Where the seconds of a wgpu load go: every step's calls, of all threads, with the code as it is."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from qwen3_moe_jax.convert.gguf_source import GGUFSource
from qwen3_moe_jax.wgpu_backend import feed, layout
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.mapped import Shared


def _unknown(*_: Any, **__: Any) -> int:
    return 0


@dataclass
class Step:
    """What is known of one step.

    Attributes:
      calls: how many.
      seconds: of all calls, whose threads may run side by side.
      first, last: when the first call began and the last ended, in seconds after the timeline's start.
      nbytes: that the calls read or wrote, where that is known.
      threads: that made them.
    """

    calls: int = 0
    seconds: float = 0.0
    first: float = float("inf")
    last: float = 0.0
    nbytes: int = 0
    threads: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "calls": self.calls,
            "thread_seconds": round(self.seconds, 4),
            "first_s": round(self.first, 3),
            "last_s": round(self.last, 3),
            "bytes": self.nbytes,
            "threads": len(self.threads),
        }


class Timeline:
    """Steps by name, in the order in which they first began."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: dict[str, Step] = {}
        self._lock = threading.Lock()

    @contextmanager
    def step(self, name: str, nbytes: int = 0) -> Iterator[None]:
        """Counts what happens inside; an inner step's seconds are the outer one's too."""
        began = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            with self._lock:
                step = self.steps.setdefault(name, Step())
                step.calls += 1
                step.seconds += ended - began
                step.first = min(step.first, began - self.began)
                step.last = max(step.last, ended - self.began)
                step.nbytes += nbytes
                step.threads.add(threading.current_thread().name)

    def wrap(self, owner: Any, name: str, label: str, size_of: Callable[..., int] = _unknown) -> Any:
        """A patch under which every call of ``owner.name`` is a step."""
        inner: Callable[..., Any] = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with self.step(label, size_of(*args, **kwargs)):
                return inner(*args, **kwargs)

        return mock.patch.object(owner, name, outer)

    def rows(self) -> list[str]:
        """A table: one line per step."""
        lines = [
            f"{'step':<26}{'calls':>7}{'thread s':>10}{'threads':>9}"
            f"{'first s':>9}{'last s':>9}{'GB':>8}{'GB/s':>8}"
        ]
        for name, s in sorted(self.steps.items(), key=lambda item: item[1].first):
            rate = f"{s.nbytes / s.seconds / 1e9:8.2f}" if s.nbytes and s.seconds else " " * 8
            lines.append(
                f"{name:<26}{s.calls:>7}{s.seconds:>10.3f}{len(s.threads):>9}"
                f"{s.first:>9.3f}{s.last:>9.3f}{s.nbytes / 1e9:>8.3f}{rate}"
            )
        return lines


@contextmanager
def load_steps(timeline: Timeline) -> Iterator[None]:
    """Under it the steps of a load are counted."""
    with ExitStack() as stack:
        for patch in (
            timeline.wrap(GGUFSource, "read_blocks", "read", lambda _, __, ___, buffer: buffer.size),
            timeline.wrap(feed, "_nonfinite_in_blocks", "check", lambda _, raw: raw.size),
            timeline.wrap(feed, "pack", "unpack on the host", lambda raw, *_: raw.size),
            timeline.wrap(feed, "find_nonfinite", "check of arrays"),
            timeline.wrap(feed, "device_words", "arrange on the host"),
            timeline.wrap(feed, "fill_with_blocks", "read, check, copy"),
            timeline.wrap(Shared, "wait", "wait for shared memory"),
            timeline.wrap(Device, "shared", "make shared memory", lambda _, nbytes: nbytes),
            timeline.wrap(Device, "send", "submit a piece", lambda _, __, copies, ___: copies[0][3]),
            timeline.wrap(Device, "buffer", "make buffers", lambda _, nbytes, *__, **___: nbytes),
            timeline.wrap(Device, "write", "small writes", lambda _, __, data, *___: np.asarray(data).nbytes),
            timeline.wrap(Device, "_compile", "compile kernels"),
            timeline.wrap(Device, "bind", "bind groups"),
            timeline.wrap(layout, "device_words", "orders of types"),
        ):
            stack.enter_context(patch)
        yield
