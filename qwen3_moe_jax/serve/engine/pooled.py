"""Rows of several lengths: one batch for each length behind the interface of one, shortest rows first.

A step goes through every batch that has something to do, one after the other, so weights are read once for
each; in return a long context is reserved for few sequences alone, and no kernel knows of it. Why rows of
several lengths and not pages: docs/design/serve.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwen3_moe_jax.core.batch import Progress, RowBatch
from qwen3_moe_jax.core.errors import BatchFullError


class PooledBatch:
    """Slots of several lengths; a slot's number says its batch, shorter rows have lower ones.

    Attributes:
      batches: one for each length, that of the shortest rows first.
      slots: how many, in all batches.
      capacity: tokens that a sequence in the longest row may have.
      read_tokens: of prompts, in the last step.
    """

    def __init__(self, batches: Sequence[RowBatch]):
        """Takes batches over, which are sorted by their capacity."""
        self.batches = tuple(sorted(batches, key=lambda b: b.capacity))
        self._first: list[int] = []
        self.slots = 0
        for batch in self.batches:
            self._first.append(self.slots)
            self.slots += batch.slots
        self.capacity = self.batches[-1].capacity
        self._reader = self.read_tokens = 0

    def _row_of(self, slot: int) -> tuple[RowBatch, int]:
        """The batch of a slot and its number there."""
        for batch, first in zip(reversed(self.batches), reversed(self._first), strict=True):
            if slot >= first:
                return batch, slot - first
        raise KeyError(slot)

    @property
    def free_slots(self) -> int:
        return sum(b.free_slots for b in self.batches)

    @property
    def waiting(self) -> int:
        return sum(b.waiting for b in self.batches)

    @property
    def running(self) -> int:
        return sum(b.running for b in self.batches)

    @property
    def is_whole(self) -> bool:
        return all(b.is_whole for b in self.batches)

    @property
    def is_held(self) -> bool:
        running = [b for b in self.batches if b.running]
        return bool(running) and all(b.is_held for b in running)

    def room(self, slot: int) -> int:
        """Tokens that a sequence in this slot may have."""
        return self._row_of(slot)[0].capacity

    def admit(self, token_ids: Sequence[int], *, slot: int | None = None, **options: Any) -> int:
        """As ``Batch.admit``; without a slot the shortest row that holds prompt and ``max_tokens``."""
        if slot is None:
            slot = self._fitting(len(token_ids) + (options.get("max_tokens") or 1))
        batch, number = self._row_of(slot)
        return slot - number + batch.admit(token_ids, slot=number, **options)

    def _fitting(self, tokens: int) -> int:
        able = [pair for pair in zip(self.batches, self._first, strict=True) if pair[0].free_slots]
        if not able:
            raise BatchFullError(self.slots)
        batch, first = next((pair for pair in able if pair[0].capacity >= tokens), able[-1])
        return first + (batch.lowest_free or 0)

    def allow(self, slot: int, mask: bytes) -> None:
        """As ``Batch.allow``."""
        batch, number = self._row_of(slot)
        batch.allow(number, mask)

    def free(self, slot: int) -> None:
        """As ``Batch.free``."""
        batch, number = self._row_of(slot)
        batch.free(number)

    def step(self, tokens: int = 1, *, prompt_tokens: int = 0, ahead: int = 0) -> list[Progress]:
        """As ``Batch.step`` of every batch; one of them reads prompts, they take turns."""
        reader = self._next_reader()
        found: list[Progress] = []
        for number, batch in enumerate(self.batches):
            if batch.running:
                maximum = prompt_tokens if number == reader else 0
                found += self._numbered(number, batch.step(tokens, prompt_tokens=maximum, ahead=ahead))
        self.read_tokens = 0 if reader is None else self.batches[reader].read_tokens
        return found

    def _next_reader(self) -> int | None:
        order = [(self._reader + i) % len(self.batches) for i in range(len(self.batches))]
        reader = next((n for n in order if self.batches[n].waiting), None)
        if reader is not None:
            self._reader = (reader + 1) % len(self.batches)
        return reader

    def _numbered(self, batch: int, progress: Sequence[Progress]) -> Iterator[Progress]:
        return (replace(p, slot=p.slot + self._first[batch]) for p in progress)

    def make_programs(self) -> None:
        """As ``Batch.make_programs``."""
        for batch in self.batches:
            batch.make_programs()

    def load_programs(self) -> None:
        """As ``Batch.load_programs``."""
        for batch in self.batches:
            batch.load_programs()

    def use_ready_programs(self) -> None:
        """As ``Batch.use_ready_programs``."""
        for batch in self.batches:
            batch.use_ready_programs()

    # -- rows

    def row_length(self, slot: int) -> int:
        """As ``Batch.row_length``."""
        batch, number = self._row_of(slot)
        return batch.row_length(number)

    def row_nbytes(self, length: int) -> int:
        """As ``Batch.row_nbytes``, of the longest rows."""
        return self.batches[-1].row_nbytes(length)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """As ``Batch.copy_row``, also from one batch to another: on the device."""
        (one, a), (other, b) = self._row_of(source), self._row_of(target)
        if one is other:
            one.copy_row(a, b, length)
        else:
            other.load_row(b, one.cut_row(a, length, other.positions))

    def save_row(self, slot: int, length: int) -> Any:
        """As ``Batch.save_row``."""
        batch, number = self._row_of(slot)
        return batch.save_row(number, length)

    def load_row(self, slot: int, saved: Any) -> None:
        """As ``Batch.load_row``; the row must hold what was saved."""
        batch, number = self._row_of(slot)
        batch.load_row(number, saved)
