"""The KV cache: where tokens are written, what int8 loses, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.jax_backend import kv_cache
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span, write_positions
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.machine.memory import cache_nbytes, fitting_slots
from qwen3_moe_jax.parity.judge import StageJudge
from tests import tolerances

SEED = 20261123


def new_keys(batch, length, config, scale=1.0):
    rng = np.random.default_rng(SEED)
    shape = (2, batch, length, config.num_key_value_heads, config.head_dim)
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("batch", [3, kv_cache.MAX_SLICES + 1], ids=["slices", "scatter"])
@pytest.mark.parametrize("in_order", [True, False])
def test_tokens_go_to_their_places_and_nowhere_else(source, dtype, batch, in_order):
    config, rng = source.config, np.random.default_rng(SEED)
    cache = KVCache.create(config, batch + 2, 40, jnp.dtype(dtype))
    k, v = new_keys(batch, 5, config)
    start = jnp.asarray(rng.integers(0, 35, batch), jnp.int32)
    slots = None if in_order else jnp.asarray(rng.permutation(batch + 2)[:batch], jnp.int32)
    written = jax.jit(write_positions)(cache, k, v, Span(start, 5, slots), jnp.int32(2))
    expected = [np.zeros(cache.k.shape, np.float32) for _ in "kv"]
    for b in range(batch):
        row = b if in_order else int(slots[b])
        for stack, new in zip(expected, (k, v), strict=True):
            stack[2, row, int(start[b]) : int(start[b]) + 5] = new[b]
    for name, stack in zip("kv", expected, strict=True):
        values = np.asarray(getattr(written, name), np.float32)
        if dtype == "int8":
            values *= np.asarray(getattr(written, f"{name}_scale"))[..., None]
        bound = 0 if dtype == "float32" else np.abs(stack).max(-1, keepdims=True) / 254 * (1 + 1e-5)
        assert (np.abs(values - stack) <= bound).all()


def test_int8_keeps_zeros_and_shows_what_is_not_finite(source):
    k, _ = new_keys(4, 1, source.config, scale=1e-30)
    k = k.at[0].set(0).at[1, ..., 3].set(jnp.nan).at[2, ..., 3].set(jnp.inf)
    cache = KVCache.create(source.config, 4, 64, jnp.int8)
    cache = write_positions(cache, k, k, Span(jnp.zeros(4, jnp.int32), 1), jnp.int32(0))
    values = np.asarray(cache.k[0, :, 0] * cache.k_scale[0, :, 0, :, None])
    assert not values[0].any()
    assert not np.isfinite(values[1]).all()
    assert not np.isfinite(values[2]).all()
    np.testing.assert_allclose(values[3], k[3, 0], atol=float(jnp.abs(k[3]).max()) / 253, rtol=0)


def test_an_int8_cache_is_near_the_float_one(source, jax_runner, golden):
    ids = np.resize(np.concatenate([golden[f"ids{i}"] for i in range(3)]), 250)
    exact = jax_runner.forward(ids)
    runner = JaxRunner(source, max_context=256, cache_dtype="int8")
    assert runner.describe()["cache_dtype"] == "int8"
    rounded = runner.forward(ids, expert_ids=exact.expert_ids)
    a, b = (f.logits.astype(np.float64) for f in (exact, rounded))
    away = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert 1e-7 < away.mean() < tolerances.INT8_CACHE_MEAN
    assert away.max() < tolerances.INT8_CACHE_WORST


def test_what_a_cache_takes():
    config = PRESETS["Qwen3-30B-A3B"]
    a_token = {4: 192 << 10, 2: 96 << 10, 1: 48 * 2 * 4 * (128 + 4)}
    for itemsize, nbytes in a_token.items():
        assert cache_nbytes(config, 4096, itemsize, batch=3) == 3 * 4096 * nbytes
    for dtype in (jnp.float32, jnp.float16, jnp.int8):
        cache = jax.eval_shape(lambda dtype=dtype: KVCache.create(config, 3, 4096, dtype))
        nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert nbytes == cache_nbytes(config, 4096, jnp.dtype(dtype).itemsize, batch=3)
    assert fitting_slots(config, 16, 4096, 2, 5 << 30) == 12
    assert fitting_slots(config, 16, 4096, 2, 0) == 1
    assert fitting_slots(config, 16, 4096, 2, None) == 16


def test_the_cache_is_chosen_by_name_and_judged_by_what_it_rounds_to(source, golden):
    runner = loader.make_runner(source, "jax", max_context=64, kv_cache="int8")
    forward = runner.forward(golden["ids0"], capture=["Qcur_rope", "Kcur_rope", "Vcur", "kqv_out"])
    facts = runner.describe()
    for dtype, departs in (("int8", False), ("float16", True)):
        judge = StageJudge(source, {**facts, "cache_dtype": dtype}, golden["ids0"], forward)
        assert judge.judge(("kqv_out", 2)).departs is departs
    with pytest.raises(ValueError, match="kv_cache 'int4' is not one of float32, float16, bfloat16, int8"):
        loader.make_runner(source, "jax", kv_cache="int4")
    with pytest.raises(BackendUnavailableError, match="reference backend chooses its KV cache.*kv_cache"):
        loader.make_runner(source, "reference", kv_cache="int8")
