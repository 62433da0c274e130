"""A block's shared memory in the decode kernel.

``python -m scripts.shared_memory`` prints its bytes by name.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.kernels_pallas.decode_step.config import (
    MAX_NORMED,
    MAX_SPLITS,
    PIECE,
    STORE_GROUP,
    WARPGROUPS,
    Quantized,
    StepConfig,
    ceil_div,
    padded,
    quantized_types,
    scalar_count,
    spans_of,
)
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import RANK_WORDS

REDUCE_SITES = ("norm", "router", "split_largest", "split_sum")
"""Callers of ``Grid.totals``; each has scratch of its own."""
SHARED_ALIGN = 1024
"""Each buffer begins at a multiple of this many bytes."""
REDUCTION_BYTES = 2048
"""What Pallas reserves for reductions across warps (its default)."""
PADDING_BYTES = 16
"""After a row of queries, keys or values in shared memory: 8 rows then lie in different banks."""


class Scratch(NamedTuple):
    """A block's shared memory.

    Attributes:
      barrier: of both warpgroups.
      sums_or_attention_smem: (sums, (q, stats, outputs)): attention needs no sums of products, and the rest
        not what attention has here: queries [warpgroups, columns, head_dim]; of its warps the largest scores
        and the sums, float32 [warpgroups, 2, 4 warps, columns], and outputs of 8 columns, float32
        [warpgroups, 4, 8, head_dim].
      ids_smem, routing_smem: int32 and float32 [padded batch, X], the chosen experts and their weights.
      new_score_smem, new_value_smem: the new token's scores, float32 [warpgroups, columns], and value
        [warpgroups, head_dim].
      pair_order_smem: int32 [pairs], pairs in the order of their experts.
      split_plan_smem: int32 [padded batch + 4, 4] (``Attention.plan_splits``).
      reduce_smem: scratch of ``Grid.totals``.
      scalars_smem: a copy of ``scalars_gmem``.
      split_weight_smem: float32 [warpgroups, MAX_SPLITS].
      squares_smem: float32 [warpgroups, padded batch], sums of squares of the residual stream.
      x_scale_smem, x_sums_smem, x_words_smem: activations that this block multiplies (:class:`Quantized`).
      zeros_smem: int32 [16] of zeros.
      rank_smem: int32 [warpgroups, RANK_WORDS] where experts are ranked (``StepConfig.ranks_experts``).
      best_smem: float32 [X], the logits of the chosen experts, likewise.
      tiles_smem: (k, v) where they are asked for early (``StepConfig.prefetches``), else None.
    """

    barrier: Any
    sums_or_attention_smem: Any
    ids_smem: Any
    new_score_smem: Any
    new_value_smem: Any
    pair_order_smem: Any
    split_plan_smem: Any
    reduce_smem: Any
    routing_smem: Any
    scalars_smem: Any
    split_weight_smem: Any
    squares_smem: Any
    x_scale_smem: Any
    x_sums_smem: Any
    x_words_smem: Any
    zeros_smem: Any
    rank_smem: Any = None
    best_smem: Any = None
    tiles_smem: Any = None

    @classmethod
    def of(cls, types: "Scratch", refs: tuple) -> "Scratch":
        """The references of those types that are not None, in their order."""
        names = [name for name, type in types._asdict().items() if type is not None]
        return cls(**dict(zip(names, refs, strict=True)))

    @property
    def x_smem(self) -> Quantized:
        return Quantized(self.x_words_smem, self.x_scale_smem, self.x_sums_smem)


def _superblocks(c: StepConfig) -> int:
    """Superblocks of the longest activations that a block multiplies."""
    experts = c.experts_per_part // c.down_passes
    down = ceil_div(experts * c.moe_intermediate_size, PIECE) * PIECE
    return max(padded(c.hidden_size), padded(c.attention_width), down) // SUPERBLOCK


def scratch_types(c: StepConfig) -> Scratch:
    """The types of :class:`Scratch`."""
    parts = max(
        8 * spans_of(max(c.hidden_size, c.attention_width)), 4 * c.moe_intermediate_size // SUPERBLOCK
    )
    shared = plgpu.SMEM
    x = quantized_types(c.batch, _superblocks(c))
    tables = (c.padded_batch, c.num_experts_per_tok)
    row = lambda dtype: c.head_dim + PADDING_BYTES // jnp.dtype(dtype).itemsize
    tile = shared((WARPGROUPS, c.kv_tile, row(c.cache_dtype)), c.cache_dtype)
    attention = [
        shared((WARPGROUPS, c.query_columns, row(c.tile_dtype)), c.tile_dtype),
        shared((WARPGROUPS, 2, 4, c.query_columns), jnp.float32),
        shared((WARPGROUPS, 4, 8, c.head_dim), jnp.float32),
    ]
    return Scratch(
        barrier=plgpu.Barrier(num_arrivals=WARPGROUPS),
        sums_or_attention_smem=plgpu.RefUnion(
            shared((max(2, c.batch), STORE_GROUP, parts + 1, 8), jnp.float32),
            attention,
        ),
        ids_smem=shared(tables, jnp.int32),
        new_score_smem=shared((WARPGROUPS, c.query_columns), jnp.float32),
        new_value_smem=shared((WARPGROUPS, c.head_dim), jnp.float32),
        pair_order_smem=shared((c.pairs,), jnp.int32),
        split_plan_smem=shared((c.padded_batch + 4, 4), jnp.int32),
        reduce_smem=shared((WARPGROUPS, len(REDUCE_SITES), 2, 2 * MAX_NORMED, 4), jnp.float32),
        routing_smem=shared(tables, jnp.float32),
        scalars_smem=shared((scalar_count(c),), jnp.int32),
        split_weight_smem=shared((WARPGROUPS, MAX_SPLITS), jnp.float32),
        squares_smem=shared((WARPGROUPS, c.padded_batch), jnp.float32),
        x_scale_smem=shared(x.scale.shape, x.scale.dtype),
        x_sums_smem=shared(x.sums.shape, x.sums.dtype),
        x_words_smem=shared(x.words.shape, x.words.dtype),
        zeros_smem=shared((16,), jnp.int32),
        rank_smem=shared((WARPGROUPS, RANK_WORDS), jnp.int32) if c.ranks_experts else None,
        best_smem=shared((c.num_experts_per_tok,), jnp.float32) if c.ranks_experts else None,
        tiles_smem=plgpu.RefUnion([tile] * 2) if c.prefetches else None,
    )


def shared_memory_budget(c: StepConfig) -> dict[str, int]:
    """Bytes of a block's shared memory by name: the buffers of :class:`Scratch`, and what Pallas takes."""
    budget = {
        name: _bytes(buffer)
        for name, buffer in scratch_types(c)._asdict().items()
        if buffer is not None and name != "barrier"
    }
    return budget | {"reductions": REDUCTION_BYTES, "barriers": SHARED_ALIGN}


def check_shared_memory(c: StepConfig, limit: int) -> None:
    """Raises NotImplementedError where a block needs more shared memory than ``limit``, in bytes."""
    budget = shared_memory_budget(c)
    total = sum(budget.values())
    if total > limit:
        name = max(budget, key=lambda name: budget[name])
        raise NotImplementedError(
            f"GPU decode step: a batch of {c.batch} needs {total} bytes of shared memory per block "
            f"({name} {budget[name]}), and the device has {limit}"
        )


def _bytes(buffer: Any) -> int:
    """Of one buffer; a union of buffers is as long as the longest of them."""
    nbytes = int(np.prod(buffer.shape)) * np.dtype(buffer.dtype).itemsize
    return ceil_div(nbytes, SHARED_ALIGN) * SHARED_ALIGN
