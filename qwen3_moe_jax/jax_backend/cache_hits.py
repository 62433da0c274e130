"""How many programs a thread has taken from JAX's own cache on disk."""

import threading
from typing import Any

import jax


class _CacheHits(threading.local):
    """Programs that this thread has taken from JAX's own cache: serialized once more they lack functions
    on a CPU (JAX 0.11.2: "Function ... not found" when it runs)."""

    count = 0


cache_hits = _CacheHits()


def _on_event(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        cache_hits.count += 1


jax.monitoring.register_event_listener(_on_event)
