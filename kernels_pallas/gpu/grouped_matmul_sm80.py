"""The grouped matrix product from Ampere on: ``mma`` in place of ``wgmma``, ``cp.async`` in place of TMA.

What work there is, how tiles of weights lie in shared memory and how they become operands in registers is
that of ``grouped_matmul_sm90``. Here all warpgroups of a block copy and multiply alike, 64 columns at a time.

Why no copy overwrites what is still read: before piece n is multiplied all threads meet at a barrier, so
that piece n - 1 is done with. Copies that begin after it go to that piece's stage of x (they are piece
n + stages - 1), and at the first piece of a superblock to the stage of weights of the superblock before. Each
piece begins one group of copies, so a thread that waits until ``stages - 2`` groups are on their way has
piece n, and the weights that were asked for four pieces before.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.gpu import grouped_matmul_sm90, mma
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_block import Body, Item
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import MAX_FEW_ROWS, MatmulConfig
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_stores import emulated_swiglu, store_swiglu
from qwen3_moe_jax.kernels_pallas.gpu.sorting import ROW_ALIGN, Tiles, UsedExperts
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import PIECE, PIECES, SLAB_ROWS
from qwen3_moe_jax.kernels_pallas.gpu.unpack_sm90 import piece_operand
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

SHARED_BYTES = 99 * 1024
"""What every card from Ampere on gives a block."""
_RESERVED_BYTES = 2048
_PADDING = 8
"""Elements after a row of x in shared memory: the rows of an operand then lie in different banks."""
_PART = 16
"""Rows of x of one operand: with 32, tiles of 128 rows and Q6_K weights spilled 136 bytes."""
_WEIGHT_STAGES = 2
_MAX_X_STAGES = 4
"""Weights are asked for four pieces ahead: with more stages of x they would not be waited for."""


def sizes(config: MatmulConfig, weights: Matrices) -> MatmulConfig:
    """The sizes of Hopper's kernel as far as they suit this one and these weights.

    Two warpgroups where they divide the matrix' rows, and their weights leave room for x.
    """
    is_large = weights.stack.type is GGMLType.Q8_0 and config.tile > MAX_FEW_ROWS
    warpgroups = 1 if is_large or weights.rows % (2 * SLAB_ROWS) else 2
    return replace(config, slabs=1, warpgroups=warpgroups, weight_stages=_WEIGHT_STAGES, exchange=False)


class PortableBody(Body):
    """One block's run."""

    def run(self) -> None:
        self.each(self.multiply)

    def full(self, stage: Any) -> None:
        """Copies are waited for by groups."""

    def copy(self, source: Any, target: Any, full: None) -> None:
        del full
        if self.k.emulate:
            pl.when(self.wg == 0)(lambda: target.__setitem__(..., source[...]))
        else:
            mma.copy(target, source, 128 * self.c.warpgroups)

    def barrier(self) -> None:
        """All warpgroups of the block."""
        if self.k.emulate:
            plgpu.barrier_arrive(self.s.barrier)
            plgpu.barrier_wait(self.s.barrier)
        else:
            mma.block_barrier(self.c.warpgroups)

    # Copies

    def begin(self, item: Item, piece: Any, *, weights: bool) -> None:
        """Begins a group of copies: the piece of x, if there is one, and the superblock of weights."""

        @pl.when(piece < self.k.split_superblocks * PIECES)
        def _():
            at = item.split * (self.k.split_superblocks * PIECES) + piece
            source = self.s.x.at[pl.ds(self.x_start(item), item.width), pl.ds(at * PIECE, PIECE)]
            self.copy(source, self.x_tile(piece, item.width), None)

        if weights:
            self.begin_weights(item, jnp.int32(0))
        self.commit()

    def begin_weights(self, item: Item, superblock: Any) -> None:
        @pl.when(superblock < self.k.split_superblocks)
        def _():
            stage = lax.rem(superblock, jnp.int32(_WEIGHT_STAGES))
            self.copy_weights(item, None, item.split * self.k.split_superblocks + superblock, stage)

    def commit(self) -> None:
        if not self.k.emulate:
            mma.commit_copies()

    def wait(self) -> None:
        if not self.k.emulate:
            mma.wait_for_copies(self.k.x_stages - 2)
        self.barrier()

    def x_tile(self, piece: Any, width: int) -> Any:
        stage = lax.rem(piece, jnp.int32(self.k.x_stages))
        return self.s.x_tile.at[stage, pl.ds(0, width), pl.ds(0, PIECE)]

    # Products

    def multiply(self, item: Item) -> None:
        part = _part(item.width)
        self.barrier()  # the last item's pieces are done with
        for piece in range(self.k.x_stages - 1):
            self.begin(item, jnp.int32(piece), weights=piece == 0)
        sums = tuple(self.zeros(part) for _ in range(item.width // part))
        sums = lax.fori_loop(0, self.k.split_superblocks, partial(self.superblock_of, item), sums)
        for i, total in enumerate(sums):
            here = replace(item, start=item.start + i * part, held=item.held - i * part, width=part)
            self.finish(total, self.x_start(item) + i * part, here)

    def zeros(self, columns: int) -> Any:
        if self.k.emulate:
            return jnp.zeros((SLAB_ROWS, columns), jnp.float32)
        return mma.zeros(columns, jnp.float16)

    def superblock_of(self, item: Item, i: Any, sums: tuple) -> tuple:
        """The sums with one superblock's products."""
        stage = lax.rem(i, jnp.int32(_WEIGHT_STAGES))
        weights = {name: self.s.weights[name].at[stage] for name in self.k.arrays}
        for quarter in range(PIECES):
            piece = i * PIECES + quarter
            self.wait()
            if quarter == 0:
                self.begin_weights(item, i + 1)
            self.begin(item, piece + (self.k.x_stages - 1), weights=False)
            operand = piece_operand(
                self.k.type, weights, self.k.tiles_of(0), quarter, self.wg, emulate=self.k.emulate
            )
            sums = self.add_products(sums, operand, piece, item.width)
        return sums

    def add_products(self, sums: tuple, operand: Any, piece: Any, width: int) -> tuple:
        """The sums with the products of one operand and each part of a piece of x."""
        stage, part = lax.rem(piece, jnp.int32(self.k.x_stages)), _part(width)
        left = operand if self.k.emulate else mma.left_operand(operand)
        found = []
        for number, total in enumerate(sums):
            x = self.s.x_tile.at[stage, pl.ds(number * part, part), pl.ds(0, PIECE)]
            if self.k.emulate:
                product = jnp.dot(left.astype(jnp.float32), x[...].astype(jnp.float32).T, precision="highest")
                found.append(total + product)
            else:
                found.append(plgpu.mma(total, left, mma.right_operand(x.T)))
        return tuple(found)

    # Results

    def finish(self, total: Any, first: Any, item: Item) -> None:
        """Scales and writes the rows of one part."""
        if self.k.emulate:
            scale = self.s.scale[pl.ds(first, item.width)]
            values = total * scale[None]
        else:
            layout = plgpu.Layout.WGMMA
            values = mma.product_rows(total, jnp.float16)
            at = self.s.scale.at[pl.ds(first, item.width)]
            scale = plgpu.load(at, layout=layout.reduce(0), optimized=False)
            values = values * lax.broadcast_in_dim(scale, values.shape, (1,))
        if self.k.fused:
            self.write_swiglu(values, item)
        else:
            self.store(values, 0, item)

    def write_swiglu(self, values: Any, item: Item) -> None:
        """Writes float16 results [rows, 32 positions]."""
        columns = pl.ds(item.row_block * self.k.block_rows + self.wg * (SLAB_ROWS // 2), SLAB_ROWS // 2)
        if not self.k.emulate:
            target = self.out.at[pl.ds(item.start, item.width), columns]
            store_swiglu(target, values, item.held, self.k.rows)
            return
        results = emulated_swiglu(values, item.width)
        for i in range(0, item.width, ROW_ALIGN):

            @pl.when(i < item.held)
            def _(i=i):
                self.out[pl.ds(item.start + i, ROW_ALIGN), columns] = results[i : i + ROW_ALIGN]


def _part(width: int) -> int:
    return _PART if width % _PART == 0 else ROW_ALIGN


class PortableKernel(grouped_matmul_sm90.Kernel):
    """Shapes, shared memory and the launch."""

    copiers = 0
    body = PortableBody

    def _stages(self) -> tuple[int, int]:
        c = self.config
        if c.slabs != 1:
            raise NotImplementedError(f"the portable kernel keeps one slab per warpgroup, not {c.slabs}")
        tile_bytes = sum(np.dtype(a.dtype).itemsize * a.parts * a.inner for a in self.arrays.values())
        weights = c.warpgroups * SLAB_ROWS // 8 * tile_bytes * _WEIGHT_STAGES
        piece = c.tile * (PIECE + _PADDING) * 2
        stages = min(c.max_x_stages, _MAX_X_STAGES, (SHARED_BYTES - _RESERVED_BYTES - weights) // piece)
        if stages < 2:
            raise NotImplementedError(f"no shared memory for {c} and {self.type.name} weights")
        return _WEIGHT_STAGES, stages

    def scratch(self) -> dict[str, Any]:
        c = self.config
        types: dict[str, Any] = {
            "x_tile": plgpu.SMEM((self.x_stages, c.tile, PIECE + _PADDING), jnp.float16),
            "barrier": plgpu.Barrier(num_arrivals=c.warpgroups),
        }
        for name, a in self.arrays.items():
            shape = (_WEIGHT_STAGES, *self._tile_axes(), a.parts, a.inner)
            types[f"w_{name}"] = plgpu.SMEM(shape, jnp.dtype(a.dtype))
        return types


def grouped_matmul(
    x: jax.Array,
    scale: jax.Array,
    work: Tiles | UsedExperts,
    weights: tuple[Matrices, ...],
    *,
    config: MatmulConfig,
    **options: Any,
) -> jax.Array:
    """As ``grouped_matmul_sm90.grouped_matmul``; of the sizes only those of x are taken."""
    run = grouped_matmul_sm90.grouped_matmul
    config = sizes(config, weights[0])
    return run(x, scale, work, weights, config=config, kernel_class=PortableKernel, **options)
