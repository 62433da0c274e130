"""top_k: the kernels in Pallas' interpreter equal ``jax.lax.top_k``, places and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.kernels_pallas.top_k import api
from tests.kernels.op_cases import needs_hopper_gpu, rng

__all__ = ["rng"]

kernel_triton = pytest.importorskip("qwen3_moe_jax.kernels_pallas.top_k.kernel_triton")


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
    x = np.stack(list(rows(rng, columns).values()) * 3)
    x = jnp.asarray(x, jnp.float32) + 0.0
    values, ids = kernel_triton.top_k(x, k, interpret=True)
    expected = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(ids, expected[1])


@needs_hopper_gpu
def test_equals_laxs_on_a_gpu(rng):
    x = jnp.asarray(np.stack(list(rows(rng, 151936).values()) * 9), jnp.float32) + 0.0
    values, ids = api.top_k(x, 64, implementation="pallas")
    expected = jax.lax.top_k(x, 64)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(ids, expected[1])


def test_what_it_does_not_take_is_xlas(rng):
    x = jnp.asarray(rng.normal(size=(2, 300)), jnp.float32)
    for k in (3, 300):
        np.testing.assert_array_equal(api.top_k(x, k)[1], jax.lax.top_k(x, k)[1])
    with pytest.raises(NotImplementedError, match="not 2"):
        kernel_triton.top_k(x, 2)
    for k in (48, 64):
        with pytest.raises(NotImplementedError, match="300 values"):
            kernel_triton.top_k(jnp.zeros((20, 300)), k)
    with pytest.raises(NotImplementedError, match="Hopper"):
        api.top_k(x, 2, implementation="pallas")
    with pytest.raises(ValueError, match="k=301"):
        api.top_k(x, 301)
