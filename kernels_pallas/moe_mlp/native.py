"""moe_mlp as one foreign call: integer dots on activations of 15 bits."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.packed import LANES
from qwen3_moe_jax.kernels_pallas.native import library
from qwen3_moe_jax.kernels_pallas.native.operands import Operands, check_matrices, numbers, offset_of
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf

_FIXED = 5
"""Operands before the arrays."""


def moe_mlp(
    x: jax.Array,
    gate_proj: Matrices | OneOf,
    up_proj: Matrices | OneOf,
    down_proj: Matrices | OneOf,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    compute_dtype: np.dtype,
) -> jax.Array:
    """See ``api.moe_mlp``; ``compute_dtype`` has no part in it."""
    library.require()
    experts, inner, width = gate_proj.shape
    projections = (gate_proj, up_proj, down_proj)
    for w in projections:
        check_matrices(w)
    if inner % LANES or width % LANES:
        raise NotImplementedError(f"experts of {inner} x {width} are not made of sixteens")
    operands = Operands(_FIXED)
    choices = [number for w in projections for number in operands.choice(w)]
    call = jax.ffi.ffi_call("qwen3_moe_experts", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(
        numbers([experts, inner, width, *choices]),
        jnp.stack([offset_of(w) for w in projections]),
        x.astype(jnp.float32),
        expert_ids.astype(jnp.int32),
        expert_weights.astype(jnp.float32),
        *operands.arrays,
    )
