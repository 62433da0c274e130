"""The experts that were chosen: gate + up + SwiGLU, and down."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.config import (
    PIECE,
    STORE_GROUP,
    TILES_PER_SUBBLOCK,
    WARPGROUPS,
    ceil_div,
    divisor,
    expert_tiles,
    padded,
    spans_of,
)
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, carried, fori, one_type, stream
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    LOG2E,
    OUTPUT_ROWS,
    SUBBLOCKS,
    TILE_ROWS,
    load,
    sum_groups,
)
from qwen3_moe_jax.kernels_pallas.decode_step.projections import Products
from qwen3_moe_jax.kernels_pallas.decode_step.router import Router
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import FourTiles

Array = Any


class Experts(Products):
    """The phases :meth:`gate_up` and :meth:`down`."""

    def __init__(self, grid: Grid, activations: Activations, router: Router):
        super().__init__(grid, activations)
        self.choice = router

    @jax.named_scope("gate_up")
    def gate_up(self, layer: Array, count: Array) -> None:
        """``ids = top_k(r)``, ``s = silu(h W_gate[ids]) * (h W_up[ids])``: float32 or quantized, per pair.

        Waits for the router (``count``); every block signals once.
        """
        self.g.begin()
        c = self.c
        self.g.wait(count)
        if c.shares:
            self.x.fetch(self.outputs.hidden_gmem, 0, padded(c.hidden_size) // SUPERBLOCK)
        self.choice.choose(layer)  # ends with both warpgroups together and what was fetched in place
        selector = self.g.table(layer, "gate_up_type")
        one_type(c.gate_up_types, selector, lambda i: _GateUp(self, layer, i).run())

        @pl.when((self.g.block == c.blocks - 1) & (self.g.wg == 1 % WARPGROUPS))
        def _():
            def copy(b):
                for i in range(c.num_experts_per_tok):
                    self.outputs.expert_ids_gmem[layer, b, i] = self.shared.ids_smem[b, i]

            self.g.for_batch(copy)

    @jax.named_scope("down")
    def down(self, layer: Array, count: Array) -> None:
        """``parts = w * (quantize(s) @ W_down[ids])``: float32 state [1:], summed in the order of top-k.

        Waits for gate_up (``count``); every block signals once, to all devices.
        """
        self.g.begin()
        selector = self.g.table(layer, "down_type")
        one_type(self.c.down_types, selector, lambda i: _Down(self, layer, i).run(count))
        self.g.signal(by_first=self.c.batch == 1, to_all=True)


class _GateUp:
    """gate + up of one type. Blocks take tiles of pairs, in batches in groups of four.

    ``nth`` counts a block's own tiles.
    """

    def __init__(self, experts: Experts, layer: Array, type_index: int):
        self.p, self.c = experts, experts.c
        c = self.c
        self.fmt = c.format(c.gate_up_types[type_index])
        self.stacks = [experts.inputs.weights_gmem[n][type_index] for n in ("gate", "up")]
        self.offset = experts.g.table(layer, "gate_up_offset")
        self.per_expert = c.moe_intermediate_size // 8
        self.subblocks = c.moe_intermediate_size // 32
        _, self.used, self.store_groups = expert_tiles(c)
        self.spans = spans_of(c.hidden_size)
        self.own = experts.own_activations(c.hidden_size)
        limit = min(4 if c.shares else 3, self.fmt.ahead // 2)
        self.depth = divisor(self.used, limit) if self.spans == 1 else 1
        self.together = 2 if self.depth == 4 else 1  # neighbouring tiles of an expert share their activations
        # Store groups whose sums are there at once: behind one barrier both warpgroups take their share.
        self.room = divisor(self.store_groups, experts.sums_smem.shape[0] // 2)

    def group_at(self, group: Array) -> tuple:
        """(sequence, which of its experts, subblock of its width) of a block's groups of four tiles."""
        c = self.c
        group = jnp.minimum(group * c.blocks + self.p.g.block, c.pairs * self.subblocks - 1)
        pair, subblock = self.p.shared.pair_order_smem[group // self.subblocks], group % self.subblocks
        return pair // c.num_experts_per_tok, pair % c.num_experts_per_tok, subblock

    def item_at(self, nth: Array) -> tuple:
        """(sequence, which of its experts, tile)."""
        c = self.c
        if c.shares:
            b, k, subblock = self.group_at(nth // TILES_PER_SUBBLOCK)
            return b, k, subblock * TILES_PER_SUBBLOCK + nth % TILES_PER_SUBBLOCK
        item = jnp.minimum(nth * c.blocks + self.p.g.block, c.pairs * self.per_expert - 1)
        return 0, item // self.per_expert, item % self.per_expert

    def load(self, nth: Array) -> list:
        """Tiles of gate and up, for each span."""
        b, k, tile = self.item_at(nth)
        tile = self.offset + self.p.choice.expert(b, k) * self.per_expert + tile
        places = [self.p.place(tile, span, self.c.hidden_size) for span in range(self.spans)]
        return [[self.fmt.load(stack, place) for stack in self.stacks] for place in places]

    def multiply(self, nth: Array, at: Array, tiles: Any, first_sums: Array) -> None:
        """Sums of gate and of up into entry ``at`` of two neighbouring arrays of sums."""
        b, _, _ = self.item_at(nth)
        for span in range(self.spans):
            here = self.own or self.p.lanes(b, span, self.c.hidden_size)
            for i, pair in enumerate(tiles):
                for which, value in enumerate(self.fmt.multiply(pair[span], here)):
                    self.p.store_sums(first_sums + which, at + i, span, value)

    def finish(self, i: Array, first_sums: Array) -> None:
        """SwiGLU of the i-th store group's tiles."""
        gate, up = (self.p.result_rows(first_sums + which, self.spans) for which in range(2))
        value = gate / (1.0 + jnp.exp2(gate * -LOG2E)) * up
        if not self.c.shares:
            self.p.outputs.swiglu_gmem[pl.ds(i * self.used, STORE_GROUP), self.p.g.block] = value
            return
        groups = self.used // TILES_PER_SUBBLOCK

        def subblock_of(warp):
            b, k, subblock = self.group_at(i * groups + warp)
            return b, k * self.subblocks + subblock

        to = self.p.outputs.swiglu_quantized_gmem
        self.p.x.quantize_lanes(value, OUTPUT_ROWS, to, subblock_of, groups)

    def store_group(self, i: Array, first_sums: Array, ahead: Any) -> Any:
        """The products of one store group."""
        first = i * self.used
        return stream(
            self.used,
            lambda at: self.load(first + at),
            lambda at, tiles: self.multiply(first + at, at, tiles, first_sums),
            ahead,
            together=self.together,
            is_last=self.store_groups == 1,
        )

    def round_of_groups(self, n: Array, ahead: Any) -> Any:
        """As many store groups as there is room for sums."""
        start, room, g = n * self.room, self.room, self.p.g
        ahead = carried(room, lambda j, ahead: self.store_group(start + j, 2 * j, ahead), ahead)
        g.sync_block()

        def own(i):
            j = i * WARPGROUPS + g.wg
            pl.when(j < room)(lambda: self.finish(start + j, 2 * j))

        fori(ceil_div(room, WARPGROUPS), own)
        if self.store_groups > room:
            g.sync_block()
        return ahead

    def run(self) -> None:
        """All of this block's tiles, and the signal."""
        ahead = tuple(self.load(nth) for nth in range(self.depth))
        self.p.choice.weigh()
        carried(self.store_groups // self.room, self.round_of_groups, ahead)
        self.p.g.signal(by_first=self.room == 1)


@dataclass(frozen=True)
class Where:
    """What a block multiplies in one round: tiles of 32 rows, a part of the experts, a share of sequences."""

    tile: Any
    part: Any
    share: Any


class _Down:
    """down of one type. Block (tiles of 32 rows, part): that part of each token's experts.

    In batches two tiles of 32 rows for half of the sequences: as many blocks as one for all, but a
    product has two tiles in it and not one and zeros, and one reading of the activations serves both.

    Where shared memory has no room for the activations of all of the part's experts, they come in several
    passes (``StepConfig.down_passes``). A product's sums have a place for each expert, and are added up after
    the last pass in the order of the experts.
    """

    def __init__(self, experts: Experts, layer: Array, type_index: int):
        self.p, self.c = experts, experts.c
        c = self.c
        self.fmt = c.format(c.down_types[type_index])
        self.stack = experts.inputs.weights_gmem["down"][type_index]
        self.offset = experts.g.table(layer, "down_offset")
        self.per_part = c.experts_per_part
        self.per_pass = self.per_part // c.down_passes
        self.superblocks = c.moe_intermediate_size // SUPERBLOCK
        self.mine = self.per_pass // WARPGROUPS
        self.wide = c.down_tiles
        self.sequences = ceil_div(c.batch, self.wide)
        self.tiles = c.hidden_size // (32 * self.wide)
        self.rounds = ceil_div(self.tiles * c.down_parts * self.wide, c.blocks)
        self.pairs = self.sequences * self.mine
        self.items = self.pairs * self.superblocks
        limit = self.fmt.ahead // self.wide
        few = self.items <= min(6, limit)
        self.depth = self.items if few else divisor(self.items, min(4 if self.wide == 1 else 3, limit))

    def where(self, i: Array) -> Where:
        """Where this block is in its i-th round."""
        item = i * self.c.blocks + self.p.g.block
        tile = item // (self.c.down_parts * self.wide)
        return Where(tile, item // self.wide % self.c.down_parts, item % self.wide)

    def sequence(self, i: Array, share: Array) -> Array:
        """The last share may have a sequence less: it does its last one again."""
        return i if self.wide == 1 else jnp.minimum(share * self.sequences + i, self.c.batch - 1)

    def index(self, group: Array, j: int) -> tuple:
        """(pair, superblock): items count superblocks first, then own experts, then sequences."""
        if self.depth % self.superblocks == 0:
            return group * (self.depth // self.superblocks) + j // self.superblocks, j % self.superblocks
        i = group * self.depth + j
        return i // self.superblocks, i % self.superblocks

    def pass_of(self, n: Array, pair: Array) -> tuple:
        """(pass, pair in it) of a pair counted from the n-th pass on; after the last pass its last."""
        if self.c.down_passes == 1:
            return n, jnp.minimum(pair, self.pairs - 1)
        n = n + pair // self.pairs
        return jnp.minimum(n, self.c.down_passes - 1), pair % self.pairs

    def of_part(self, n: Array, k: Array) -> Array:
        """The k-th expert of the n-th pass, counted from the first pass on."""
        return k if self.c.down_passes == 1 else n * self.per_pass + k

    def load(self, item: tuple, where: Where, n: Array) -> list:
        """Four tiles of one superblock, for each of ``wide`` tiles of 32 rows."""
        pair, s = item
        n, pair = self.pass_of(n, pair)
        k = where.part * self.per_part + self.of_part(n, self.p.g.wg * self.mine) + pair % self.mine
        expert = self.p.choice.expert(self.sequence(pair // self.mine, where.share), k)
        first = self.offset + expert * (self.c.hidden_size // 8)
        starts = [first + (where.tile * self.wide + t) * 4 for t in range(self.wide)]
        places = [FourTiles(start, s, True, self.superblocks, self.p.prim) for start in starts]
        return [self.fmt.load(self.stack, place) for place in places]

    def multiply(self, item: tuple, tiles: Any, where: Where, n: Array) -> None:
        """Sums of lanes into shared memory."""
        pair, s = item
        b, k = self.sequence(pair // self.mine, where.share), self.p.g.wg * self.mine + pair % self.mine
        x = self.p.x.lanes(b, k * self.superblocks + s, shared=True)
        entry = self.of_part(n, k)
        for t, value in enumerate(self.fmt.multiply(tiles[0], x)):
            self.p.sums_smem[b, t * self.per_part + entry, pl.ds(s * 4, 4)] = sum_groups(value)

    def load_ahead(self, where: Where, n: Array) -> tuple:
        """The first tiles of the n-th pass."""
        return tuple(self.load(self.index(0, j), where, n) for j in range(self.depth))

    def run(self, count: Array) -> None:
        """Waits, and does this block's rounds. One round's first weights are asked for before the wait."""
        early = self.rounds == 1
        first = self.where(0)
        nearest = Where(jnp.minimum(first.tile, self.tiles - 1), first.part, first.share)
        ahead = self.load_ahead(nearest, 0) if early else None
        self.p.g.wait(count)

        def guarded(i):
            @pl.when(self.where(i).tile < self.tiles)
            def _():
                self.one_round(nearest if early else self.where(i), ahead)

            if self.rounds > 1:
                self.p.g.sync_block()

        fori(self.rounds, guarded)

    def one_round(self, where: Where, ahead: tuple | None) -> None:
        """One round of a block. Of several passes, each asks for the first tiles of the next."""
        last = self.c.down_passes - 1
        if last:
            ahead = ahead or self.load_ahead(where, 0)

        def one_pass(n, ahead):
            self.prepare(where, n)
            ahead = stream(
                self.items,
                lambda item: self.load(item, where, n),
                lambda item, tiles: self.multiply(item, tiles, where, n),
                ahead or self.load_ahead(where, n),
                index=self.index,
            )
            if last and self.items == self.depth:  # then the stream has loaded nothing more
                ahead = self.load_ahead(where, jnp.minimum(n + 1, last))
            self.p.g.sync_block()
            return ahead

        carried(self.c.down_passes, one_pass, ahead)
        own = lambda i: pl.when(i % WARPGROUPS == self.p.g.wg)(lambda: self.store(i, where))
        fori(self.sequences, own)

    def prepare(self, where: Where, n: Array) -> None:
        """The quantized SwiGLU of a pass's experts, in shared memory."""
        if not self.c.shares:
            self.quantize_swiglu(where, n)
            self.p.g.sync_block()
            return
        own = partial(self.sequence, share=where.share)
        count = self.per_pass * self.superblocks
        first = self.first_expert(where, n) * self.superblocks
        self.p.x.fetch(self.p.outputs.swiglu_quantized_gmem, first, count, self.sequences, own)
        self.p.x.fetched()

    def first_expert(self, where: Where, n: Array) -> Array:
        """Which of a token's experts is the first of a pass."""
        return self.of_part(n, where.part * self.per_part)

    def quantize_swiglu(self, where: Where, n: Array) -> None:
        """One sequence's SwiGLU of a pass's experts."""
        swiglu, width, wg = self.p.outputs.swiglu_gmem, self.c.moe_intermediate_size, self.p.g.wg
        size = swiglu.shape[0] * swiglu.shape[1] * 8
        source = self.p.prim.View(swiglu, (size // 32, 2, 4, 4), leading=0)
        pieces = ceil_div(self.per_pass * width, PIECE)
        # The last piece may be both warpgroups': they store the same.
        own = [jnp.minimum(i * WARPGROUPS + wg, pieces - 1) for i in range(ceil_div(pieces, WARPGROUPS))]
        first = self.first_expert(where, n) * width // 32
        starts = [first + i * 32 for i in own]
        loaded = [source.load((pl.ds(start, 32),), SUBBLOCKS) for start in starts]
        for i, x in zip(own, loaded, strict=True):
            self.p.x.quantize(0, i, x, self.p.shared.x_smem)

    def store(self, i: Array, where: Where) -> None:
        """The weighted sum over the part's experts of a sequence's rows."""
        c, sums = self.c, self.p.sums_smem
        b = self.sequence(i, where.share)
        shape = (c.slots.number, c.batch, c.row_stride(padded(c.hidden_size)) // 32, 4, 8)
        out = self.p.prim.View(self.p.inputs.state_gmem, shape, leading=2)
        for t in range(self.wide):
            total = None
            for k in range(self.per_part):
                at = (b, t * self.per_part + k)
                refs = [sums.at[*at, pl.ds(s * 4, 4)] for s in range(self.superblocks)]
                value = sum(load(ref, TILE_ROWS) for ref in refs)
                value = value * self.p.choice.weight(b, where.part * self.per_part + k)
                total = value if total is None else total + value
            if c.devices == 1:
                out.store((1 + where.part, b, where.tile * self.wide + t), total)
            else:
                slot = c.slots.down(self.p.g.device, where.part)
                out.send((slot, b, where.tile * self.wide + t), total, c.devices)
