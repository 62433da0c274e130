"""One thread block of the grouped matrix product: what its warpgroups do, item after item."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import REGISTERS
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_stores import (
    emulated_scatter,
    emulated_swiglu,
    fence_async_copies,
    store_scattered,
    store_transposed,
    swiglu_to_shared,
)
from qwen3_moe_jax.kernels_pallas.gpu.sorting import ROW_ALIGN, Tiles, UsedExperts
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import PIECE, PIECES, SLAB_ROWS
from qwen3_moe_jax.kernels_pallas.gpu.unpack_sm90 import piece_operand

_SLAB_TILES = SLAB_ROWS // TILE_ROWS


class References(NamedTuple):
    """What a thread block reads and writes.

    Attributes:
      firsts: of each weight stack the first row, or the layer and the table of all layers' first rows.
      out: the result.
      x, scale, destinations: see ``grouped_matmul_sm90.grouped_matmul``; the last where results scatter.
      x_tile: pieces of x in shared memory, one per stage.
      weights: the arrays of a superblock of weights in shared memory, by name, one per stage.
      x_full, w_full: barriers of each stage, when a copy is there; x_free, w_free: when all have read it.
      operand: where the kernel is emulated, what would be in registers.
      swiglu: results of SwiGLU on their way.
      barrier: of all warpgroups, in the portable kernel.
    """

    firsts: Any
    out: Any
    x: Any
    scale: Any
    x_tile: Any
    weights: dict[str, Any]
    destinations: Any = None
    x_full: Any = None
    w_full: Any = None
    x_free: Any = None
    w_free: Any = None
    operand: Any = None
    swiglu: Any = None
    barrier: Any = None


@dataclass(frozen=True)
class Item:
    """What a block does at a time: a tile of rows, a block of weight rows, a part of K.

    Attributes:
      number: items of this block before.
      expert: the matrix.
      start: first row of the tile, in x (but for ``Kernel.shared``), scale and the result.
      row_block: which block of weight rows.
      split: which part of K.
      held: rows that are written.
      width: rows that are multiplied.
    """

    number: Any
    expert: Any
    start: Any
    row_block: Any
    split: Any
    held: Any
    width: int


class Body:
    """One block's run: methods are what its warpgroups do.

    Args:
      kernel: the ``grouped_matmul_sm90.Kernel`` whose shapes they have.
      work: which rows belong to which matrix, as references.
      refs: operands and scratch memory.
      views: of each weight stack's arrays, one after the other.
      blocks: how many share the work.
    """

    def __init__(self, kernel: Any, work: Tiles | UsedExperts, refs: References, views, blocks: int):
        self.k, self.c, self.blocks = kernel, kernel.config, blocks
        self.work: Any = work
        self.s, self.firsts, self.out = refs, refs.firsts, refs.out
        count = len(kernel.arrays)
        self.views = [
            dict(zip(kernel.arrays, views[i : i + count], strict=True)) for i in range(0, len(views), count)
        ]
        self.block = lax.axis_index("block")
        self.wg = lax.axis_index("wg")
        self.each = self.each_used if isinstance(work, UsedExperts) else self.each_tile

    def run(self) -> None:
        increased, decreased = REGISTERS[self.c.warpgroups]
        exchange = self.c.exchange and not self.k.emulate

        @pl.when(self.wg < self.c.warpgroups)
        def _():
            if exchange:
                plgpu.set_max_registers(increased, action="increase")
            self.each(self.multiply)
            if self.k.fused:
                plgpu.wait_smem_to_gmem(0)

        @pl.when(self.wg == self.c.warpgroups)
        def _():
            if exchange:
                plgpu.set_max_registers(decreased, action="decrease")
            copied = self.each(self.produce) * self.k.split_superblocks
            self.drain(self.s.w_free, copied, self.k.weight_stages)
            self.drain(self.s.x_free, copied * PIECES, self.k.x_stages)

    def each_tile(self, body):
        """Calls ``body(item)`` for each item of this block and gives their number."""
        splits, row_blocks = self.k.splits, self.k.row_blocks
        items = self.count() * (splits * row_blocks)
        mine = lax.div(items - self.block + self.blocks - 1, jnp.int32(self.blocks))

        def one_item(number, _):
            at = number * self.blocks + self.block
            row_block = lax.rem(at, jnp.int32(row_blocks))
            part = lax.div(at, jnp.int32(row_blocks))
            tile = lax.div(part, jnp.int32(splits))
            split = lax.rem(part, jnp.int32(splits))
            held, expert = self.work.rows[tile], self.work.expert[tile]
            start = pl.multiple_of(self.work.start[tile], ROW_ALIGN)
            narrower = 0
            for width in self.c.widths:
                item = Item(number, expert, start, row_block, split, held, width)
                pl.when((held > narrower) & (held <= width))(functools.partial(body, item))
                narrower = width
            return _

        lax.fori_loop(0, mine, one_item, None)
        return mine

    def each_used(self, body):
        """As ``each_tile``: all rows with every expert in use."""
        row_blocks, tile = self.k.row_blocks, self.c.tile
        items = self.count() * row_blocks
        mine = lax.div(items - self.block + self.blocks - 1, jnp.int32(self.blocks))

        def one_item(number, _):
            at = number * self.blocks + self.block
            expert = self.work.experts[lax.div(at, jnp.int32(row_blocks))]
            row_block = lax.rem(at, jnp.int32(row_blocks))
            start = pl.multiple_of(expert * tile, ROW_ALIGN)
            body(Item(number, expert, start, row_block, jnp.int32(0), jnp.int32(tile), tile))
            return _

        lax.fori_loop(0, mine, one_item, None)
        return mine

    def count(self):
        """Tiles, or experts in use; none where the layer's matrices have another type."""
        count, of_layer = self.work.count[0], self.k.of_layer
        if of_layer is None:
            return count
        return jnp.where(self.entry(of_layer.which) == of_layer.option, count, 0)

    def entry(self, offset: int):
        """The layer's entry of the table."""
        layer, table = self.firsts
        return table[offset + layer[0]]

    def first(self, i: int):
        """First row of the weights number i in their stack."""
        of_layer = self.k.of_layer
        return self.firsts[i][0] if of_layer is None else self.entry(of_layer.firsts[i])

    def x_start(self, item: Item):
        return 0 if self.k.shared else item.start

    # The warpgroup that copies

    def produce(self, item: Item) -> None:
        x, x_stages, weight_stages = self.s.x_tile, self.k.x_stages, self.k.weight_stages
        width, start = item.width, self.x_start(item)
        found = [self.first(i) for i in range(len(self.views))] if self.k.of_layer else None

        def copy(i, _):
            superblock = item.number * self.k.split_superblocks + i
            at = item.split * self.k.split_superblocks + i
            stage = lax.rem(superblock, jnp.int32(weight_stages))

            @pl.when(superblock >= weight_stages)
            def _wait():
                plgpu.barrier_wait(self.s.w_free.at[stage])
                fence_async_copies(emulate=self.k.emulate)

            self.copy_weights(item, found, at, stage)
            for quarter in range(PIECES):
                piece = superblock * PIECES + quarter
                x_stage = lax.rem(piece, jnp.int32(x_stages))

                @pl.when(piece >= x_stages)
                def _wait(x_stage=x_stage):
                    plgpu.barrier_wait(self.s.x_free.at[x_stage])

                plgpu.copy_gmem_to_smem(
                    self.s.x.at[pl.ds(start, width), pl.ds((at * PIECES + quarter) * PIECE, PIECE)],
                    x.at[x_stage, pl.ds(0, width)],
                    self.s.x_full.at[x_stage],
                )
            return _

        lax.fori_loop(0, self.k.split_superblocks, copy, None)

    def drain(self, barriers, copied, stages: int) -> None:
        """Waits until everything that was copied has been used."""

        def wait(i, _):
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(stages))]))

        lax.fori_loop(copied, copied + stages, wait, None)

    def copy_weights(self, item: Item, firsts: list | None, superblock, stage) -> None:
        """One superblock of all the block's weight rows into stage ``stage``.

        Args:
          firsts: first rows where they have been looked up; None reads them here, which needs no registers.
        """
        k, full = self.k, self.full(stage)
        expert, row_block = item.expert, item.row_block
        tiles_each = k.rows // TILE_ROWS
        for i, views in enumerate(self.views):
            first = (
                lax.div(self.first(i) if firsts is None else firsts[i], jnp.int32(TILE_ROWS))
                + expert * tiles_each
            )
            for name, view in views.items():
                parts = k.arrays[name].parts
                inner = pl.ds(superblock * parts, parts)
                target = self.s.weights[name]
                if k.fused:
                    # A block has 8 columns per slab of each of a superblock's four groups.
                    blocks_each = SUPERBLOCK // k.block_rows
                    group = lax.div(first, jnp.int32(32)) + lax.div(row_block, jnp.int32(blocks_each))
                    part = lax.rem(row_block, jnp.int32(blocks_each)) * k.slabs
                    source = view.at[group, :, pl.ds(part, k.slabs), inner]
                    self.copy(source, target.at[stage, i], full)
                else:
                    group = lax.div(first, jnp.int32(_SLAB_TILES)) + row_block * k.slabs
                    self.copy(view.at[pl.ds(group, k.slabs), :, inner], target.at[stage], full)

    def copy(self, source: Any, target: Any, full: Any) -> None:
        """Begins to copy to shared memory; ``full`` is arrived at when it is done."""
        plgpu.copy_gmem_to_smem(source, target, full)

    def full(self, stage: Any) -> Any:
        """The barrier at which a stage's weights arrive."""
        return self.s.w_full.at[stage]

    # The warpgroups that multiply

    def multiply(self, item: Item) -> None:
        width = item.width

        def accumulate(*accumulators):
            lax.fori_loop(
                0,
                self.k.split_superblocks,
                lambda i, _: self.superblock(item.number, i, width, accumulators),
                None,
            )
            last = (item.number + 1) * (self.k.split_superblocks * PIECES) - 1
            sums = [a[...] for a in accumulators]
            if self.c.in_flight:
                plgpu.barrier_arrive(self.s.x_free.at[lax.rem(last, jnp.int32(self.k.x_stages))])
            return sums

        shape = plgpu.ACC((SLAB_ROWS, width), jnp.float32)
        sums = pl.run_scoped(accumulate, *([shape] * self.c.slabs))
        layout = plgpu.Layout.WGMMA
        at = pl.ds(self.x_start(item), width)
        scale = plgpu.load(self.s.scale.at[at], layout=layout.reduce(0), optimized=False)
        scale = lax.broadcast_in_dim(scale, (SLAB_ROWS, width), (1,))
        sums = [s * scale for s in sums]
        if self.k.fused:
            self.store_swiglu(sums, item)
        else:
            for slab, values in enumerate(sums):
                self.store(values, slab, item)

    def superblock(self, number, i, width: int, accumulators) -> None:
        c = self.c
        superblock = number * self.k.split_superblocks + i
        stage = lax.rem(superblock, jnp.int32(self.k.weight_stages))
        plgpu.barrier_wait(self.s.w_full.at[stage])
        weights = {name: self.s.weights[name].at[stage] for name in self.k.arrays}
        for quarter in range(PIECES):
            piece = superblock * PIECES + quarter
            x_stage = lax.rem(piece, jnp.int32(self.k.x_stages))
            for slab, accumulator in enumerate(accumulators):
                operand = piece_operand(
                    self.k.type, weights, self.k.tiles_of(slab), quarter, self.wg, emulate=self.k.emulate
                )
                if self.k.emulate:
                    kept = self.s.operand.at[self.wg, quarter % 2, slab]
                    kept[...] = operand
                    operand = kept
                if slab == 0:
                    plgpu.barrier_wait(self.s.x_full.at[x_stage])
                if quarter == PIECES - 1 and slab == c.slabs - 1:
                    plgpu.barrier_arrive(self.s.w_free.at[stage])
                plgpu.wgmma(accumulator, operand, self.s.x_tile.at[x_stage, pl.ds(0, width)].T)
                plgpu.wgmma_wait(c.in_flight)
                if c.in_flight and slab == 0:
                    self.release_before(piece, i, quarter)
            if not c.in_flight:
                plgpu.barrier_arrive(self.s.x_free.at[x_stage])

    def release_before(self, piece, i, quarter: int) -> None:
        """Frees the piece of x before this one, which no running wgmma reads any more."""

        def release():
            before = lax.rem(piece + (self.k.x_stages - 1), jnp.int32(self.k.x_stages))
            plgpu.barrier_arrive(self.s.x_free.at[before])

        if quarter:
            release()
        else:
            pl.when(i > 0)(release)

    # Results

    def store(self, values, slab: int, item: Item) -> None:
        """Writes float32 [64 weight rows, width] transposed; a warp fills whole 32-byte sectors."""
        k, width, held = self.k, item.width, item.held
        column = item.row_block * k.block_rows + (self.wg * self.c.slabs + slab) * SLAB_ROWS
        start = item.start + item.split * (self.out.shape[0] // k.splits)
        columns = pl.ds(column, SLAB_ROWS)

        @pl.when(column < k.rows)
        def _():
            if k.scattered:
                destinations = self.s.destinations.at[pl.ds(item.start, width)]
                if k.emulate:
                    emulated_scatter(self.out, columns, destinations, values)
                else:
                    store_scattered(self.out.at[:, columns], values, destinations, k.rows)
            elif k.emulate:
                for i in range(width // ROW_ALIGN):
                    rows = slice(i * ROW_ALIGN, (i + 1) * ROW_ALIGN)

                    @pl.when(i * ROW_ALIGN < held)
                    def _(i=i, rows=rows):
                        at = (pl.ds(start + i * ROW_ALIGN, ROW_ALIGN), columns)
                        self.out[at] = values[:, rows].T

            else:
                store_transposed(self.out.at[pl.ds(start, width), columns], values, held, k.rows)

    def store_swiglu(self, sums: list, item: Item) -> None:
        """Writes float16 results [rows, 32 positions] of each slab through shared memory."""
        k, slabs, width = self.k, self.c.slabs, item.width
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slab, values in enumerate(sums):
            buffer = self.s.swiglu.at[self.wg, slab, pl.ds(0, width)]
            if k.emulate:
                buffer[...] = emulated_swiglu(values, width)
            else:
                swiglu_to_shared(buffer, values)
        plgpu.commit_smem()
        for slab in range(slabs):
            part = slab * self.c.warpgroups + self.wg
            position = item.row_block * k.block_rows + part * (SLAB_ROWS // 2)
            offset, size = 0, 1 << (width.bit_length() - 1)
            while size >= ROW_ALIGN:
                # The largest power of two of rows first, then the next: copies have fixed sizes.
                @pl.when(item.held & size != 0)
                def _(offset=offset, size=size, slab=slab, position=position):
                    at = offset if isinstance(offset, int) else pl.multiple_of(offset, ROW_ALIGN)
                    plgpu.copy_smem_to_gmem(
                        self.s.swiglu.at[self.wg, slab, pl.ds(at, size)],
                        self.out.at[pl.ds(item.start + at, size), pl.ds(position, SLAB_ROWS // 2)],
                        commit_group=False,
                    )

                offset = offset + (item.held & size)
                size //= 2
        plgpu.commit_smem_to_gmem_group()
