"""What a loaded model takes of a device's memory, worked out before anything is read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.config import Qwen3MoeConfig
from convert.model_source import ModelSource
from convert.packed import packed_nbytes
from qwen3_moe_jax.errors import MemoryPlanError

if TYPE_CHECKING:
    import jax

WORKING_BYTES = 400 << 20
"""Compiled programs, one chunk of activations, one dequantized tile: measured below this on every model."""


def cache_nbytes(config: Qwen3MoeConfig, length: int, itemsize: int, batch: int = 1) -> int:
    """Bytes of the KV cache of ``batch`` sequences of ``length`` positions."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    return batch * length * per_token


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
    """

    weights: int
    cache: int
    context: int
    working: int = WORKING_BYTES

    @classmethod
    def of(cls, source: ModelSource, context: int, itemsize: int) -> "MemoryPlan":
        """The plan of a model with a cache of ``context`` positions of ``itemsize`` bytes a value."""
        return cls(weights_nbytes(source), cache_nbytes(source.config, context, itemsize), context)

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working

    def __str__(self) -> str:
        return (
            f"weights {self.weights / 1e9:.2f} GB + KV cache of {self.context} tokens "
            f"{self.cache / 1e9:.2f} GB + working memory {self.working / 1e9:.2f} GB"
        )

    def fitting_context(self, available: int) -> int:
        """Tokens of KV cache that ``available`` bytes leave room for; 0 where not even the weights fit."""
        left = available - self.weights - self.working
        return max(0, left * self.context // self.cache)

    def check(self, available: int | None, where: str) -> None:
        """Raises MemoryPlanError unless the plan fits ``available`` bytes; None is unknown, and passes."""
        if available is None or self.total <= available:
            return
        fits = self.fitting_context(available)
        advice = f"--context {fits} would fit" if fits >= 16 else "use a machine with more memory"
        raise MemoryPlanError(f"{self} do not fit {where}, {available / 1e9:.2f} GB free: {advice}")


def available_memory(device: "jax.Device") -> tuple[int | None, str]:
    """Bytes that are free where a JAX device keeps its arrays (None: unknown), and that place's name."""
    if device.platform == "cpu":
        return available_main_memory(), "main memory"
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit and limit - stats.get("bytes_in_use", 0), device.device_kind


def available_main_memory() -> int | None:
    """Bytes that a program can still take without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return total_main_memory()


def total_main_memory() -> int | None:
    """Bytes of main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
