"""The operations of the reference model in NumPy, each as its equation is written.

Weights are packed and are dequantized where they are used: a matrix in slices of rows, an expert when a token
chose it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from qwen3_moe_jax.convert.config import MIN_WEIGHT_SUM
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.machine.threads import ALONE, Workers

ROWS_AT_A_TIME = 8192
"""Rows of a matrix that are dequantized at a time, by all workers together."""

TOKENS_AT_A_TIME = 64
"""Tokens whose experts' outputs are summed at a time, by one worker."""


class Rows(Protocol):
    """A packed matrix [N, K], or those of experts [E, N, K], whose parts may have to be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice, /) -> PackedTensor: ...


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates pairs (j, j + H/2) of x [T, heads, H] by the angles of cos, sin [T, H/2] (NEOX order)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)``; an exponential that overflows makes it the zero that it nearly is."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def matmul(
    x: np.ndarray, weight: Rows, workers: Workers = ALONE, out: np.ndarray | None = None
) -> np.ndarray:
    """x [T, K] times the transpose of weight [N, K]: [T, N]; in ``out``, if one is given."""
    return matmuls(x, [weight], workers, out)[0]


def matmuls(
    x: np.ndarray, weights: Sequence[Rows], workers: Workers = ALONE, out: np.ndarray | None = None
) -> list[np.ndarray]:
    """As ``matmul`` of each."""
    found = [workers.empty((len(x), w.shape[0]), x.dtype) if out is None else out for w in weights]
    stride = ROWS_AT_A_TIME // workers.count

    def fill(item: tuple[int, int]) -> None:
        which, start = item
        rows = slice(start, start + stride)
        found[which][:, rows] = x @ dequantize(weights[which][rows], x.dtype).T

    workers.each(fill, [(i, start) for i, w in enumerate(weights) for start in range(0, w.shape[0], stride)])
    return found


def by_rows(function: Callable[..., np.ndarray], *arrays: np.ndarray, workers: Workers = ALONE) -> np.ndarray:
    """``function`` of arrays whose first axis is the same, where each row of the result needs that row alone.

    The result has the shape and the dtype of the first of them.
    """
    out = workers.empty(arrays[0].shape, arrays[0].dtype)

    def fill(rows: slice) -> None:
        out[rows] = function(*(array[rows] for array in arrays))

    workers.each(fill, workers.parts(len(out)))
    return out


def expert_matmul(x: np.ndarray, weight: PackedTensor, expert_ids: np.ndarray) -> np.ndarray:
    """x [T, X, K] times, for every (token, choice), the expert weight[expert_ids] [N, K]: [T, X, N]."""
    out = np.empty((*expert_ids.shape, weight.shape[1]), x.dtype)
    for expert in np.unique(expert_ids):
        chosen = expert_ids == expert
        out[chosen] = x[chosen] @ dequantize(weight[int(expert)], x.dtype).T
    return out


class ChosenExperts:
    """What the chosen experts make of the tokens of one text.

    Attributes:
      h: their input [T, D].
      ids: int32 [T, X].
      gate, up, act: [T, X, F].
      down: [T, X, D].
    """

    def __init__(self, h: np.ndarray, ids: np.ndarray, width: int, workers: Workers = ALONE):
        self.h, self.ids = h, ids
        self.gate, self.up, self.act = (workers.empty((*ids.shape, width), h.dtype) for _ in range(3))
        self.down = workers.empty((*ids.shape, h.shape[-1]), h.dtype)

    def fill(self, expert: int, gate_proj: np.ndarray, up_proj: np.ndarray, down_proj: np.ndarray) -> None:
        """One expert's part, from its dequantized matrices [F, D], [F, D] and [D, F]."""
        place = np.nonzero(self.ids == expert)
        if not len(place[0]):
            return
        x = self.h[place[0]]
        gate, up = x @ gate_proj.T, x @ up_proj.T
        act = silu(gate) * up
        self.gate[place], self.up[place], self.act[place] = gate, up, act
        self.down[place] = act @ down_proj.T

    def weighted_sum(self, weights: np.ndarray, workers: Workers = ALONE) -> np.ndarray:
        """``down`` times weights [T, X], summed over the choices: [T, D]."""
        out = workers.empty(self.h.shape, self.h.dtype)

        def add(start: int) -> None:
            rows = slice(start, start + TOKENS_AT_A_TIME)
            out[rows] = 0
            for choice in range(weights.shape[1]):  # the order of the sum is part of the definition
                out[rows] += self.down[rows, choice] * weights[rows, choice, None]

        workers.each(add, range(0, len(out), TOKENS_AT_A_TIME))
        return out


def fill_experts(
    texts: Sequence[ChosenExperts], projections: Sequence[Rows], workers: Workers = ALONE
) -> None:
    """Fills all ``texts``; the matrices [E, N, K] of an expert are dequantized once for all of them."""

    def fill(expert: int) -> None:
        matrices = [dequantize(weight[int(expert)], texts[0].h.dtype) for weight in projections]
        for text in texts:
            text.fill(expert, *matrices)

    chosen, counts = np.unique(np.concatenate([text.ids for text in texts]), return_counts=True)
    workers.each(fill, chosen[np.argsort(-counts, kind="stable")])  # the shares of a team are alike then


def choose_experts(
    logits: np.ndarray, num_experts_per_tok: int, forced_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Softmax over all experts, the most probable ones, and their renormalized weights.

    Args:
      logits: [T, E].
      num_experts_per_tok: X.
      forced_ids: int32 [T, X], experts to take in place of the most probable.

    Returns:
      probs [T, E], expert_ids int32 [T, X] (lowest id first among equals), weights [T, X].
    """
    probs = softmax(logits)
    expert_ids = forced_ids
    if expert_ids is None:
        expert_ids = np.argsort(-probs, axis=-1, kind="stable")[:, :num_experts_per_tok].astype(np.int32)
    chosen = np.take_along_axis(probs, expert_ids, axis=-1)
    return probs, expert_ids, chosen / np.maximum(chosen.sum(-1, keepdims=True), MIN_WEIGHT_SUM)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, workers: Workers = ALONE
) -> np.ndarray:
    """Causal grouped-query attention.

    Args:
      q: [T, N, H] queries at ``positions`` [T].
      k: [S, K, H] keys of positions 0..S-1.
      v: [S, K, H] values.
      workers: share the heads.

    Returns:
      [T, N, H]; query head n uses KV head ``n // (N / K)``.
    """
    groups = q.shape[1] // k.shape[1]
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    future = np.arange(k.shape[0])[None, :] > positions[:, None]
    out = workers.empty(q.shape, q.dtype)

    def fill(head: int) -> None:
        scores = (q[:, head] @ k[:, head // groups].T) * scale
        out[:, head] = softmax(np.where(future, -np.inf, scores)) @ v[:, head // groups]

    workers.each(fill, range(q.shape[1]))
    return out
