"""Random weights on the device in the packed types of a file, for measurements of speed without a file."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.jax_backend.params import (
    GPU_ROLES,
    Params,
    Roles,
    ShapeOf,
    Types,
    plan_layers,
    whole_shape,
)
from qwen3_moe_jax.jax_backend.sharding import Shards
from qwen3_moe_jax.kernels_pallas import LayerTable
from qwen3_moe_jax.kernels_pallas.packed.stacks import abstract_packed

SCALES = {
    GGMLType.Q4_0: {"d": 4.3e-3},
    GGMLType.Q4_1: {"d": 4.3e-3, "m": -3.3e-2},
    GGMLType.Q5_0: {"d": 2.2e-3},
    GGMLType.Q5_1: {"d": 2.2e-3, "m": -3.4e-2},
    GGMLType.Q8_0: {"d": 2.7e-4},
    GGMLType.Q2_K: {"d": 2.2e-3, "dmin": 3.3e-3},
    GGMLType.Q3_K: {"d": 2.4e-4},
    GGMLType.Q4_K: {"d": 1.4e-4, "dmin": 1.05e-3},
    GGMLType.Q5_K: {"d": 0.7e-4, "dmin": 1.085e-3},
    GGMLType.Q6_K: {"d": 1.5e-5},
    GGMLType.IQ4_NL: {"d": 3e-4},
    GGMLType.IQ4_XS: {"d": 8e-6},
}
"""Mean of the float16 arrays that gives weights of about 0.02."""


MAX_WORDS = 1 << 28
"""Random words of an array; a larger one has these again and again: nothing is as large that keeps them."""


@partial(jax.jit, static_argnums=(1, 2, 3))
def random_array(seed: Any, shape: tuple[int, ...], mask: int, scale: float) -> jax.Array:
    """Random int32 words under ``mask``; or float16 around ``scale`` where that is not zero."""
    key = jnp.stack([jnp.uint32(n) for n in (seed, 7, 11, 13)])
    count, *each = shape
    distinct = min(count, max(1, MAX_WORDS // math.prod(each)))
    bits = lax.rng_bit_generator(key, (distinct, *each), jnp.uint32)[1]
    if distinct < count:
        bits = bits[jnp.arange(count) % distinct]
    if scale:
        return (scale * (0.75 + 0.5 * (bits >> 8).astype(jnp.float32) * 2.0**-24)).astype(jnp.float16)
    return lax.bitcast_convert_type(bits & jnp.uint32(mask), jnp.int32)


def random_packed(seed: int, rows: PackedTensor) -> PackedTensor:
    """Random weights of the type, layout and shapes of ``rows``, made on the device."""
    kind, arrays = rows.type, {}
    for i, (name, like) in enumerate(rows.arrays.items()):
        key = seed * 16 + i
        if name == "w":
            w = (2e-2 * jax.random.normal(jax.random.key(key), like.shape)).astype(jnp.bfloat16)
            is_half = like.dtype == jnp.float16
            arrays[name] = w.astype(jnp.float16) if is_half else lax.bitcast_convert_type(w, jnp.uint16)
        elif like.dtype == jnp.float16:
            arrays[name] = random_array(key, like.shape, 0, SCALES[kind][name.rstrip("01")])
        elif name == "e":
            arrays[name] = jnp.full(like.shape, 120 if like.dtype == jnp.uint8 else 120 * 257, like.dtype)
        else:
            six_bits = name == "scales" and kind in (GGMLType.Q4_K, GGMLType.Q5_K)
            *leading, last = like.shape
            words = random_array(
                key,
                (*leading, last * like.dtype.itemsize // 4),
                0x3F3F3F3F if six_bits else 0xFFFFFFFF,
                0.0,
            )
            arrays[name] = lax.bitcast_convert_type(words, like.dtype).reshape(like.shape)
    return PackedTensor(arrays, kind, rows.layout)


def packed_like(kind: GGMLType, rows: int, columns: int) -> PackedTensor:
    """The shapes of weights as a GPU holds them."""
    like = abstract_packed(kind, (rows, columns))
    return jax.eval_shape(partial(to_gpu_tiles, xp=jnp), like) if kind in TILED_TYPES else like


def random_matrices(seed: int, kind: GGMLType, rows: int, columns: int) -> PackedTensor:
    """Random weights as a GPU holds them."""
    return random_packed(seed, packed_like(kind, rows, columns))


def random_params(
    config: Qwen3MoeConfig,
    types: Types,
    roles: Roles | None = None,
    shape_of: ShapeOf = whole_shape,
) -> Params:
    """The model's parameters; embeddings are plain bfloat16 bits, which every layout's lookup can read.

    Args:
      roles: tensors that share stacks, as ``params.GPU_ROLES``.
      shape_of: a tensor's shape on one device, where that has a part.
    """
    plan = plan_layers(config, types, roles or {}, shape_of)
    stacks: dict[str, Any] = {}
    for i, (name, like) in enumerate(plan.stacks.items()):
        key = jax.random.key(i)
        if not isinstance(like, PackedTensor):
            stacks[name] = jnp.ones(like.shape, jnp.float32)
        elif like.type is GGMLType.F32:
            w = 0.02 * jax.random.normal(key, like.shape, jnp.float32)
            stacks[name] = PackedTensor({"w": w}, GGMLType.F32)
        else:
            stacks[name] = random_matrices(i, like.type, *like.shape)
    embedding = jax.random.normal(jax.random.key(99), (config.vocab_size, config.hidden_size), jnp.bfloat16)
    bits = lax.bitcast_convert_type(embedding, jnp.uint16)
    head = next(spec for spec in tensor_specs(config) if spec.path == "lm_head")
    return {
        "layers": LayerTable(stacks, plan.tensors),
        "norm": jnp.ones(config.hidden_size, jnp.float32),
        "embed_tokens": PackedTensor({"w": bits}, GGMLType.BF16),
        "lm_head": random_matrices(99, types["lm_head"], *shape_of(head)),
    }


def sharded_random_params(shards: Shards, types: Types) -> Params:
    """As ``random_params``, on every device of a mesh its part: one array at a time, as memory is short."""
    make = partial(random_params, shards.config, types, GPU_ROLES, shards.shape_of)
    local = jax.eval_shape(make)
    tree = jax.tree.structure(local)
    is_spec = lambda node: isinstance(node, PartitionSpec)
    every = jax.tree.map(
        lambda spec, of: [spec] * len(jax.tree.leaves(of)), shards.param_specs(local), local, is_leaf=is_spec
    )
    specs = jax.tree.leaves(every, is_leaf=is_spec)

    def leaf(index: int, spec: PartitionSpec) -> jax.Array:
        one = lambda: jax.tree.leaves(make())[index]
        on_all = jax.shard_map(one, mesh=shards.mesh, in_specs=(), out_specs=spec, check_vma=False)
        return jax.block_until_ready(jax.jit(on_all)())

    return jax.tree.unflatten(tree, [leaf(i, spec) for i, spec in enumerate(specs)])
