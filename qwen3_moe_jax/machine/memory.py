"""What a loaded model takes of a device's memory, worked out before anything is read.

Where main memory does not hold it, a CPU's weights stay in a file that is mapped (``kept_weights``): a limit
on memory counts the file's pages as well, but the system drops them before it refuses memory to a program.
Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.stat, file and inactive_file).
"""

import os
from dataclasses import dataclass, replace

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.machine.headroom import MAIN_MEMORY, Headroom

WORKING_BYTES = 400 << 20
"""Compiled programs, one chunk of activations, one dequantized tile: measured below this on every model."""

MIN_POSITIONS = 1024
"""A shorter slot is not advised: it has little room beside the longest prefill chunk."""

MIN_CONTEXT = 16
"""A shorter context is not advised."""

MIN_SHARE = 1 / 8
"""Of weights in a file, what has to fit the memory. A token of a 30B model reads a ninth of them: with less,
each one is read from the disk again and again."""


def cache_nbytes(config: Qwen3MoeConfig, length: int, itemsize: int, batch: int = 1) -> int:
    """Bytes of the KV cache of ``batch`` sequences of ``length`` positions.

    ``itemsize`` is of a value; 1 is int8, where each head's vector has a float32 scale beside it.
    """
    vector = config.head_dim * itemsize + (4 if itemsize == 1 else 0)
    return batch * length * 2 * config.num_hidden_layers * config.num_key_value_heads * vector


def check_slots(config: Qwen3MoeConfig, slots: int, length: int, itemsize: int, free: Headroom) -> None:
    """Raises MemoryPlanError unless the KV cache of ``slots`` sequences of ``length`` positions fits.

    Args:
      itemsize: as for ``cache_nbytes``.
      free: with the weights loaded; an unknown size passes.
    """
    one, needed = (cache_nbytes(config, length, itemsize, n) for n in (1, slots))
    if free.nbytes is None or needed + WORKING_BYTES <= free.nbytes:
        return
    left = max(0, free.nbytes - WORKING_BYTES)
    positions = left // cache_nbytes(config, slots, itemsize)
    advice = [f"{left // one} slots"] if left >= one else []
    advice += [f"{positions} positions each"] if positions >= MIN_POSITIONS else []
    raise MemoryPlanError(
        f"a KV cache of {slots} slots x {length} positions takes {needed / 1e9:.2f} GB beside "
        f"{WORKING_BYTES / 1e9:.2f} GB of working memory and does not fit {free}: "
        + (f"{' or '.join(advice)} would fit" if advice else "not even one of them fits")
    )


def fitting_slots(
    config: Qwen3MoeConfig, maximum: int, length: int, itemsize: int, available: int | None
) -> int:
    """How many slots of ``length`` positions fit what is free: at most ``maximum``, at least 1."""
    if available is None:
        return maximum
    return max(1, min(maximum, (available - WORKING_BYTES) // cache_nbytes(config, length, itemsize)))


def weights_nbytes(source: ModelSource) -> int:
    """Bytes of the model's packed arrays."""
    return sum(packed_nbytes(source.types[path], spec.shape) for path, spec in source.specs.items())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model is going to take.

    Attributes:
      weights: the packed arrays.
      cache: the KV cache.
      context: tokens that the cache holds.
      working: everything else.
      room: of weights that stay in a file which is mapped: memory that is left for them; None where memory
        holds them.
    """

    weights: int
    cache: int
    context: int
    working: int = WORKING_BYTES
    room: int | None = None

    @classmethod
    def of(cls, source: ModelSource, context: int, itemsize: int) -> "MemoryPlan":
        """The plan of a model with a cache of ``context`` positions of ``itemsize`` bytes per value."""
        return cls(weights_nbytes(source), cache_nbytes(source.config, context, itemsize), context)

    @property
    def is_mapped(self) -> bool:
        """Whether the weights stay in a file."""
        return self.room is not None

    @property
    def total(self) -> int:
        """Bytes in memory and in a file."""
        return self.weights + self.cache + self.working

    @property
    def needed(self) -> int:
        """Bytes that have to be free in memory."""
        return self._held() + self.cache + self.working

    def _held(self) -> int:
        return int(self.weights * MIN_SHARE) if self.is_mapped else self.weights

    def __str__(self) -> str:
        place = "" if self.room is None else f" in a file ({self.share:.0%} of them fit memory)"
        return (
            f"weights {self.weights / 1e9:.2f} GB{place} + KV cache of {self.context} tokens "
            f"{self.cache / 1e9:.2f} GB + working memory {self.working / 1e9:.2f} GB"
        )

    @property
    def share(self) -> float:
        """Of the weights, what memory has room for."""
        return 1.0 if self.room is None else min(1.0, self.room / max(1, self.weights))

    def settled(self, free: Headroom) -> "MemoryPlan":
        """What a CPU does: this plan, or where it does not fit and a file can be mapped, that."""
        beside = self.cache + self.working
        has_addresses = free.addresses is None or self.weights + beside <= free.addresses
        is_cpu = free.where == MAIN_MEMORY and os.name == "posix"
        if free.nbytes is None or self.needed <= free.nbytes or not (is_cpu and has_addresses):
            return self
        mapped = replace(self, room=max(0, free.nbytes - beside))
        would_fit = self.fitting_context(free.nbytes), mapped.fitting_context(free.nbytes)
        helps = mapped.needed <= free.nbytes or would_fit[0] < MIN_CONTEXT <= would_fit[1]
        return mapped if helps else self

    def beside(self, available: int | None) -> int | None:
        """Of bytes that are free with the model loaded: those that push no weights out of memory."""
        if available is None or not self.is_mapped:
            return available
        return max(self.cache + self.working, available - self.weights)

    def fitting_context(self, available: int) -> int:
        """Tokens of KV cache that ``available`` bytes leave room for; 0 where not even the weights fit."""
        left = available - self._held() - self.working
        return max(0, left * self.context // max(1, self.cache))

    def check(self, free: Headroom, advice: str = "") -> None:
        """Raises MemoryPlanError unless the plan fits what is free; an unknown size passes.

        Args:
          free: of the memory that is to hold the model.
          advice: what to do where no context would fit.
        """
        if free.nbytes is None or self.needed <= free.nbytes:
            return
        is_limited = free.where == MAIN_MEMORY and free.origin
        advice = advice or f"use a machine with more memory{', or raise that limit' if is_limited else ''}"
        fits = self.fitting_context(free.nbytes)
        if fits >= MIN_CONTEXT:
            advice = f"max_context={fits} would fit"
        raise MemoryPlanError(f"{self} do not fit {free}: {advice}")
