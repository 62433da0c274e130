"""Attention over the cache and the new token, a warpgroup per sequence, KV head and split of the context."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.attention_item import Attending, Item
from qwen3_moe_jax.kernels_pallas.decode_step.attention_join import SplitsJoined
from qwen3_moe_jax.kernels_pallas.decode_step.config import WARPGROUPS, ceil_div
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import head_halves, load

Array = Any


class Attention(SplitsJoined):
    """The phases :meth:`attend` and :meth:`join`."""

    def __init__(self, grid: Grid, activations: Activations):
        super().__init__(grid, activations)
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
        begun = None
        if self.has_one_item and not c.one_sequence:
            begun = Attending(self, self.item(layer, 0), heads, norms)
            begun.begin()
        self.g.wait(count)
        if c.one_sequence:
            self.write_rows(layer, heads, norms)
            self.g.signal()
            self.g.wait(count + c.blocks)

        def one(i):
            if begun is not None:
                begun.run()
                return
            item = Attending(self, self.item(layer, i), heads, norms)
            if c.prefetches and not isinstance(i, int):

                @pl.when(i > 0)
                def _():
                    self.g.sync_warpgroup()  # the last item is done with its tiles
                    item.prefetch()

            item.begin()
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
                Attending(self, item, heads, norms).write_new()

        fori(ceil_div(c.batch * c.num_key_value_heads, workers), one)

    def prefetch(self, layer: Array) -> None:
        """Begins to copy this warpgroup's first tile of a layer, if it has any, to shared memory.

        The layer's norm and q/k/v leave memory idle while they wait. Only where ``StepConfig.prefetches``.
        """
        if self.c.prefetches:
            item = Attending(self, self.item(layer, 0), [None] * 3, [None] * 2)
            pl.when(self.own_items() > 0)(item.prefetch)

    @property
    def has_one_item(self) -> bool:
        """Whether no warpgroup has more than one item."""
        c = self.c
        return c.batch * c.num_key_value_heads * c.splits <= WARPGROUPS * c.blocks

    def own_items(self) -> Array:
        """The number of this warpgroup's items."""
        workers, own = WARPGROUPS * self.c.blocks, self.g.wg * self.c.blocks + self.g.block
        return (self.shared.split_plan_smem[self.c.batch, 3] - own + workers - 1) // workers

    def for_items(self, body: Callable) -> None:
        """``body(i)`` for this warpgroup's items; with a number where no warpgroup has more than one."""
        if self.has_one_item:
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
