"""expert_matmul on NVIDIA GPUs: rows sorted by expert, then the kernel in ``gpu.products``."""

from functools import partial
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.gpu.activations import float16_operand
from qwen3_moe_jax.kernels_pallas.gpu.device import require_16_bits
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MatmulConfig,
    check_supported,
    pick_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.products import HOPPER, Product
from qwen3_moe_jax.kernels_pallas.gpu.sorting import sort_by_expert
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types


def expert_matmul(
    x: jax.Array,
    w: PackedTensor | Matrices | OneOf,
    expert_ids: jax.Array,
    compute_dtype: np.dtype,
    *,
    config: MatmulConfig | None = None,
    interpret: Any = None,
    product: Product = HOPPER,
) -> jax.Array:
    """See ``api.expert_matmul``. Operands are float16 with a power of two per row, not bfloat16.

    Raises:
      NotImplementedError: no such device, ``compute_dtype`` float32, or weights that it does not take.
    """
    product.require(interpret)
    require_16_bits(compute_dtype)
    config = config or pick_config(expert_ids.size / w.shape[0])

    def multiply(w: Matrices) -> jax.Array:
        check_supported((w,))
        return _multiply(x, w, expert_ids, config, interpret, product)

    return switch_types(multiply, as_matrices(w))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _multiply(
    x: jax.Array,
    w: Matrices,
    expert_ids: jax.Array,
    config: MatmulConfig,
    interpret: Any,
    product: Product,
) -> jax.Array:
    order = sort_by_expert(expert_ids, w.shape[0], config.tile)
    source = order.source // expert_ids.shape[1] if x.ndim == 2 else order.source
    operand, scale = float16_operand(x.reshape(-1, x.shape[-1]))
    out = product.multiply(
        operand[source], scale[source], order.tiles, (w,), config=config, interpret=interpret
    )
    return out[order.destination]
