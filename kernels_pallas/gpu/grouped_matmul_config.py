"""Sizes of the grouped matrix product: what a launch is told, and which sizes suit which work."""

from dataclasses import dataclass, replace

import jax

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import GPU_TILES
from qwen3_moe_jax.kernels_pallas.gpu.device import multiprocessors
from qwen3_moe_jax.kernels_pallas.gpu.sorting import ROW_ALIGN
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import SLAB_ROWS, TILE_ARRAYS
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

REGISTERS = {2: (240, 24), 4: (112, 32)}
"""Registers of a thread that multiplies and of one that copies, by warpgroups that multiply.

Warpgroups exchange what the launch gave the block, 168 per thread of three warpgroups or 96 of
five: a sum above that would wait for ever. Only with ``MatmulConfig.exchange``.
"""
MAX_FEW_ROWS = 64
"""Up to this many rows are "few": one tile of a dense matrix holds them all."""
MAX_UNSORTED = 16
"""Up to this many tokens are multiplied by every expert in use; more are sorted by expert first.

On an H100 gate, up and down of 128 experts took 236 us for 64 unsorted tokens of which each has 8, and 151
sorted; for 32 tokens 168 and 129. Sorting and bringing the rows together took 20.
"""


@dataclass(frozen=True)
class MatmulConfig:
    """Sizes of the kernel's pieces.

    Attributes:
      tile: rows of x per tile, at most 256.
      widths: how many rows of a tile may be multiplied, ascending up to ``tile``: the smallest that
        holds a tile's rows is used.
      slabs: operands of 64 weight rows that a warpgroup keeps at once.
      warpgroups: how many multiply, 2 or 4: with few rows of x unpacking takes most of the time, and
        more warpgroups hide its latencies.
      in_flight: wgmma groups that may be running while the next operand is unpacked, 0 or 1.
      weight_stages: superblocks of weights in shared memory, at most; two at minimum.
      max_x_stages: pieces of x in shared memory, at most.
      blocks: persistent blocks; None is one for each multiprocessor.
      exchange: warpgroups that multiply take registers from the one that copies. Not needed where the
        registers of the launch do, and then there is one thing less to wait for.
    """

    tile: int = 128
    widths: tuple[int, ...] = (64, 128)
    slabs: int = 2
    warpgroups: int = 2
    in_flight: int = 1
    weight_stages: int = 2
    max_x_stages: int = 8
    blocks: int | None = None
    exchange: bool = True


@dataclass(frozen=True)
class OfLayer:
    """Where a layer's matrices lie, for the kernel to look up: no launch picks them.

    Attributes:
      layer: int32 [1].
      table: int32 [n], in which the layer's entry is ``layer`` after each of these offsets:
      firsts: of each of the weights, its first row, in place of ``Matrices.first``.
      which: of which of several types the layer's matrices are.
      option: the type that these weights have; in layers of another nothing is multiplied or written.
    """

    layer: jax.Array
    table: jax.Array
    firsts: tuple[int, ...]
    which: int
    option: int = 0


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


def few_config(rows: int, type: GGMLType = GGMLType.Q4_K) -> MatmulConfig:
    """Sizes for up to ``MAX_FEW_ROWS`` rows that every matrix multiplies: unpacking is most of the work.

    Four warpgroups hide each other's latencies, in the registers that the launch gives them. More
    than 32 rows (16 of Q5_K, gate_proj's type) leave none for a second operand, so that a warpgroup
    waits for its products.
    """
    tile = -(-rows // ROW_ALIGN) * ROW_ALIGN
    in_flight = 1 if tile <= (16 if type is GGMLType.Q5_K else 32) else 0
    return MatmulConfig(tile, (tile,), 1, 4, in_flight, weight_stages=4, exchange=False)


def experts_config() -> MatmulConfig:
    """Sizes for a few rows of each of many experts, sorted: of 64 tokens an expert has four on average.

    A tile is as narrow as a matrix instruction can be, so that reading the weights takes longest. An expert
    with more rows has several tiles, which are multiplied at about the same time and share what they read.
    """
    return MatmulConfig(ROW_ALIGN, (ROW_ALIGN,), 1, 4, 1, weight_stages=4, max_x_stages=16, exchange=False)


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
