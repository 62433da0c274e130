"""moe_mlp: the SwiGLU experts that each token chose, weighted after down_proj and summed in order."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.expert_matmul.api import expert_matmul
from qwen3_moe_jax.kernels_pallas.gpu.device import FromAmpereOn, OnHopper
from qwen3_moe_jax.kernels_pallas.implementations import Implementation
from qwen3_moe_jax.kernels_pallas.moe_mlp import native, xla
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types

OnStage = Callable[[str, jax.Array], jax.Array]
"""(name, value) -> the value that goes on."""


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
    on_stage: OnStage | None = None,
    all_experts: int | None = None,
) -> jax.Array:
    """Runs each token through its experts.

    Differentiable with respect to ``x`` and ``expert_weights``; packed weights get no gradient.

    Args:
      x: float32 or bfloat16 [T, D].
      gate_proj: packed [E, F, D], alone, inside a stack, or of one of several types; as the other two.
      up_proj: packed [E, F, D].
      down_proj: packed [E, D, F].
      expert_ids: int32 [T, X], each in [0, E); their order is the order of the sum.
      expert_weights: float32 [T, X].
      compute_dtype: float32 or bfloat16, what operands of products are rounded to; sums are float32.
      implementation: None chooses; a named one runs or raises.
      on_stage: given each stage by its name, may change it, and gives it back: ``ffn_moe_gate``,
        ``ffn_moe_up``, ``ffn_moe_swiglu`` [T, X, F] and ``ffn_moe_down`` [T, X, D] (before weighting).
        The op then runs unfused, product after product.
      all_experts: how many the model has where these E are some of them: ids may be E then, for an expert
        that is not here, which adds nothing.

    Returns:
      float32 [T, D].

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
    dtype = implementations.check_compute_dtype(compute_dtype)
    expert_ids, expert_weights = jnp.asarray(expert_ids), jnp.asarray(expert_weights)
    known_ids, known_weights = expert_ids, expert_weights
    if all_experts is not None:
        is_here = expert_ids < E
        any_here = jnp.max(jnp.where(is_here, expert_ids, 0))  # one that is read anyway
        known_ids, known_weights = (
            jnp.where(is_here, expert_ids, any_here),
            jnp.where(is_here, expert_weights, 0),
        )
    if on_stage is not None:
        project = partial(
            expert_matmul, expert_ids=known_ids, compute_dtype=dtype, implementation=implementation
        )
        return _in_stages(x, gate_proj, up_proj, down_proj, known_weights, project, on_stage)

    def with_known(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *args: run(*args[:4], known_ids, known_weights, dtype)

    return implementations.run(
        "moe_mlp",
        implementation,
        {
            "native": with_known(native.moe_mlp),
            "hopper": partial(OnHopper("moe_mlp"), all_experts=all_experts),
            "portable": partial(FromAmpereOn("moe_mlp"), all_experts=all_experts),
            "xla": with_known(partial(switch_types, xla.moe_mlp)),
        },
        jnp.asarray(x),
        as_matrices(gate_proj),
        as_matrices(up_proj),
        as_matrices(down_proj),
        expert_ids,
        expert_weights,
        dtype,
    )


def _in_stages(
    x: jax.Array,
    gate_proj: PackedTensor | Matrices | OneOf,
    up_proj: PackedTensor | Matrices | OneOf,
    down_proj: PackedTensor | Matrices | OneOf,
    expert_weights: jax.Array,
    project: Callable[..., jax.Array],
    on_stage: OnStage,
) -> jax.Array:
    """The op's definition, one product after the other."""
    gate = on_stage("ffn_moe_gate", project(x, gate_proj))
    up = on_stage("ffn_moe_up", project(x, up_proj))
    swiglu = on_stage("ffn_moe_swiglu", jax.nn.silu(gate) * up)
    down = on_stage("ffn_moe_down", project(swiglu, down_proj))
    out = jnp.zeros_like(down[:, 0])
    for choice in range(expert_weights.shape[1]):  # the order of the sum is part of the definition
        out = out + down[:, choice] * expert_weights[:, choice, None]
    return out
