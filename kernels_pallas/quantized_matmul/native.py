"""quantized_matmul as one foreign call: integer dots on activations of 15 bits."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.kernels_pallas.native import library
from qwen3_moe_jax.kernels_pallas.native.operands import Operands, check_matrices, numbers, offset_of
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf

_FIXED = 3
"""Operands before the arrays."""


def quantized_matmul(x: jax.Array, w: Matrices | OneOf, compute_dtype: np.dtype) -> jax.Array:
    """See ``api.quantized_matmul``; ``compute_dtype`` has no part in it."""
    library.require()
    check_matrices(w)
    rows, columns = w.shape
    operands = Operands(_FIXED)
    meta = numbers([rows, columns, *operands.choice(w)])
    call = jax.ffi.ffi_call("qwen3_moe_matmul", jax.ShapeDtypeStruct((x.shape[0], rows), jnp.float32))
    return call(meta, offset_of(w), x.astype(jnp.float32), *operands.arrays)
