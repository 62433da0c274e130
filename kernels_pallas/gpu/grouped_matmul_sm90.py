"""Grouped matrix product of sorted rows with packed weights, a Pallas:Mosaic GPU kernel for Hopper.

The one kernel serves the sparse experts (a tile of rows belongs to one expert) and dense
matrices (one group). Weights are the wgmma operand that lies in registers: a warpgroup
unpacks a 64 x 64 piece while the tensor cores work on the piece before it, or for the other
warpgroups. Activations are the operand in shared memory. The last warpgroup brings both there,
packed, through the tensor memory accelerator; blocks are persistent and go through
(tile of rows) x (block of weight rows), the tiles that share weights one after the other.
Few tokens are not sorted at all (:class:`UsedExperts`): every expert in use multiplies all of
them, which costs less than arranging them, and results of others are not written.

With two weight stacks the kernel computes SwiGLU: of a warp's 16 operand rows, 8 are rows of
gate_proj and 8 the same rows of up_proj, so that both products of an element end up in one lane.

Why every block ends: all its warpgroups go through the same items, which they work out from the
same arrays, and each item takes the same number of steps everywhere, whatever its rows. With s
steps so far, the copying warpgroup fills slot ``s % slots`` after ``s // slots`` uses of it were
arrived at, once by each multiplying warpgroup; these arrive at slot s before they wait for
anything that is copied after s + 1, and two slots or more exist. So of all waits the one of the
least step is always satisfied. A block without items waits for nothing, an item without rows does
not exist. Registers are exchanged within what the launch gave (``REGISTERS``), or not at all.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import GPU_TILES, TILE_ROWS
from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE
from qwen3_moe_jax.kernels_pallas.gpu.device import multiprocessors
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter_option
from qwen3_moe_jax.kernels_pallas.gpu.sorting import ROW_ALIGN, Tiles, UsedExperts
from qwen3_moe_jax.kernels_pallas.gpu.unpack_sm90 import (
    CHUNK,
    CHUNKS,
    SLAB_ROWS,
    TILE_ARRAYS,
    TilePlace,
    chunk_operand,
)
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

REGISTERS = {2: (240, 24), 4: (112, 32)}
"""Registers of a thread that multiplies and of one that copies, by warpgroups that multiply.

Warpgroups exchange what the launch gave the block, 168 a thread of three warpgroups or 96 of
five: a sum above that would wait for ever. Only with ``MatmulConfig.exchange``.
"""
SHARED_BYTES = 227 * 1024
_RESERVED_BYTES = 2048
_SLAB_TILES = SLAB_ROWS // TILE_ROWS
_FLOAT16_MAX = 65504.0
_SWIZZLED = (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))


@dataclass(frozen=True)
class MatmulConfig:
    """Sizes of the kernel's pieces.

    Attributes:
      tile: rows of x a tile, at most 256.
      widths: how many rows of a tile may be multiplied, ascending up to ``tile``: the least that
        holds a tile's rows is used.
      slabs: operands of 64 weight rows that a warpgroup keeps at once.
      warpgroups: how many multiply, 2 or 4: with few rows of x unpacking takes most of the time, and
        more warpgroups hide its latencies.
      in_flight: wgmma groups that may be running while the next operand is unpacked, 0 or 1.
      weight_slots: superblocks of weights in shared memory, at most; two at least.
      most_x_slots: pieces of x in shared memory, at most.
      blocks: persistent blocks; None is one for each multiprocessor.
      exchange: warpgroups that multiply take registers from the one that copies. Not needed where the
        registers of the launch do, and then there is one thing less to wait for.
    """

    tile: int = 128
    widths: tuple[int, ...] = (64, 128)
    slabs: int = 2
    warpgroups: int = 2
    in_flight: int = 1
    weight_slots: int = 2
    most_x_slots: int = 8
    blocks: int | None = None
    exchange: bool = True


@dataclass(frozen=True)
class OfLayer:
    """Where a layer's matrices lie, for the kernel to look up: no launch picks them.

    Attributes:
      layer: int32 [1].
      table: int32 [n], in which the layer's entry is ``layer`` after each of these places:
      firsts: of each of the weights, its first row, in place of ``Matrices.first``.
      which: of which of several types the layer's matrices are.
      option: the type that these weights have; in layers of another nothing is multiplied or written.
    """

    layer: jax.Array
    table: jax.Array
    firsts: tuple[int, ...]
    which: int
    option: int = 0


def grouped_matmul(
    x: jax.Array,
    scale: jax.Array,
    work: Tiles | UsedExperts,
    weights: tuple[Matrices, ...],
    *,
    config: MatmulConfig,
    splits: int = 1,
    places: jax.Array | None = None,
    out_rows: int | None = None,
    of_layer: OfLayer | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Multiplies tiles of rows with their matrices.

    Args:
      x: float16 [R, K] in operand order (``activations.float16_operand``). For ``UsedExperts`` R is
        ``config.tile``, rows that all experts multiply, or that times E: each expert has its own.
      scale: float32 [R], a factor of each row of the result.
      work: which rows belong to which matrix. Rows after a tile's own are read up to
        ``config.tile``: R leaves room for that.
      weights: matrices [N, K] or [E, N, K], or two of one type: gate_proj and up_proj. N is a
        multiple of 64, or of 256 for SwiGLU, and so are rows before them in their stack.
      config: sizes.
      splits: parts of K that are summed apart, each by other blocks; a divisor of K / 256.
      places: with ``UsedExperts``, int32 [E * config.tile]: the row of the result for each expert's
        product with each row of x, or -1 for a product that nobody wants.
      out_rows: rows of the result, with ``places``.
      of_layer: which layer's matrices; the weights' own ``first`` is not read then.
      interpret: parameters of Pallas' interpreter, which replaces instructions that it lacks.

    Returns:
      [R, N]: float32 products; or SwiGLU's results in operand order, times
      ``activations.SWIGLU_SCALE``. With ``UsedExperts`` [E * config.tile, N] or, with places,
      [out_rows, N]. With splits > 1 [splits, R, N], to be added. Rows of no tile are not written.

    Raises:
      NotImplementedError: the kernel does not take this type, layout or shape.
    """
    check_supported(weights)
    kernel = _Kernel(weights[0], len(weights) == 2, config, splits, interpret)
    kernel.shared = isinstance(work, UsedExperts) and x.shape[0] == config.tile
    kernel.scattered = places is not None
    rows = x.shape[0]
    if isinstance(work, UsedExperts):
        rows = out_rows if kernel.scattered else work.experts.shape[0] * config.tile
    views = [kernel.view(w.stack.arrays[n], n) for w in weights for n in kernel.arrays]
    firsts = [w.first.reshape(1) for w in weights]
    if of_layer is not None:
        kernel.of_layer, firsts = of_layer, [of_layer.layer, of_layer.table]
    out = kernel.call(work, rows, [x, scale, *([places] if kernel.scattered else [])], firsts, views)
    return out.reshape(splits, rows, -1) if splits > 1 else out


def check_supported(weights: tuple[Matrices, ...]) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not take."""
    for w in weights:
        if w.stack.layout != GPU_TILES:
            raise NotImplementedError(f"Hopper kernels read layout {GPU_TILES!r}, not {w.stack.layout!r}")
        if w.stack.type not in TILE_ARRAYS:
            raise NotImplementedError(f"Hopper kernels take no {w.stack.type.name} weights")
    if len({w.stack.type for w in weights}) > 1:
        raise NotImplementedError("gate_proj and up_proj of two types are not fused")
    unit = SUPERBLOCK if len(weights) == 2 else SLAB_ROWS
    rows, columns = weights[0].shape[-2:]
    if rows % unit or columns % SUPERBLOCK:
        raise NotImplementedError(
            f"Hopper kernels need rows in {unit}s, columns in 256s, not {rows}, {columns}"
        )


def pick_config(rows_each: float) -> MatmulConfig:
    """Sizes for matrices that are multiplied with about ``rows_each`` rows each.

    These two have run on a GPU with their values checked; what else was tried is in
    ``docs/log``. More widths make ptxas serialize the matrix instructions for want of
    registers (C7512).
    """
    return MatmulConfig(tile=64, widths=(32, 64)) if rows_each <= 48 else MatmulConfig()


MAX_FEW_ROWS = 64
"""Up to this many rows are "few": one tile holds them all."""


def few_config(rows: int, type: GGMLType = GGMLType.Q4_K) -> MatmulConfig:
    """Sizes for up to ``MAX_FEW_ROWS`` rows that every matrix multiplies: unpacking is most of the work.

    Four warpgroups hide each other's latencies, in the registers that the launch gives them. More
    than 32 rows (16 of Q5_K, gate_proj's type) leave none for a second operand, so that a warpgroup
    waits for its products.
    """
    tile = -(-rows // ROW_ALIGN) * ROW_ALIGN
    in_flight = 1 if tile <= (16 if type is GGMLType.Q5_K else 32) else 0
    return MatmulConfig(tile, (tile,), 1, 4, in_flight, weight_slots=4, exchange=False)


def dense_config(rows: int, matrix_rows: int, columns: int) -> tuple[MatmulConfig, int]:
    """Sizes for one matrix, and splits of K: as many blocks as there are multiprocessors get work."""
    config = pick_config(rows)
    if rows <= MAX_FEW_ROWS:
        config = replace(few_config(rows), warpgroups=2, in_flight=1)
    block_rows = config.warpgroups * config.slabs * SLAB_ROWS
    items = -(-rows // config.tile) * -(-matrix_rows // block_rows)
    splits = 1
    while items * splits * 2 <= multiprocessors() and columns // SUPERBLOCK % (splits * 2) == 0:
        splits *= 2
    return config, splits


class _Kernel:
    """Shapes that follow from the arguments, and the kernel's body.

    Attributes:
      shared: all experts multiply the same rows of x.
      scattered: ``places`` says where results go.
      of_layer: places in the table of which layer's matrices.
    """

    shared = scattered = False
    of_layer: OfLayer | None = None

    def __init__(self, weights: Matrices, fused: bool, config: MatmulConfig, splits: int, interpret: Any):
        self.type, self.rows, self.fused, self.config = weights.stack.type, weights.rows, fused, config
        self.interpret, self.emulate = interpret, interpret is not None
        self.arrays = TILE_ARRAYS[self.type]
        self.superblocks = weights.columns // SUPERBLOCK
        if (fused and splits > 1) or self.superblocks % splits:
            raise ValueError(f"{self.superblocks} superblocks cannot be summed in {splits} parts")
        self.splits, self.steps = splits, self.superblocks // splits
        slab_rows = SLAB_ROWS // 2 if fused else SLAB_ROWS
        self.slabs = config.warpgroups * config.slabs
        self.block_rows = config.warpgroups * config.slabs * slab_rows
        self.row_blocks = -(-self.rows // self.block_rows)
        self.weight_slots, self.x_slots = self._slots()

    # Memory

    def _slots(self) -> tuple[int, int]:
        """Slots of weights, as many as leave room for a superblock's pieces of x, and of those."""
        c = self.config
        tile_bytes = sum(np.dtype(a.dtype).itemsize * a.parts * a.inner for a in self.arrays.values())
        weights, piece = self.slabs * _SLAB_TILES * tile_bytes, c.tile * CHUNK * 2
        room = SHARED_BYTES - _RESERVED_BYTES - 2 * math.prod(self._swiglu_shape())
        weight_slots = max(2, min(c.weight_slots, (room - CHUNKS * piece) // weights))
        slots = min(c.most_x_slots, (room - weight_slots * weights) // piece)
        if slots < 2:
            raise NotImplementedError(f"no shared memory for {self.config} and {self.type.name} weights")
        return weight_slots, slots

    def _swiglu_shape(self) -> tuple[int, ...]:
        if not self.fused:
            return (0,)
        return (self.config.warpgroups, self.config.slabs, self.config.tile, SLAB_ROWS // 2)

    def _tile_axes(self) -> tuple[int, ...]:
        """Axes of a block's tiles in shared memory, as the copies from global memory fill them."""
        # SwiGLU: gate or up, column group of the result (= warp), 8 columns of the group a slab.
        return (2, 4, self.slabs) if self.fused else (self.slabs, _SLAB_TILES)

    def place(self, slab: int) -> TilePlace:
        if self.fused:
            return TilePlace(slab * self.config.warpgroups, 1, self.slabs, 4 * self.slabs)
        return TilePlace(slab * _SLAB_TILES, self.config.slabs * _SLAB_TILES, 2, 1)

    def view(self, array: jax.Array, name: str) -> jax.Array:
        """An array of tiles with axes that one copy of a block's tiles can step through."""
        tile = self.arrays[name]
        inner = (self.superblocks * tile.parts, tile.inner)
        return array.reshape(-1, *((4, 8) if self.fused else (_SLAB_TILES,)), *inner)

    def scratch(self) -> dict[str, Any]:
        c = self.config
        types = {
            "x_tile": plgpu.SMEM(
                (self.x_slots, c.tile, CHUNK),
                jnp.float16,
                transforms=_SWIZZLED,
            ),
            "x_full": plgpu.Barrier(num_barriers=self.x_slots),
            "x_free": plgpu.Barrier(num_barriers=self.x_slots, num_arrivals=c.warpgroups),
            "w_full": plgpu.Barrier(
                num_barriers=self.weight_slots, num_arrivals=len(self.arrays) * (2 if self.fused else 1)
            ),
            "w_free": plgpu.Barrier(num_barriers=self.weight_slots, num_arrivals=c.warpgroups),
        }
        for name, a in self.arrays.items():
            shape = (self.weight_slots, *self._tile_axes(), a.parts, a.inner)
            types[f"w_{name}"] = plgpu.SMEM(shape, jnp.dtype(a.dtype))
        if self.emulate:  # the interpreter's wgmma takes no operand in registers
            shape = (c.warpgroups, 2, c.slabs, SLAB_ROWS, CHUNK)
            types["operand"] = plgpu.SMEM(shape, jnp.float16, transforms=_SWIZZLED)
        if self.fused:
            types["swiglu"] = plgpu.SMEM(self._swiglu_shape(), jnp.float16)
        return types

    def call(
        self, work: Tiles | UsedExperts, rows: int, rowwise: list, firsts: list, views: list
    ) -> jax.Array:
        """Runs the kernel.

        Args:
          rows: rows of the result.
          rowwise: x, scale and, where results are scattered, places.
        """
        dtype = jnp.float16 if self.fused else jnp.float32
        blocks = self.config.blocks or multiprocessors()
        warpgroups = self.config.warpgroups + 1
        counts = [len(work), len(rowwise), len(firsts), len(views)]

        def body(*operands, **scratch):
            ends = np.cumsum(counts)
            of_work, of_rows, firsts, views = (
                operands[end - count : end] for end, count in zip(ends, counts, strict=True)
            )
            refs = {"firsts": firsts, "out": operands[-1], **scratch}
            refs |= dict(zip(("x", "scale", "places"), of_rows, strict=False))
            _Body(self, type(work)(*of_work), refs, views, blocks).run()

        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((self.splits * rows, self.rows), dtype),
            scratch_types=self.scratch(),
            grid=(blocks,),
            grid_names=("block",),
            num_threads=warpgroups,
            thread_name="wg",
            kernel_name=f"grouped_matmul_{self.type.name.lower()}_{'swiglu' if self.fused else 'plain'}",
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                unsafe_no_auto_barriers=not self.emulate,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            **interpreter_option(self.interpret, warpgroups),
        )
        return kernel(*work, *rowwise, *firsts, *views)


@dataclass(frozen=True)
class _Item:
    """What a block does at a time: a tile of rows, a block of weight rows, a part of K.

    Attributes:
      number: items of this block before.
      expert: the matrix.
      start: first row of the tile, in x (but for ``_Kernel.shared``), scale and the result.
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


class _Body:
    """One block's run: methods are what its warpgroups do."""

    def __init__(self, kernel: _Kernel, work: Tiles | UsedExperts, refs: dict, views, blocks: int):
        self.k, self.c, self.work, self.blocks = kernel, kernel.config, work, blocks
        self.s, self.firsts, self.out = refs, refs["firsts"], refs["out"]
        count = len(kernel.arrays)
        self.views = [
            dict(zip(kernel.arrays, views[i : i + count], strict=True)) for i in range(0, len(views), count)
        ]
        self.block = lax.axis_index("block")
        self.wg = lax.axis_index("wg")
        self.each = self.each_used if isinstance(work, UsedExperts) else self.each_tile

    def run(self) -> None:
        most, least = REGISTERS[self.c.warpgroups]
        exchange = self.c.exchange and not self.k.emulate

        @pl.when(self.wg < self.c.warpgroups)
        def _():
            if exchange:
                plgpu.set_max_registers(most, action="increase")
            self.each(self.multiply)
            if self.k.fused:
                plgpu.wait_smem_to_gmem(0)

        @pl.when(self.wg == self.c.warpgroups)
        def _():
            if exchange:
                plgpu.set_max_registers(least, action="decrease")
            steps = self.each(self.produce) * self.k.steps
            self.drain(self.s["w_free"], steps, self.k.weight_slots)
            self.drain(self.s["x_free"], steps * CHUNKS, self.k.x_slots)

    def each_tile(self, body):
        """Calls ``body(item)`` for each item of this block and gives their number."""
        splits, row_blocks = self.k.splits, self.k.row_blocks
        items = self.count() * (splits * row_blocks)
        mine = lax.div(items - self.block + self.blocks - 1, jnp.int32(self.blocks))

        def step(number, _):
            at = number * self.blocks + self.block
            row_block = lax.rem(at, jnp.int32(row_blocks))
            part = lax.div(at, jnp.int32(row_blocks))
            tile = lax.div(part, jnp.int32(splits))
            split = lax.rem(part, jnp.int32(splits))
            held, expert = self.work.rows[tile], self.work.expert[tile]
            start = pl.multiple_of(self.work.start[tile], ROW_ALIGN)
            least = 0
            for width in self.c.widths:
                item = _Item(number, expert, start, row_block, split, held, width)
                pl.when((held > least) & (held <= width))(functools.partial(body, item))
                least = width
            return _

        lax.fori_loop(0, mine, step, None)
        return mine

    def each_used(self, body):
        """As ``each_tile``: all rows with every expert in use."""
        row_blocks, tile = self.k.row_blocks, self.c.tile
        items = self.count() * row_blocks
        mine = lax.div(items - self.block + self.blocks - 1, jnp.int32(self.blocks))

        def step(number, _):
            at = number * self.blocks + self.block
            expert = self.work.experts[lax.div(at, jnp.int32(row_blocks))]
            row_block = lax.rem(at, jnp.int32(row_blocks))
            start = pl.multiple_of(expert * tile, ROW_ALIGN)
            body(_Item(number, expert, start, row_block, jnp.int32(0), jnp.int32(tile), tile))
            return _

        lax.fori_loop(0, mine, step, None)
        return mine

    def count(self):
        """Tiles, or experts in use; none where the layer's matrices have another type."""
        count, of_layer = self.work.count[0], self.k.of_layer
        if of_layer is None:
            return count
        return jnp.where(self.entry(of_layer.which) == of_layer.option, count, 0)

    def entry(self, place: int):
        """The layer's entry of the table."""
        layer, table = self.firsts
        return table[place + layer[0]]

    def first(self, i: int):
        """First row of the weights number i in their stack."""
        of_layer = self.k.of_layer
        return self.firsts[i][0] if of_layer is None else self.entry(of_layer.firsts[i])

    def x_start(self, item: _Item):
        return 0 if self.k.shared else item.start

    # The warpgroup that copies

    def produce(self, item: _Item) -> None:
        x, x_slots, weight_slots = self.s["x_tile"], self.k.x_slots, self.k.weight_slots
        width, start = item.width, self.x_start(item)
        found = [self.first(i) for i in range(len(self.views))] if self.k.of_layer else None

        def superblock(i, _):
            step = item.number * self.k.steps + i
            at = item.split * self.k.steps + i
            slot = lax.rem(step, jnp.int32(weight_slots))

            @pl.when(step >= weight_slots)
            def _wait():
                plgpu.barrier_wait(self.s["w_free"].at[slot])
                _fence_async_copies(emulate=self.k.emulate)

            self.copy_weights(item, found, at, slot)
            for chunk in range(CHUNKS):
                x_step = step * CHUNKS + chunk
                x_slot = lax.rem(x_step, jnp.int32(x_slots))

                @pl.when(x_step >= x_slots)
                def _wait(x_slot=x_slot):
                    plgpu.barrier_wait(self.s["x_free"].at[x_slot])

                plgpu.copy_gmem_to_smem(
                    self.s["x"].at[pl.ds(start, width), pl.ds((at * CHUNKS + chunk) * CHUNK, CHUNK)],
                    x.at[x_slot, pl.ds(0, width)],
                    self.s["x_full"].at[x_slot],
                )
            return _

        lax.fori_loop(0, self.k.steps, superblock, None)

    def drain(self, barriers, steps, slots: int) -> None:
        """Waits until everything that was copied has been used."""

        def wait(i, _):
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(slots))]))

        lax.fori_loop(steps, steps + slots, wait, None)

    def copy_weights(self, item: _Item, firsts: list | None, superblock, slot) -> None:
        """One superblock of all the block's weight rows into slot ``slot``.

        Args:
          firsts: first rows where they have been looked up; None reads them here, which needs no registers.
        """
        k, full = self.k, self.s["w_full"].at[slot]
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
                target = self.s[f"w_{name}"]
                if k.fused:
                    # A block has 8 columns a slab of each of a superblock's four groups.
                    blocks_each = SUPERBLOCK // k.block_rows
                    group = lax.div(first, jnp.int32(32)) + lax.div(row_block, jnp.int32(blocks_each))
                    part = lax.rem(row_block, jnp.int32(blocks_each)) * k.slabs
                    source = view.at[group, :, pl.ds(part, k.slabs), inner]
                    plgpu.copy_gmem_to_smem(source, target.at[slot, i], full)
                else:
                    group = lax.div(first, jnp.int32(_SLAB_TILES)) + row_block * k.slabs
                    plgpu.copy_gmem_to_smem(view.at[pl.ds(group, k.slabs), :, inner], target.at[slot], full)

    # The warpgroups that multiply

    def multiply(self, item: _Item) -> None:
        width = item.width

        def accumulate(*accumulators):
            lax.fori_loop(
                0, self.k.steps, lambda i, _: self.superblock(item.number, i, width, accumulators), None
            )
            last = (item.number + 1) * (self.k.steps * CHUNKS) - 1
            sums = [a[...] for a in accumulators]
            if self.c.in_flight:
                plgpu.barrier_arrive(self.s["x_free"].at[lax.rem(last, jnp.int32(self.k.x_slots))])
            return sums

        shape = plgpu.ACC((SLAB_ROWS, width), jnp.float32)
        sums = pl.run_scoped(accumulate, *([shape] * self.c.slabs))
        layout = plgpu.Layout.WGMMA
        at = pl.ds(self.x_start(item), width)
        scale = plgpu.load(self.s["scale"].at[at], layout=layout.reduce(0), optimized=False)
        scale = lax.broadcast_in_dim(scale, (SLAB_ROWS, width), (1,))
        sums = [s * scale for s in sums]
        if self.k.fused:
            self.store_swiglu(sums, item)
        else:
            for slab, values in enumerate(sums):
                self.store(values, slab, item)

    def superblock(self, number, i, width: int, accumulators) -> None:
        c = self.c
        step = number * self.k.steps + i
        slot = lax.rem(step, jnp.int32(self.k.weight_slots))
        plgpu.barrier_wait(self.s["w_full"].at[slot])
        weights = {name: self.s[f"w_{name}"].at[slot] for name in self.k.arrays}
        for chunk in range(CHUNKS):
            x_step = step * CHUNKS + chunk
            x_slot = lax.rem(x_step, jnp.int32(self.k.x_slots))
            for slab, accumulator in enumerate(accumulators):
                operand = chunk_operand(
                    self.k.type, weights, self.k.place(slab), chunk, self.wg, emulate=self.k.emulate
                )
                if self.k.emulate:
                    kept = self.s["operand"].at[self.wg, chunk % 2, slab]
                    kept[...] = operand
                    operand = kept
                if slab == 0:
                    plgpu.barrier_wait(self.s["x_full"].at[x_slot])
                if chunk == CHUNKS - 1 and slab == c.slabs - 1:
                    plgpu.barrier_arrive(self.s["w_free"].at[slot])
                plgpu.wgmma(accumulator, operand, self.s["x_tile"].at[x_slot, pl.ds(0, width)].T)
                plgpu.wgmma_wait(c.in_flight)
                if c.in_flight and slab == 0:
                    self.release_before(x_step, i, chunk)
            if not c.in_flight:
                plgpu.barrier_arrive(self.s["x_free"].at[x_slot])

    def release_before(self, x_step, i, chunk: int) -> None:
        """Frees the piece of x before this one, which no running wgmma reads any more."""

        def release():
            before = lax.rem(x_step + (self.k.x_slots - 1), jnp.int32(self.k.x_slots))
            plgpu.barrier_arrive(self.s["x_free"].at[before])

        if chunk:
            release()
        else:
            pl.when(i > 0)(release)

    # Results

    def store(self, values, slab: int, item: _Item) -> None:
        """Writes float32 [64 weight rows, width] transposed; a warp fills whole 32-byte sectors."""
        k, width, held = self.k, item.width, item.held
        column = item.row_block * k.block_rows + (self.wg * self.c.slabs + slab) * SLAB_ROWS
        start = item.start + item.split * (self.out.shape[0] // k.splits)
        columns = pl.ds(column, SLAB_ROWS)

        @pl.when(column < k.rows)
        def _():
            if k.scattered:
                places = self.s["places"].at[pl.ds(item.start, width)]
                if k.emulate:
                    _emulated_scatter(self.out, columns, places, values)
                else:
                    _store_scattered(self.out.at[:, columns], values, places, k.rows)
            elif k.emulate:
                for i in range(width // ROW_ALIGN):
                    rows = slice(i * ROW_ALIGN, (i + 1) * ROW_ALIGN)

                    @pl.when(i * ROW_ALIGN < held)
                    def _(i=i, rows=rows):
                        at = (pl.ds(start + i * ROW_ALIGN, ROW_ALIGN), columns)
                        self.out[at] = values[:, rows].T

            else:
                _store_transposed(self.out.at[pl.ds(start, width), columns], values, held, k.rows)

    def store_swiglu(self, sums: list, item: _Item) -> None:
        """Writes float16 results [rows, 32 positions] of each slab through shared memory."""
        k, slabs, width = self.k, self.c.slabs, item.width
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slab, values in enumerate(sums):
            buffer = self.s["swiglu"].at[self.wg, slab, pl.ds(0, width)]
            if k.emulate:
                buffer[...] = _emulated_swiglu(values, width)
            else:
                _swiglu_to_shared(buffer, values)
        plgpu.commit_smem()
        for slab in range(slabs):
            place = slab * self.c.warpgroups + self.wg
            position = item.row_block * k.block_rows + place * (SLAB_ROWS // 2)
            offset, size = 0, 1 << (width.bit_length() - 1)
            while size >= ROW_ALIGN:
                # The largest power of two of rows first, then the next: copies have fixed sizes.
                @pl.when(item.held & size != 0)
                def _(offset=offset, size=size, slab=slab, position=position):
                    at = offset if isinstance(offset, int) else pl.multiple_of(offset, ROW_ALIGN)
                    plgpu.copy_smem_to_gmem(
                        self.s["swiglu"].at[self.wg, slab, pl.ds(at, size)],
                        self.out.at[pl.ds(item.start + at, size), pl.ds(position, SLAB_ROWS // 2)],
                        commit_group=False,
                    )

                offset = offset + (item.held & size)
                size //= 2
        plgpu.commit_smem_to_gmem_group()


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    value = gate * up / (1 + jnp.exp(-gate)) * SWIGLU_SCALE
    return jnp.clip(value, -_FLOAT16_MAX, _FLOAT16_MAX).astype(jnp.float16)


def _emulated_swiglu(values: jax.Array, width: int) -> jax.Array:
    """Rows (warp, gate or up, 2 words x 4 bytes) to float16 [width, 32] in operand order."""
    v = values.reshape(4, 2, 2, 2, 2, width)  # group, gate or up, word, b, c
    out = _swiglu(v[:, 0], v[:, 1])  # group, word, b, c, row of x
    return out.transpose(4, 1, 3, 0, 2).reshape(width, SLAB_ROWS // 2)


def _fence_async_copies(*, emulate: bool) -> None:
    """Orders ordinary reads of shared memory, already waited for, before later copies into it."""
    if emulate:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def fence(ctx):
        del ctx
        from jaxlib.mlir.dialects import nvvm

        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


def _lane_values():
    """(i32 constructor, warp of the warpgroup, row of 8, column pair of 4) of the emitting lane."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32 = ir.IntegerType.get_signless(32)
    const = lambda v: arith.constant(i32, v)
    thread = mgpu.utils.thread_idx()
    lane = arith.andi(thread, const(31))
    warp = arith.andi(arith.shrui(thread, const(5)), const(3))
    return const, warp, arith.shrui(lane, const(2)), arith.andi(lane, const(3))


def _float_pairs(values) -> dict:
    """{(column tile of 8, half of rows, element of pair): f32 value} of a WGMMA accumulator."""
    from jaxlib.mlir.dialects import llvm

    const = _lane_values()[0]
    rows, columns = values.shape
    registers = values.registers.reshape(columns // 8, rows // 32, -1)
    out = {}
    for (j, half, _), register in np.ndenumerate(registers):
        for e in range(2):
            out[j, half, e] = llvm.extractelement(register, const(e))
    return out


def _store_transposed(target, values, held, stride: int) -> None:
    """``target[:held] = values.T[:held]`` in global memory, where rows are ``stride`` elements apart."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())))
    def emit(ctx, target, values, held):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf

        f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
        const, warp, row, pair = _lane_values()
        (held,) = held.registers.flat
        weight_row = arith.addi(arith.muli(warp, const(16)), row)
        lane = arith.addi(weight_row, arith.muli(pair, const(2 * stride)))
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [arith.extui(i64, lane)], f32)
        elements = _float_pairs(values)
        for j in range(values.shape[1] // 8):
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sgt, held, const(8 * j)))
            with ir.InsertionPoint(branch.then_block):
                for half in range(2):
                    for e in range(2):
                        at = const((8 * j + e) * stride + 8 * half)
                        llvm.store(elements[j, half, e], mgpu.utils.getelementptr(base, [at], f32))
                scf.yield_([])

    emit(target, values, held)


def _emulated_scatter(out, columns, places, values: jax.Array) -> None:
    for row in range(values.shape[1]):
        place = places[row]

        @pl.when(place >= 0)
        def _(row=row, place=place):
            out[pl.ds(place, 1), columns] = values[:, row : row + 1].T


def _store_scattered(target, values, places, stride: int) -> None:
    """``target[places[i]] = values[:, i]`` in global memory, where ``places[i]`` is not negative."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.RefType()))
    def emit(ctx, target, values, places):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, scf

        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        const, warp, row, pair = _lane_values()
        weight_row = arith.addi(arith.muli(warp, const(16)), row)
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [weight_row], f32)
        first = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(places), [arith.muli(pair, const(2))], i32)
        elements = _float_pairs(values)
        for j in range(values.shape[1] // 8):
            for e in range(2):
                place = llvm.load(i32, mgpu.utils.getelementptr(first, [const(8 * j + e)], i32))
                branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.sge, place, const(0)))
                with ir.InsertionPoint(branch.then_block):
                    there = arith.muli(place, const(stride))
                    for half in range(2):
                        at = arith.addi(there, const(8 * half))
                        llvm.store(elements[j, half, e], mgpu.utils.getelementptr(base, [at], f32))
                    scf.yield_([])

    emit(target, values, places)


def _swiglu_to_shared(buffer, values) -> None:
    """SwiGLU of an accumulator's halves to float16 [columns, 32] in operand order."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def emit(ctx, buffer, values):
        del ctx
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        f16, f32 = ir.F16Type.get(), ir.F32Type.get()
        const, warp, row, pair = _lane_values()
        real = lambda v: arith.constant(f32, v)
        ptx = lambda code, *a: llvm.inline_asm(f32, list(a), code, ",".join(["=f"] + ["f"] * len(a)))
        # Row 4 w + c + 2 b of the tile is position 16 w + 8 c + 2 group + b.
        word = arith.muli(arith.shrui(row, const(2)), const(16))
        parity = arith.muli(arith.andi(row, const(1)), const(8))
        upper = arith.andi(arith.shrui(row, const(1)), const(1))
        position = arith.addi(arith.addi(word, parity), arith.addi(arith.muli(warp, const(2)), upper))
        half_slab = SLAB_ROWS // 2
        lane = arith.addi(position, arith.muli(pair, const(2 * half_slab)))
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(buffer), [lane], f16)
        elements = _float_pairs(values)
        for j in range(values.shape[1] // 8):
            for e in range(2):
                gate, up = elements[j, 0, e], elements[j, 1, e]
                power = ptx("ex2.approx.ftz.f32 $0, $1;", arith.mulf(gate, real(-math.log2(math.e))))
                below = ptx("rcp.approx.ftz.f32 $0, $1;", arith.addf(power, real(1.0)))
                value = arith.mulf(arith.mulf(arith.mulf(gate, up), below), real(SWIGLU_SCALE))
                value = arith.maximumf(arith.minimumf(value, real(_FLOAT16_MAX)), real(-_FLOAT16_MAX))
                at = const((8 * j + e) * half_slab)
                llvm.store(arith.truncf(f16, value), mgpu.utils.getelementptr(base, [at], f16))

    emit(buffer, values)
