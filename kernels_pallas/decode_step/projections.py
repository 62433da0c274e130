"""Projections whose matrix every sequence multiplies: q/k/v, attention's output, lm_head.

Rows are dealt out in tiles of 8: block i takes tiles i, i + blocks, i + 2 blocks, ...; its warps split the
columns, so a thread multiplies all its tiles with the same 64 activations.
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
from qwen3_moe_jax.kernels_pallas.decode_step.config import STEP, STORE_GROUP, WARPGROUPS, ceil_div, divisor
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, Phases, carried, fori, one_type, stream
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import OUTPUT_ROWS, load, sum_groups
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import (
    TILE_FORMATS,
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
        self.sums_smem, _ = self.shared.sums_or_tiles_smem

    def mine(self, step: Array) -> Any:
        """This warpgroup's four superblocks of a step."""
        return pl.ds(step * 8 + self.g.wg * 4, 4)

    def multiply_into_sums(self, fmt: Any, tiles: Any, slots: Any, step: Array, x: Any = None) -> None:
        """Multiplies loaded tiles for every sequence and leaves the sums of lanes in shared memory."""

        def group(_, first, size):
            here = [x or self.x.lanes(first + j, step * 8 + self.g.wg * 4) for j in range(size)]
            for i in range(0, len(tiles), 2):
                for j in range(size):  # one sequence's products pass the time that the other's take
                    values = fmt.multiply(tiles[i : i + 2], here[j])
                    for slot, value in zip(slots[i : i + 2], values, strict=True):
                        self.store_sums(first + j, slot, step, value)

        self.g.for_groups(2, group)

    def own_activations(self, steps: int) -> LaneActivations | None:
        """Activations that stay in registers: one sequence whose columns take one step."""
        return self.x.lanes(0, self.g.wg * 4) if self.c.batch == 1 and steps == 1 else None

    def store_sums(self, b: Array, slot: Array, step: Array, value: Array) -> None:
        """Sums over the column groups of products [4, 8, 4], as four parts of the rows of a slot."""
        self.sums_smem[b, slot, pl.ds(step * 8 + self.g.wg * 4, 4)] = sum_groups(value)

    def result_rows(self, b: Array, steps: int) -> Array:
        """float32 [16 slots, 8 rows]: the finished rows of this block's tiles."""
        total = None
        for part in range(8 * steps):
            value = load(self.sums_smem.at[b, :, part], OUTPUT_ROWS)
            total = value if total is None else total + value
        return total


@dataclass(frozen=True)
class DenseMatrix:
    """A matrix of one type: ``tiles`` tiles of 8 rows from tile ``offset`` of ``stack`` on.

    Attributes:
      fmt: the tile format.
      steps: columns / STEP.
    """

    fmt: Any
    stack: dict
    offset: Any
    tiles: int
    steps: int


class Projections(Products):
    """The phases :meth:`qkv`, :meth:`output` and :meth:`logits`."""

    @jax.named_scope("qkv")
    def qkv(self, layer: Array, count: Array) -> None:
        """``qkv = rms_norm(x + down parts) @ W_qkv``: float32 [B, heads, 2, head_dim / 2].

        Waits for down of the layer before (``count``), in batches also for the owners, who signal once per
        sequence; every block signals once.
        """
        self.g.begin()
        norm_ref = self.inputs.input_norm_gmem.at[layer]
        phase = _QKV(self, layer)
        if self.c.shares:
            self.x.share_normed(norm_ref, count)
        phase.load_ahead()
        self.x.prepare_normed(norm_ref, count)
        phase.multiply()
        self.g.signal(by_first=self.c.batch == 1)

    def dense(self, matrix: DenseMatrix, prepare: Callable, store: Callable, *, ahead: int) -> None:
        """A projection whose matrix has one type.

        Args:
          prepare: waits for the activations, and leaves them in shared memory.
          store: ``store(i, b, chunk)`` takes the finished rows of this warpgroup's i-th sequence b.
          ahead: tiles that are loaded ahead, at most.
        """
        fmt, steps = matrix.fmt, matrix.steps
        slots = ceil_div(matrix.tiles, self.c.blocks)
        chunks, here = ceil_div(slots, STORE_GROUP), min(slots, STORE_GROUP)
        items = here * steps

        def load_tile(i):
            """Item i counts steps first, then slots, then chunks."""
            slot = i // steps
            tile = jnp.minimum(slot * self.c.blocks + self.g.block, matrix.tiles - 1)
            return fmt.load(matrix.stack, (matrix.offset + tile, self.mine(i % steps)))

        tiles = tuple(load_tile(i) for i in range(divisor(items, ahead)))
        prepare()
        x = self.own_activations(steps)
        together = 2 if steps == 1 and len(tiles) % 2 == 0 else 1

        def multiply(i, tiles):
            slots = [i // steps + j for j in range(together)]
            self.multiply_into_sums(fmt, tiles, slots, i % steps, x)

        def chunk(i, tiles):
            first = i * items
            last = chunks * items - 1
            next_tile = lambda j: load_tile(jnp.minimum(first + j, last))
            tiles = stream(items, next_tile, multiply, tiles, together=together)
            self.g.sync_block()
            self.g.for_my_batch(lambda n, b: store(n, b, i))
            if chunks > 1:
                self.g.sync_block()
            return tiles

        if chunks == 1 and items == len(tiles):
            for step in range(steps):
                self.multiply_into_sums(fmt, tiles[step::steps], range(here), step, x)
            self.g.sync_block()
            self.g.for_my_batch(lambda i, b: store(i, b, 0))
        else:
            carried(chunks, chunk, tiles)

    @jax.named_scope("output_projection")
    def output(self, layer: Array, count: Array) -> None:
        """``x += attention @ W_o``, where x takes in the parts of the last down: float32 state [0].

        Waits for attention, or for join where contexts are split (``count``); every block signals once.
        """
        self.g.begin()
        c, phase = self.c, _Output(self, count)

        def run(i):
            matrix = DenseMatrix(
                fmt=TILE_FORMATS[c.o_types[i]],
                stack=self.inputs.weights_gmem["o"][i],
                offset=self.g.table(layer, "o_offset"),
                tiles=c.hidden_size // 8,
                steps=c.attention_width // STEP,
            )
            self.dense(matrix, phase.prepare, phase.store, ahead=4)

        one_type(c.o_types, self.g.table(layer, "o_type"), run)
        self.g.signal(by_first=c.batch == 1)

    @jax.named_scope("logits")
    def logits(self, count: Array) -> None:
        """``logits = rms_norm(x + down parts) @ W_lm_head``: float32 [B, tiles, blocks, 8].

        Waits for down of the last layer (``count``), in batches also for the owners, who signal once per
        sequence.
        """
        self.g.begin()
        c, steps = self.c, self.c.hidden_size // STEP
        norm_ref = self.inputs.final_norm_gmem
        if c.shares:
            self.x.share_normed(norm_ref, count)

        def store(_, b, chunk):
            rows = self.result_rows(b, steps)
            self.outputs.logits_gmem[b, pl.ds(chunk * STORE_GROUP, STORE_GROUP), self.g.block] = rows

        fmt, stack = TILE_FORMATS[c.lm_head_type], self.inputs.weights_gmem["lm_head"][0]
        matrix = DenseMatrix(fmt, stack, 0, c.vocab_size // 8, steps)
        self.dense(matrix, lambda: self.x.prepare_normed(norm_ref, count), store, ahead=4)


class _Output:
    """Activations and results of the output projection."""

    def __init__(self, projections: Projections, count: Array):
        self.p, self.c, self.x, self.count = projections, projections.c, projections.x, count
        self.state = state_view(projections.g)
        self.is_early = ceil_div(self.c.hidden_size // 8, self.c.blocks) <= STORE_GROUP
        self.before: dict[int, Array] = {}

    def prepare(self) -> None:
        """Waits, and leaves the quantized outputs of attention in shared memory."""
        c, wg = self.c, self.p.g.wg
        self.p.g.wait(self.count)
        if c.shares:
            self.x.fetch(self.p.outputs.attended_gmem, 0, c.attention_width // SUPERBLOCK)
            self.load_old()
            self.x.fetched()
            return
        chunks = [2 * step + wg for step in range(c.attention_width // STEP)]
        loaded = [self.x.attended(0, chunk) for chunk in chunks]
        self.load_old()
        for chunk, x in zip(chunks, loaded, strict=True):
            self.x.quantize(0, chunk, x, self.p.shared.x_smem)
        self.p.g.sync_warpgroup()

    def load_old(self) -> None:
        """The residual stream's rows: after the products, each sequence would wait for memory."""
        for i in range(ceil_div(self.c.batch, WARPGROUPS) if self.is_early else 0):
            self.before[i] = self.rows(jnp.minimum(i * WARPGROUPS + self.p.g.wg, self.c.batch - 1), 0)

    def rows(self, b: Array, chunk: Array) -> Array:
        """float32 [16, 8] of the residual stream with its parts."""
        at = (b, pl.ds(chunk * STORE_GROUP, STORE_GROUP), self.p.g.block)
        return sum(self.state.load((part, *at), OUTPUT_ROWS) for part in range(1 + self.c.down_parts))

    def store(self, i: int, b: Array, chunk: Array) -> None:
        """Adds the finished rows to the residual stream."""
        old = self.before[i] if self.is_early else self.rows(b, chunk)
        at = (b, pl.ds(chunk * STORE_GROUP, STORE_GROUP), self.p.g.block)
        self.state.store((0, *at), self.p.result_rows(b, self.c.attention_width // STEP) + old)


class _QKV:
    """q, k and v: first the tiles that have one type in every layer, then those whose type depends on it."""

    def __init__(self, projections: Projections, layer: Array):
        self.p, self.c = projections, projections.c
        c = self.c
        self.stacks = projections.inputs.weights_gmem["qkv"]
        self.formats = [TILE_FORMATS[t] for t in c.qkv_types]
        self.steps = c.hidden_size // STEP
        self.slots = ceil_div(c.qkv_tiles, c.blocks)
        self.is_static = self.slots <= STORE_GROUP
        self.always = c.qkv_always // c.blocks if self.is_static else 0
        table = lambda name: [projections.g.table(layer, f"qkv_{name}{i}") for i in range(len(c.qkv_types))]
        self.counts, self.offsets = table("count"), table("offset")

    def tile(self, slot: Array) -> Array:
        """The tile of one of this block's slots."""
        return slot * self.c.blocks + self.p.g.block

    def load_first(self, i: Array) -> tuple:
        """Item i of the tiles that always have the first type; it counts steps first."""
        tile = self.offsets[0] + i // self.steps * self.c.blocks + self.p.g.block
        return self.formats[0].load(self.stacks[0], (tile, self.p.mine(i % self.steps)))

    def load_ahead(self) -> None:
        """Issues the loads that need no activations."""
        self.items = self.always * self.steps
        count = divisor(self.items, 5) if self.items else 0
        self.ahead = tuple(self.load_first(i) for i in range(count))
        self.mixed = list(range(self.always, self.slots)) if self.is_static else []
        few = len(self.mixed) <= 2
        self.mixed_ahead = [self.load_mixed(slot) for slot in self.mixed] if few else None

    def load_mixed(self, slot: int) -> list:
        """The weights of a tile whose type depends on the layer, one tuple per step."""
        counts, formats = self.counts, self.formats
        tile = self.tile(slot)
        kinds = weight_kinds(formats)
        starts = [sum(counts[:i]) for i in range(len(formats))]

        def load_as(i, step):
            index = jnp.clip(tile - starts[i], 0, counts[i] - 1) + self.offsets[i]
            return pad_weights(formats[i], formats[i].load(self.stacks[i], (index, self.p.mine(step))), kinds)

        def choose(i, step):
            if i == len(formats) - 1:
                return load_as(i, step)
            inside = tile < starts[i] + counts[i]
            return lax.cond(inside, lambda: load_as(i, step), lambda: choose(i + 1, step))

        return [(kinds, choose(0, step)) for step in range(self.steps)]

    def multiply(self) -> None:
        """Multiplies all tiles and stores the results."""
        self.multiply_first(self.p.own_activations(self.steps))
        if self.is_static:
            for i, slot in enumerate(self.mixed):
                self.multiply_mixed(slot, slot, self.mixed_ahead and self.mixed_ahead[i])
            self.p.g.sync_block()
            self.p.g.for_my_batch(lambda i, b: self.store(b, 0))
        else:
            fori(ceil_div(self.slots, STORE_GROUP), self.chunk)

    def multiply_first(self, x: LaneActivations | None) -> None:
        """Tiles of the type that they have in every layer."""
        self.own = x
        items, steps, fmt = self.items, self.steps, self.formats[0]
        if steps == 1 and items == len(self.ahead):  # all tiles are in registers and share their activations
            self.p.multiply_into_sums(fmt, self.ahead, range(items), 0, x)
        elif items:
            stream(
                items,
                lambda i: self.load_first(jnp.minimum(i, items - 1)),
                lambda i, tiles: self.p.multiply_into_sums(fmt, tiles, [i // steps], i % steps, x),
                self.ahead,
            )

    def multiply_mixed(self, slot: Array, at: Array, loaded: list | None = None) -> None:
        """A tile whose type depends on the layer, its sums into slot ``at``."""
        tile = self.tile(slot)
        start = 0
        for i, (fmt, count) in enumerate(zip(self.formats, self.counts, strict=True)):

            @pl.when((tile >= start) & (tile < start + count))
            def _(i=i, fmt=fmt, start=start):
                for step in range(self.steps):
                    if loaded is None:
                        index = (self.offsets[i] + tile - start, self.p.mine(step))
                        weights = fmt.load(self.stacks[i], index)
                    else:
                        weights = take_weights(fmt, loaded[step])
                    self.p.multiply_into_sums(fmt, [weights], [at], step, self.own)

            start = start + count

    def chunk(self, i: Array) -> None:
        """One store group of tiles of any type."""
        fori(STORE_GROUP, lambda slot: self.multiply_mixed(i * STORE_GROUP + slot, slot))
        self.p.g.sync_block()
        self.p.g.for_my_batch(lambda _, b: self.store(b, i))
        self.p.g.sync_block()

    def store(self, b: Array, chunk: Array) -> None:
        """Finished rows of one store group."""
        c = self.c
        shape = (c.batch, c.row_stride(c.qkv_tiles * 8) // (8 * c.blocks), c.blocks, 8)
        out = self.p.prim.View(self.p.outputs.qkv_gmem, shape, leading=1)
        at = (b, pl.ds(chunk * STORE_GROUP, STORE_GROUP), self.p.g.block)
        out.store(at, self.p.result_rows(b, self.steps))
