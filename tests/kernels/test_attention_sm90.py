"""The attention kernels, Hopper's and the portable one, in Pallas' interpreter on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")

from qwen3_moe_jax.kernels_pallas.attention import kernel_sm80, kernel_sm90, xla
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from tests import tolerances
from tests.kernels.op_inputs import rng
from tests.kernels.op_oracles import check
from tests.kernels.races import no_races

__all__ = ["no_races", "rng"]

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
SMALL = kernel_sm90.AttentionConfig(keys=64)


@pytest.mark.parametrize(
    ("tokens", "starts", "group", "slots"),
    [
        (9, (0, 3), 8, None),
        (5, (100, 70), 8, (3, 0)),
        (70, (0, 0), 2, None),
        (1, (130, 63), 4, (1, 2)),
    ],
    ids=["prompt", "chunk", "two blocks of keys", "decode"],
)
def test_attention(rng, tokens, starts, group, slots):
    run = partial(kernel_sm90.attention, config=SMALL)
    check_attention(rng, run, tokens, starts, group, slots)


@pytest.mark.parametrize(
    ("tokens", "starts", "group", "slots"),
    [(5, (100, 70), 8, (3, 0)), (70, (0, 0), 2, None)],
    ids=["chunk", "two tiles"],
)
def test_portable_attention(rng, tokens, starts, group, slots):
    check_attention(rng, kernel_sm80.attention, tokens, starts, group, slots)


def check_attention(rng, run, tokens, starts, group, slots):
    """Chunks that continue a cache, in any of its rows; NaN in layers and rows that nothing may read."""
    layers, batch, length, heads, dim = 2, 2, 192, 2, 64
    q = rng.standard_normal((batch, tokens, heads * group, dim)).astype(np.float32)
    shape = (layers, 4, length, heads, dim)
    rows = np.array(slots or (0, 1))
    others = np.setdiff1d(np.arange(4), rows)
    slots = None if slots is None else jnp.asarray(rows, jnp.int32)
    k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(2))
    positions = np.asarray(starts)[:, None] + np.arange(tokens)
    positions[1, -1] = -1
    k, v = (c.at[0].set(jnp.nan).at[:, others].set(jnp.nan) for c in (k, v))
    args = (jnp.asarray(q), k, v, jnp.asarray(positions, jnp.int32), jnp.int32(1), slots)
    out = run(*args, interpret=interpreter(detect_races=True))
    q16 = jnp.asarray(q, jnp.bfloat16).astype(jnp.float32)
    args = (q16, k, v, jnp.asarray(positions, jnp.int32), jnp.int32(1), slots)
    expected = np.array(xla.attention(*args))
    check(out, expected, tolerances.ATTENTION_BFLOAT16_NMSE, tokens)
    assert not np.asarray(out)[1, -1].any()


def test_what_the_kernel_does_not_take_is_named(rng):
    q, cache = jnp.zeros((1, 2, 2, 64)), jnp.zeros((1, 1, 64, 1, 64))
    positions, interpret = jnp.zeros((1, 2), jnp.int32), interpreter()
    with pytest.raises(NotImplementedError, match="float32"):
        kernel_sm90.attention(q, cache, cache, positions, jnp.int32(0), interpret=interpret)
    scales, whole = (jnp.ones((1, 1, 64, 1)),) * 2, cache.astype(jnp.int8)
    with pytest.raises(NotImplementedError, match="int8"):
        kernel_sm90.attention(q, whole, whole, positions, jnp.int32(0), None, scales, interpret=interpret)
    wide = jnp.zeros((1, 2, 2, 256))
    with pytest.raises(NotImplementedError, match="up to 128"):
        kernel_sm80.attention(wide, wide, wide, positions, jnp.int32(0), interpret=interpret)
    q, cache = q[..., :32], cache[..., :32].astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="head_dim"):
        kernel_sm90.attention(q, cache, cache, positions, jnp.int32(0), interpret=interpret)
