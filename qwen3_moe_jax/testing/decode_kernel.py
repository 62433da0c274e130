"""The decode kernel traced for a GPU that is not there, with operands that are shapes alone."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.kernels_pallas.decode_step import api, kernel
from qwen3_moe_jax.kernels_pallas.decode_step.config import Operands, StepConfig, scalar_count, state_shape
from qwen3_moe_jax.kernels_pallas.packed.stacks import abstract_packed

CONFIG = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=2, vocab_size=4096)
Array = jax.ShapeDtypeStruct


def _stack(type: GGMLType, tiles: int, columns: int) -> dict[str, Array]:
    """Arrays of a stack as a GPU holds it: in tiles where the type is held so."""
    rows = abstract_packed(type, (8 * tiles, columns))
    tiled = type in TILED_TYPES
    return dict((jax.eval_shape(lambda w: to_gpu_tiles(w, jnp), rows) if tiled else rows).arrays)


def operands(c: StepConfig) -> Operands:
    """The operands' shapes; state and cache as arrays."""
    f32 = lambda *shape: Array(shape, jnp.float32)
    width, layers = (c.hidden_size // 32, 2, 4, 4), c.num_hidden_layers
    cache = Array((layers, c.batch, c.cache_length, c.num_key_value_heads, c.head_dim), c.cache_dtype)
    scale = f32(*cache.shape[:-1]) if c.has_scales else None
    stacks = lambda types, tiles, columns: [_stack(type, tiles, columns) for type in types]
    experts = layers * c.num_experts
    gate_up = (c.gate_up_types, experts * c.moe_intermediate_size // 8, c.hidden_size)
    return Operands(
        scalars_gmem=Array((scalar_count(c),), jnp.int32),
        rope_gmem=f32(c.batch, 2, c.head_dim // 2),
        replay_ids_gmem=Array((layers, c.batch, c.num_experts_per_tok), jnp.int32),
        input_norm_gmem=f32(layers, *width),
        post_norm_gmem=f32(layers, *width),
        q_norm_gmem=f32(layers, c.head_dim),
        k_norm_gmem=f32(layers, c.head_dim),
        final_norm_gmem=f32(*width),
        router_gmem=f32(layers, c.num_experts, *width),
        weights_gmem={
            "qkv": stacks(c.qkv_types, layers * c.qkv_tiles, c.hidden_size),
            "o": stacks(c.o_types, layers * c.hidden_size // 8, c.attention_width),
            "gate": stacks(*gate_up),
            "up": stacks(*gate_up),
            "down": stacks(c.down_types, experts * c.hidden_size // 8, c.moe_intermediate_size),
            "lm_head": stacks((c.lm_head_type,), c.vocab_size // 8, c.hidden_size),
        },
        state_gmem=f32(*state_shape(c)),
        k_cache_gmem=cache,
        v_cache_gmem=cache,
        k_scale_gmem=scale,
        v_scale_gmem=scale,
    )


def trace_step(
    config: Any = CONFIG, *, batch: int, device: api.Device, sharding: Any = None, **options: Any
) -> Any:
    """The kernel of ``config`` traced for a grid, Q6_K beside Q4_K.

    Args:
      sharding: of a device that is not there, to compile for it.
      options: fields of ``StepConfig``.
    """
    c = replace(api.shape_config(config, batch, device), **options)

    def step(operands: Operands) -> Any:
        written = ["state_gmem", "k_cache_gmem", "v_cache_gmem"]
        written += ["k_scale_gmem", "v_scale_gmem"] if c.has_scales else []
        refs = {name: jax.new_ref(getattr(operands, name)) for name in written}
        return kernel.decode_step(c, operands._replace(**refs)).logits_gmem

    there = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.jit(step).trace(jax.tree.map(there, operands(c)))
