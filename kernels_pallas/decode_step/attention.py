"""Attention over the cache and the new token, a warpgroup per sequence, KV head and split of the context."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.attention_join import NO_SCORE, SplitsJoined
from qwen3_moe_jax.kernels_pallas.decode_step.config import PIECE, WARPGROUPS, ceil_div, padded
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    LOG2E,
    full,
    head_halves,
    lanes,
    load,
)

Array = Any
ROWS = plgpu.Layout.WGMMA
"""float32 [64, n]: query heads of a KV head in the first rows, n columns."""


def spread_rows(v: Array, columns: int) -> Array:
    """[64] of one value per row as [64, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (64, columns), (0,)), ROWS)


def spread_columns(v: Array, columns: int) -> Array:
    """[columns] as [64, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (64, columns), (1,)), ROWS)


@dataclass(frozen=True)
class Item:
    """What a warpgroup attends to: tiles ``start`` to ``stop`` of one sequence and KV head.

    Attributes:
      b: sequence; head: KV head; split: which of ``splits`` parts.
      position: tokens in the cache.
    """

    layer: Any
    b: Any
    head: Any
    split: Any
    splits: Any
    start: Any
    stop: Any
    position: Any


class Attention(SplitsJoined):
    """The phases :meth:`attend` and :meth:`join`."""

    def __init__(self, grid: Grid, activations: Activations):
        super().__init__(grid, activations)
        _, (self.q_smem, *tiles) = self.shared.sums_or_tiles_smem
        if self.c.prefetches:
            (tiles,) = self.shared.tiles_smem
        self.k_smem, self.v_smem = tiles
        self.half = self.c.head_dim // 2
        self.halves = head_halves(self.c.head_dim)
        self.one_head = self.halves.reduce(0)

    # The split of contexts

    def plan_splits(self) -> Array:
        """The split of every sequence's attention, by its length alone, into shared memory; items in all.

        Row b: tiles of earlier tokens, tiles per split, splits, number of the first item (a KV head's split).
        """
        c, plan = self.c, self.shared.split_plan_smem
        tile = c.kv_tile
        short = 128 // tile  # tiles that are not worth a split

        def one(b, items):
            tiles = (self.g.position(b) + tile - 1) // tile
            each = jnp.where(tiles <= short, short, (tiles + c.splits - 1) // c.splits)
            splits = jnp.maximum((tiles + each - 1) // each, 1)
            for i, value in enumerate((tiles, each, splits, items)):
                plan[b, i] = value
            return items + splits * c.num_key_value_heads

        @pl.when(self.g.wg == 0)
        def _():
            plan[c.batch, 3] = lax.fori_loop(0, c.batch, one, jnp.int32(0))

        self.g.sync_block()
        return plan[c.batch, 3]

    # Attention

    @jax.named_scope("attention")
    def attend(self, layer: Array, count: Array) -> None:
        """q/k-norm, RoPE, cache write and ``softmax(q K) V``: float32 [B, heads, head_dim], or parts of it.

        Waits for qkv (``count``); every block signals once, or twice with ``StepConfig.one_sequence``.
        """
        self.g.begin()
        c = self.c
        heads = [self.g.table(layer, f"{n}_head") for n in "qkv"]
        norms = [self.norm_halves(ref, layer) for ref in (self.inputs.q_norm_gmem, self.inputs.k_norm_gmem)]
        self.g.wait(count)
        if c.one_sequence:
            self.write_rows(layer, heads, norms)
            self.g.signal()
            self.g.wait(count + c.blocks)

        def one(i):
            item = _Item(self, self.item(layer, i), heads, norms)
            if c.prefetches and not isinstance(i, int):

                @pl.when(i > 0)
                def _():
                    self.g.sync_warpgroup()  # the last item is done with its tiles
                    item.prefetch()

            item.run()

        self.for_items(one)
        self.g.signal()

    def write_rows(self, layer: Array, heads: list, norms: list) -> None:
        """Writes the new keys and values of all rows, which later rows of the same sequence read."""
        c, workers = self.c, WARPGROUPS * self.c.blocks

        def one(i):
            number = i * workers + self.g.wg * c.blocks + self.g.block
            b, head = number // c.num_key_value_heads, number % c.num_key_value_heads

            @pl.when(b < c.batch)
            def _():
                none = jnp.int32(0)
                item = Item(layer, b, head, none, none, none, none, self.g.position(b))
                _Item(self, item, heads, norms).write_new()

        fori(ceil_div(c.batch * c.num_key_value_heads, workers), one)

    def prefetch(self, layer: Array) -> None:
        """Begins to copy this warpgroup's first tile of a layer, if it has any, to shared memory.

        The layer's norm and q/k/v leave memory idle while they wait. Only where ``StepConfig.prefetches``.
        """
        if self.c.prefetches:
            item = _Item(self, self.item(layer, 0), [None] * 3, [None] * 2)
            pl.when(self.own_items() > 0)(item.prefetch)

    def own_items(self) -> Array:
        """The number of this warpgroup's items."""
        workers, own = WARPGROUPS * self.c.blocks, self.g.wg * self.c.blocks + self.g.block
        return (self.shared.split_plan_smem[self.c.batch, 3] - own + workers - 1) // workers

    def for_items(self, body: Callable) -> None:
        """``body(i)`` for this warpgroup's items; with a number where no warpgroup has more than one."""
        c = self.c
        if c.batch * c.num_key_value_heads * c.splits <= WARPGROUPS * c.blocks:
            pl.when(self.own_items() > 0)(lambda: body(0))
        else:
            fori(self.own_items(), body)

    def item(self, layer: Array, i: Array) -> Item:
        """This warpgroup's i-th item."""
        c, plan = self.c, self.shared.split_plan_smem
        number, b = i * WARPGROUPS * c.blocks + self.g.wg * c.blocks + self.g.block, 0
        for later in range(1, c.batch):
            b = jnp.where(number >= plan[later, 3], later, b)
        tiles, each, splits = self.splits_of(b)
        number -= plan[b, 3]
        head, split = number % c.num_key_value_heads, number // c.num_key_value_heads
        first, last = split * each, jnp.minimum((split + 1) * each, tiles)
        return Item(layer, b, head, split, splits, first, last, self.g.position(b))

    def norm_halves(self, ref: Any, layer: Array) -> list:
        """Both halves of a layer's q- or k-norm."""
        return [load(ref.at[layer, pl.ds(i * self.half, self.half)], self.one_head) for i in range(2)]

    def rotated(self, b: Array, halves: list, norm: list, scale: float, axis: int | None) -> tuple:
        """q/k-norm and RoPE (pairs j, j + 64) of one KV head's halves [64], or of query heads' [8, 64]."""
        cos, sin = (load(self.inputs.rope_gmem.at[b, i], self.one_head) for i in range(2))
        eps, size = self.c.rms_norm_eps, self.c.head_dim
        if axis is None:
            # Stay in vectors: every lane group holds the whole of it.
            mean = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=0) / size
            inverse = lax.rsqrt(mean + eps)
            spread = lambda v: v
        else:
            shape = halves[0].shape
            mean = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=1) / size
            inverse = lax.broadcast_in_dim(lax.rsqrt(mean + eps), shape, (0,))
            inverse = plgpu.layout_cast(inverse, self.halves)
            spread = lambda v: plgpu.layout_cast(lax.broadcast_in_dim(v, shape, (1,)), self.halves)
        first, second = (h * inverse * spread(n) for h, n in zip(halves, norm, strict=True))
        cos, sin = spread(cos * scale), spread(sin * scale)
        return first * cos - second * sin, second * cos + first * sin


class _Item:
    """One warpgroup's work on an :class:`Item`. Everything is loaded up front."""

    def __init__(self, attention: Attention, item: Item, heads: list, norms: list):
        self.a, self.c, self.prim, self.i = attention, attention.c, attention.prim, item
        self.q_head, self.k_head, self.v_head = heads
        self.q_norm, self.k_norm = norms
        wg = attention.g.wg
        self.q_smem, self.k_smem, self.v_smem = (
            self.rows_of(ref.at[wg]) for ref in (attention.q_smem, attention.k_smem, attention.v_smem)
        )
        self.new_score_smem = attention.shared.new_score_smem.at[wg]
        self.new_value_smem = attention.shared.new_value_smem.at[wg]

    @cached_property
    def copy(self) -> Any:
        """The layout in which a tile of the cache passes through registers."""
        return plgpu.Layout.SMEM_GMEM_COPY((self.c.kv_tile, self.c.head_dim), self.c.cache_dtype, 128)

    def rows_of(self, ref: Any) -> Any:
        """A warpgroup's queries, keys or values in shared memory, without the padding of their rows."""
        size = self.c.head_dim
        return ref if ref.shape[-1] == size else ref.at[:, pl.ds(0, size)]

    def run(self) -> None:
        """Attends, and stores the output or this split's part of it."""
        i = self.i
        is_last = i.split == i.splits - 1
        query, key, value = self.load_query(), *self.load_new()
        first_tile = self.first_tile()
        key, value = self.rounded(key, value)
        if self.c.prefetches:
            self.prim.wait_for_copies()
        self.a.g.sync_warpgroup()  # the last item is done with shared memory
        self.put_queries(query, key)
        for j in range(2):
            self.new_value_smem[self.at_half(j)] = value[j].astype(jnp.float32)
        if not self.c.one_sequence:
            pl.when(is_last)(lambda: self.write_cache(key, value))
        self.a.g.sync_warpgroup()
        carry = lax.fori_loop(i.start, i.stop, self.tile, (*first_tile, *self.start_softmax(is_last)))
        self.store(*carry[2:])

    def at_half(self, j: int) -> Any:
        return pl.ds(j * self.a.half, self.a.half)

    def load_query(self) -> list:
        """The new token's queries as halves of heads."""
        i, qkv = self.i, self.a.outputs.qkv_gmem
        first = self.q_head + i.head * self.c.group_heads
        return [
            [load(qkv.at[i.b, pl.ds(first + row, 8), j], self.a.halves) for j in range(2)]
            for row in self.query_rows
        ]

    def load_new(self) -> tuple[list, list]:
        """The new token's key and value as halves of heads."""
        i, qkv = self.i, self.a.outputs.qkv_gmem
        key = [load(qkv.at[i.b, self.k_head + i.head, j], self.a.one_head) for j in range(2)]
        value = [load(qkv.at[i.b, self.v_head + i.head, j], self.a.one_head) for j in range(2)]
        return key, value

    def rounded(self, key: list, value: list) -> tuple[list, list]:
        """The new key, normed and rotated, and the value, as the cache holds them."""
        rounded = lambda halves: [half.astype(self.c.cache_dtype) for half in halves]
        return rounded(self.a.rotated(self.i.b, key, self.k_norm, 1.0, None)), rounded(value)

    def write_new(self) -> None:
        """Writes the new key and value, without attention."""
        self.write_cache(*self.rounded(*self.load_new()))

    @property
    def query_rows(self) -> list[int]:
        """The first rows of groups of 8 query heads; the last group may share rows with the one before.

        Where there are fewer than 8, the others are read and not used.
        """
        heads = self.c.group_heads
        return [max(min(row, heads - 8), 0) for row in range(0, heads, 8)]

    @property
    def cache_row(self) -> Any:
        """The cache's row of this item's sequence."""
        return self.c.first_sequence if self.c.one_sequence else self.i.b + self.c.first_sequence

    def tile_of_cache(self, i: Array) -> list:
        """Keys and values of one tile of the cache, as references."""
        c, tile = self.c, self.c.kv_tile
        i = jnp.minimum(i, c.cache_length // tile - 1)
        at = (self.i.layer, self.cache_row, pl.ds(i * tile, tile), self.i.head)
        return [ref.at[at] for ref in (self.a.inputs.k_cache_gmem, self.a.inputs.v_cache_gmem)]

    def load_tile(self, i: Array) -> tuple:
        """Keys and values of one tile, in registers."""
        return tuple(load(ref, self.copy) for ref in self.tile_of_cache(i))

    def prefetch(self) -> None:
        """Begins to copy the first tile, if there is one, to shared memory."""

        @pl.when(self.i.start < self.i.stop)
        def _():
            for to, source in zip((self.k_smem, self.v_smem), self.tile_of_cache(self.i.start), strict=True):
                self.prim.copy_tile(to, source)

    def first_tile(self) -> tuple:
        """The registers of the first tile; not set where it is in shared memory."""
        if not self.c.prefetches:
            return self.load_tile(self.i.start)
        shape = (self.c.kv_tile, self.c.head_dim)
        return tuple(self.prim.unset(shape, self.c.cache_dtype, self.copy) for _ in range(2))

    def put_queries(self, query: list, key: list) -> None:
        """Normed and rotated queries, and their scores with the new key, into shared memory."""
        c, half = self.c, self.a.half
        for row, halves in zip(self.query_rows, query, strict=True):
            halves = self.a.rotated(self.i.b, halves, self.q_norm, LOG2E * c.head_dim**-0.5, 1)
            score = 0.0
            for j in range(2):
                rounded = halves[j].astype(c.cache_dtype)
                self.q_smem[pl.ds(row, 8), self.at_half(j)] = rounded
                other = lax.broadcast_in_dim(key[j].astype(jnp.float32), (8, half), (1,))
                other = plgpu.layout_cast(other, self.a.halves)
                score += rounded.astype(jnp.float32) * other
            score = plgpu.layout_cast(jnp.sum(score, axis=1), self.a.halves.reduce(1))
            self.new_score_smem[pl.ds(row, 8)] = score

    def write_cache(self, key: list, value: list) -> None:
        """The new token's key and value, which this token's attention does not read."""
        i, inputs = self.i, self.a.inputs
        for j in range(2):
            at = (i.layer, self.cache_row, i.position, i.head, self.at_half(j))
            inputs.k_cache_gmem[at] = key[j]
            inputs.v_cache_gmem[at] = value[j]

    def start_softmax(self, is_last: Array) -> tuple:
        """(largest score [64], sum [64], output [64, head_dim]) before the first tile.

        The last split also takes the new token, whose key and value never pass through the cache: they are
        where its running softmax starts.
        """
        size, row = self.c.head_dim, ROWS.reduce(1)
        score = load(self.new_score_smem, row)
        value = spread_columns(load(self.new_value_smem, ROWS.reduce(0)), size)
        constant = lambda shape, value, layout: full(shape, value, jnp.float32, layout)
        return (
            jnp.where(is_last, score, constant((64,), NO_SCORE, row)),
            jnp.where(is_last, constant((64,), 1.0, row), constant((64,), 0.0, row)),
            jnp.where(is_last, value, constant((64, size), 0.0, ROWS)),
        )

    def tile(self, i: Array, carry: tuple) -> tuple:
        """One tile of keys and values in the running softmax; loads the next one."""
        k, v, largest, total, out = carry
        tile, size, dtype = self.c.kv_tile, self.c.head_dim, self.c.cache_dtype

        def put():
            self.a.g.sync_warpgroup()  # the last tile's products are done with k_smem and v_smem
            self.k_smem[...] = k
            self.v_smem[...] = v

        pl.when(i > self.i.start)(put) if self.c.prefetches else put()
        self.prim.publish_tiles()
        following = lax.cond(i + 1 < self.i.stop, lambda: self.load_tile(i + 1), lambda: (k, v))

        s = self.prim.matmul(self.prim.load_queries(self.q_smem), self.k_smem, tile, transposed=True)
        column = plgpu.broadcasted_iota(jnp.int32, (64, tile), 1, layout=ROWS)
        s = jnp.where(column + i * tile < self.i.position, s, NO_SCORE)
        new = jnp.maximum(largest, jnp.max(s, axis=1))
        decay = jnp.exp2(largest - new)
        p = jnp.exp2(s - spread_rows(new, tile))
        total = total * decay + jnp.sum(p, axis=1)

        weighted = self.prim.matmul(p.astype(dtype), self.v_smem, size, transposed=False)
        out = out * spread_rows(decay, size) + weighted
        return *following, new, total, out

    def store(self, largest: Array, total: Array, out: Array) -> None:
        """The output of a whole context, quantized in batches; or a split's part and what joins it."""
        i, outputs, rows = self.i, self.a.outputs, self.c.group_heads
        out = out * spread_rows(1.0 / total, self.c.head_dim)

        @pl.when(i.splits == 1)
        def _():
            own = outputs.attention_gmem.at[i.b, pl.ds(i.head * rows, rows)]
            self.prim.store_first_rows(own, out)
            if self.c.shares:
                self.a.g.sync_warpgroup()
                self.quantize()

        @pl.when(i.splits > 1)
        def _():
            self.prim.store_first_rows(outputs.part_gmem.at[i.b, i.head, i.split], out)
            for which, value in enumerate((largest, total)):
                stats = outputs.part_stats_gmem.at[i.b, i.head, which, :, i.split]
                self.prim.store_first_rows(stats, value)

    def quantize(self) -> None:
        """Quantizes this KV head's outputs for all blocks."""
        x, b, heads = self.a.x, self.i.b, self.c.group_heads
        pieces, rest = divmod(heads * self.c.head_dim, PIECE)
        if rest:
            whole = heads * self.c.head_dim // 128
            fori(whole, lambda n: self.quantize_lanes(self.i.head * whole + n))
            return
        for n in range(pieces):
            piece = self.i.head * pieces + n
            x.quantize(b, piece, x.attended(b, piece), self.a.outputs.attended_gmem)

    def quantize_lanes(self, number: Array) -> None:
        """Quantizes 128 of a sequence's outputs, one value per lane."""
        layout, b, out = lanes(128), self.i.b, self.a.outputs
        shape = (self.c.batch, padded(self.c.attention_width) // 128, 128)
        x = self.prim.View(out.attention_gmem, shape, leading=1).load((b, number), layout)
        self.a.x.quantize_lanes(x, layout, out.attended_gmem, lambda warp: (b, number * 4 + warp))
