"""Every type's products with quantized activations in the decode kernel, against its dequantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.kernels_pallas.decode_step.formats import TILE_FORMATS
from qwen3_moe_jax.kernels_pallas.decode_step.primitives import emulated
from qwen3_moe_jax.kernels_pallas.decode_step.row_formats import ROW_FORMATS
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import (
    SHAPE,
    FourTiles,
    LaneActivations,
)
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from tests.kernels.op_inputs import random_weights

SEED = 20261127
SUPERBLOCKS = 3
"""Of a row: fewer than the four that a warpgroup reads."""
CASES = [
    *((t, "rows", f) for t, f in ROW_FORMATS.items()),
    *((t, "tiles", f) for t, f in TILE_FORMATS.items()),
]


def quantized(rng) -> tuple:
    """Activations as the kernel holds them, and float64 [4, 256]; after the row they have scale 0.

    The first lane's are as large as they can be.
    """
    q = rng.integers(-16256, 16257, (4, 4, 2, 2, 16))  # superblock, group, s, h, number
    q[0, 0] = 16256
    high = (q + 64) >> 7
    parts = np.stack([high, q - (high << 7)])
    words = np.ascontiguousarray(parts.astype(np.int8)).view(np.int32)
    scale = rng.uniform(1e-5, 1e-4, (4, 4, 2)).astype(np.float32)
    scale[SUPERBLOCKS:] = 0
    return (
        words,
        scale,
        q.sum(-1).astype(np.int32),
        (q * scale[..., None, None].astype(np.float64)).reshape(4, 256),
    )


def extreme_weights(rng, kind, shape):
    """Random ones; the first row that is multiplied has the largest integers and scales in two bits."""
    weights = random_weights(rng, kind, shape)
    if kind is GGMLType.Q2_K:
        arrays = {name: array.copy() for name, array in weights.arrays.items()}
        for name in ("q", "scales"):
            arrays[name][8] = 0xFF
        weights = PackedTensor(arrays, kind)
    return weights


@pytest.fixture(scope="module")
def products():
    """By case: the kernel's [4 superblocks, 8 rows, 4 groups], and NumPy's in float64. One kernel for all."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    words, scale, sums, x = quantized(rng)
    packed = [extreme_weights(rng, kind, (16, SUPERBLOCKS * 256)) for kind, _, _ in CASES]
    held = [to_gpu_tiles(w) if lies == "tiles" else w for w, (_, lies, _) in zip(packed, CASES, strict=True)]
    arrays = [{n: jnp.asarray(a) for n, a in w.arrays.items()} for w in held]
    leaves, tree = jax.tree.flatten(arrays)

    def body(*refs):
        words, scale, sums, *stacks, out = refs
        stacks = jax.tree.unflatten(tree, stacks)
        activations = LaneActivations(
            fragments=emulated.load_fragments(words, None, shared=False),
            scale=[scale[:, :, s] for s in range(2)],
            sums=[[sums[:, :, s, h] for h in range(2)] for s in range(2)],
            dimensions=(0, 2),
            prim=emulated,
        )
        place = FourTiles(1, 0, False, SUPERBLOCKS, emulated)
        for i, ((_, _, fmt), stack) in enumerate(zip(CASES, stacks, strict=True)):
            (out[i],) = fmt.multiply([fmt.load(stack, place)], activations)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(CASES), *SHAPE), jnp.float32),
        grid=(1,),
        grid_names=("sm",),
        interpret=interpreter(),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    found = np.asarray(jax.jit(kernel)(jnp.asarray(words), jnp.asarray(scale), jnp.asarray(sums), *leaves))
    expected = []
    for w in packed:
        rows = dequantize(w)[8:].astype(np.float64).reshape(8, SUPERBLOCKS, 4, 64)
        mine = np.einsum("rsgc,sgc->srg", rows, x[:SUPERBLOCKS].reshape(SUPERBLOCKS, 4, 64))
        expected.append(np.concatenate([mine, np.zeros((1, 8, 4))]))
    return found, np.stack(expected)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{t.name}-{lies}" for t, lies, _ in CASES])
def test_products_are_those_of_the_dequantized_weights(products, case):
    """Each lane's 64 weights; float32 sums of exact integer dots. Nothing of a superblock after the last."""
    found, expected = (values[case] for values in products)
    large = np.zeros(expected.shape, bool)
    large[0, :, 0] = True  # the first lanes
    for part in (large, ~large):
        atol = 2e-6 * np.abs(expected[part]).max()
        np.testing.assert_allclose(found[part], expected[part], rtol=0, atol=atol)
