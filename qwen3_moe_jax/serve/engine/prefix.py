"""Prompts that are in the cache already: rows of the batch and a bounded store in main memory.

A row keeps its keys and values after its sequence has ended, until another sequence takes it. A new prompt
that begins as some row does (a free one, or one that is running) starts from there: in the row itself, or
in a copy of it. Rows that are about to be overwritten go to the store. What one scope left, another scope
never finds: a scope is an API key and a salt.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_moe_jax.core.batch import Batch

if TYPE_CHECKING:
    from qwen3_moe_jax.serve.engine.jobs import Job
    from qwen3_moe_jax.serve.engine.scheduler import Running

UNIT = 16
"""Reused lengths are multiples of this, as prompts' chunks are."""

MIN_LENGTH = 16
"""A shorter match is not worth a copy."""

GOES_ON = 0.9
"""A prompt that has this share of a row continues it in place; another gets a copy of what it shares."""


@dataclass(frozen=True)
class Reuse:
    """How a job's slot was prepared.

    Attributes:
      slot: where it goes.
      length: tokens of its prompt that are in that row's cache already.
      source: the row they were copied from, None if they were there or came from the store.
      saved: what the store had, for ``repeat``; None unless it came from there.
    """

    slot: int
    length: int
    source: int | None = None
    saved: Any = field(default=None, repr=False, compare=False)

    def repeat(self, batch: Batch) -> None:
        """Does to another batch what was done to the first one."""
        if self.saved is not None:
            batch.load_row(self.slot, self.saved)
        elif self.source is not None:
            batch.copy_row(self.source, self.slot, self.length)


@dataclass(frozen=True)
class _Row:
    """Tokens whose keys and values a row or an entry of the store holds."""

    tokens: np.ndarray
    scope: str
    saved: Any = field(default=None, repr=False)
    nbytes: int = 0


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens at their beginning two sequences share."""
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if different.size else count


class PrefixCache:
    """Finds and prepares what a prompt can reuse.

    Attributes:
      store_bytes: bytes that the store holds now.
      hits, lookups, reused_tokens, prompt_tokens: counts since the start, for the metrics.
    """

    def __init__(self, max_store_bytes: int = 0, *, chunk: int | None = None):
        """Nothing is known yet.

        Args:
          max_store_bytes: bound of the store; 0 keeps no store.
          chunk: reuse whole chunks of so many tokens of prompts alone, so that the rest is read in the chunks
            in which it would be read without a cache: the same bits. None reuses what was written, too.
        """
        self._unit, self._is_of_prompts = chunk or UNIT, chunk is not None
        self._max_store_bytes = max_store_bytes
        self._free: OrderedDict[int, _Row | None] = OrderedDict()  # least recently used first
        self._store: OrderedDict[int, _Row] = OrderedDict()
        self._next = 0
        self.store_bytes = 0
        self.hits = self.lookups = self.reused_tokens = self.prompt_tokens = 0

    def prepare(
        self,
        batch: Batch,
        token_ids: Sequence[int],
        scope: str | None,
        busy: "dict[int, Running]",
        free: list[int],
    ) -> Reuse:
        """Chooses one of the slots ``free`` and brings what can be reused into its row.

        Args:
          busy: what runs, by its slot: rows to copy from, as those of all slots that are free.
        """
        prompt = np.asarray(token_ids, np.int64)
        for slot in free:
            self._free.setdefault(slot, None)
        self.lookups += 1
        self.prompt_tokens += len(prompt)
        reuse = self._best(batch, prompt, scope, busy, free) if scope is not None else None
        reuse = reuse or Reuse(self._victim(batch, free), 0)
        self._free.pop(reuse.slot, None)
        if reuse.length:
            self.hits += 1
            self.reused_tokens += reuse.length
        return reuse

    def take(self, batch: Batch, free: list[int]) -> int:
        """Chooses one of these slots for a row that is going to be copied there."""
        for slot in free:
            self._free.setdefault(slot, None)
        slot = self._victim(batch, free)
        self._free.pop(slot)
        return slot

    def leave(
        self, batch: Batch, slot: int, job: "Job", written: Sequence[int], *, is_sound: bool = True
    ) -> None:
        """Notes what a sequence that ended leaves in its row."""
        row = None
        if is_sound and job.scope is not None:
            tokens = np.asarray(job.token_ids, np.int64)
            if not self._is_of_prompts:
                tokens = np.concatenate([tokens, np.asarray(written, np.int64)])
            row = _Row(tokens[: batch.row_length(slot)], job.scope)
        self._free[slot] = row
        self._free.move_to_end(slot)

    def forget_rows(self) -> None:
        """After the batch has lost its state; the store stays."""
        self._free.clear()

    def _best(
        self,
        batch: Batch,
        prompt: np.ndarray,
        scope: str,
        busy: "dict[int, Running]",
        free: list[int],
    ) -> Reuse | None:
        maximum = len(prompt) - 1  # the last token is the first step's input
        match = lambda row: min(common_length(row.tokens, prompt), maximum) // self._unit * self._unit
        rows = {s: r for s, r in self._free.items() if r is not None and r.scope == scope}
        rows |= {s: r for s, r in self._running_rows(batch, busy, scope)}
        length, slot = max(((match(r), s) for s, r in rows.items()), default=(0, -1))
        stored = ((match(r), n) for n, r in self._store.items() if r.scope == scope)
        in_store, number = max(stored, default=(0, -1))
        if max(length, in_store) < MIN_LENGTH:
            return None
        if in_store > length:
            return self._from_store(batch, number, in_store, free)
        if slot in free and length >= GOES_ON * len(rows[slot].tokens):
            return Reuse(slot, length)
        target = self._victim(batch, free, keep=slot)
        if target == slot:  # the only one that is free: its end is lost
            return Reuse(slot, length)
        batch.copy_row(slot, target, length)
        return Reuse(target, length, source=slot)

    def _running_rows(self, batch: Batch, busy: "dict[int, Running]", scope: str):
        for slot, running in busy.items():
            if running.job.scope == scope:
                tokens = np.asarray(running.job.token_ids, np.int64)
                yield slot, _Row(tokens[: batch.row_length(slot)], scope)

    def _from_store(self, batch: Batch, number: int, length: int, free: list[int]) -> Reuse:
        self._store.move_to_end(number)
        saved = self._store[number].saved
        target = self._victim(batch, free, keep_entry=number)
        batch.load_row(target, saved)
        return Reuse(target, length, saved=saved)

    def _victim(
        self, batch: Batch, free: list[int], keep: int | None = None, keep_entry: int | None = None
    ) -> int:
        """The free slot that is overwritten, an empty or the least recently used one; its row is stored."""
        order = [s for s in self._free if s in free]
        empty = [s for s in order if self._free[s] is None]
        others = [s for s in order if s != keep]
        slot = min(empty) if empty else (others or order)[0]
        row = self._free[slot]
        if row is not None and self._max_store_bytes:
            self._save(batch, slot, row, keep_entry)
        return slot

    def _save(self, batch: Batch, slot: int, row: _Row, keep_entry: int | None) -> None:
        nbytes = batch.row_nbytes(len(row.tokens))
        covered = any(
            r.scope == row.scope and common_length(r.tokens, row.tokens) == len(row.tokens)
            for r in self._store.values()
        )
        if covered or len(row.tokens) < MIN_LENGTH or nbytes > self._max_store_bytes:
            return
        while self.store_bytes + nbytes > self._max_store_bytes:
            victim = next((n for n in self._store if n != keep_entry), None)
            if victim is None:
                return
            self.store_bytes -= self._store.pop(victim).nbytes
        saved = batch.save_row(slot, len(row.tokens))
        self._store[self._next] = _Row(row.tokens, row.scope, saved, nbytes)
        self._next += 1
        self.store_bytes += nbytes
