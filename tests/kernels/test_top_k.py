"""top_k: what a GPU runs equals ``jax.lax.top_k``, places and all."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen3_moe_jax.kernels_pallas.top_k import api, xla
from tests.kernels.op_inputs import rng

__all__ = ["rng"]


def rows(rng, columns: int) -> dict[str, np.ndarray]:
    one_block = rng.normal(size=columns)
    one_block[130:250] += 50
    return {
        "normal": rng.normal(size=columns),
        "ties": np.round(rng.normal(size=columns)),
        "equal": np.full(columns, -2.5),
        "ascending": np.arange(columns),
        "all in one block": one_block,
        "infinite": np.where(rng.uniform(size=columns) < 0.999, -np.inf, rng.normal(size=columns)),
        "zeros of both signs": np.where(rng.uniform(size=columns) < 0.5, 0.0, -0.0),
    }


@pytest.mark.parametrize(("columns", "k"), [(4096, 16), (151936 // 8 + 3, 64)])
def test_equals_laxs(rng, columns, k):
    x = jnp.asarray(np.stack(list(rows(rng, columns).values())), jnp.float32)
    values, ids = xla.by_blocks(x, k)
    expected = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(np.asarray(values).view(np.int32), np.asarray(expected[0]).view(np.int32))
    np.testing.assert_array_equal(ids, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 9])
def test_equals_laxs_on_a_gpu(rng, count):
    x = jnp.asarray(np.stack(list(rows(rng, 151936).values()) * count), jnp.float32)
    values, ids = api.top_k(x, 64)
    expected = jax.lax.top_k(x, 64)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(ids, expected[1])


def test_on_a_cpu_no_row_is_sorted_whole(rng):
    """Even where the largest value alone has a use of its own, as in a softmax; and nothing differs."""

    def shifted(top_k, x):
        values, ids = top_k(x, 64)
        return values - values[:, :1], ids

    x = jnp.asarray(np.stack(list(rows(rng, 4096).values())), jnp.float32)
    for few in (x[:1], x, jnp.tile(x, (3, 1))):
        ours, laxs = (
            jax.jit(partial(shifted, top_k)).lower(few).compile() for top_k in (api.top_k, lax.top_k)
        )
        assert " sort(" in laxs.as_text()  # else XLA has become wiser, and nothing is needed here
        assert " sort(" not in ours.as_text()
        for found, expected in zip(ours(few), laxs(few), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_it_does_not_take_is_sorted(rng):
    x = jnp.asarray(rng.normal(size=(20, 300)), jnp.float32)
    for k in (1, 3, 48, 300):
        np.testing.assert_array_equal(api.top_k(x, k)[1], jax.lax.top_k(x, k)[1])
    with pytest.raises(ValueError, match="k=301"):
        api.top_k(x, 301)


def test_on_a_gpu_many_rows_are_not_sorted_whole():
    def sorted_lengths(rows: int) -> list[int]:
        x = jax.ShapeDtypeStruct((rows, 151936), jnp.float32)
        text = jax.jit(lambda x: api.top_k(x, 64)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
        found = re.findall(r"top_k.*tensor<(?:\d+)x(\d+)x\w+>[,)]? *->", text)
        return [int(length) for length in found]

    assert sorted_lengths(16) == [151936]
    assert sorted_lengths(32) == [2374, 4096]
