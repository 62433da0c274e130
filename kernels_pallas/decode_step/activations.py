"""Activations between the phases: the residual stream, norms, and quantization in two int8 parts."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK
from qwen3_moe_jax.kernels_pallas.decode_step.config import PIECE, SPAN, WARPGROUPS, Quantized, padded
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, Phases, fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import SUBBLOCKS, TILE_LANES, load
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats import LaneActivations

Array = Any
QUANT_MAX = 127 * 128


def inverse_scale(largest: Array) -> Array:
    """By what values are multiplied so that the largest of them becomes ``QUANT_MAX``."""
    return jnp.where(largest > 0, QUANT_MAX / largest, 0.0)


def integers(x: Array, inverse: Array) -> tuple[Array, Array, Array]:
    """(q, high, low): x times ``inverse`` as an integer q = 128 * high + low, both parts int8."""
    q = jnp.round(x * inverse).astype(jnp.int32)
    high = (q + 64) >> 7
    return q, high, q - (high << 7)


def state_view(grid: Grid) -> Any:
    """The residual stream and the parts added to it, float32 [1 + parts, B, tiles, blocks, 8 rows]."""
    c = grid.c
    tiles = c.row_stride(padded(c.hidden_size)) // (8 * c.blocks)
    shape = (c.slots.number, c.batch, tiles, c.blocks, 8)
    return grid.prim.View(grid.inputs.state_gmem, shape, leading=2)


class Activations(Phases):
    """Residual stream, norms and quantized activations. A piece is 1,024 values, of layout ``SUBBLOCKS``."""

    # The residual stream and its norm

    def residual(self, b: Array, piece: Array, slots: list) -> Array:
        """float32 [32, 2, 4, 4]: 1,024 values of the residual stream, the sum of these slots of the state."""
        total: Any = None
        for slot in slots:
            ref = self.inputs.state_gmem.at[slot, b, pl.ds(piece * 32, 32)]
            value = load(ref, SUBBLOCKS)
            total = value if total is None else total + value
        if self.c.hidden_size % SPAN == 0:
            return total
        inside = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=SUBBLOCKS) + piece * 32
        return jnp.where(inside < self.c.hidden_size // 32, total, 0.0)

    @property
    def own_pieces(self) -> list:
        """Pieces of 1,024 columns that this warpgroup norms."""
        return [i + self.g.wg for i in range(0, padded(self.c.hidden_size) // PIECE, WARPGROUPS)]

    def own_columns(self, ref: Any) -> list:
        """This warpgroup's pieces of a norm's or router's weights; load them before waiting."""
        if self.c.hidden_size % SPAN:
            return [self.prim.load_clamped(ref, i * 32, 32, SUBBLOCKS) for i in self.own_pieces]
        refs = [ref.at[pl.ds(i * 32, 32)] for i in self.own_pieces]
        return [load(ref, SUBBLOCKS) for ref in refs]

    def normed(self, b: Array, norms: list, layer: Array) -> list:
        """This warpgroup's pieces of sequence b's normed residual stream, before a layer."""
        slots = self.c.slots.before(layer)
        pieces = [self.residual(b, i, slots) for i in self.own_pieces]
        (total,) = self.g.totals([sum(v * v for v in pieces)], SUBBLOCKS, "add", "norm", 0)
        self.shared.squares_smem[self.g.wg, b] = total
        self.g.sync_block()
        return self.scaled(b, pieces, norms)

    def norm_scale(self, read: Any) -> Array:
        """A norm's scale; ``read`` reads a warpgroup's sums of squares of the sequences that are meant."""
        first, second = (read(self.shared.squares_smem.at[i]) for i in range(WARPGROUPS))
        return lax.rsqrt((first + second) / self.c.hidden_size + self.c.rms_norm_eps)

    def scaled(self, b: Array, pieces: list, norms: list) -> list:
        """This warpgroup's pieces of sequence b, normed; both warpgroups' squares are there."""
        scale = self.norm_scale(lambda squares: squares[b])
        return [v * scale * w for v, w in zip(pieces, norms, strict=True)]

    # Quantization

    def quantize(self, b: Array, piece: Array, x: Array, into: Quantized) -> None:
        """Quantizes 1,024 values of sequence b in two int8 parts, one scale for 32."""
        largest = jnp.max(jnp.max(jnp.max(jnp.abs(x), axis=3), axis=2), axis=1)
        inverse = inverse_scale(largest)
        spread = lax.broadcast_in_dim(inverse, x.shape, (0,))
        q, high, low = integers(x, plgpu.layout_cast(spread, SUBBLOCKS))
        shift = plgpu.broadcasted_iota(jnp.int32, x.shape, 3, layout=SUBBLOCKS) * 8
        to = into.of(b)
        for part, value in enumerate((high, low)):
            packed = jnp.sum((value & 0xFF) << shift, axis=3)
            self.prim.store_subblocks(to.words.at[part], piece, packed)
        self.prim.store_subblocks(to.scale, piece, largest * (1.0 / QUANT_MAX))
        self.prim.store_subblocks(to.sums, piece, jnp.sum(jnp.sum(q, axis=3), axis=2))

    def quantize_pieces(self, b: Array, pieces: list, into: Quantized) -> None:
        """Quantizes this warpgroup's pieces of sequence b."""
        for i, x in zip(self.own_pieces, pieces, strict=True):
            self.quantize(b, i, x, into)

    def quantize_lanes(
        self, x: Array, layout: Any, into: Quantized, subblock_of: Any, warps: int = 4
    ) -> None:
        """Quantizes 128 values, one per lane: a warp's 32 are a subblock.

        Args:
          subblock_of: ``subblock_of(warp)`` is that subblock's (sequence, index in its row).
          warps: those of the first warps are stored.
        """
        largest = self.prim.warp_largest(jnp.abs(x), layout)
        q, high, low = integers(x, inverse_scale(largest))
        scale = largest * (1.0 / QUANT_MAX)
        for warp in range(warps):
            b, subblock = subblock_of(warp)
            self.prim.store_lanes(into.of(b), subblock, warp, [high, low], scale, q, layout)

    # From one block to all

    def share_normed(self, norm_ref: Any, layer: Array, count: Array) -> None:
        """The normed residual stream before a layer, quantized by the owners of sequences.

        Waits for down (``count``); the owners signal once per sequence.
        """

        def one(b):
            norms = self.own_columns(norm_ref)
            self.g.wait_for_down(layer, count)
            self.quantize_pieces(b, self.normed(b, norms, layer), self.outputs.hidden_gmem)
            self.g.signal()

        self.g.for_own(0, self.c.batch, one)

    def fetch(
        self, source: Quantized, first: Array, superblocks: int, sequences: int = 0, sequence=None
    ) -> None:
        """Begins to copy superblocks of sequences' quantized activations to shared memory.

        Args:
          source: where they are, in global memory, from superblock ``first`` on.
          sequences: how many, 0 for all; ``sequence(i)`` is the number of the i-th.
        """
        wg = self.g.wg

        def one(i):
            b = sequence(i) if sequence else i
            here, there = self.shared.x_smem.of(b), source.of(b)
            words = (here.words.at[wg, pl.ds(0, superblocks)], there.words.at[wg, pl.ds(first, superblocks)])
            half = superblocks // WARPGROUPS
            own = wg * half
            halves = [
                (to.at[pl.ds(own, half)], begin.at[pl.ds(first + own, half)])
                for to, begin in zip(here[1:], there[1:], strict=True)
            ]
            for to, begin in (words, *halves):
                self.prim.copy_to_shared(to, begin)

        fori(sequences or self.c.batch, one)

    def fetched(self) -> None:
        """Waits for what :meth:`fetch` copies, for both warpgroups."""
        self.prim.wait_for_copies()
        self.g.sync_block()

    def lanes(
        self, b: Array, superblock: Array, *, shared: bool = False, superblocks: int = SPAN // SUPERBLOCK
    ) -> LaneActivations:
        """This lane's activations of four superblocks, or of one for all warps (``shared``).

        Those after the last of ``superblocks`` have scale 0: weights there are not the row's.
        """
        at = superblock if shared else pl.ds(superblock, 4)
        value = TILE_LANES.reduce((0, 1) if shared else 1)
        x = self.shared.x_smem

        def mask(scale):
            if shared or superblocks % (SPAN // SUPERBLOCK) == 0:
                return scale
            number = plgpu.broadcasted_iota(jnp.int32, scale.shape, 0, layout=value) + superblock
            return jnp.where(number < superblocks, scale, 0.0)

        fragments = self.prim.load_fragments(x.words.at[b, :, at], self.shared.zeros_smem, shared=shared)
        return LaneActivations(
            fragments=fragments,
            scale=[mask(load(x.scale.at[b, at, :, s], value)) for s in range(2)],
            sums=[[load(x.sums.at[b, at, :, s, h], value) for h in range(2)] for s in range(2)],
            dimensions=(2,) if shared else (0, 2),
            prim=self.prim,
        )

    def prepare_normed(self, norm_ref: Any, layer: Array, count: Array) -> None:
        """Has what comes before a layer, normed and quantized, in shared memory.

        Where activations are shared, :meth:`share_normed` was called before weights were asked for: the
        owners' registers are free then, and the others wait for them anyway.

        Waits for ``count``, the phase before; in batches for the owners of sequences as well.
        """
        c = self.c
        if c.shares:
            self.g.wait(count + c.batch)
            self.fetch(self.outputs.hidden_gmem, 0, padded(c.hidden_size) // SUPERBLOCK)
            self.fetched()
        else:
            norms = self.own_columns(norm_ref)
            self.g.wait_for_down(layer, count)
            self.quantize_pieces(0, self.normed(0, norms, layer), self.shared.x_smem)
            self.g.sync_warpgroup()

    def attended(self, b: Array, piece: Array) -> Array:
        """float32 [32, 2, 4, 4]: 1,024 values of attention's output."""
        shape = (self.c.batch, padded(self.c.attention_width) // 32, 2, 4, 4)
        view = self.prim.View(self.outputs.attention_gmem, shape, leading=1)
        return view.load((b, pl.ds(piece * 32, 32)), SUBBLOCKS)
