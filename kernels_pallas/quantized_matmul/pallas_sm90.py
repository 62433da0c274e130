"""quantized_matmul on Hopper GPUs: one group of the kernel in ``prefill.matmul_sm90``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.packed import PackedTensor
from kernels_pallas.matrices import Matrices
from kernels_pallas.prefill.activations import float16_operand
from kernels_pallas.prefill.device import require_16_bits, require_hopper
from kernels_pallas.prefill.matmul_sm90 import (
    MatmulConfig,
    check_supported,
    grouped_matmul,
    pick_config,
)
from kernels_pallas.prefill.sorting import dense_tiles


def quantized_matmul(
    x: jax.Array,
    w: PackedTensor | Matrices,
    compute_dtype: np.dtype,
    *,
    config: MatmulConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See ``api.quantized_matmul``. Operands are float16 with a power of two a row, not bfloat16.

    Raises:
      NotImplementedError: not a Hopper GPU, ``compute_dtype`` float32, or weights that it does not take.
    """
    require_hopper(interpret)
    require_16_bits(compute_dtype)
    w = Matrices.of(w)
    check_supported((w,))
    return _multiply(x, w, config or pick_config(x.shape[0]), interpret)


@partial(jax.jit, static_argnums=(2, 3))
def _multiply(x: jax.Array, w: Matrices, config: MatmulConfig, interpret: Any) -> jax.Array:
    tokens = x.shape[0]
    operand, scale = float16_operand(x)
    tiles = dense_tiles(tokens, config.tile)
    padding = tiles.start.shape[0] * config.tile - tokens
    operand, scale = jnp.pad(operand, ((0, padding), (0, 0))), jnp.pad(scale, (0, padding))
    return grouped_matmul(operand, scale, tiles, (w,), config=config, interpret=interpret)[:tokens]
