"""A runner's batches, of any number of threads: all that are in use, and the one that the last stream left.

A stream takes a batch of one slot and leaves it to the next one, with the tokens whose keys and values it
holds. Both are handed over together: with the tokens of another batch a stream would take keys for its own
that its cache does not have, and write another text.
"""

import threading
import weakref
from collections.abc import Sequence

from qwen3_moe_jax.jax_backend.batching import Batch


class Batches:
    """Those of one runner; at most one is spare, and who takes it has it alone."""

    def __init__(self):
        self._lock = threading.Lock()
        self._all: weakref.WeakSet[Batch] = weakref.WeakSet()
        self._spare: tuple[Batch, list[int]] | None = None

    def add(self, batch: Batch) -> Batch:
        """Notes one that was made; returns it."""
        with self._lock:
            self._all.add(batch)
        return batch

    def take_spare(self) -> tuple[Batch, list[int]] | None:
        """The spare one and the tokens that its row holds, or None where another stream has it."""
        with self._lock:
            spare, self._spare = self._spare, None
            return spare

    def keep_spare(self, batch: Batch, tokens: Sequence[int]) -> None:
        """Leaves a batch whose row holds ``tokens`` to the next stream."""
        with self._lock:
            self._spare = batch, list(tokens)

    def close(self) -> None:
        """Closes each that is left."""
        self.take_spare()
        with self._lock:
            batches = list(self._all)
        for batch in batches:
            batch.close()
