"""One warpgroup's share of attention: a sequence, a KV head and a part of its context, tile by tile."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.attention_join import NO_SCORE
from qwen3_moe_jax.kernels_pallas.decode_step.config import PIECE, padded
from qwen3_moe_jax.kernels_pallas.decode_step.grid import fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    CHUNK,
    LOG2E,
    WARPGROUP,
    full,
    lanes,
    load,
)

Array = Any
INT8_MAX = 127
ROWS = plgpu.Layout.WGMMA
"""float32 [64, columns]: tokens, of which warp w has 16 w to 16 w + 15; query heads of a KV head."""
MASKED = 2 * NO_SCORE
"""The score of what is not attended to: nothing even beside ``NO_SCORE``, with which sums begin."""
MIN_SCALE = 2.0**-60
"""Of a value, at least: its logarithm is a number."""


def spread_rows(v: Array, columns: int) -> Array:
    """[64] of one value per row as [64, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (CHUNK, columns), (0,)), ROWS)


def spread_columns(v: Array) -> Array:
    """[columns] as [64, columns]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (CHUNK, *v.shape), (1,)), ROWS)


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


class _Kept(NamedTuple):
    """A new key or value: halves as the cache stores them and what they mean, and the scale of int8."""

    stored: list
    floats: list
    scale: Any = None


class Attending:
    """One warpgroup's work on an :class:`Item`. Everything is loaded up front."""

    def __init__(self, attention: Any, item: Item, heads: list, norms: list):
        self.a, self.c, self.prim, self.i = attention, attention.c, attention.prim, item
        self.q_head, self.k_head, self.v_head = heads
        self.q_norm, self.k_norm = norms
        shared, wg, size = attention.shared, attention.g.wg, pl.ds(0, self.c.head_dim)
        _, (queries, stats, outputs) = shared.sums_or_attention_smem
        self.query_smem = queries.at[wg, :, size]
        self.stats_smem, self.outputs_smem = stats.at[wg], outputs.at[wg]
        self.tiles_smem = [ref.at[wg, :, size] for ref in shared.tiles_smem[0]] if self.c.prefetches else []
        self.new_score_smem, self.new_value_smem = shared.new_score_smem.at[wg], shared.new_value_smem.at[wg]

    def begin(self) -> None:
        """Loads what depends on no earlier phase: the second tile where the first is in shared memory, else
        the first."""
        i, is_second = self.i, self.c.prefetches
        self.scales = self.load_scales(i.start) if is_second else []
        tile = i.start + is_second
        may_lack = is_second or self.a.has_one_item  # then many warpgroups have none, and should load nothing
        self.loaded = self.load_tile(tile, tile < i.stop if may_lack else None)

    def run(self) -> None:
        """Attends, and stores the output or this split's part of it."""
        i = self.i
        is_last = i.split == i.splits - 1
        query, key, value = self.load_query(), *self.load_new()
        key, value = self.rounded(key, value)
        if self.c.prefetches:
            self.prim.wait_for_copies()
        self.a.g.sync_warpgroup()  # the last item is done with shared memory
        self.put_queries(query, key)
        for j, half in enumerate(value.floats):
            self.new_value_smem[self.at_half(j)] = half
        if not self.c.one_sequence:
            pl.when(is_last)(lambda: self.write_cache(key, value))
        self.a.g.sync_warpgroup()
        self.queries = self.prim.load_queries(self.query_smem, of_bytes=self.c.has_scales)
        state, start = self.start_softmax(is_last), i.start
        if self.c.prefetches:
            first = lambda: self.tile(start, (*self.tile_in_shared_memory(), *state), is_only=True)[-3:]
            state = lax.cond(start < i.stop, first, lambda: state)
            start += 1
        *_, largest, total, out = lax.fori_loop(start, i.stop, self.tile, (*self.loaded, *state))
        self.store(largest, total, out)

    def at_half(self, j: int) -> Any:
        return pl.ds(j * self.a.half, self.a.half)

    def load_query(self) -> list:
        """The new token's queries as halves of heads."""
        i, qkv = self.i, self.a.outputs.qkv_gmem
        first = self.q_head + i.head * self.c.group_heads
        return [
            [load(qkv.at[i.b, pl.ds(first + head, 8), j], self.a.halves) for j in range(2)]
            for head in self.query_heads
        ]

    def load_new(self) -> tuple[list, list]:
        """The new token's key and value as halves of heads."""
        i, qkv = self.i, self.a.outputs.qkv_gmem
        key = [load(qkv.at[i.b, self.k_head + i.head, j], self.a.one_head) for j in range(2)]
        value = [load(qkv.at[i.b, self.v_head + i.head, j], self.a.one_head) for j in range(2)]
        return key, value

    def rounded(self, key: list, value: list) -> tuple["_Kept", "_Kept"]:
        """The new key, normed and rotated, and the value, as the cache holds them."""
        return self.kept(list(self.a.rotated(self.i.b, key, self.k_norm, 1.0, None))), self.kept(value)

    def kept(self, halves: list) -> "_Kept":
        """A new key or value as the cache holds it."""
        if not self.c.has_scales:
            stored = [half.astype(self.c.cache_dtype) for half in halves]
            return _Kept(stored, [half.astype(jnp.float32) for half in stored])
        first, second = (jnp.max(jnp.abs(half), axis=0) for half in halves)
        largest = jnp.maximum(first, second)
        inverse = jnp.where(largest > 0, INT8_MAX / largest, 0.0)
        scale = largest * (1.0 / INT8_MAX)
        whole = [jnp.round(half * inverse).astype(jnp.int32) for half in halves]
        floats = [half.astype(jnp.float32) * scale for half in whole]
        return _Kept([half.astype(jnp.int8) for half in whole], floats, scale)

    def write_new(self) -> None:
        """Writes the new key and value, without attention."""
        self.write_cache(*self.rounded(*self.load_new()))

    @property
    def query_heads(self) -> list[int]:
        """The first of each 8 query heads; the last group may share heads with the one before.

        Where there are fewer than 8, the others are read and not used.
        """
        heads = self.c.group_heads
        return [max(min(first, heads - 8), 0) for first in range(0, heads, 8)]

    @property
    def cache_row(self) -> Any:
        """The cache's row of this item's sequence."""
        return self.c.first_sequence if self.c.one_sequence else self.i.b + self.c.first_sequence

    @property
    def chunks(self) -> range:
        """Chunks of a tile."""
        return range(self.c.kv_tile // CHUNK)

    def chunks_of(self, i: Array, *refs: Any) -> list:
        """One tile of each of these arrays of the cache, as references to its chunks, inside the cache."""
        last, found = self.c.cache_length // CHUNK - 1, []
        for chunk in self.chunks:
            number = jnp.minimum(i * len(self.chunks) + chunk, last)
            found.append((self.i.layer, self.cache_row, pl.ds(number * CHUNK, CHUNK), self.i.head))
        return [[ref.at[at] for at in found] for ref in refs]

    def load_tile(self, i: Array, wanted: Array | None) -> tuple:
        """Keys and values of one tile, if they are wanted, in registers; of int8 their scales as well."""
        keys, values = self.chunks_of(i, self.a.inputs.k_cache_gmem, self.a.inputs.v_cache_gmem)
        return self.prim.load_keys(keys, wanted), self.prim.load_values(values, wanted), self.load_scales(i)

    def tile_in_shared_memory(self) -> tuple:
        """The tile that :meth:`prefetch` has copied."""
        keys, values = ([ref.at[pl.ds(n * CHUNK, CHUNK)] for n in self.chunks] for ref in self.tiles_smem)
        return self.prim.load_keys(keys), self.prim.load_values(values), self.scales

    def prefetch(self) -> None:
        """Begins to copy the first tile, if there is one, to shared memory."""

        @pl.when(self.i.start < self.i.stop)
        def _():
            tiles = self.chunks_of(self.i.start, self.a.inputs.k_cache_gmem, self.a.inputs.v_cache_gmem)
            for to, chunks in zip(self.tiles_smem, tiles, strict=True):
                for n, chunk in enumerate(chunks):
                    self.prim.copy_rows(to.at[pl.ds(n * CHUNK, CHUNK)], chunk)

    def load_scales(self, i: Array) -> list:
        """float32 [64] of each chunk of a tile: scales of keys, and of values. None of 16 bits."""
        if not self.c.has_scales:
            return []
        refs = self.chunks_of(i, self.a.inputs.k_scale_gmem, self.a.inputs.v_scale_gmem)
        return [[self.prim.load_scales(ref) for ref in chunks] for chunks in refs]

    def put_queries(self, query: list, key: "_Kept") -> None:
        """Normed and rotated queries, and their scores with the new key, into shared memory."""
        c, half = self.c, self.a.half
        for head, halves in zip(self.query_heads, query, strict=True):
            halves = self.a.rotated(self.i.b, halves, self.q_norm, LOG2E * c.head_dim**-0.5, 1)
            own, score = pl.ds(head, 8), 0.0
            for j in range(2):
                rounded = halves[j].astype(c.tile_dtype)
                self.query_smem[own, self.at_half(j)] = rounded
                other = lax.broadcast_in_dim(key.floats[j], (8, half), (1,))
                other = plgpu.layout_cast(other, self.a.halves)
                score += rounded.astype(jnp.float32) * other
            score = plgpu.layout_cast(jnp.sum(score, axis=1), self.a.halves.reduce(1))
            self.new_score_smem[own] = score

    def write_cache(self, key: "_Kept", value: "_Kept") -> None:
        """The new token's key and value, which this token's attention does not read."""
        i, inputs = self.i, self.a.inputs
        at = (i.layer, self.cache_row, i.position, i.head)
        for j in range(2):
            inputs.k_cache_gmem[(*at, self.at_half(j))] = key.stored[j]
            inputs.v_cache_gmem[(*at, self.at_half(j))] = value.stored[j]
        if self.c.has_scales:
            inputs.k_scale_gmem[at] = key.scale
            inputs.v_scale_gmem[at] = value.scale

    def start_softmax(self, is_last: Array) -> tuple:
        """(largest scores, sums, both [64, columns], outputs [4 head_dim, columns]) before the first tile.

        Largest scores are those of a warp, and sums of a row alone. The last split also takes the new token,
        whose key and value never pass through the cache: they are where the first warp's running softmax
        starts.
        """
        c, shape = self.c, (CHUNK, self.c.query_columns)
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS)
        constant = lambda value: full(shape, value, jnp.float32, ROWS)
        score = spread_columns(load(self.new_score_smem, ROWS.reduce(0)))
        return (
            jnp.where((token < 16) & is_last, score, constant(NO_SCORE)),
            jnp.where((token < 1) & is_last, constant(1.0), constant(0.0)),
            self.prim.start_outputs(self.new_value_smem, is_last, c.query_columns, of_bytes=c.has_scales),
        )

    def tile(self, i: Array, carry: tuple, *, is_only: bool = False) -> tuple:
        """One tile of keys and values in the running softmax; loads the next one, unless ``is_only``."""
        keys, values, scales, largest, total, out = carry
        c, columns, of_bytes = self.c, self.c.query_columns, self.c.has_scales
        inputs = self.a.inputs

        def ahead(load_next, now):
            """The same of the next tile, which takes the registers of this one's."""
            return now if is_only else lax.cond(i + 1 < self.i.stop, load_next, lambda: now)

        s = self.prim.scores(keys, self.queries, len(self.chunks), columns, c.tile_dtype, of_bytes=of_bytes)
        keys = ahead(lambda: self.prim.load_keys(self.chunks_of(i + 1, inputs.k_cache_gmem)[0]), keys)
        token = plgpu.broadcasted_iota(jnp.int32, (CHUNK, columns), 0, layout=ROWS) + i * c.kv_tile
        inside = [token + n * CHUNK < self.i.position for n in self.chunks]
        if of_bytes:
            s = [self.prim.as_rounded(x * spread_rows(scales[0][n], columns)) for n, x in enumerate(s)]
        s = [jnp.where(own, x, MASKED) for own, x in zip(inside, s, strict=True)]
        # A value's scale is a part of its weight: what is largest is the weight, 1.
        weight = s
        if of_bytes:
            logs = [spread_rows(jnp.log2(jnp.maximum(scale, MIN_SCALE)), columns) for scale in scales[1]]
            weight = [jnp.where(own, x + y, MASKED) for own, x, y in zip(inside, s, logs, strict=True)]
            scales = ahead(lambda: self.load_scales(i + 1), scales)
        new = jnp.maximum(largest, self.prim.warp_columns(weight, "max"))
        decay = jnp.exp2(largest - new)
        p = [jnp.exp2(x - new) for x in s]
        total = self.prim.as_rounded(total * decay)
        for x in p:
            total += x
        weight = [jnp.exp2(x - new) for x in weight] if of_bytes else p
        out = self.prim.weigh(values, weight, out, decay, c.tile_dtype, of_bytes=of_bytes)
        values = ahead(lambda: self.prim.load_values(self.chunks_of(i + 1, inputs.v_cache_gmem)[0]), values)
        return keys, values, scales, new, total, out

    def store(self, largest: Array, total: Array, out: Array) -> None:
        """Joins the warps. The outputs of a whole context, quantized in batches; or a split's part and what
        joins it."""
        i, c = self.i, self.c
        for n, values in enumerate((largest, self.prim.warp_columns([total], "add"))):
            self.prim.put_columns(self.stats_smem.at[n], values)
        self.a.g.sync_warpgroup()
        warps = [[load(self.stats_smem.at[n, w], ROWS.reduce(0)) for w in range(4)] for n in range(2)]
        joined = jnp.maximum(jnp.maximum(warps[0][0], warps[0][1]), jnp.maximum(warps[0][2], warps[0][3]))
        total = sum(self.prim.as_rounded(t * jnp.exp2(x - joined)) for x, t in zip(*warps, strict=True))
        factor = jnp.exp2(largest - spread_columns(joined)) * spread_columns(1.0 / total)
        for group in range(c.query_columns // 8):
            if group:
                self.a.g.sync_warpgroup()  # the columns before are read
            self.prim.put_outputs(self.outputs_smem, out, factor, group, of_bytes=c.has_scales)
            self.a.g.sync_warpgroup()
            self.store_outputs(8 * group)

        @pl.when(i.splits > 1)
        def _():
            for which, values in enumerate((joined, total)):
                stats = self.a.outputs.part_stats_gmem.at[i.b, i.head, which, :, i.split]
                self.prim.store_columns(stats, values)

        if c.shares:
            self.a.g.sync_warpgroup()
            pl.when(i.splits == 1)(self.quantize)

    def store_outputs(self, first: int) -> None:
        """The outputs of 8 query heads, ``first`` and on, as shared memory has them of each warp."""
        i, c, outputs = self.i, self.c, self.a.outputs
        count = min(8, c.group_heads - first)
        each = count * c.head_dim // WARPGROUP
        layout = plgpu.Layout.WG_STRIDED((count, c.head_dim), next(n for n in (4, 2, 1) if each % n == 0))

        def store(ref):
            parts = [load(self.outputs_smem.at[w, pl.ds(0, count)], layout) for w in range(4)]
            ref[...] = (parts[0] + parts[1]) + (parts[2] + parts[3])

        heads = pl.ds(i.head * c.group_heads + first, count)
        pl.when(i.splits == 1)(lambda: store(outputs.attention_gmem.at[i.b, heads]))
        part = outputs.part_gmem.at[i.b, i.head, i.split, pl.ds(first, count)]
        pl.when(i.splits > 1)(lambda: store(part))

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
