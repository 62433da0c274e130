"""A whole decoded token on an NVIDIA Hopper GPU as one kernel.

This is an alternative to the model's decode step that runs op by op: ``decode_step`` makes
logits and updates the cache in place, inside the caller's ``jit`` and its loop. What the
kernel does not support raises ``NotImplementedError`` that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import GPU_TILES
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.decode_step import step_mosaic_gpu as kernel
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats_mosaic_gpu import TILE_FORMATS
from qwen3_moe_jax.kernels_pallas.decode_step.weights import ROUTER, StepWeights
from qwen3_moe_jax.kernels_pallas.embedding_lookup.api import embedding_lookup
from qwen3_moe_jax.kernels_pallas.gpu.device import multiprocessors
from qwen3_moe_jax.kernels_pallas.norm_rope.api import rope_tables
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable

MAX_BATCH = 16
BLOCKS_UNIT = 4
"""The number of blocks is a multiple of this: four tiles of 8 rows are a subblock of activations."""
KERNEL_BATCH = 8
"""Sequences of one kernel: what shared memory holds. Larger batches take two, with the same bits."""


class StepOutput(NamedTuple):
    """What a step gives.

    Attributes:
      logits: float32 [B, V].
      k, v: the updated cache.
      expert_ids: int32 [L, B, X], most probable first.
    """

    logits: jax.Array
    k: jax.Array
    v: jax.Array
    expert_ids: jax.Array


@dataclass(frozen=True)
class Device:
    """What the kernel is compiled for. Tests use one emulated block.

    Attributes:
      blocks: thread blocks of the grid, one per multiprocessor; all of them must run at once.
      splits: parts that attention over one sequence and KV head is split into, at most; None takes as many as
        give every warpgroup one.
    """

    blocks: int
    splits: int | None = None
    emulate: bool = False
    interpret: Any = None

    @classmethod
    def of_cores(cls, cores: int) -> "Device":
        """A device of ``cores`` multiprocessors, as many of them as are a multiple of ``BLOCKS_UNIT``."""
        return cls(blocks=cores // BLOCKS_UNIT * BLOCKS_UNIT)


def _require(ok: bool, name: str, value: Any, need: str) -> None:
    if not ok:
        raise NotImplementedError(f"GPU decode step: {name} {value} is not supported; {need}")


def check_device(device: Any) -> None:
    """Raises NotImplementedError unless the kernel was written for ``device`` (a ``jax.Device``).

    Any number of multiprocessors from ``BLOCKS_UNIT`` on will do: at most one block starts on each, so that
    all of them run at once, as the grid barrier needs.
    """
    _require(device.platform == "gpu", "platform", device.platform, "need an NVIDIA GPU")
    capability = str(getattr(device, "compute_capability", "unknown"))
    _require(capability == "9.0", "compute capability", capability, "need 9.0 (Hopper)")
    cores = getattr(device, "core_count", 0)
    _require(cores >= BLOCKS_UNIT, "multiprocessors", cores, f"need at least {BLOCKS_UNIT}")


def check_supported(config: Any, types: dict[str, tuple[GGMLType, ...]], batch: int) -> None:
    """Raises NotImplementedError naming the first value that the kernel does not support."""
    step = kernel.STEP
    width = config.num_attention_heads * config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    _require(1 <= batch <= MAX_BATCH, "batch", batch, f"it must be 1 to {MAX_BATCH}")
    _require(config.hidden_size % step == 0, "hidden_size", config.hidden_size, f"need a multiple of {step}")
    _require(width % step == 0, "num_attention_heads * head_dim", width, f"need a multiple of {step}")
    _require(config.head_dim == 128, "head_dim", config.head_dim, "need 128")
    _require(group in (8, 16), "query heads per KV head", group, "need 8 or 16")
    _require(
        config.moe_intermediate_size % 256 == 0,
        "moe_intermediate_size",
        config.moe_intermediate_size,
        "need a multiple of 256",
    )
    _require(
        config.num_experts_per_tok % 4 == 0 and config.num_experts_per_tok <= 16,
        "num_experts_per_tok",
        config.num_experts_per_tok,
        "need 4, 8, 12 or 16",
    )
    _require(config.vocab_size % 8 == 0, "vocab_size", config.vocab_size, "need a multiple of 8")
    for role, used in types.items():
        for type in used:
            _require(type in TILE_FORMATS, f"type of {role}", type.name, "need Q4_K, Q5_K, Q6_K or Q8_0")


def _splits(blocks: int, kv_heads: int) -> int:
    """Parts that give every warpgroup of the grid one where a single sequence is decoded."""
    return max(1, min(kernel.WARPGROUPS * blocks // kv_heads, kernel.MAX_SPLITS))


def check(config: Any, params: Mapping[str, Any], batch: int) -> None:
    """Raises NotImplementedError unless the kernel runs this model with weights that lie so.

    Args:
      config: the model's ``Qwen3MoeConfig``.
      params: the model's parameters, or their shapes; see :func:`decode_step`.
      batch: sequences that are decoded together.
    """
    weights = StepWeights.of(params)
    check_supported(config, weights.types, batch)
    for role, stacks in weights.stacks.items():
        for stack in stacks:
            _require(stack.layout == GPU_TILES, f"layout of {role}", stack.layout, f"need {GPU_TILES}")


def step_config(
    weights: StepWeights, config: Any, batch: int, cache: jax.Array, device: Device, *, replay: bool = False
) -> kernel.StepConfig:
    """The kernel's static configuration for these weights and shapes; ``cache`` is that of the keys."""
    types = weights.types
    check_supported(config, types, batch)
    length = cache.shape[2]
    _require(length % kernel.KV_TILE == 0, "cache length", length, f"need a multiple of {kernel.KV_TILE}")
    return kernel.StepConfig(
        batch=batch,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        moe_width=config.moe_intermediate_size,
        vocab=config.vocab_size,
        cache_length=length,
        eps=config.rms_norm_eps,
        qkv_types=types["qkv"],
        qkv_always=weights.qkv_always,
        o_types=types["o"],
        gate_up_types=types["gate"],
        down_types=types["down"],
        lm_head_type=types["lm_head"][0],
        cache_dtype=cache.dtype,
        blocks=device.blocks,
        splits=device.splits or _splits(device.blocks, config.num_key_value_heads),
        replay=replay,
        emulate=device.emulate,
    )


def decode_step(
    params: Mapping[str, Any],
    config: Any,
    token_ids: jax.Array,
    positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    expert_ids: jax.Array | None = None,
    active: jax.Array | None = None,
    device: Device | None = None,
) -> StepOutput:
    """Decodes one token of every sequence. Call inside ``jit``, with the cache donated.

    Args:
      params: the model's parameters, matrices in GPU tiles: "layers" (a ``LayerTable``), "embed_tokens",
        "norm" and "lm_head".
      config: the model's ``Qwen3MoeConfig``.
      token_ids: int32 [B].
      positions: int32 [B], the tokens already in each sequence's cache; less than S.
      k: keys of the earlier tokens, after RoPE: bfloat16 or float16 [L, B, S, K, H], S a multiple of 64.
        The token's own are written at ``positions``.
      v: values, as k.
      expert_ids: int32 [L, B, X] forces these experts; their weights are still the model's own.
      active: bool [B], whose results are wanted; None for all. Where none of a kernel's sequences is, it
        ends at once: logits are then anything, and the cache is as it was.
      device: the grid; None takes the default device's multiprocessors.

    Raises:
      NotImplementedError: a shape or type that the kernel does not support.
    """
    device = device or Device.of_cores(multiprocessors())
    (batch,) = token_ids.shape
    replay = expert_ids is not None
    weights = StepWeights.of(params)
    whole = step_config(weights, config, batch, k, device, replay=replay)
    implementations.note("decode_step", "pallas", (s for stacks in weights.stacks.values() for s in stacks))
    x = embedding_lookup(params["embed_tokens"], token_ids)
    rope = jnp.stack(rope_tables(positions, whole.head_dim, config.rope_theta, config.rope_scaling), axis=1)
    refs = {"k_cache": jax.new_ref(k), "v_cache": jax.new_ref(v)}
    outputs = []
    for first in range(0, batch, KERNEL_BATCH):
        here = slice(first, min(first + KERNEL_BATCH, batch))
        c = replace(whole, batch=here.stop - first, first_sequence=first)
        forced = expert_ids[:, here] if replay else jnp.zeros((1, 1, 1), jnp.int32)
        wanted = jnp.ones(c.batch, jnp.int32) if active is None else active[here].astype(jnp.int32)
        operands = _operands(c, params, weights, x[here], positions[here], wanted, rope[here], forced)
        outputs.append((c, kernel.decode_step(c, operands | refs, interpret=device.interpret)))
    k, v = jax.freeze(refs["k_cache"]), jax.freeze(refs["v_cache"])
    logits = [out["logits"].reshape(c.batch, -1)[:, : config.vocab_size] for c, out in outputs]
    chosen = [out["expert_ids"] for _, out in outputs]
    return StepOutput(jnp.concatenate(logits), k, v, jnp.concatenate(chosen, axis=1))


def _operands(
    c: kernel.StepConfig,
    params: Mapping[str, Any],
    weights: StepWeights,
    x,
    positions,
    wanted,
    rope,
    expert_ids,
) -> dict[str, Any]:
    """The kernel's operands but for the cache."""
    layers: LayerTable = params["layers"]
    norm = lambda name: layers[name].options[0]
    router = layers[ROUTER].options[0].arrays["w"].reshape(c.layers, c.experts, c.hidden)
    shape = kernel.state_shape(c)
    state = jnp.zeros(shape, jnp.float32)
    state = lax.dynamic_update_slice(state, x.reshape(1, c.batch, -1, *shape[3:]), (0,) * len(shape))
    table = jnp.asarray(weights.table.reshape(-1))
    scalars = jnp.concatenate([table, positions.astype(jnp.int32), wanted])
    scalars = jnp.pad(scalars, (0, kernel.scalar_count(c) - scalars.size))
    split = lambda a: a.reshape(*a.shape[:-1], -1, 2, 4, 4)
    return {
        "scalars_in": scalars,
        "rope": rope,
        "replay_ids": expert_ids.astype(jnp.int32),
        "input_norm": split(norm("input_layernorm")),
        "post_norm": split(norm("post_attention_layernorm")),
        "q_norm": norm("self_attn.q_norm"),
        "k_norm": norm("self_attn.k_norm"),
        "final_norm": split(params["norm"]),
        "router": split(router),
        "weights": {role: [dict(s.arrays) for s in stacks] for role, stacks in weights.stacks.items()},
        "state": jax.new_ref(state),
    }
