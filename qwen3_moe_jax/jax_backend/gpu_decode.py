"""The GPU's decode step, one kernel for a whole token, on the model's own parameters.

``qwen3_moe_jax.kernels_pallas.decode_step`` reads stacks of tiles and a table of where each
layer's matrices begin; both follow from the parameter tree without a copy.
"""

import jax
import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.stacks import Types
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.weights import DecodeWeights, LayerTypes, StackPlan, plan_stacks

STACK_OF_ROLE = {
    "qkv": "self_attn.qkv",
    "o": "self_attn.o_proj",
    "gate": "mlp.experts.gate_proj",
    "up": "mlp.experts.up_proj",
    "down": "mlp.experts.down_proj",
}


def check(config: Qwen3MoeConfig, types: Types, batch: int, device: jax.Device) -> None:
    """Raises NotImplementedError, naming the first thing that the kernel does not take."""
    api.check_device(device)
    if config.tie_word_embeddings:
        raise NotImplementedError("GPU decode step: tied word embeddings are not supported")
    for path, ggml_type in types.items():
        if path.endswith("mlp.router") and ggml_type != GGMLType.F32:
            raise NotImplementedError(f"GPU decode step: {path} is {ggml_type.name}; it must be F32")
    api.check(config, _role_types(_plan(config, types), types), batch, device)


def decode_step(
    params: dict,
    config: Qwen3MoeConfig,
    types: Types,
    token_ids: jax.Array,
    start: jax.Array,
    cache: KVCache,
    expert_ids: jax.Array | None = None,
    goes: jax.Array | None = None,
) -> api.StepOutput:
    """One token of every sequence: logits float32 [B, V], the cache with it, expert ids [L, B, X].

    Args:
      params: the model's parameters, matrices in GPU tiles.
      config: the model's hyper-parameters.
      types: quantization type of each parameter, by its path.
      token_ids: int32 [B].
      start: int32 [B], position of each token.
      cache: donated; keys and values of the positions before.
      expert_ids: int32 [L, B, X] to force the routing, or None.
      goes: bool [B], as of ``api.decode_step``.
    """
    weights = decode_weights(params, config, types)
    cache = api.KVCache(cache.k, cache.v)
    return api.decode_step(weights, config, token_ids, start, cache, expert_ids=expert_ids, goes=goes)


def _plan(config: Qwen3MoeConfig, types: Types) -> StackPlan:
    return plan_stacks([_layer_types(i, types) for i in range(config.num_hidden_layers)], config=config)


def _layer_types(layer: int, types: Types) -> LayerTypes:
    attention, experts = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp.experts."
    gate, up = types[experts + "gate_proj"], types[experts + "up_proj"]
    if gate != up:
        raise NotImplementedError(
            f"GPU decode step: gate_proj and up_proj of layer {layer} are {gate.name} and {up.name}; "
            "they must have one type"
        )
    q, k, v, o = (types[f"{attention}{name}_proj"] for name in "qkvo")
    return LayerTypes(q=q, k=k, v=v, o=o, gate_up=gate, down=types[experts + "down_proj"])


def _role_types(plan: StackPlan, types: Types) -> dict[str, tuple[GGMLType, ...]]:
    return {**plan.types, "lm_head": (types["lm_head"],)}


def decode_weights(params: dict, config: Qwen3MoeConfig, types: Types) -> DecodeWeights:
    """The parameter tree, matrices in GPU tiles, as the kernel names it; no array is copied."""
    plan, stacks = _plan(config, types), params["stacks"]
    arrays = {
        role: [dict(stacks[f"{name}.{t.name}"].arrays) for t in plan.types[role]]
        for role, name in STACK_OF_ROLE.items()
    }
    arrays["lm_head"] = [dict(params["lm_head"].arrays)]
    router = stacks[f"mlp.router.{GGMLType.F32.name}"].arrays["w"]
    return DecodeWeights(
        stacks=arrays,
        table=jax.numpy.asarray(np.asarray(plan.table, np.int32)),
        router=router.reshape(config.num_hidden_layers, config.num_experts, config.hidden_size),
        input_norm=stacks["input_layernorm"],
        post_norm=stacks["post_attention_layernorm"],
        q_norm=stacks["self_attn.q_norm"],
        k_norm=stacks["self_attn.k_norm"],
        final_norm=params["norm"],
        embed_tokens=params["embed_tokens"],
        types=tuple(_role_types(plan, types).items()),
        qkv_always=plan.qkv_always,
    )
