"""all_layers as one foreign call (``native/csrc/layers.h``)."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.packed import LANES
from qwen3_moe_jax.kernels_pallas.native import library
from qwen3_moe_jax.kernels_pallas.native.operands import Operands, check_stack, numbers
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable

MATRICES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    "mlp.router",
    *(f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")),
)
"""In the order of the C code."""

NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

HEAD_DIMS = (64, 128)
"""Sizes of a head that attention is compiled for."""

MAX_STACKS, MAX_GROUP = 64, 64
"""Stacks of weights, and query heads that read one KV head."""

_FIXED = 13
"""Operands before the arrays; the caches are the last two of them."""


def check(layers: LayerTable, k_cache: jax.Array) -> None:
    """Raises NotImplementedError where these weights or this cache are not for the C code."""
    library.require()
    head_dim, kv_heads = k_cache.shape[-1], k_cache.shape[-2]
    if k_cache.dtype != jnp.float32:
        raise NotImplementedError(f"it reads a KV cache of float32, and it is {k_cache.dtype}")
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"heads of {head_dim}, not {' or '.join(map(str, HEAD_DIMS))}")
    heads = layers["self_attn.q_proj"].shape[0] // head_dim
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise NotImplementedError(f"{heads} heads for {kv_heads} of keys and values")
    used = {stack for name in MATRICES for stack in layers[name].stacks}
    if len(used) > MAX_STACKS:
        raise NotImplementedError(f"{len(used)} stacks of weights, more than {MAX_STACKS}")
    for name in MATRICES:
        tensor = layers[name]
        rows, columns = tensor.shape[-2:]
        if name != "mlp.router" and (rows % LANES or columns % LANES):
            raise NotImplementedError(f"{name} of {rows} x {columns} is not made of sixteens")
        for stack in tensor.options:
            check_stack(stack, rows)


def _matrices(layers: LayerTable, operands: Operands) -> list[int]:
    """The stacks, and of each layer and matrix its stack's number and first row."""
    names: dict[str, list[int]] = {}
    for name in MATRICES:
        for stack in layers[name].stacks:
            if stack not in names:
                names[stack] = operands.stack(layers.stacks[stack])
    order = list(names)
    table = [
        number
        for layer in range(layers.num_layers)
        for name in MATRICES
        for stack, first in (layers[name].place(layer),)
        for number in (order.index(stack), first)
    ]
    return [len(order), *(number for stack in names.values() for number in stack), *table]


def all_layers(
    x: jax.Array,
    layers: LayerTable,
    k_cache: jax.Array,
    v_cache: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    num_experts_per_tok: int,
    eps: float,
    expert_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``api.all_layers``."""
    check(layers, k_cache)
    kv_heads, head_dim = k_cache.shape[-2:]
    experts, inner, width = layers["mlp.experts.gate_proj"].shape
    operands = Operands(_FIXED)
    matrices = _matrices(layers, operands)
    heads = layers["self_attn.q_proj"].shape[0] // head_dim
    is_forced = expert_ids is not None
    eps_bits = int(np.float32(eps).view(np.int32))
    sizes = [layers.num_layers, width, heads, kv_heads, head_dim, experts, num_experts_per_tok, inner]
    chosen = (layers.num_layers, x.shape[0], num_experts_per_tok)
    forced = expert_ids if is_forced else jnp.zeros((1,), jnp.int32)
    shaped = [(x.shape, x.dtype), (k_cache.shape, k_cache.dtype), (v_cache.shape, v_cache.dtype)]
    call = jax.ffi.ffi_call(
        "qwen3_moe_layers",
        [jax.ShapeDtypeStruct(*one) for one in (*shaped, (chosen, jnp.int32))],
        input_output_aliases={_FIXED - 2: 1, _FIXED - 1: 2},
    )
    hidden, k, v, ids = call(
        numbers([*sizes, int(is_forced), eps_bits, *matrices]),
        x,
        *rope,
        slots.astype(jnp.int32),
        positions.astype(jnp.int32),
        *(layers[name].options[0] for name in NORMS),
        forced.astype(jnp.int32),
        k_cache,
        v_cache,
        *operands.arrays,
    )
    return hidden, k, v, ids
