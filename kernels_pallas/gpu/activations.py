"""Activations as the tensor cores read them: float16, scaled per row, columns in the order of weight tiles.

A weight tile (``convert.layouts.gpu_tiles``) gives each lane of a warp one row and 64 neighbouring
columns. A tensor-core instruction contracts 16 columns and wants four of them from each of
the four lanes of a row, so the columns of a superblock are contracted in this order: position
``16 i + 8 c + 2 g + b`` is column ``64 g + 4 i + c + 2 b`` for i < 16, lane group g < 4 and
c, b < 2. A sum does not depend on its order, so only the activations are rearranged.

float16 keeps 11 bits where bfloat16 keeps 8, at the same speed. Its range is made up for by a
power of two per row, which is exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK

FLOAT16_TOP = 2.0**15
"""Rows are scaled so that their largest magnitude is below this."""

WEIGHT_SCALE = 16.0
"""Weights are multiplied by this in float16, so that small ones keep all bits; up to 4,094 is in range."""

SWIGLU_SCALE = 2.0**-4
"""SwiGLU's results are stored multiplied by this, so that up to a million is in range."""


def operand_order(columns: int) -> np.ndarray:
    """int32 [columns]: the column at each position of the contraction."""
    i, c, g, b = np.meshgrid(*(np.arange(n) for n in (16, 2, 4, 2)), indexing="ij")
    one = (64 * g + 4 * i + c + 2 * b).reshape(-1)
    starts = np.arange(0, columns, SUPERBLOCK)
    return (starts[:, None] + one).reshape(-1).astype(np.int32)


def to_operand_order(x: jax.Array) -> jax.Array:
    """Columns of x [..., K] in the order of :func:`operand_order`, as a transposition."""
    *leading, columns = x.shape
    n = len(leading)
    x = x.reshape(*leading, columns // SUPERBLOCK, 4, 16, 2, 2)  # superblock, g, i, b, c
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*leading, columns)


def float16_operand(x: jax.Array, rows: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Rows as operands of :func:`qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_sm90.grouped_matmul`.

    Args:
      x: float32 or bfloat16 [T, K], K a multiple of 256.
      rows: R >= T, of which those after T are zero; T if not given.

    Returns:
      float16 [R, K] in operand order, and float32 [R] to multiply the products with.
    """
    x = x.astype(jnp.float32)
    if rows is not None and rows > x.shape[0]:
        x = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    # One value per row for the operand and the products, made before the reduction: two kernels of XLA.
    scale = jnp.max(operand_scale(jnp.abs(x)), axis=1)
    scaled = (x / (scale * WEIGHT_SCALE)[:, None]).astype(jnp.float16)
    return to_operand_order(scaled), scale


def operand_scale(magnitude: jax.Array) -> jax.Array:
    """Powers of two, growing with float32 magnitudes, that bring these up to below ``FLOAT16_TOP``.

    What is divided by the scale and ``WEIGHT_SCALE`` is in [FLOAT16_TOP / 2, FLOAT16_TOP), but for
    magnitudes under 2^-86.
    """
    bits = lax.bitcast_convert_type(magnitude, jnp.int32) & np.int32(0x7F800000)
    below = lax.bitcast_convert_type(bits, jnp.float32)  # the largest power of two that is not above
    return jnp.clip(below, 2.0**-86, 2.0**114) * (2 / FLOAT16_TOP / WEIGHT_SCALE)
