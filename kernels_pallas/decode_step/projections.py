"""Projections whose matrix every sequence multiplies: q/k/v, attention's output, lm_head.

Rows are dealt out in tiles of 8: block i takes tiles i, i + blocks, i + 2 blocks, ...; its warps split the
columns, so a thread multiplies all its tiles with the same 64 activations.
``nth`` counts a block's own tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations, state_view
from qwen3_moe_jax.kernels_pallas.decode_step.config import (
    SPAN,
    STORE_GROUP,
    WARPGROUPS,
    ceil_div,
    divisor,
    padded,
    spans_of,
)
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, Phases, carried, fori, one_type, stream
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import OUTPUT_ROWS, load, sum_groups
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import (
    FourTiles,
    LaneActivations,
    pad_weights,
    take_weights,
    weight_kinds,
)

Array = Any


class Products(Phases):
    """Products of tiles with activations, whose sums over a block's lanes lie in shared memory."""

    def __init__(self, grid: Grid, activations: Activations):
        super().__init__(grid)
        self.x = activations
        self.sums_smem, _ = self.shared.sums_or_attention_smem

    def place(self, tile: Array, span: Array, columns: int) -> FourTiles:
        """This warpgroup's four superblocks of a span of a tile's ``columns``."""
        return FourTiles(tile, span * 8 + self.g.wg * 4, False, columns // SUPERBLOCK, self.prim)

    def lanes(self, b: Array, span: Array, columns: int) -> LaneActivations:
        """The activations of :meth:`place`."""
        return self.x.lanes(b, span * 8 + self.g.wg * 4, superblocks=columns // SUPERBLOCK)

    def multiply_into_sums(
        self, fmt: Any, tiles: Any, entries: Any, span: Array, columns: int, x: Any = None
    ) -> None:
        """Multiplies loaded tiles for every sequence; entries of ``sums_smem`` get the sums of lanes."""

        def group(_, first, size):
            here = [x or self.lanes(first + j, span, columns) for j in range(size)]
            for i in range(0, len(tiles), 2):
                for j in range(size):  # one sequence's products pass the time that the other's take
                    values = fmt.multiply(tiles[i : i + 2], here[j])
                    for entry, value in zip(entries[i : i + 2], values, strict=True):
                        self.store_sums(first + j, entry, span, value)

        self.g.for_groups(2, group)

    def own_activations(self, columns: int) -> LaneActivations | None:
        """Activations that stay in registers: one sequence whose columns are one span."""
        return self.lanes(0, 0, columns) if self.c.batch == 1 and columns <= SPAN else None

    def store_sums(self, b: Array, entry: Array, span: Array, value: Array) -> None:
        """Sums over the column groups of products [4, 8, 4], as four parts of the rows of a tile."""
        self.sums_smem[b, entry, pl.ds(span * 8 + self.g.wg * 4, 4)] = sum_groups(value)

    def result_rows(self, b: Array, spans: int) -> Array:
        """float32 [16 tiles, 8 rows]: the finished rows of this block's tiles."""
        total = None
        for part in range(8 * spans):
            value = load(self.sums_smem.at[b, :, part], OUTPUT_ROWS)
            total = value if total is None else total + value
        return total


@dataclass(frozen=True)
class DenseMatrix:
    """A matrix of one type: ``tiles`` tiles of 8 rows from tile ``offset`` of ``stack`` on.

    Attributes:
      fmt: the tile format.
      columns: of each row.
    """

    fmt: Any
    stack: dict
    offset: Any
    tiles: int
    columns: int


class Projections(Products):
    """The phases :meth:`qkv`, :meth:`output` and :meth:`logits`."""

    @jax.named_scope("qkv")
    def qkv(self, layer: Array, count: Array, *, also_ahead: Callable) -> None:
        """``qkv = rms_norm(x + down parts) @ W_qkv``: float32 [B, heads, 2, head_dim / 2].

        Waits for down of the layer before (``count``), in batches also for the owners, who signal once per
        sequence; every block signals once. ``also_ahead()`` asks for what later phases need.
        """
        self.g.begin()
        norm_ref = self.inputs.input_norm_gmem.at[layer]
        phase = _QKV(self, layer)
        if self.c.shares:
            self.x.share_normed(norm_ref, layer, count)
        phase.load_ahead()
        also_ahead()
        self.x.prepare_normed(norm_ref, layer, count)
        phase.multiply()
        self.g.signal(by_first=self.c.batch == 1)

    def dense(self, matrix: DenseMatrix, prepare: Callable, store: Callable, *, ahead: int) -> None:
        """A projection whose matrix has one type.

        Args:
          prepare: waits for the activations, and leaves them in shared memory.
          store: ``store(i, b, group)`` takes the finished rows of this warpgroup's i-th sequence b,
            of a store group.
          ahead: tiles that are loaded ahead, at most.
        """
        fmt, columns = matrix.fmt, matrix.columns
        spans = spans_of(columns)
        own = ceil_div(matrix.tiles, self.c.blocks)
        groups, here = ceil_div(own, STORE_GROUP), min(own, STORE_GROUP)
        items = here * spans

        def load_tile(i):
            """Item i counts spans first, then own tiles, then store groups."""
            nth = i // spans
            tile = jnp.minimum(nth * self.c.blocks + self.g.block, matrix.tiles - 1)
            return fmt.load(matrix.stack, self.place(matrix.offset + tile, i % spans, columns))

        tiles = tuple(load_tile(i) for i in range(divisor(items, min(ahead, fmt.ahead))))
        prepare()
        x = self.own_activations(columns)
        together = 2 if spans == 1 and len(tiles) % 2 == 0 else 1

        def multiply(i, tiles):
            entries = [i // spans + j for j in range(together)]
            self.multiply_into_sums(fmt, tiles, entries, i % spans, columns, x)

        def store_group(i, tiles):
            first = i * items
            last = groups * items - 1
            next_tile = lambda j: load_tile(jnp.minimum(first + j, last))
            tiles = stream(items, next_tile, multiply, tiles, together=together)
            self.g.sync_block()
            self.g.for_my_batch(lambda n, b: store(n, b, i))
            if groups > 1:
                self.g.sync_block()
            return tiles

        if groups == 1 and items == len(tiles):
            for span in range(spans):
                self.multiply_into_sums(fmt, tiles[span::spans], range(here), span, columns, x)
            self.g.sync_block()
            self.g.for_my_batch(lambda i, b: store(i, b, 0))
        else:
            carried(groups, store_group, tiles)

    @jax.named_scope("output_projection")
    def output(self, layer: Array, count: Array) -> None:
        """``x += attention @ W_o``, where x takes in the parts of the last down: float32 state [0].

        On a mesh the product is a part of its own, for all devices. Waits for attention, or for join where
        contexts are split (``count``); every block signals once, to all devices.
        """
        self.g.begin()
        c, phase = self.c, _Output(self, layer, count)

        def run(i):
            matrix = DenseMatrix(
                fmt=c.format(c.o_types[i]),
                stack=self.inputs.weights_gmem["o"][i],
                offset=self.g.table(layer, "o_offset"),
                tiles=c.hidden_size // 8,
                columns=c.attention_width,
            )
            self.dense(matrix, phase.prepare, phase.store, ahead=4)

        one_type(c.o_types, self.g.table(layer, "o_type"), run)
        self.g.signal(by_first=c.batch == 1, to_all=True)

    @jax.named_scope("logits")
    def logits(self, count: Array) -> None:
        """``logits = rms_norm(x + down parts) @ W_lm_head``: float32 [B, tiles, blocks, 8].

        Waits for down of the last layer (``count``), in batches also for the owners, who signal once per
        sequence. Where devices have different rows each sends its own to all, and signals to all.
        """
        self.g.begin()
        c, spans = self.c, spans_of(self.c.hidden_size)
        norm_ref, last = self.inputs.final_norm_gmem, self.c.num_hidden_layers
        if c.shares:
            self.x.share_normed(norm_ref, last, count)

        def store(_, b, group):
            rows = self.result_rows(b, spans)
            at = (b, pl.ds(group * STORE_GROUP, STORE_GROUP), self.g.block)
            if c.gathers:
                self.all_logits.send((self.g.device, *at), rows, c.devices)
            else:
                self.outputs.logits_gmem[at] = rows

        fmt, stack = c.format(c.lm_head_type, c.lm_head_tiled), self.inputs.weights_gmem["lm_head"][0]
        matrix = DenseMatrix(fmt, stack, 0, c.vocab_size // 8, c.hidden_size)
        self.dense(matrix, lambda: self.x.prepare_normed(norm_ref, last, count), store, ahead=4)
        if c.gathers:
            self.g.signal(to_all=True)

    @property
    def all_logits(self) -> Any:
        """Those of all devices, float32 [devices, B, tiles, blocks, 8]."""
        return self.prim.View(self.outputs.logits_gmem, self.outputs.logits_gmem.shape, leading=2)


class _Output:
    """Activations and results of the output projection."""

    def __init__(self, projections: Projections, layer: Array, count: Array):
        self.p, self.c, self.x, self.count = projections, projections.c, projections.x, count
        self.layer = layer
        self.state = state_view(projections.g)
        self.is_early = ceil_div(self.c.hidden_size // 8, self.c.blocks) <= STORE_GROUP
        self.before: dict[int, Array] = {}

    def prepare(self) -> None:
        """Waits, and leaves the quantized outputs of attention in shared memory."""
        c, wg = self.c, self.p.g.wg
        self.p.g.wait(self.count)
        if c.shares:
            self.x.fetch(self.p.outputs.attended_gmem, 0, padded(c.attention_width) // SUPERBLOCK)
            self.load_old()
            self.x.fetched()
            return
        pieces = [2 * span + wg for span in range(spans_of(c.attention_width))]
        loaded = [self.x.attended(0, piece) for piece in pieces]
        self.load_old()
        for piece, x in zip(pieces, loaded, strict=True):
            self.x.quantize(0, piece, x, self.p.shared.x_smem)
        self.p.g.sync_warpgroup()

    def load_old(self) -> None:
        """The residual stream's rows: after the products, each sequence would wait for memory."""
        for i in range(ceil_div(self.c.batch, WARPGROUPS) if self.is_early else 0):
            self.before[i] = self.rows(jnp.minimum(i * WARPGROUPS + self.p.g.wg, self.c.batch - 1), 0)

    def rows(self, b: Array, group: Array) -> Array:
        """float32 [16, 8] of the residual stream with its parts."""
        at = (b, pl.ds(group * STORE_GROUP, STORE_GROUP), self.p.g.block)
        slots = self.c.slots.before(self.layer)
        return sum(self.state.load((slot, *at), OUTPUT_ROWS) for slot in slots)

    def store(self, i: int, b: Array, group: Array) -> None:
        """Adds the finished rows to the residual stream; on a mesh they are sent to all devices."""
        c = self.c
        old = self.before[i] if self.is_early else self.rows(b, group)
        at = (b, pl.ds(group * STORE_GROUP, STORE_GROUP), self.p.g.block)
        rows = self.p.result_rows(b, spans_of(c.attention_width))
        if c.devices == 1:
            self.state.store((0, *at), rows + old)
            return
        self.state.send((c.slots.output(self.p.g.device, self.layer), *at), rows, c.devices)
        self.state.store((0, *at), old)


class _QKV:
    """q, k and v: first the tiles that have one type in every layer, then those whose type depends on it."""

    def __init__(self, projections: Projections, layer: Array):
        self.p, self.c = projections, projections.c
        c = self.c
        self.stacks = projections.inputs.weights_gmem["qkv"]
        self.formats = [c.format(t) for t in c.qkv_types]
        self.columns = c.hidden_size
        self.spans = spans_of(self.columns)
        self.own_tiles = ceil_div(c.qkv_tiles, c.blocks)
        self.is_static = self.own_tiles <= STORE_GROUP
        self.always = c.qkv_always // c.blocks if self.is_static else 0
        table = lambda name: [projections.g.table(layer, f"qkv_{name}{i}") for i in range(len(c.qkv_types))]
        self.counts, self.offsets = table("count"), table("offset")

    def tile(self, nth: Array) -> Array:
        """The number of this block's nth tile."""
        return nth * self.c.blocks + self.p.g.block

    def load_first(self, i: Array) -> tuple:
        """Item i of the tiles that always have the first type; it counts spans first."""
        tile = self.offsets[0] + i // self.spans * self.c.blocks + self.p.g.block
        return self.formats[0].load(self.stacks[0], self.p.place(tile, i % self.spans, self.columns))

    def load_ahead(self) -> None:
        """Issues the loads that need no activations."""
        self.items = self.always * self.spans
        count = divisor(self.items, min(5, self.formats[0].ahead)) if self.items else 0
        self.ahead = tuple(self.load_first(i) for i in range(count))
        self.mixed = list(range(self.always, self.own_tiles)) if self.is_static else []
        few = len(self.mixed) <= 2 and all(fmt.ahead >= 4 for fmt in self.formats)
        self.mixed_ahead = [self.load_mixed(nth) for nth in self.mixed] if few else None

    def load_mixed(self, nth: int) -> list:
        """The weights of a tile whose type depends on the layer, one tuple per span."""
        counts, formats = self.counts, self.formats
        tile = self.tile(nth)
        kinds = weight_kinds(formats)
        starts = [sum(counts[:i]) for i in range(len(formats))]

        def load_as(i, span):
            index = jnp.clip(tile - starts[i], 0, counts[i] - 1) + self.offsets[i]
            place = self.p.place(index, span, self.columns)
            return pad_weights(formats[i], formats[i].load(self.stacks[i], place), kinds)

        def choose(i, span):
            if i == len(formats) - 1:
                return load_as(i, span)
            inside = tile < starts[i] + counts[i]
            return lax.cond(inside, lambda: load_as(i, span), lambda: choose(i + 1, span))

        return [(kinds, choose(0, span)) for span in range(self.spans)]

    def multiply(self) -> None:
        """Multiplies all tiles and stores the results."""
        self.multiply_first(self.p.own_activations(self.columns))
        if self.is_static:
            for i, nth in enumerate(self.mixed):
                self.multiply_mixed(nth, nth, self.mixed_ahead and self.mixed_ahead[i])
            self.p.g.sync_block()
            self.p.g.for_my_batch(lambda i, b: self.store(b, 0))
        else:
            fori(ceil_div(self.own_tiles, STORE_GROUP), self.store_group)

    def multiply_first(self, x: LaneActivations | None) -> None:
        """Tiles of the type that they have in every layer."""
        self.own = x
        items, spans, fmt = self.items, self.spans, self.formats[0]
        if spans == 1 and items == len(self.ahead):  # all tiles are in registers and share their activations
            self.p.multiply_into_sums(fmt, self.ahead, range(items), 0, self.columns, x)
        elif items:
            stream(
                items,
                lambda i: self.load_first(jnp.minimum(i, items - 1)),
                lambda i, tiles: self.p.multiply_into_sums(
                    fmt, tiles, [i // spans], i % spans, self.columns, x
                ),
                self.ahead,
            )

    def multiply_mixed(self, nth: Array, at: Array, loaded: list | None = None) -> None:
        """A tile whose type depends on the layer, its sums into entry ``at``."""
        tile = self.tile(nth)
        start = 0
        for i, (fmt, count) in enumerate(zip(self.formats, self.counts, strict=True)):

            @pl.when((tile >= start) & (tile < start + count))
            def _(i=i, fmt=fmt, start=start):
                for span in range(self.spans):
                    if loaded is None:
                        place = self.p.place(self.offsets[i] + tile - start, span, self.columns)
                        weights = fmt.load(self.stacks[i], place)
                    else:
                        weights = take_weights(fmt, loaded[span])
                    self.p.multiply_into_sums(fmt, [weights], [at], span, self.columns, self.own)

            start = start + count

    def store_group(self, i: Array) -> None:
        """One store group of tiles of any type."""
        fori(STORE_GROUP, lambda entry: self.multiply_mixed(i * STORE_GROUP + entry, entry))
        self.p.g.sync_block()
        self.p.g.for_my_batch(lambda _, b: self.store(b, i))
        self.p.g.sync_block()

    def store(self, b: Array, group: Array) -> None:
        """Finished rows of one store group."""
        c = self.c
        shape = (c.batch, c.qkv_stride // (8 * c.blocks), c.blocks, 8)
        out = self.p.prim.View(self.p.outputs.qkv_gmem, shape, leading=1)
        at = (b, pl.ds(group * STORE_GROUP, STORE_GROUP), self.p.g.block)
        out.store(at, self.p.result_rows(b, self.spans))
