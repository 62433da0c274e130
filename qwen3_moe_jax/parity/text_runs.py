"""What is kept of a run over a text: its logits' distance from the reference's, and what is wrong with it."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.runner import Forward
from qwen3_moe_jax.machine.threads import ALONE, Workers
from qwen3_moe_jax.parity import metrics

FLOAT64_BYTES = 2 << 20
"""Of rows that are compared at a time: float64 copies stay in a processor's caches."""


@dataclass(frozen=True)
class LogitDistance:
    """Logits of one backend against the reference's, over a text.

    Attributes:
      cosine: [T], over the vocabulary.
      nmse: [T].
      kl: [T], nats.
      agrees: bool [T], whether the best token is the same.
      largest: largest difference of any logit.
    """

    cosine: np.ndarray
    nmse: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray
    largest: float

    @classmethod
    def of(cls, expected: np.ndarray, actual: np.ndarray, workers: Workers = ALONE) -> "LogitDistance":
        """That of two texts' logits [T, V], as far as both go; ``workers`` share the rows."""
        count = min(len(expected), len(actual))
        stride = max(1, FLOAT64_BYTES // (8 * expected.shape[-1]))

        def part(start: int) -> LogitDistance:
            rows = slice(start, min(start + stride, count))
            return cls._of_rows(expected[rows], actual[rows])

        return cls.joined(list(workers.map(part, range(0, count, stride))))

    @classmethod
    def _of_rows(cls, expected: np.ndarray, actual: np.ndarray) -> "LogitDistance":
        with np.errstate(invalid="ignore", over="ignore"):
            return cls(
                metrics.cosine(expected, actual),
                metrics.nmse(actual, expected),
                metrics.kl_divergence(expected, actual),
                metrics.top1_agrees(expected, actual),
                float(np.abs(actual - expected).max()),
            )

    @classmethod
    def joined(cls, parts: Sequence["LogitDistance"]) -> "LogitDistance":
        """The distance over a text from those over its windows."""
        return cls(
            np.concatenate([part.cosine for part in parts]),
            np.concatenate([part.nmse for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.agrees for part in parts]),
            float(np.max([part.largest for part in parts])),
        )

    @property
    def top1(self) -> float:
        """Share of positions whose best token is the same."""
        return float(self.agrees.mean())

    def figures(self) -> dict[str, float]:
        """What a receipt keeps."""
        return {
            "cosine_min": float(self.cosine.min()),
            "cosine_mean": float(self.cosine.mean()),
            "nmse_max": float(self.nmse.max()),
            "nmse_mean": float(self.nmse.mean()),
            "kl_mean": float(self.kl.mean()),
            "kl_max": float(self.kl.max()),
            "top1_agreement": self.top1,
            "largest_difference": self.largest,
        }


@dataclass(frozen=True)
class TextRun:
    """What is kept of a backend's run over the text; not its logits, gigabytes for a large vocabulary.

    Attributes:
      distance: of its logits from the reference's.
      expert_ids: int32 [L, T, X].
      router_logits: float32 [L, T, E], or None where they were not asked for.
      checksums: int [T], a CRC-32 of the bits of each position's logits.
      broken: what is wrong with shapes, dtypes, finiteness and expert ids, one line each.
    """

    distance: LogitDistance
    expert_ids: np.ndarray
    router_logits: np.ndarray | None
    checksums: np.ndarray
    broken: tuple[str, ...]


def broken_invariants(config: Qwen3MoeConfig, forward: Forward, length: int) -> list[str]:
    """What is wrong with a run of ``length`` tokens whatever its weights; one line each."""
    shape = (length, config.vocab_size)
    if forward.logits.shape != shape or forward.logits.dtype != np.float32:
        return [f"logits are {forward.logits.dtype} {forward.logits.shape}, not float32 {shape}"]
    broken = []
    if not np.isfinite(forward.logits).all():
        rows = np.flatnonzero(~np.isfinite(forward.logits).all(axis=-1))
        broken.append(f"logits are not finite from position {rows[0]} on")
    ids = forward.expert_ids
    expected = (config.num_hidden_layers, length, config.num_experts_per_tok)
    if ids.shape != expected:
        return [*broken, f"expert ids are {ids.shape}, not {expected}"]
    ordered = np.sort(ids, axis=-1)
    if ids.min() < 0 or ids.max() >= config.num_experts or (np.diff(ordered, axis=-1) == 0).any():
        broken.append("a token's experts are out of range or not distinct")
    return broken


def differing_bits(actual: np.ndarray, expected: np.ndarray) -> int:
    """How many values differ in any bit; all of them where the shapes do."""
    if actual.shape != expected.shape:
        return expected.size
    return int(np.count_nonzero(actual.view(np.uint32) != expected.view(np.uint32)))


def checksums(rows: np.ndarray) -> np.ndarray:
    """A CRC-32 of the bits of each row."""
    return np.array([zlib.crc32(np.ascontiguousarray(row).data) for row in rows], np.int64)
