"""Grouped matrix product of sorted rows with packed weights, a Pallas:Mosaic GPU kernel for Hopper.

The one kernel serves the sparse experts (a tile of rows belongs to one expert) and dense
matrices (one group). Weights are the wgmma operand that lies in registers: a warpgroup
unpacks a 64 x 64 piece while the tensor cores work on the piece before it, or for the other
warpgroups. Activations are the operand in shared memory. The last warpgroup brings both there,
packed, through the tensor memory accelerator; blocks are persistent and go through
(tile of rows) x (block of weight rows), the tiles that share weights one after the other.
Up to 16 tokens are not sorted at all (:class:`UsedExperts`): every expert in use multiplies all of
them, which costs less than arranging them, and results of others are not written.

With two weight stacks the kernel computes SwiGLU: of a warp's 16 operand rows, 8 are rows of
gate_proj and 8 the same rows of up_proj, so that both products of an element end up in one lane.

Why every block ends: all its warpgroups go through the same items, which they work out from the
same arrays, and each item takes the same number of copies everywhere, whatever its rows. With s
copies so far, the copying warpgroup fills stage ``s % stages`` after ``s // stages`` uses of it were
arrived at, once by each multiplying warpgroup; these arrive at stage s before they wait for
anything that is copied after s + 1, and two stages or more exist. So of all waits the one of the
earliest copy is always satisfied. A block without items waits for nothing, an item without rows does
not exist. Registers are exchanged within what the launch gave (``REGISTERS``), or not at all.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS
from qwen3_moe_jax.kernels_pallas.gpu.device import multiprocessors
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_block import Body, References
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import MatmulConfig, OfLayer, check_supported
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter_option
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles, UsedExperts
from qwen3_moe_jax.kernels_pallas.gpu.tile_arrays import PIECE, PIECES, SLAB_ROWS, TILE_ARRAYS, WarpTiles
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices

SHARED_BYTES = 227 * 1024
_RESERVED_BYTES = 2048
_SLAB_TILES = SLAB_ROWS // TILE_ROWS
_SWIZZLED = (plgpu.TilingTransform((8, PIECE)), plgpu.SwizzleTransform(128))


def grouped_matmul(
    x: jax.Array,
    scale: jax.Array,
    work: Tiles | UsedExperts,
    weights: tuple[Matrices, ...],
    *,
    config: MatmulConfig,
    splits: int = 1,
    destinations: jax.Array | None = None,
    out_rows: int | None = None,
    of_layer: OfLayer | None = None,
    interpret: Any = None,
    kernel_class: type["Kernel"] | None = None,
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
      destinations: int32 [R], or [E * config.tile] with ``UsedExperts``: the row of the result for each
        product, or -1 for one that nobody wants.
      out_rows: rows of the result, with ``destinations``.
      of_layer: which layer's matrices; the weights' own ``first`` is not read then.
      interpret: parameters of Pallas' interpreter, which replaces instructions that it lacks.
      kernel_class: the kernel; None is this module's.

    Returns:
      [R, N]: float32 products; or SwiGLU's results in operand order, times
      ``activations.SWIGLU_SCALE``. With ``UsedExperts`` [E * config.tile, N]; with destinations
      [out_rows, N]. With splits > 1 [splits, R, N], to be added. Rows of no tile are not written.

    Raises:
      NotImplementedError: the kernel does not take this type, layout or shape.
    """
    check_supported(weights)
    kernel = (kernel_class or Kernel)(weights[0], len(weights) == 2, config, splits, interpret)
    kernel.shared = isinstance(work, UsedExperts) and x.shape[0] == config.tile
    kernel.scattered = destinations is not None
    rows = x.shape[0]
    if isinstance(work, UsedExperts):
        rows = work.experts.shape[0] * config.tile
    if kernel.scattered:
        if out_rows is None:
            raise ValueError("with destinations, out_rows says how many rows the result has")
        rows = out_rows
    views = [kernel.view(w.stack.arrays[n], n) for w in weights for n in kernel.arrays]
    firsts = [w.first.reshape(1) for w in weights]
    if of_layer is not None:
        kernel.of_layer, firsts = of_layer, [of_layer.layer, of_layer.table]
    out = kernel.call(work, rows, [x, scale, *([destinations] if kernel.scattered else [])], firsts, views)
    return out.reshape(splits, rows, -1) if splits > 1 else out


class Kernel:
    """Shapes that follow from the arguments, and the kernel's body.

    Attributes:
      shared: all experts multiply the same rows of x.
      scattered: ``destinations`` says where results go.
      of_layer: offsets in the table of which layer's matrices.
      copiers: warpgroups of a block that copy alone.
      body: what a block runs.
    """

    shared = scattered = False
    of_layer: OfLayer | None = None
    copiers = 1
    body: type[Body] = Body

    def __init__(self, weights: Matrices, fused: bool, config: MatmulConfig, splits: int, interpret: Any):
        self.type, self.rows, self.fused, self.config = weights.stack.type, weights.rows, fused, config
        self.interpret, self.emulate = interpret, interpret is not None
        self.arrays = TILE_ARRAYS[self.type]
        self.superblocks = weights.columns // SUPERBLOCK
        if (fused and splits > 1) or self.superblocks % splits:
            raise ValueError(f"{self.superblocks} superblocks cannot be summed in {splits} parts")
        self.splits, self.split_superblocks = splits, self.superblocks // splits
        slab_rows = SLAB_ROWS // 2 if fused else SLAB_ROWS
        self.slabs = config.warpgroups * config.slabs
        self.block_rows = config.warpgroups * config.slabs * slab_rows
        self.row_blocks = -(-self.rows // self.block_rows)
        self.weight_stages, self.x_stages = self._stages()

    # Memory

    def _stages(self) -> tuple[int, int]:
        """Stages of weights, as many as leave room for a superblock's pieces of x, and of those."""
        c = self.config
        tile_bytes = sum(np.dtype(a.dtype).itemsize * a.parts * a.inner for a in self.arrays.values())
        weights, piece = self.slabs * _SLAB_TILES * tile_bytes, c.tile * PIECE * 2
        room = SHARED_BYTES - _RESERVED_BYTES - 2 * math.prod(self._swiglu_shape())
        weight_stages = max(2, min(c.weight_stages, (room - PIECES * piece) // weights))
        stages = min(c.max_x_stages, (room - weight_stages * weights) // piece)
        if stages < 2:
            raise NotImplementedError(f"no shared memory for {self.config} and {self.type.name} weights")
        return weight_stages, stages

    def _swiglu_shape(self) -> tuple[int, ...]:
        if not self.fused:
            return (0,)
        return (self.config.warpgroups, self.config.slabs, self.config.tile, SLAB_ROWS // 2)

    def _tile_axes(self) -> tuple[int, ...]:
        """Axes of a block's tiles in shared memory, as the copies from global memory fill them."""
        # SwiGLU: gate or up, column group of the result (= warp), 8 columns of the group a slab.
        return (2, 4, self.slabs) if self.fused else (self.slabs, _SLAB_TILES)

    def tiles_of(self, slab: int) -> WarpTiles:
        if self.fused:
            return WarpTiles(slab * self.config.warpgroups, 1, self.slabs, 4 * self.slabs)
        return WarpTiles(slab * _SLAB_TILES, self.config.slabs * _SLAB_TILES, 2, 1)

    def view(self, array: jax.Array, name: str) -> jax.Array:
        """An array of tiles with axes that one copy of a block's tiles can step through."""
        tile = self.arrays[name]
        inner = (self.superblocks * tile.parts, tile.inner)
        return array.reshape(-1, *((4, 8) if self.fused else (_SLAB_TILES,)), *inner)

    def scratch(self) -> dict[str, Any]:
        c = self.config
        types = {
            "x_tile": plgpu.SMEM(
                (self.x_stages, c.tile, PIECE),
                jnp.float16,
                transforms=_SWIZZLED,
            ),
            "x_full": plgpu.Barrier(num_barriers=self.x_stages),
            "x_free": plgpu.Barrier(num_barriers=self.x_stages, num_arrivals=c.warpgroups),
            "w_full": plgpu.Barrier(
                num_barriers=self.weight_stages, num_arrivals=len(self.arrays) * (2 if self.fused else 1)
            ),
            "w_free": plgpu.Barrier(num_barriers=self.weight_stages, num_arrivals=c.warpgroups),
        }
        for name, a in self.arrays.items():
            shape = (self.weight_stages, *self._tile_axes(), a.parts, a.inner)
            types[f"w_{name}"] = plgpu.SMEM(shape, jnp.dtype(a.dtype))
        if self.emulate:  # the interpreter's wgmma takes no operand in registers
            shape = (c.warpgroups, 2, c.slabs, SLAB_ROWS, PIECE)
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
          rowwise: x, scale and, where results are scattered, destinations.
        """
        dtype = jnp.float16 if self.fused else jnp.float32
        blocks = self.config.blocks or multiprocessors()
        warpgroups = self.config.warpgroups + self.copiers
        counts = [len(work), len(rowwise), len(firsts), len(views)]

        def body(*operands, **scratch):
            ends = np.cumsum(counts)
            of_work, of_rows, firsts, views = (
                operands[end - count : end] for end, count in zip(ends, counts, strict=True)
            )
            weights = {name: scratch.pop(f"w_{name}") for name in self.arrays}
            rowwise = dict(zip(("x", "scale", "destinations"), of_rows, strict=False))
            refs = References(firsts=firsts, out=operands[-1], weights=weights, **rowwise, **scratch)
            self.body(self, type(work)(*of_work), refs, views, blocks).run()

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
