"""The ops in plain jnp, on both layouts that the CPU takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts import lanes16 as layouts
from qwen3_moe_jax.convert.packed import LANES16, ROWS
from tests.kernels.op_cases import OpCases
from tests.kernels.op_inputs import QUANTIZED, random_weights, rng, uniform

__all__ = ["rng"]


class TestXlaRows(OpCases):
    implementation, layout = "xla", ROWS


class TestXlaLanes(OpCases):
    implementation, layout = "xla", LANES16


def test_none_chooses_what_runs_here(rng):
    w = random_weights(rng, GGMLType.Q4_K, (16, 256))
    x = uniform(rng, (1, 256))
    chosen, named = (ops.quantized_matmul(x, w, implementation=i) for i in (None, "xla"))
    np.testing.assert_array_equal(chosen, named)


@pytest.mark.parametrize("layout", [ROWS, LANES16])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_no_copy_of_a_stack_is_made(rng, type, tokens, layout):
    """Scratch memory of an expert layer stays below a tenth of the float stack, and below the packed one."""
    stack = layouts.to_layout(random_weights(rng, type, (128, 256, 256)), layout)
    x, ids = jnp.zeros((tokens, 256)), jnp.zeros((tokens, 4), jnp.int32)
    layer = jax.jit(lambda w: ops.moe_mlp(x, w, w, w, ids, jnp.ones((tokens, 4)), implementation="xla"))
    scratch = layer.lower(stack).compile().memory_analysis().temp_size_in_bytes
    assert scratch < min(128 * 256 * 256 * 4 / 10, stack.nbytes)


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_layouts_go_both_ways(rng, type):
    w = random_weights(rng, type, (3, 32, 512))
    lanes = layouts.to_layout(w, LANES16)
    assert (lanes.shape, lanes.nbytes) == (w.shape, w.nbytes)
    rows = layouts.to_layout(lanes, ROWS)
    for name, array in w.arrays.items():
        assert rows.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(rows.arrays[name], array)


def test_layouts_refuse_what_they_cannot_hold(rng):
    w = random_weights(rng, GGMLType.Q4_K, (17, 256))
    with pytest.raises(ValueError, match="16 quantized rows at a time"):
        layouts.to_layout(w, LANES16)
    with pytest.raises(ValueError, match="unknown layout 'columns'"):
        layouts.to_layout(w, "columns")
