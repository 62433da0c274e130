"""quantized_matmul on NVIDIA GPUs: one group of the kernel in ``gpu.products``."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.gpu.activations import float16_operand
from qwen3_moe_jax.kernels_pallas.gpu.device import require_16_bits
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MAX_FEW_ROWS,
    MatmulConfig,
    check_supported,
    dense_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.products import HOPPER, Product
from qwen3_moe_jax.kernels_pallas.gpu.sorting import dense_tiles
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types


def quantized_matmul(
    x: jax.Array,
    w: PackedTensor | Matrices | OneOf,
    compute_dtype: np.dtype,
    *,
    config: MatmulConfig | None = None,
    splits: int = 1,
    interpret: Any = None,
    product: Product = HOPPER,
) -> jax.Array:
    """See ``api.quantized_matmul``. Operands are float16 with a power of two per row, not bfloat16.

    Args:
      config: sizes, or None to choose them and ``splits``.
      splits: parts of K that are summed apart and then added in order.

    Raises:
      NotImplementedError: no such device, ``compute_dtype`` float32, or weights that it does not take.
    """
    product.require(interpret)
    require_16_bits(compute_dtype)
    w = as_matrices(w)
    options = w.options if isinstance(w, OneOf) else (w,)
    for option in options:
        check_supported((option,))
    if config is None:
        config, splits = dense_config(x.shape[0], *w.shape)
    if len(options) == 1 or x.shape[0] <= MAX_FEW_ROWS:
        which = w.which if isinstance(w, OneOf) else None
        return _multiply(x, options, which, config, splits, interpret, product)
    return switch_types(lambda w: _multiply(x, (w,), None, config, splits, interpret, product), w)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _multiply(
    x: jax.Array,
    options: tuple[Matrices, ...],
    which: jax.Array | None,
    config: MatmulConfig,
    splits: int,
    interpret: Any,
    product: Product,
) -> jax.Array:
    """The product with option ``which``; kernels of the others find no tiles."""
    tokens = x.shape[0]
    tiles = dense_tiles(tokens, config.tile)
    operand, scale = float16_operand(x, tiles.start.shape[0] * config.tile)
    total = None
    for i, w in enumerate(options):
        mine = tiles if which is None else tiles._replace(count=tiles.count * (which == i))
        out = product.multiply(operand, scale, mine, (w,), config=config, splits=splits, interpret=interpret)
        out = functools.reduce(jnp.add, [out[part] for part in range(splits)] if splits > 1 else [out])
        total = out if total is None else jnp.where(which == i, out, total)
    assert total is not None, "a matrix has a type"
    return total[:tokens]
