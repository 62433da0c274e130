"""moe_mlp on NVIDIA GPUs: sort by expert, gate + up + SwiGLU, down with weighting, sum in order.

Two launches of the kernel in ``gpu.products`` and a few small operations of XLA. SwiGLU's
results stay sorted, in float16 and in the order in which the second launch reads them. Every
token adds its experts' results in the order of ``expert_ids``.

Up to ``MAX_UNSORTED`` tokens are not sorted: reading the weights takes as long as multiplying all
tokens with every expert in use, and only what tokens chose is written. That leaves out a dozen
small launches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE, WEIGHT_SCALE, float16_operand
from qwen3_moe_jax.kernels_pallas.gpu.device import require_16_bits
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MAX_FEW_ROWS,
    MAX_UNSORTED,
    MatmulConfig,
    check_supported,
    experts_config,
    few_config,
    pick_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.products import HOPPER, Product
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles, UsedExperts, sort_by_expert, used_experts
from qwen3_moe_jax.kernels_pallas.moe_mlp.routes import expert_factors
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf, as_matrices, switch_types

Stacks = tuple[Matrices, Matrices, tuple[Matrices, ...]]
"""gate_proj, up_proj, and down_proj's types, of which one is meant."""


def moe_mlp(
    x: jax.Array,
    gate_proj: PackedTensor | Matrices | OneOf,
    up_proj: PackedTensor | Matrices | OneOf,
    down_proj: PackedTensor | Matrices | OneOf,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    compute_dtype: np.dtype,
    *,
    all_experts: int | None = None,
    config: MatmulConfig | None = None,
    interpret: Any = None,
    product: Product = HOPPER,
) -> jax.Array:
    """See ``api.moe_mlp``. Operands are float16 with powers of two as scales, not bfloat16.

    Raises:
      NotImplementedError: no such device, ``compute_dtype`` float32, or weights that it does not take.
    """
    product.require(interpret)
    require_16_bits(compute_dtype)
    weights = [as_matrices(w) for w in (gate_proj, up_proj, down_proj)]
    if config is None and x.shape[0] <= MAX_UNSORTED:
        gate = weights[0].options[0] if isinstance(weights[0], OneOf) else weights[0]
        config = few_config(x.shape[0], gate.stack.type)
    elif config is None and x.shape[0] <= MAX_FEW_ROWS:
        config = experts_config()
    config = config or pick_config(expert_ids.size / (all_experts or gate_proj.shape[0]))
    is_unsorted = x.shape[0] <= config.tile and config.widths == (config.tile,)
    multiply = _unsorted if is_unsorted else _sorted

    def run(gate: Matrices, up: Matrices, down: Matrices | OneOf) -> jax.Array:
        check_supported((gate, up))
        downs, which = (down.options, down.which) if isinstance(down, OneOf) else ((down,), None)
        for option in downs:
            check_supported((option,))
        stacks = gate, up, downs
        is_part = all_experts is not None
        return multiply(x, stacks, which, expert_ids, expert_weights, config, interpret, product, is_part)

    if x.shape[0] <= MAX_FEW_ROWS:  # a launch that finds nothing to do costs less than a branch
        return switch_types(lambda gate, up: run(gate, up, weights[2]), *weights[:2])
    return switch_types(run, *weights)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _unsorted(
    x: jax.Array,
    stacks: Stacks,
    which: jax.Array | None,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    config: MatmulConfig,
    interpret: Any,
    product: Product,
    is_part: bool,
) -> jax.Array:
    """All tokens with every expert in use."""
    gate, up, downs = stacks
    (T, X), E = expert_ids.shape, gate.shape[0]
    options = {"config": config, "interpret": interpret}
    operand, scale = float16_operand(x, config.tile)
    used = used_experts(expert_ids, E)
    destination, weight = expert_factors(expert_ids, expert_weights.astype(jnp.float32), E, config.tile)
    swiglu = product.multiply(operand, scale, used, (gate, up), **options)
    scatter = {"destinations": destination.reshape(-1), "out_rows": T * X}
    multiply = partial(product.multiply, swiglu, weight.reshape(-1), **scatter, **options)
    parts = _of_which(multiply, used, downs, which).reshape(T, X, -1)
    total = None
    for choice in range(X):
        part = parts[:, choice]
        if is_part:
            part = jnp.where((expert_ids[:, choice] < E)[:, None], part, 0.0)
        for later in range(choice + 1, X):  # an expert that a token chose twice stands last
            again = expert_ids[:, choice] == expert_ids[:, later]
            part = jnp.where(again[:, None], 0.0, part)
        total = part if total is None else total + part
    assert total is not None, "a token has an expert"
    return total


def _of_which(
    multiply: Callable[..., jax.Array],
    work: Tiles | UsedExperts,
    downs: tuple[Matrices, ...],
    which: jax.Array | None,
) -> jax.Array:
    """The product with that of several matrices that is meant: the others find nothing to do."""
    parts = None
    for i, down in enumerate(downs):
        mine = work if which is None else work._replace(count=work.count * (which == i))
        out = multiply(mine, (down,))
        parts = out if parts is None else jnp.where(which == i, out, parts)
    assert parts is not None, "down has a type"
    return parts


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _sorted(
    x: jax.Array,
    stacks: Stacks,
    which: jax.Array | None,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    config: MatmulConfig,
    interpret: Any,
    product: Product,
    is_part: bool,
) -> jax.Array:
    gate, up, downs = stacks
    options = {"config": config, "interpret": interpret}
    order = sort_by_expert(expert_ids, gate.shape[0], config.tile)
    operand, scale = float16_operand(x)
    source = order.source
    token = source // expert_ids.shape[1]
    swiglu = product.multiply(operand[token], scale[token], order.tiles, (gate, up), **options)
    weight = expert_weights.astype(jnp.float32).reshape(-1)[source] / (SWIGLU_SCALE * WEIGHT_SCALE)
    multiply = partial(product.multiply, swiglu, weight, **options)
    parts = _of_which(multiply, order.tiles, downs, which)

    def part(choice: int) -> jax.Array:
        row = order.destination[:, choice]
        if not is_part:
            return parts[row]
        return jnp.where((row < len(parts))[:, None], parts[jnp.minimum(row, len(parts) - 1)], 0.0)

    total = part(0)
    for choice in range(1, expert_ids.shape[1]):
        total = total + part(choice)
    return total
