"""attention on Hopper GPUs for many queries: a flash-attention kernel in Pallas:Mosaic GPU.

The query heads that share a KV head are rows of one operand (row = token * group + head), so
keys and values are read once for all of them, and a tile of 128 rows spans few positions.
Two warpgroups multiply, a third brings keys and values through the tensor memory accelerator;
while one warpgroup computes its softmax the other one has the tensor cores. Tiles of keys
that every row sees need no mask, tiles that none sees are not read.

The recurrence is in ``block``; the division of labour is that of FlashAttention-3
(https://arxiv.org/abs/2407.08608) and of JAX's own ``pallas.ops.gpu.attention_mgpu``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.attention.block import (
    PER_ROW,
    RESULT,
    Arrays,
    fill,
    launch,
    share_of,
    weights_of,
)
from qwen3_moe_jax.kernels_pallas.gpu.device import require_hopper

ROWS = 64
"""Rows of one warpgroup's operand."""
_DTYPES = (jnp.bfloat16, jnp.float16)
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes: keys per tile, pipeline stages of keys and values in shared memory, warpgroups that multiply."""

    keys: int = 128
    stages: int = 2
    warpgroups: int = 2

    @property
    def tile(self) -> int:
        """Rows of a block."""
        return ROWS * self.warpgroups


ONE_QUERY = AttentionConfig(stages=3, warpgroups=1)
"""For one position per sequence, whose heads are a few rows of one operand."""


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    slots: jax.Array | None = None,
    scales: Any = None,
    *,
    config: AttentionConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See ``api.attention``; k_cache and v_cache are [L, C, S, K, H] of bfloat16 or float16.

    Queries, softmax weights and the result are rounded to the cache's dtype, sums are float32.

    Raises:
      NotImplementedError: not a Hopper GPU, or arrays that the kernel does not take.
    """
    require_hopper(interpret)
    return attention_with(
        make_kernel,
        config or AttentionConfig(),
        q,
        k_cache,
        v_cache,
        positions,
        layer,
        slots,
        scales,
        interpret,
    )


def attention_with(
    make: Callable[..., Any],
    config: AttentionConfig,
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    slots: jax.Array | None,
    scales: Any,
    interpret: Any,
) -> jax.Array:
    """As :func:`attention`, by a kernel that ``make`` makes (as :func:`make_kernel`)."""
    if scales is not None or k_cache.dtype not in _DTYPES or v_cache.dtype != k_cache.dtype:
        raise NotImplementedError(f"the Hopper kernel reads 16-bit caches, not {k_cache.dtype}")
    if q.shape[-1] % 64:
        raise NotImplementedError(f"the Hopper kernel needs a head_dim in 64s, not {q.shape[-1]}")
    slots = jnp.arange(len(q), dtype=jnp.int32) if slots is None else slots.astype(jnp.int32)
    return _attention(q, k_cache, v_cache, positions, layer.reshape(1), slots, config, interpret, make)


@partial(jax.jit, static_argnums=(6, 7, 8))
def _attention(
    q,
    k_cache,
    v_cache,
    positions,
    layer,
    slots,
    config: AttentionConfig,
    interpret: Any,
    make: Callable[..., Any],
) -> jax.Array:
    B, T, N, H = q.shape
    S, K = k_cache.shape[2:4]
    group, tile = N // K, config.tile
    rows = T * group
    padding = -rows % tile
    q = q.astype(k_cache.dtype).reshape(B, T, K, group, H).transpose(0, 2, 1, 3, 4).reshape(B * K, rows, H)
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0)))
    row_positions = jnp.pad(jnp.repeat(positions, group, axis=1), ((0, 0), (0, padding)), constant_values=-1)
    by_tile = row_positions.reshape(B, -1, tile)
    bounds = _bounds(by_tile.min(axis=2), by_tile.max(axis=2), S, config)
    out = attend_rows(q, k_cache, v_cache, row_positions, bounds, layer, slots, config, interpret, make)
    out = out[:, :rows].reshape(B, K, T, group, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(B, T, N, H).astype(jnp.float32)


def _bounds(minimum: jax.Array, maximum: jax.Array, length: int, config: AttentionConfig) -> jax.Array:
    """Tiles of keys that some row sees and, of these, that all see: int32 [..., 2], from positions."""
    read = -(-(jnp.clip(maximum, -1, length - 1) + 1) // config.keys)
    return jnp.stack([read, jnp.clip(minimum + 1, 0, length) // config.keys], axis=-1).astype(jnp.int32)


def one_query_rows(
    positions: jax.Array, length: int, config: AttentionConfig = ONE_QUERY
) -> tuple[jax.Array, jax.Array]:
    """What :func:`attend_rows` wants for one query of each sequence, the same for all layers.

    Args:
      positions: int32 [B].
      length: S.
      config: of one tile of rows per sequence.

    Returns:
      Positions [B, rows] and bounds [B, 1, 2].
    """
    rows = jnp.broadcast_to(positions[:, None], (len(positions), config.tile)).astype(jnp.int32)
    return rows, _bounds(positions[:, None], positions[:, None], length, config)


def attend_rows(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    bounds: jax.Array,
    layer: jax.Array,
    slots: jax.Array,
    config: AttentionConfig,
    interpret: Any = None,
    make: Callable[..., Any] | None = None,
) -> jax.Array:
    """The kernel alone.

    Args:
      q: [B * K, rows, H] in the caches' dtype, rows in ``config.tile``s. A row that is not written is not
        read by any other.
      k_cache, v_cache: [L, C, S, K, H].
      positions: int32 [B, rows], negative for padding.
      bounds: int32 [B, tiles, 2], tiles of keys to read, and how many of them need no mask.
      layer: int32 [1].
      slots: int32 [B].
      make: makes the kernel; None makes this module's.

    Returns:
      As q.
    """
    L, C, S, K, H = k_cache.shape
    shape = {"batch": len(slots), "kv_heads": K, "rows": q.shape[1], "head_dim": H, "capacity": C}
    caches = (c.reshape(L * C, S, K * H) for c in (k_cache, v_cache))
    return (make or make_kernel)(config, interpret, dtype=q.dtype, **shape)(
        layer, slots, bounds, positions, q, *caches
    )


def make_kernel(config: AttentionConfig, interpret: Any, **shape: Any) -> Any:
    """See ``block.launch``; ``shape`` is of the arrays."""
    return launch(
        _Block,
        config,
        interpret,
        scratch=scratch_of(config, shape["head_dim"], shape["dtype"]),
        warpgroups=config.warpgroups + 1,
        name="prefill_attention",
        **shape,
    )


def scratch_of(config: AttentionConfig, head_dim: int, dtype: Any) -> "_Scratch":
    """A block's shared memory and barriers."""
    one = lambda *axes: plgpu.SMEM(axes, dtype, transforms=_SWIZZLED)
    used = plgpu.Barrier(num_barriers=config.stages, num_arrivals=config.warpgroups)
    full = plgpu.Barrier(num_barriers=config.stages)
    return _Scratch(
        q_tile=one(config.warpgroups, ROWS, head_dim),
        k_tile=one(config.stages, config.keys, head_dim),
        v_tile=one(config.stages, config.keys, head_dim),
        q_full=plgpu.Barrier(num_barriers=config.warpgroups),
        k_full=full,
        v_full=full,
        k_used=used,
        v_used=used,
    )


class _Scratch(NamedTuple):
    """Shared memory, and barriers: "full" when a copy is there, "used" when all have read it.

    Attributes:
      q_tile: [warpgroups, 64, H]; k_tile, v_tile: [stages, keys, H].
      q_full: of each warpgroup; the others of each stage.
    """

    q_tile: Any
    k_tile: Any
    v_tile: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_used: Any
    v_used: Any


class _Stream(NamedTuple):
    """Keys or values on their way: from where, through which stages and barriers."""

    source: Any
    tile: Any
    full: Any
    used: Any


class _Block:
    """One tile of rows of one KV head: methods are what its warpgroups do.

    Attributes:
      cache: the sequence's row of the cache.
      column: the first column of the KV head.
    """

    cache: Any
    column: Any

    def __init__(
        self, config: AttentionConfig, refs: Arrays, own: _Scratch, emulate: bool, *, tile, head, sequence
    ):
        self.c, self.r, self.own, self.emulate = config, refs, own, emulate
        self.tile, self.head, self.sequence = tile, head, sequence
        self.keys = _Stream(refs.k, own.k_tile, own.k_full, own.k_used)
        self.values = _Stream(refs.v, own.v_tile, own.v_full, own.v_used)
        self.wg = lax.axis_index("wg")
        self.head_dim = refs.q.shape[-1]
        self.key_tiles = refs.bounds[sequence, tile, 0]
        self.unmasked = refs.bounds[sequence, tile, 1]

    def run(self) -> None:
        # One warpgroup that multiplies has registers enough by the launch.
        exchange = not self.emulate and self.c.warpgroups > 1

        @pl.when(self.wg < self.c.warpgroups)
        def _():
            if exchange:
                plgpu.set_max_registers(240 if self.c.warpgroups == 2 else 160, action="increase")
            self.attend()

        @pl.when(self.wg == self.c.warpgroups)
        def _():
            if exchange:
                plgpu.set_max_registers(24 if self.c.warpgroups == 2 else 32, action="decrease")
            self.produce()

    def stage(self, key_tile):
        return lax.rem(key_tile, jnp.int32(self.c.stages))

    def produce(self) -> None:
        """Copies keys and values, a stage ahead of their use where there is one."""

        def copy(key_tile, _):
            stage = self.stage(key_tile)
            keys = pl.ds(key_tile * self.c.keys, self.c.keys)
            for stream in (self.keys, self.values):

                @pl.when(key_tile >= self.c.stages)
                def _wait(stream=stream):
                    plgpu.barrier_wait(stream.used.at[stage])

                source = stream.source.at[self.cache, keys, pl.ds(self.column, self.head_dim)]
                plgpu.copy_gmem_to_smem(source, stream.tile.at[stage], stream.full.at[stage])
            return _

        def drain(key_tile, _):
            @pl.when(key_tile >= self.c.stages)
            def _wait():
                plgpu.barrier_wait(self.keys.used.at[self.stage(key_tile)])
                plgpu.barrier_wait(self.values.used.at[self.stage(key_tile)])

            return _

        lax.fori_loop(0, self.key_tiles, copy, None)
        lax.fori_loop(self.key_tiles, self.key_tiles + self.c.stages, drain, None)

    def attend(self) -> None:
        first = self.tile * (ROWS * self.c.warpgroups) + self.wg * ROWS
        rows = (self.head, pl.ds(first, ROWS))
        q_tile = self.own.q_tile.at[self.wg]
        plgpu.copy_gmem_to_smem(self.r.q.at[rows], q_tile, self.own.q_full.at[self.wg])
        at = self.r.positions.at[self.sequence, pl.ds(first, ROWS)]
        position = plgpu.load(at, layout=PER_ROW, optimized=False)
        state = (
            fill((ROWS, self.head_dim), 0, RESULT),
            fill((ROWS,), -jnp.inf, PER_ROW),
            fill((ROWS,), 0, PER_ROW),
        )
        plgpu.barrier_wait(self.own.q_full.at[self.wg])
        attend_to = partial(self.attend_to, q_tile, position)
        state = lax.fori_loop(0, self.unmasked, partial(attend_to, False), state)
        out, _, total = lax.fori_loop(self.unmasked, self.key_tiles, partial(attend_to, True), state)
        out = out * lax.broadcast_in_dim(share_of(position, total), out.shape, [0])
        q_tile[...] = out.astype(self.r.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, self.r.out.at[rows])
        plgpu.wait_smem_to_gmem(0)

    def attend_to(self, q_tile, position, masked: bool, key_tile, state):
        out, peak, total = state
        stage, keys = self.stage(key_tile), self.c.keys
        dtype = self.r.q.dtype
        plgpu.barrier_wait(self.keys.full.at[stage])

        def scores(acc):
            plgpu.wgmma(acc, q_tile, self.keys.tile.at[stage].T)
            return acc[...]

        score = pl.run_scoped(scores, plgpu.ACC((ROWS, keys), jnp.float32))
        plgpu.barrier_arrive(self.keys.used.at[stage])
        weights, shrink, new_peak, total = weights_of(
            score, position, key_tile, self.head_dim, peak, total, masked=masked
        )
        out = out * lax.broadcast_in_dim(shrink, out.shape, [0])
        weights = weights.astype(dtype)
        plgpu.barrier_wait(self.values.full.at[stage])
        if self.emulate:
            values = self.values.tile[stage].astype(jnp.float32)
            out = out + jnp.dot(weights.astype(jnp.float32), values)
            plgpu.commit_smem()  # an ordinary read before the next copy into the stage
        else:
            out = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, self.values.tile.at[stage]))(
                plgpu.ACC.init(out)
            )
        plgpu.barrier_arrive(self.values.used.at[stage])
        return out, new_peak, total
