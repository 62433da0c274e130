"""Grouped matrix product of sorted rows with packed weights, a Pallas:Mosaic GPU kernel for Hopper.

The one kernel serves the sparse experts (a tile of rows belongs to one expert) and dense
matrices (one group). Weights are the wgmma operand that lies in registers: a warpgroup
unpacks a 64 x 64 piece while the tensor cores work on the piece before it, or for the other
warpgroup. Activations are the operand in shared memory. A third warpgroup brings both there,
packed, through the tensor memory accelerator; blocks are persistent and go through
(tile of rows) x (block of weight rows), the tiles that share weights one after the other.

With two weight stacks the kernel computes SwiGLU: of a warp's 16 operand rows, 8 are rows of
gate_proj and 8 the same rows of up_proj, so that both products of an element end up in one lane.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from convert.ggml_types import SUPERBLOCK
from convert.gpu_tiles import GPU_TILES, TILE_ROWS
from kernels_pallas.matrices import Matrices
from kernels_pallas.prefill.activations import SWIGLU_SCALE
from kernels_pallas.prefill.sorting import ROW_ALIGN, Tiles
from kernels_pallas.prefill.tile_operands_sm90 import (
    CHUNK,
    CHUNKS,
    SLAB_ROWS,
    TILE_ARRAYS,
    TilePlace,
    chunk_operand,
)

REGISTERS = {2: (240, 24), 4: (112, 32)}
"""Registers of a thread that multiplies and of one that copies, by warpgroups that multiply.

Warpgroups exchange what the launch gave the block, 168 a thread of three warpgroups or 96 of
five: a sum above that would wait for ever.
"""
MULTIPROCESSORS = 132
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
      weight_slots: superblocks of weights in shared memory.
      most_x_slots: pieces of x in shared memory, at most.
      blocks: persistent blocks; None is one for each multiprocessor.
    """

    tile: int = 128
    widths: tuple[int, ...] = (64, 128)
    slabs: int = 2
    warpgroups: int = 2
    in_flight: int = 1
    weight_slots: int = 2
    most_x_slots: int = 8
    blocks: int | None = None


def grouped_matmul(
    x: jax.Array,
    scale: jax.Array,
    tiles: Tiles,
    weights: tuple[Matrices, ...],
    *,
    config: MatmulConfig,
    interpret: Any = None,
) -> jax.Array:
    """Multiplies tiles of rows with their matrices.

    Args:
      x: float16 [R, K] in operand order (``activations.float16_operand``).
      scale: float32 [R], a factor of each row of the result.
      tiles: which rows belong to which matrix. Rows after a tile's own are read up to
        ``config.tile``: R leaves room for that.
      weights: matrices [N, K] or [E, N, K], or two of one type: gate_proj and up_proj. N is a
        multiple of 64, or of 256 for SwiGLU, and so are rows before them in their stack.
      config: sizes.
      interpret: parameters of Pallas' interpreter, which replaces instructions that it lacks.

    Returns:
      [R, N]: float32 products; or SwiGLU's results in operand order, times
      ``activations.SWIGLU_SCALE``. Rows of no tile are not written.

    Raises:
      NotImplementedError: the kernel does not take this type, layout or shape.
    """
    check_supported(weights)
    kernel = _Kernel(x.shape, weights[0].stack.type, weights[0].rows, len(weights) == 2, config, interpret)
    views = [kernel.view(w.stack.arrays[n], n) for w in weights for n in kernel.arrays]
    firsts = [w.first.reshape(1) for w in weights]
    return kernel.call(tiles, firsts, x, scale, views)


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
    ``docs/prefill_gpu.md``. More widths make ptxas serialize the matrix instructions for want of
    registers (C7512).
    """
    return MatmulConfig(tile=64, widths=(32, 64)) if rows_each <= 48 else MatmulConfig()


class _Kernel:
    """Shapes that follow from the arguments, and the kernel's body."""

    def __init__(self, x_shape, type, rows: int, fused: bool, config: MatmulConfig, interpret: Any):
        self.r, self.k = x_shape
        self.type, self.rows, self.fused, self.config = type, rows, fused, config
        self.interpret, self.emulate = interpret, interpret is not None
        self.arrays = TILE_ARRAYS[type]
        self.superblocks = self.k // SUPERBLOCK
        slab_rows = SLAB_ROWS // 2 if fused else SLAB_ROWS
        self.slabs = config.warpgroups * config.slabs
        self.block_rows = config.warpgroups * config.slabs * slab_rows
        self.row_blocks = -(-rows // self.block_rows)
        self.x_slots = self._x_slots()

    # Memory

    def _x_slots(self) -> int:
        tile = self.config.tile
        tile_bytes = sum(np.dtype(a.dtype).itemsize * a.parts * a.inner for a in self.arrays.values())
        weights = self.config.weight_slots * self.slabs * _SLAB_TILES * tile_bytes
        left = SHARED_BYTES - _RESERVED_BYTES - weights - 2 * math.prod(self._swiglu_shape())
        slots = min(self.config.most_x_slots, left // (tile * CHUNK * 2))
        if slots < 2:
            raise NotImplementedError(f"no shared memory for {self.config} and {self.type.name} weights")
        return slots

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
            "x": plgpu.SMEM(
                (self.x_slots, c.tile, CHUNK),
                jnp.float16,
                transforms=_SWIZZLED,
            ),
            "x_full": plgpu.Barrier(num_barriers=self.x_slots),
            "x_free": plgpu.Barrier(num_barriers=self.x_slots, num_arrivals=c.warpgroups),
            "w_full": plgpu.Barrier(
                num_barriers=c.weight_slots, num_arrivals=len(self.arrays) * (2 if self.fused else 1)
            ),
            "w_free": plgpu.Barrier(num_barriers=c.weight_slots, num_arrivals=c.warpgroups),
        }
        for name, a in self.arrays.items():
            shape = (c.weight_slots, *self._tile_axes(), a.parts, a.inner)
            types[f"w_{name}"] = plgpu.SMEM(shape, jnp.dtype(a.dtype))
        if self.emulate:  # the interpreter's wgmma takes no operand in registers
            shape = (c.warpgroups, 2, c.slabs, SLAB_ROWS, CHUNK)
            types["operand"] = plgpu.SMEM(shape, jnp.float16, transforms=_SWIZZLED)
        if self.fused:
            types["swiglu"] = plgpu.SMEM(self._swiglu_shape(), jnp.float16)
        return types

    def call(self, tiles: Tiles, firsts: list, x: jax.Array, scale: jax.Array, views: list) -> jax.Array:
        dtype = jnp.float16 if self.fused else jnp.float32
        blocks = self.config.blocks or MULTIPROCESSORS
        options = {} if self.interpret is None else {"interpret": self.interpret}

        matrices = len(firsts)

        def body(*operands, **scratch):
            expert, start, held, count, x, scale, *rest, out = operands
            firsts, views = rest[:matrices], rest[matrices:]
            _Body(
                self, Tiles(expert, start, held, count), firsts, x, scale, views, out, scratch, blocks
            ).run()

        kernel = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((self.r, self.rows), dtype),
            scratch_types=self.scratch(),
            grid=(blocks,),
            grid_names=("block",),
            num_threads=self.config.warpgroups + 1,
            thread_name="wg",
            kernel_name=f"grouped_matmul_{self.type.name.lower()}_{'swiglu' if self.fused else 'plain'}",
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                unsafe_no_auto_barriers=not self.emulate,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            **options,
        )
        return kernel(*tiles, x, scale, *firsts, *views)


class _Body:
    """One block's run: methods are what its warpgroups do."""

    def __init__(self, kernel: _Kernel, tiles: Tiles, firsts, x, scale, views, out, scratch, blocks: int):
        self.k, self.c, self.tiles, self.firsts = kernel, kernel.config, tiles, firsts
        self.x, self.scale, self.out, self.s, self.blocks = x, scale, out, scratch, blocks
        count = len(kernel.arrays)
        self.views = [
            dict(zip(kernel.arrays, views[i : i + count], strict=True)) for i in range(0, len(views), count)
        ]
        self.block = lax.axis_index("block")
        self.wg = lax.axis_index("wg")

    def run(self) -> None:
        items = self.tiles.count[0] * self.k.row_blocks
        mine = lax.div(items - self.block + self.blocks - 1, self.blocks)

        most, least = REGISTERS[self.c.warpgroups]

        @pl.when(self.wg < self.c.warpgroups)
        def _():
            if not self.k.emulate:
                plgpu.set_max_registers(most, action="increase")
            self.each(mine, self.multiply)
            if self.k.fused:
                plgpu.wait_smem_to_gmem(0)

        @pl.when(self.wg == self.c.warpgroups)
        def _():
            if not self.k.emulate:
                plgpu.set_max_registers(least, action="decrease")
            self.each(mine, self.produce)
            steps = mine * self.k.superblocks
            self.drain(self.s["w_free"], steps, self.c.weight_slots)
            self.drain(self.s["x_free"], steps * CHUNKS, self.k.x_slots)

    def each(self, count, body) -> None:
        """Calls ``body(number, tile, row block, rows of the tile, width)`` for each item of this block."""

        def step(number, _):
            item = number * self.blocks + self.block
            tile = lax.div(item, jnp.int32(self.k.row_blocks))
            row_block = lax.rem(item, jnp.int32(self.k.row_blocks))
            held = self.tiles.rows[tile]
            least = 0
            for width in self.c.widths:
                fits = (held > least) & (held <= width)
                pl.when(fits)(functools.partial(body, number, tile, row_block, held, width))
                least = width
            return _

        lax.fori_loop(0, count, step, None)

    # The warpgroup that copies

    def produce(self, number, tile, row_block, held, width: int) -> None:
        del held
        expert = self.tiles.expert[tile]
        start = pl.multiple_of(self.tiles.start[tile], ROW_ALIGN)
        x, x_slots, weight_slots = self.s["x"], self.k.x_slots, self.c.weight_slots

        def superblock(i, _):
            step = number * self.k.superblocks + i
            slot = lax.rem(step, jnp.int32(weight_slots))

            @pl.when(step >= weight_slots)
            def _wait():
                plgpu.barrier_wait(self.s["w_free"].at[slot])
                _fence_async_copies(emulate=self.k.emulate)

            self.copy_weights(expert, row_block, i, slot)
            for chunk in range(CHUNKS):
                x_step = step * CHUNKS + chunk
                x_slot = lax.rem(x_step, jnp.int32(x_slots))

                @pl.when(x_step >= x_slots)
                def _wait(x_slot=x_slot):
                    plgpu.barrier_wait(self.s["x_free"].at[x_slot])

                plgpu.copy_gmem_to_smem(
                    self.x.at[pl.ds(start, width), pl.ds((i * CHUNKS + chunk) * CHUNK, CHUNK)],
                    x.at[x_slot, pl.ds(0, width)],
                    self.s["x_full"].at[x_slot],
                )
            return _

        lax.fori_loop(0, self.k.superblocks, superblock, None)

    def drain(self, barriers, steps, slots: int) -> None:
        """Waits until everything that was copied has been used."""

        def wait(i, _):
            pl.when(i >= slots)(lambda: plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(slots))]))

        lax.fori_loop(steps, steps + slots, wait, None)

    def copy_weights(self, expert, row_block, superblock, slot) -> None:
        """One superblock of all the block's weight rows into slot ``slot``."""
        k, full = self.k, self.s["w_full"].at[slot]
        tiles_each = k.rows // TILE_ROWS
        for i, views in enumerate(self.views):
            first = lax.div(self.firsts[i][0], jnp.int32(TILE_ROWS)) + expert * tiles_each
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

    def multiply(self, number, tile, row_block, held, width: int) -> None:
        start = pl.multiple_of(self.tiles.start[tile], ROW_ALIGN)

        def accumulate(*accumulators):
            lax.fori_loop(
                0, self.k.superblocks, lambda i, _: self.superblock(number, i, width, accumulators), None
            )
            last = (number + 1) * (self.k.superblocks * CHUNKS) - 1
            sums = [a[...] for a in accumulators]
            if self.c.in_flight:
                plgpu.barrier_arrive(self.s["x_free"].at[lax.rem(last, jnp.int32(self.k.x_slots))])
            return sums

        shape = plgpu.ACC((SLAB_ROWS, width), jnp.float32)
        sums = pl.run_scoped(accumulate, *([shape] * self.c.slabs))
        layout = plgpu.Layout.WGMMA
        scale = plgpu.load(self.scale.at[pl.ds(start, width)], layout=layout.reduce(0), optimized=False)
        scale = lax.broadcast_in_dim(scale, (SLAB_ROWS, width), (1,))
        sums = [s * scale for s in sums]
        if self.k.fused:
            self.store_swiglu(sums, start, row_block, held, width)
        else:
            for slab, values in enumerate(sums):
                self.store(values, slab, start, row_block, held, width)

    def superblock(self, number, i, width: int, accumulators) -> None:
        c = self.c
        step = number * self.k.superblocks + i
        slot = lax.rem(step, jnp.int32(c.weight_slots))
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
                plgpu.wgmma(accumulator, operand, self.s["x"].at[x_slot, pl.ds(0, width)].T)
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

    def store(self, values, slab: int, start, row_block, held, width: int) -> None:
        """Writes float32 [64 weight rows, width] transposed; a warp fills whole 32-byte sectors."""
        k = self.k
        column = row_block * k.block_rows + (self.wg * self.c.slabs + slab) * SLAB_ROWS

        @pl.when(column < k.rows)
        def _():
            if k.emulate:
                for i in range(width // ROW_ALIGN):
                    rows = slice(i * ROW_ALIGN, (i + 1) * ROW_ALIGN)

                    @pl.when(i * ROW_ALIGN < held)
                    def _(i=i, rows=rows):
                        at = (pl.ds(start + i * ROW_ALIGN, ROW_ALIGN), pl.ds(column, SLAB_ROWS))
                        self.out[at] = values[:, rows].T

                return
            target = self.out.at[pl.ds(start, width), pl.ds(column, SLAB_ROWS)]
            _store_transposed(target, values, held, k.rows)

    def store_swiglu(self, sums: list, start, row_block, held, width: int) -> None:
        """Writes float16 results [rows, 32 positions] of each slab through shared memory."""
        k, slabs = self.k, self.c.slabs
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
            position = row_block * k.block_rows + place * (SLAB_ROWS // 2)
            offset, size = 0, 1 << (width.bit_length() - 1)
            while size >= ROW_ALIGN:
                # The largest power of two of rows first, then the next: copies have fixed sizes.
                @pl.when(held & size != 0)
                def _(offset=offset, size=size, slab=slab, position=position):
                    at = offset if isinstance(offset, int) else pl.multiple_of(offset, ROW_ALIGN)
                    plgpu.copy_smem_to_gmem(
                        self.s["swiglu"].at[self.wg, slab, pl.ds(at, size)],
                        self.out.at[pl.ds(start + at, size), pl.ds(position, SLAB_ROWS // 2)],
                        commit_group=False,
                    )

                offset = offset + (held & size)
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
