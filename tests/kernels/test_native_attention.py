"""Attention of the CPU's own kernels against NumPy in float64, in every form that this processor has."""

import ctypes

import numpy as np
import pytest

from qwen3_moe_jax.kernels_pallas.native import compiler
from tests import tolerances
from tests.conftest import NATIVE_FOLDER as FOLDER
from tests.kernels.op_inputs import rng
from tests.kernels.test_native import HERE, names

__all__ = ["rng"]

LENGTH = 2200
"""Positions of the cache: three sections of 1,024 keys."""

RUN = tuple((1, position) for position in range(1010, 1040))
"""Rows one after the other, in two runs, across the end of a section."""

ROWS = (
    (0, 0),
    (0, 2199),
    *RUN,
    (2, 1023),
    (2, 1024),
    (0, 127),
    (0, 5000),  # padding's, which may be past the end
)


@pytest.fixture(params=HERE, ids=names)
def attend(request, native):
    """``(rows, q, k, v) -> out``; rows are pairs of slot and position."""
    library = ctypes.CDLL(str(compiler.build(request.param, FOLDER)))
    library.pool_start(3)

    def call(rows, q, k, v):
        sizes = np.array([len(rows), q.shape[1], k.shape[2], k.shape[3], k.shape[1]], np.int32)
        slot, position = (np.ascontiguousarray(x, np.int32) for x in zip(*rows, strict=True))
        out = np.empty_like(q)
        arrays = (sizes, q, k, v, slot, position, out)
        library.qwen3_moe_attention(*(ctypes.c_void_p(a.ctypes.data) for a in arrays))
        return out

    return call


def inputs(rng, group: int, kv_heads: int, head: int) -> tuple[np.ndarray, ...]:
    """q, k, v; scores as large as a model's, so that some keys weigh much more than others."""
    q = 2 * rng.standard_normal((len(ROWS), kv_heads * group, head)).astype(np.float32)
    k, v = rng.standard_normal((2, 3, LENGTH, kv_heads, head)).astype(np.float32)
    return q, k, v


def expected(row: tuple[int, int], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    slot, last = row[0], min(row[1], LENGTH - 1)
    group = q.shape[0] // k.shape[2]
    k, v = (np.repeat(x[slot, : last + 1].astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hn,nhd->hd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("group", "kv_heads", "head"), [(4, 2, 64), (7, 1, 128), (1, 2, 128)])
def test_rows_are_right_and_have_the_same_bits_in_any_company(attend, rng, group, kv_heads, head):
    """Whether sections of keys are dealt out, or come one after the other."""
    q, k, v = inputs(rng, group, kv_heads, head)
    together = attend(ROWS, q, k, v)
    for i, row in enumerate(ROWS):
        error = np.abs(together[i] - expected(row, q[i], k, v)).max()
        assert error <= tolerances.NATIVE_ATTENTION * np.abs(v).max(), (row, error)
    for i, row in enumerate(ROWS):
        alone = attend([row], q[i : i + 1].copy(), k, v)
        np.testing.assert_array_equal(alone[0], together[i], str(row))
    some = [1, *range(20, 29), 33, 34]  # few rows that do not follow each other, and one run
    np.testing.assert_array_equal(attend([ROWS[i] for i in some], q[some], k, v), together[some])
    apart = list(range(0, len(ROWS), 3))  # none follows another
    np.testing.assert_array_equal(attend([ROWS[i] for i in apart], q[apart], k, v), together[apart])


def test_what_is_not_finite_stays_with_its_head(attend, rng):
    q, k, v = inputs(rng, 4, 2, 64)
    v[0, 1500, 1, 3] = np.nan
    out = attend(ROWS[:2], q[:2].copy(), k, v)
    bad = np.argwhere(~np.isfinite(out))
    assert {(int(row), int(column)) for row, _, column in bad} == {(1, 3)}
    assert {int(head) for _, head, _ in bad} == {4, 5, 6, 7}
