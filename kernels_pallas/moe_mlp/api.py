"""moe_mlp: the SwiGLU experts that each token chose, weighted after down_proj and summed in order."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.gpu.device import OnHopper
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.moe_mlp import xla
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types


def moe_mlp(
    x: jax.Array,
    gate_proj: PackedTensor | Matrices | OneOf,
    up_proj: PackedTensor | Matrices | OneOf,
    down_proj: PackedTensor | Matrices | OneOf,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    *,
    compute_dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
    return_stages: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """Runs each token through its experts.

    Differentiable with respect to ``x`` and ``expert_weights``; packed weights
    get no gradient. Stages carry no gradient.

    Args:
      x: float32 or bfloat16 [T, D].
      gate_proj: packed [E, F, D], alone, inside a stack, or of one of several types; as the other two.
      up_proj: packed [E, F, D].
      down_proj: packed [E, D, F].
      expert_ids: int32 [T, X], each in [0, E); their order is the order of the sum.
      expert_weights: float32 [T, X].
      compute_dtype: float32 or bfloat16, what operands of products are rounded to; sums are float32.
      implementation: None chooses; a named one runs or raises.
      return_stages: also return the intermediate stages.

    Returns:
      float32 [T, D]; with ``return_stages`` a pair of it and ``ffn_moe_gate``,
      ``ffn_moe_up``, ``ffn_moe_swiglu`` [T, X, F] and ``ffn_moe_down`` [T, X, D] (before weighting).

    Raises:
      ValueError: shapes do not match.
      NotImplementedError: the named implementation does not take these arguments.
    """
    E, F, D = gate_proj.shape
    T = x.shape[0]
    shapes_match = (
        x.shape == (T, D)
        and up_proj.shape == (E, F, D)
        and down_proj.shape == (E, D, F)
        and expert_ids.ndim == 2
        and expert_ids.shape[0] == T
        and expert_weights.shape == expert_ids.shape
    )
    if not shapes_match:
        raise ValueError(
            f"moe_mlp: shapes do not match: x {x.shape}, gate_proj {gate_proj.shape}, "
            f"up_proj {up_proj.shape}, down_proj {down_proj.shape}, "
            f"expert_ids {expert_ids.shape}, expert_weights {expert_weights.shape}"
        )
    out, stages = implementations.run(
        "moe_mlp",
        implementation,
        {"pallas": OnHopper("moe_mlp"), "xla": partial(switch_types, xla.moe_mlp)},
        jnp.asarray(x),
        as_matrices(gate_proj),
        as_matrices(up_proj),
        as_matrices(down_proj),
        jnp.asarray(expert_ids),
        jnp.asarray(expert_weights),
        implementations.check_compute_dtype(compute_dtype),
        return_stages,
    )
    return (out, stages) if return_stages else out
