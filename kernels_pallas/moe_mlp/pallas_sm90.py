"""moe_mlp on Hopper GPUs: sort by expert, gate + up + SwiGLU, down with weighting, sum in order.

Two launches of the kernel in ``prefill.matmul_sm90`` and a few small steps of XLA. SwiGLU's
results stay sorted, in float16 and in the order in which the second launch reads them. Every
token adds its experts' results in the order of ``expert_ids``.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.packed import PackedTensor
from kernels_pallas.expert_matmul.pallas_sm90 import expert_matmul
from kernels_pallas.matrices import Matrices
from kernels_pallas.prefill.activations import SWIGLU_SCALE, WEIGHT_SCALE, float16_operand
from kernels_pallas.prefill.device import require_16_bits, require_hopper
from kernels_pallas.prefill.matmul_sm90 import MatmulConfig, check_supported, grouped_matmul, pick_config
from kernels_pallas.prefill.sorting import sort_by_expert

Stacks = tuple[Matrices, Matrices, Matrices]


def moe_mlp(
    x: jax.Array,
    gate_proj: PackedTensor | Matrices,
    up_proj: PackedTensor | Matrices,
    down_proj: PackedTensor | Matrices,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    compute_dtype: np.dtype,
    return_stages: bool,
    *,
    config: MatmulConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See ``api.moe_mlp``. Operands are float16 with powers of two as scales, not bfloat16.

    Raises:
      NotImplementedError: not a Hopper GPU, ``compute_dtype`` float32, or weights that it does not take.
    """
    require_hopper(interpret)
    require_16_bits(compute_dtype)
    gate, up, down = (Matrices.of(w) for w in (gate_proj, up_proj, down_proj))
    check_supported((gate, up))
    check_supported((down,))
    if return_stages:
        return _with_stages(x, (gate, up, down), expert_ids, expert_weights, compute_dtype, config, interpret)
    config = config or pick_config(expert_ids.size / gate.shape[0])
    return _experts(x, (gate, up, down), expert_ids, expert_weights, config, interpret), {}


@partial(jax.jit, static_argnums=(4, 5))
def _experts(
    x: jax.Array,
    stacks: Stacks,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    config: MatmulConfig,
    interpret: Any,
) -> jax.Array:
    gate, up, down = stacks
    options = {"config": config, "interpret": interpret}
    order = sort_by_expert(expert_ids, gate.shape[0], config.tile)
    operand, scale = float16_operand(x)
    token = order.source // expert_ids.shape[1]
    swiglu = grouped_matmul(operand[token], scale[token], order.tiles, (gate, up), **options)
    weight = expert_weights.astype(jnp.float32).reshape(-1)[order.source] / (SWIGLU_SCALE * WEIGHT_SCALE)
    parts = grouped_matmul(swiglu, weight, order.tiles, (down,), **options)
    total = parts[order.place[:, 0]]
    for choice in range(1, expert_ids.shape[1]):
        total = total + parts[order.place[:, choice]]
    return total


def _with_stages(x, weights: Stacks, expert_ids, expert_weights, compute_dtype, config, interpret):
    """The same unfused, every stage in the order of tokens."""
    options = {"config": config, "interpret": interpret}
    gate, up = (expert_matmul(x, w, expert_ids, compute_dtype, **options) for w in weights[:2])
    swiglu = jax.nn.silu(gate) * up
    down = expert_matmul(swiglu, weights[2], expert_ids, compute_dtype, **options)
    total = down[:, 0] * expert_weights[:, :1]
    for choice in range(1, expert_ids.shape[1]):
        total = total + down[:, choice] * expert_weights[:, choice : choice + 1]
    names = ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down")
    return total, dict(zip(names, (gate, up, swiglu, down), strict=True))
