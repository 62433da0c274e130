"""Weights in GPU tiles dequantize on any device to the same bits as in the file's order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.unpack import dequantize, pack

SEED = 5
SHAPE = (3, 24, 512)


@pytest.mark.parametrize("type", TILED_TYPES, ids=lambda t: t.name)
def test_tiles_dequantize_bit_for_bit(type):
    block = BLOCK_FORMATS[type]
    raw = np.random.default_rng(SEED).integers(
        0, 256, np.prod(SHAPE) // block.weights * block.nbytes, np.uint8
    )
    rows = pack(raw, type, SHAPE)
    tiles = to_gpu_tiles(rows)
    assert tiles.shape == SHAPE
    assert tiles.nbytes == rows.nbytes
    expected = dequantize(rows)
    actual = np.asarray(jax.jit(ops.dequantize)(tiles))
    finite = np.isfinite(expected)  # the payload of a NaN is nobody's promise
    finite &= (expected == 0) | (np.abs(expected) >= np.finfo(np.float32).tiny)  # nor a subnormal MXFP4's
    np.testing.assert_array_equal(
        actual.view(np.uint32)[finite], expected.view(np.uint32)[finite], f"seed {SEED}"
    )
    assert finite.mean() > 0.9


@pytest.mark.parametrize("type", TILED_TYPES, ids=lambda t: t.name)
def test_tiles_are_made_on_the_device_as_on_the_host(type):
    block = BLOCK_FORMATS[type]
    raw = np.random.default_rng(SEED).integers(
        0, 256, np.prod(SHAPE) // block.weights * block.nbytes, np.uint8
    )
    rows = pack(raw, type, SHAPE)
    on_host = to_gpu_tiles(rows)
    on_device = jax.jit(lambda w: to_gpu_tiles(w, jnp))(rows)
    for name, array in on_host.arrays.items():
        bits = np.uint16 if array.dtype == np.float16 else array.dtype
        np.testing.assert_array_equal(np.asarray(on_device.arrays[name]).view(bits), array.view(bits))
