"""attention from Ampere on, for many queries: flash attention by ``mma`` and ``cp.async``.

Rows, tiles and bounds are those of ``kernel_sm90``. Both warpgroups of a block copy and multiply, each 64
rows of the tile; while a tile of keys and values is multiplied the next one is on its way. A tile of keys
is read only after a barrier at which all threads have their copies of it and are done with the one before,
which the next one overwrites.
"""

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
from qwen3_moe_jax.kernels_pallas.attention.kernel_sm90 import ROWS, AttentionConfig, attention_with
from qwen3_moe_jax.kernels_pallas.gpu import mma
from qwen3_moe_jax.kernels_pallas.gpu.device import require_ampere

SIZES = AttentionConfig(keys=64, stages=2, warpgroups=2)
"""Keys and values of 128 dimensions take 70 KB of shared memory, of the 99 KB that every card gives."""
ONE_QUERY = AttentionConfig(keys=64, stages=2, warpgroups=1)
"""As ``kernel_sm90.ONE_QUERY``."""
MAX_HEAD_DIM = 128
_PADDING = 8
"""Elements after a row in shared memory: the rows of an operand then lie in different banks."""
_KEYS, _COLUMNS = 16, 32
"""Keys, and columns of values, of one operand: more would need more registers than there are."""


def attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    positions: jax.Array,
    layer: jax.Array,
    slots: jax.Array | None = None,
    scales: Any = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See ``kernel_sm90.attention``.

    Raises:
      NotImplementedError: no NVIDIA GPU from Ampere on, or arrays that the kernel does not take.
    """
    require_ampere(interpret)
    if q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"the portable kernel takes a head_dim of up to 128, not {q.shape[-1]}")
    return attention_with(make_kernel, SIZES, q, k_cache, v_cache, positions, layer, slots, scales, interpret)


def make_kernel(config: AttentionConfig, interpret: Any, **shape: Any) -> Any:
    """As ``kernel_sm90.make_kernel``."""
    return launch(
        _Block,
        config,
        interpret,
        scratch=scratch_of(config, shape["head_dim"], shape["dtype"]),
        warpgroups=config.warpgroups,
        name="prefill_attention_portable",
        **shape,
    )


def scratch_of(config: AttentionConfig, head_dim: int, dtype: Any) -> "_Scratch":
    """A block's shared memory."""
    cached = plgpu.SMEM((config.stages, config.keys, head_dim + _PADDING), dtype)
    return _Scratch(cached, cached, plgpu.Barrier(num_arrivals=config.warpgroups))


class _Scratch(NamedTuple):
    """Shared memory.

    Attributes:
      k_tile, v_tile: [stages, keys, H, padded].
      barrier: of all warpgroups, where the kernel is emulated.
    """

    k_tile: Any
    v_tile: Any
    barrier: Any


class _Block:
    """One tile of rows of one KV head.

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
        self.head, self.sequence = head, sequence
        self.wg = lax.axis_index("wg")
        self.first = tile * config.tile + self.wg * ROWS
        self.head_dim, self.dtype = refs.q.shape[-1], refs.q.dtype
        self.key_tiles, self.unmasked = (refs.bounds[sequence, tile, i] for i in range(2))

    def run(self) -> None:
        rows = (self.head, pl.ds(self.first, ROWS))
        self.begin(jnp.int32(0))
        at = self.r.positions.at[self.sequence, pl.ds(self.first, ROWS)]
        position = plgpu.load(at, layout=PER_ROW, optimized=False)
        attend_to = partial(self.attend_to, self.queries(self.r.q.at[rows]), position)
        columns = min(_COLUMNS, self.head_dim)
        out = tuple(fill((ROWS, columns), 0, RESULT) for _ in range(self.head_dim // columns))
        state = (out, fill((ROWS,), -jnp.inf, PER_ROW), fill((ROWS,), 0, PER_ROW))
        state = lax.fori_loop(0, self.unmasked, partial(attend_to, False), state)
        out, _, total = lax.fori_loop(self.unmasked, self.key_tiles, partial(attend_to, True), state)
        share = share_of(position, total)
        for i, part in enumerate(out):
            value = (part * lax.broadcast_in_dim(share, part.shape, [0])).astype(self.dtype)
            self.r.out[(*rows, pl.ds(i * columns, columns))] = value

    def queries(self, ref: Any) -> Any:
        if self.emulate:
            return ref[...]
        return plgpu.load(ref, layout=plgpu.Layout.MMA_LHS(self.dtype), optimized=False)

    # Keys and values

    def begin(self, key_tile: Any) -> None:
        """Begins to copy a tile of keys and values, if there is one."""

        @pl.when(key_tile < self.key_tiles)
        def _():
            keys = pl.ds(key_tile * self.c.keys, self.c.keys)
            for cached, tiles in ((self.r.k, self.own.k_tile), (self.r.v, self.own.v_tile)):
                source = cached.at[self.cache, keys, pl.ds(self.column, self.head_dim)]
                self.copy(self.tile_of(tiles, key_tile, 0, self.c.keys, 0, self.head_dim), source)

        if not self.emulate:
            mma.commit_copies()

    def copy(self, target: Any, source: Any) -> None:
        if self.emulate:
            pl.when(self.wg == 0)(lambda: target.__setitem__(..., source[...]))
        else:
            mma.copy(target, source, 128 * self.c.warpgroups)

    def tile_of(self, tiles: Any, key_tile: Any, key: int, keys: int, column: int, columns: int) -> Any:
        """A part of a tile of keys or values in shared memory."""
        stage = lax.rem(key_tile, jnp.int32(self.c.stages))
        return tiles.at[stage, pl.ds(key, keys), pl.ds(column, columns)]

    def arrived(self) -> None:
        """Waits for this tile of keys, and for everybody to be done with the one before."""
        if self.emulate:
            plgpu.barrier_arrive(self.own.barrier)
            plgpu.barrier_wait(self.own.barrier)
        else:
            mma.wait_for_copies(0)
            mma.block_barrier(self.c.warpgroups)

    # Products

    def attend_to(self, q: Any, position: Any, masked: bool, key_tile: Any, state: tuple) -> tuple:
        out, peak, total = state
        self.arrived()
        self.begin(key_tile + 1)
        weights, shrink, new_peak, total = weights_of(
            self.scores(q, key_tile), position, key_tile, self.head_dim, peak, total, masked=masked
        )
        weights = weights.astype(self.dtype)
        out = tuple(part * lax.broadcast_in_dim(shrink, part.shape, [0]) for part in out)
        return self.add_values(out, weights, key_tile), new_peak, total

    def scores(self, q: Any, key_tile: Any) -> Any:
        """float32 [64, keys]: queries times the tile's keys."""
        if self.emulate:
            keys = self.tile_of(self.own.k_tile, key_tile, 0, self.c.keys, 0, self.head_dim)[...]
            return jnp.dot(q.astype(jnp.float32), keys.astype(jnp.float32).T, precision="highest")
        parts = []
        for first in range(0, self.c.keys, _KEYS):
            keys = self.tile_of(self.own.k_tile, key_tile, first, _KEYS, 0, self.head_dim)
            product = plgpu.mma(mma.zeros(_KEYS, self.dtype), q, mma.right_operand(keys.T))
            parts.append(mma.product_rows(product, self.dtype))
        return mma.join_columns(parts)

    def add_values(self, out: tuple, weights: Any, key_tile: Any) -> tuple:
        """The results with the tile's values, times their weights."""
        columns, found = out[0].shape[1], []
        left = weights if self.emulate else mma.left_operand(weights)
        for i, part in enumerate(out):
            values = self.tile_of(self.own.v_tile, key_tile, 0, self.c.keys, i * columns, columns)
            if self.emulate:
                values = values[...].astype(jnp.float32)
                found.append(part + jnp.dot(left.astype(jnp.float32), values, precision="highest"))
            else:
                start = mma.recast(part, RESULT, plgpu.Layout.MMA_ACC(self.dtype), part.shape)
                product = plgpu.mma(start, left, mma.right_operand(values))
                found.append(mma.product_rows(product, self.dtype))
        return tuple(found)
