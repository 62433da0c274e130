"""Every type in every op on any device by XLA, in the order of the file, and in whatever mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.layouts import lanes16 as layouts
from qwen3_moe_jax.convert.packed import LANES16, PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from tests import tolerances
from tests.kernels.op_inputs import QUANTIZED, dense64, random_weights, rng, uniform
from tests.kernels.op_oracles import check, moe_oracle

__all__ = ["rng"]

TYPES = pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda t: t.name)
NEW = [t for t in SUPPORTED_TYPES if BLOCK_FORMATS[t].weights > 1 and t not in QUANTIZED]


def arranged(w: PackedTensor) -> PackedTensor:
    """As it lies on a CPU: sixteen rows side by side where the type has that."""
    able = layouts.supports(LANES16, w.type, w.shape)
    return jax.tree.map(jnp.asarray, layouts.to_layout(w, LANES16) if able else w)


@TYPES
def test_dequantization_is_bit_for_bit(rng, type):
    block = BLOCK_FORMATS[type]
    raw = rng.integers(0, 256, 48 * 512 // block.weights * block.nbytes, np.uint8)
    w = pack(raw, type, (3, 16, 512))
    expected, actual = dequantize(w), np.asarray(jax.jit(ops.dequantize)(w))
    finite = np.isfinite(expected)  # the payload of a NaN is nobody's promise
    finite &= (np.abs(expected) >= 2.0**-126) | (expected == 0)  # nor is a number that may become zero
    np.testing.assert_array_equal(actual.view(np.uint32)[finite], expected.view(np.uint32)[finite])
    assert finite.mean() > 0.9


@TYPES
@pytest.mark.parametrize("tokens", [1, 20])
def test_products_and_lookups(rng, type, tokens):
    w, x = random_weights(rng, type, (48, 512)), uniform(rng, (tokens, 512))
    actual = ops.quantized_matmul(x, arranged(w), compute_dtype=jnp.float32, implementation="xla")
    check(actual, x @ dense64(w).T, tolerances.MATMUL_FLOAT32_NMSE, type.name)
    ids = rng.integers(0, 48, tokens).astype(np.int32)
    rows = ops.embedding_lookup(arranged(w), ids, implementation="xla")
    np.testing.assert_array_equal(rows, dequantize(w)[ids])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("type", NEW, ids=lambda t: t.name)
def test_experts_of_mixed_types(rng, type, tokens):
    """The type as gate and down beside Q4_K, which XLA multiplies in packed form."""
    types = (type, GGMLType.Q4_K, type)
    stacks = [random_weights(rng, t, (6, 256, 256)) for t in types]
    ids = np.stack([rng.permutation(6)[:2] for _ in range(tokens)]).astype(np.int32)
    weights, x = rng.uniform(size=ids.shape).astype(np.float32), uniform(rng, (tokens, 256))
    actual = ops.moe_mlp(
        x, *map(arranged, stacks), ids, weights, compute_dtype=jnp.float32, implementation="xla"
    )
    check(actual, moe_oracle(x, *stacks, ids, weights), tolerances.MOE_FLOAT32_NMSE, types)
