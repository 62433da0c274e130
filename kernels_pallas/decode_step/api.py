"""A whole decoded token on an NVIDIA GPU, from Ampere on, as one kernel.

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
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES
from qwen3_moe_jax.convert.packed import GPU_TILES, ROWS
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.attention.api import CACHE_TILE
from qwen3_moe_jax.kernels_pallas.decode_step import config as kernel_config
from qwen3_moe_jax.kernels_pallas.decode_step import kernel
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import DEVICE_AXES, ONE_DEVICE, Split
from qwen3_moe_jax.kernels_pallas.decode_step.row_formats import ROW_FORMATS
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import check_shared_memory, shared_memory_budget
from qwen3_moe_jax.kernels_pallas.decode_step.weights import ROUTER, StepWeights
from qwen3_moe_jax.kernels_pallas.embedding_lookup.api import embedding_lookup
from qwen3_moe_jax.kernels_pallas.gpu import cards
from qwen3_moe_jax.kernels_pallas.gpu.device import multiprocessors
from qwen3_moe_jax.kernels_pallas.norm_rope.api import rope_tables
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable

MAX_BATCH = 16
MODEL_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
"""What the kernel's configuration takes from the model's, under the same names."""
NEEDED_TYPES = (
    f"need one of {', '.join(type.name for type in ROW_FORMATS)}; without it operations run one by one, in "
    "kernels where they have them, and XLA multiplies by this type alone"
)
"""Of a matrix that the kernel multiplies by."""
BLOCKS_UNIT = 4
"""The number of blocks is a multiple of this: four tiles of 8 rows are a subblock of activations."""
KERNEL_BATCH = 8
"""Sequences of one kernel, at most. Larger batches take several, with the same bits."""


class StepOutput(NamedTuple):
    """What a step gives.

    Attributes:
      logits: float32 [B, V].
      k, v: the updated cache.
      expert_ids: int32 [L, B, X], most probable first.
      scales: the updated scales, or None.
    """

    logits: jax.Array
    k: jax.Array
    v: jax.Array
    expert_ids: jax.Array
    scales: tuple[jax.Array, jax.Array] | None = None


@dataclass(frozen=True)
class Device:
    """What the kernel is compiled for. Tests use one emulated block.

    Attributes:
      blocks: thread blocks of the grid, one per multiprocessor; all of them must run at once.
      kernels: "hopper" (attention by ``wgmma``) or "portable" (by ``mma``, from Ampere on).
      shared_memory: bytes that a block can have.
      splits: parts that attention over one sequence and KV head is split into, at most; None takes as many as
        give every warpgroup one.
      mesh: how the model is split over devices like this one, which decode together.
      trace_folder: where the begin and end of every phase in every block are written, or None.
    """

    blocks: int
    kernels: str = "hopper"
    shared_memory: int = cards.capabilities()["9.0"].shared_memory
    splits: int | None = None
    emulate: bool = False
    interpret: Any = None
    trace_folder: str | None = None
    mesh: Split = ONE_DEVICE

    @classmethod
    def of_cores(cls, cores: int, **options: Any) -> "Device":
        """A device of ``cores`` multiprocessors, as many of them as are a multiple of ``BLOCKS_UNIT``."""
        return cls(blocks=cores // BLOCKS_UNIT * BLOCKS_UNIT, **options)

    @classmethod
    def of(
        cls, device: Any, kernels: str | None = None, cores: int | None = None, mesh: Split = ONE_DEVICE
    ) -> "Device":
        """That of a GPU.

        Args:
          device: a ``jax.Device``.
          kernels: "hopper" or "portable"; None takes Hopper's where they run.
          cores: multiprocessors that are used; None takes all.
          mesh: as the attribute.
        """
        version = str(getattr(device, "compute_capability", "9.0"))
        known = cards.capability(version)
        limit = known.shared_memory if known else Device.shared_memory
        return cls.of_cores(
            cores or getattr(device, "core_count", 0) or multiprocessors(),
            kernels=kernels or ("hopper" if version == "9.0" else "portable"),
            shared_memory=getattr(device, "shared_memory_per_block_optin", None) or limit,
            mesh=mesh,
        )


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
    is_ampere = capability[:1].isdigit() and int(capability.split(".")[0]) >= 8
    _require(is_ampere, "compute capability", capability, "need 8.0 (Ampere) or later")
    cores = getattr(device, "core_count", 0)
    _require(cores >= BLOCKS_UNIT, "multiprocessors", cores, f"need at least {BLOCKS_UNIT}")


def check_supported(config: Any, types: dict[str, tuple[GGMLType, ...]], batch: int) -> None:
    """Raises NotImplementedError naming the first value that the kernel does not support."""
    width = config.num_attention_heads * config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    _require(1 <= batch <= MAX_BATCH, "batch", batch, f"it must be 1 to {MAX_BATCH}")
    _require(config.hidden_size % 256 == 0, "hidden_size", config.hidden_size, "need a multiple of 256")
    _require(width % 256 == 0, "num_attention_heads * head_dim", width, "need a multiple of 256")
    _require(config.head_dim in (64, 128), "head_dim", config.head_dim, "need 64 or 128")
    _require(group <= 16, "query heads per KV head", group, "need at most 16")
    _require(
        group * config.head_dim % 128 == 0,
        "query heads per KV head",
        group,
        "need an even number of 64 values",
    )
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
            _require(type in ROW_FORMATS, f"type of {role}", type.name, NEEDED_TYPES)


def kernel_batch(config: Any, device: Device) -> int:
    """Sequences of one kernel: as many as shared memory holds, at most ``KERNEL_BATCH``.

    Raises:
      NotImplementedError: not even one sequence fits.
    """
    for batch in range(KERNEL_BATCH, 1, -1):
        budget = shared_memory_budget(shape_config(config, batch, device))
        if sum(budget.values()) <= device.shared_memory:
            return batch
    check_shared_memory(shape_config(config, 1, device), device.shared_memory)
    return 1


def _splits(config: Any, device: Device) -> int:
    """Parts that give every warpgroup of the grid one where a single sequence is decoded.

    One where heads have not 128 values: joining is written for these.
    """
    if config.head_dim != 128:
        return 1
    workers = kernel_config.WARPGROUPS * device.blocks
    return device.splits or max(1, min(workers // config.num_key_value_heads, kernel_config.MAX_SPLITS))


def check(
    config: Any,
    params: Mapping[str, Any],
    batch: int,
    device: Any = None,
    kernels: str | None = None,
    mesh: Split = ONE_DEVICE,
) -> None:
    """Raises NotImplementedError unless the kernel runs this model on this device, with weights that lie so.

    Args:
      config: the model's ``Qwen3MoeConfig``.
      params: the model's parameters, or their shapes; see :func:`decode_step`.
      batch: sequences that are decoded together.
      device: a ``jax.Device``; None does not ask for one.
      kernels, mesh: as ``Device.of``.
    """
    weights = StepWeights.of(params)
    config = mesh.part_of(config, config.vocab_size)
    check_supported(config, weights.types, batch)
    if device is not None:
        check_device(device)
        kernel_batch(config, Device.of(device, kernels, mesh=mesh))
    for role, stacks in weights.stacks.items():
        for stack in stacks:
            layout = GPU_TILES if stack.type in TILED_TYPES and stack is not params["embed_tokens"] else ROWS
            _require(stack.layout == layout, f"layout of {role}", stack.layout, f"need {layout}")


def step_config(
    weights: StepWeights, config: Any, batch: int, cache: jax.Array, device: Device, *, replay: bool = False
) -> kernel_config.StepConfig:
    """The kernel's static configuration for these weights and shapes; ``cache`` is that of the keys."""
    types = weights.types
    check_supported(config, types, batch)
    length = cache.shape[2]
    _require(length % CACHE_TILE == 0, "cache length", length, f"need a multiple of {CACHE_TILE}")
    return replace(
        shape_config(config, batch, device, cache.dtype),
        cache_length=length,
        qkv_types=types["qkv"],
        qkv_always=weights.qkv_always,
        o_types=types["o"],
        gate_up_types=types["gate"],
        down_types=types["down"],
        lm_head_type=types["lm_head"][0],
        lm_head_tiled=weights.lm_head_tiled,
        replay=replay,
    )


def shape_config(
    config: Any, batch: int, device: Device, cache_dtype: Any = jnp.float16
) -> kernel_config.StepConfig:
    """The static configuration of a Q4_K_M file; memory depends on the model and the cache's type alone.

    One sequence's first tiles are asked for early where shared memory has room for them. In batches a
    warpgroup has several tiles, and gains less than a copy of each through shared memory costs.
    Where activations of all experts do not fit, down of the portable kernel takes them in passes. Hopper's
    kernel does not: its cards hold 8 sequences of 30B, and nothing else was measured there.

    Args:
      config: on a mesh, one device's part of it (``Split.part_of``).
    """
    q4, q6 = GGMLType.Q4_K, GGMLType.Q6_K
    plain = kernel_config.StepConfig(
        batch=batch,
        **{name: getattr(config, name) for name in MODEL_FIELDS},
        cache_length=CACHE_TILE,
        qkv_types=(q4, q6),
        qkv_always=(config.num_attention_heads + config.num_key_value_heads) * config.head_dim // 8,
        o_types=(q4,),
        gate_up_types=(q4,),
        down_types=(q4, q6),
        lm_head_type=q6,
        cache_dtype=jnp.dtype(cache_dtype),
        blocks=device.blocks,
        splits=_splits(config, device),
        mesh=device.mesh,
        kernels=device.kernels,
        emulate=device.emulate,
        trace_folder=device.trace_folder,
    )
    choices = [replace(plain, prefetches=batch == 1), plain]
    if device.kernels == "portable":
        choices += [replace(plain, down_passes=n) for n in plain.down_pass_choices[1:]]
    size = lambda c: sum(shared_memory_budget(c).values())
    return next((c for c in choices if size(c) <= device.shared_memory), min(choices, key=size))


def decode_step(
    params: Mapping[str, Any],
    config: Any,
    token_ids: jax.Array,
    positions: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scales: tuple[jax.Array, jax.Array] | None = None,
    expert_ids: jax.Array | None = None,
    active: jax.Array | None = None,
    one_sequence: bool = False,
    device: Device | None = None,
    kernels: str | None = None,
    mesh: Split = ONE_DEVICE,
) -> StepOutput:
    """Decodes one token of every sequence. Call inside ``jit``, with the cache donated.

    On a mesh it is called inside ``jax.shard_map`` over the axes ``DEVICE_AXES``, with one device's part of
    the parameters and of the cache; all devices get the same logits.

    Args:
      params: the model's parameters, matrices in GPU tiles: "layers" (a ``LayerTable``), "embed_tokens",
        "norm" and "lm_head".
      config: the model's ``Qwen3MoeConfig``.
      token_ids: int32 [B].
      positions: int32 [B], the tokens already in each sequence's cache; less than S.
      k: keys of the earlier tokens, after RoPE: bfloat16, float16 or int8 [L, B, S, K, H], S a multiple of
        64. The token's own are written at ``positions``.
      v: values, as k.
      scales: where these are int8, what each vector of H is multiplied by: float32 [L, B, S, K] of keys, and
        of values. Attention has the new token's key and value as they are written.
      expert_ids: int32 [L, B, X] forces these experts; their weights are still the model's own.
      active: bool [B], whose results are wanted; None for all. Where none of a kernel's sequences is, it
        ends at once: logits are then anything, and the cache is as it was.
      one_sequence: the B tokens are one sequence's, at positions one after the other, and the cache has one
        row: the bits are those of B steps.
      device: the grid; None takes the default device's multiprocessors.
      kernels, mesh: without ``device``, as ``Device.of``.

    Raises:
      NotImplementedError: a shape or type that the kernel does not support.
    """
    device = device or Device.of(jax.devices()[0], kernels, multiprocessors(), mesh)
    (batch,) = token_ids.shape
    replay = expert_ids is not None
    weights = StepWeights.of(params)
    vocab_size, own_rows = config.vocab_size, params.get("lm_head", params["embed_tokens"]).shape[0]
    config = device.mesh.part_of(config, own_rows)
    whole = step_config(weights, config, batch, k, device, replay=replay)
    whole = replace(whole, gathers=own_rows < vocab_size)
    implementations.note(
        "decode_step", device.kernels, (s for stacks in weights.stacks.values() for s in stacks)
    )
    x = embedding_lookup(params["embed_tokens"], token_ids)
    rope = jnp.stack(rope_tables(positions, whole.head_dim, config.rope_theta, config.rope_scaling), axis=1)
    if (scales is not None) != whole.has_scales:
        raise ValueError(f"a cache of {k.dtype} {'has' if scales else 'needs'} scales: int8 alone has them")
    caches = {"k_cache_gmem": k, "v_cache_gmem": v}
    if scales is not None:
        caches |= dict(zip(("k_scale_gmem", "v_scale_gmem"), scales, strict=True))
    refs = {name: jax.new_ref(array) for name, array in caches.items()}
    outputs = []
    size = kernel_batch(config, device)
    for first in range(0, batch, size):
        here = slice(first, min(first + size, batch))
        row = 0 if one_sequence else first
        c = replace(whole, batch=here.stop - first, first_sequence=row, one_sequence=one_sequence)
        forced = expert_ids[:, here] if replay else jnp.zeros((1, 1, 1), jnp.int32)
        wanted = jnp.ones(c.batch, jnp.int32) if active is None else active[here].astype(jnp.int32)
        operands = _operands(c, params, weights, x[here], positions[here], wanted, rope[here], forced)
        operands = operands._replace(**refs)
        outputs.append((c, kernel.decode_step(c, operands, interpret=device.interpret)))
    k, v, *rest = (jax.freeze(ref) for ref in refs.values())
    logits = [_rows_in_order(c, out.logits_gmem) for c, out in outputs]
    chosen = [out.expert_ids_gmem for _, out in outputs]
    chosen = jnp.concatenate(chosen, axis=1)
    return StepOutput(jnp.concatenate(logits), k, v, chosen, (rest[0], rest[1]) if rest else None)


def _rows_in_order(c: kernel_config.StepConfig, logits: jax.Array) -> jax.Array:
    """The kernel's logits as float32 [B, V]."""
    rows = logits.reshape(*logits.shape[: 1 + c.gathers], -1)[..., : c.vocab_size]
    return jnp.moveaxis(rows, 0, 1).reshape(c.batch, -1) if c.gathers else rows


def _operands(
    c: kernel_config.StepConfig,
    params: Mapping[str, Any],
    weights: StepWeights,
    x,
    positions,
    wanted,
    rope,
    expert_ids,
) -> kernel_config.Operands:
    """The kernel's operands but for the cache."""
    layers: LayerTable = params["layers"]
    norm = lambda name: layers[name].options[0]
    router = layers[ROUTER].options[0].arrays["w"]
    if router.dtype == jnp.uint16:  # bfloat16's bits
        router = lax.bitcast_convert_type(router, jnp.bfloat16)
    router = router.reshape(c.num_hidden_layers, c.num_experts, c.hidden_size)
    shape = kernel_config.state_shape(c)
    state = jnp.zeros(shape, jnp.float32)
    state = lax.dynamic_update_slice(state, x.reshape(1, c.batch, -1, *shape[3:]), (0,) * len(shape))
    table = jnp.asarray(weights.table.reshape(-1))
    number = [lax.axis_index(DEVICE_AXES).reshape(1)] if c.devices > 1 else []
    scalars = jnp.concatenate([table, positions.astype(jnp.int32), wanted, *number])
    scalars = jnp.pad(scalars, (0, kernel_config.scalar_count(c) - scalars.size))
    split = lambda a: a.reshape(*a.shape[:-1], -1, 2, 4, 4)
    return kernel_config.Operands(
        scalars_gmem=scalars,
        rope_gmem=rope,
        replay_ids_gmem=expert_ids.astype(jnp.int32),
        input_norm_gmem=split(norm("input_layernorm")),
        post_norm_gmem=split(norm("post_attention_layernorm")),
        q_norm_gmem=norm("self_attn.q_norm"),
        k_norm_gmem=norm("self_attn.k_norm"),
        final_norm_gmem=split(params["norm"]),
        router_gmem=split(router),
        weights_gmem={role: [dict(s.arrays) for s in stacks] for role, stacks in weights.stacks.items()},
        state_gmem=jax.new_ref(state),
        k_cache_gmem=None,
        v_cache_gmem=None,
    )
