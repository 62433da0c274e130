"""What ops must give: NumPy in float64 on unpacked weights; and checks of errors and of canary rows."""

import itertools
from functools import partial

import jax
import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from tests.kernels.op_inputs import dense64

CANARY = np.float32(-1.2345678e30)
CANARY_ROWS = 8


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    """Squared error over the square of what is expected; infinite where finiteness differs."""
    actual = np.asarray(actual, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(((actual - expected) ** 2).sum() / max((expected**2).sum(), 1e-300))


@partial(jax.jit, static_argnames=("op", "dtype"), donate_argnames="buffer")
def write_between(op, dtype, buffer: jax.Array, *arrays) -> jax.Array:
    """Rows of ``buffer`` become the op's result; XLA lets the op write there itself where it can."""
    rows = op(*arrays, dtype)
    return jax.lax.dynamic_update_slice(buffer, rows, (CANARY_ROWS,) + (0,) * (rows.ndim - 1))


def check_canaries(buffer: np.ndarray) -> np.ndarray:
    """The rows between the canaries, which are as they were."""
    around = np.concatenate([buffer[:CANARY_ROWS], buffer[-CANARY_ROWS:]])
    assert (around == CANARY).all(), "rows beside the output were written"
    return buffer[CANARY_ROWS:-CANARY_ROWS]


def check(actual: jax.Array, expected: np.ndarray, bound: float, what: object) -> None:
    error = nmse(np.asarray(actual), expected)
    assert error <= bound, f"NMSE {error:.3g} > {bound:g} for {what}"


def silu64(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expert_oracle(x: np.ndarray, w: PackedTensor | np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float64 [T, X, N] of x [T, K] or [T, X, K] and packed or dense w [E, N, K]."""
    rows = np.broadcast_to(x[:, None] if x.ndim == 2 else x, (*ids.shape, x.shape[-1])).astype(np.float64)
    out = np.empty((*ids.shape, w.shape[1]))
    for e in np.unique(ids):
        out[ids == e] = rows[ids == e] @ (dense64(w[e]) if isinstance(w, PackedTensor) else w[e]).T
    return out


def moe_oracle(x, gate: PackedTensor, up: PackedTensor, down: PackedTensor, ids, weights) -> np.ndarray:
    swiglu = silu64(expert_oracle(x, gate, ids)) * expert_oracle(x, up, ids)
    return (expert_oracle(swiglu, down, ids) * weights[..., None].astype(np.float64)).sum(axis=1)


def attention_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64, one query and head at a time."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    B, T, N, H = q.shape
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        seen = positions[b, t] + 1
        kv_head = n // (N // k.shape[2])
        if seen > 0:
            scores = k[b, :seen, kv_head] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, :seen, kv_head] / weights.sum()
    return out
