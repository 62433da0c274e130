"""One decoded token of Qwen3-MoE as a single persistent Pallas:Mosaic GPU kernel.

A block of two warpgroups runs on every multiprocessor and walks through the layers. A layer
is six phases with a grid-wide barrier between them (a seventh where a long context is split):
norm + q/k/v, attention with q/k-norm, RoPE and cache write, output projection + residual,
norm + router, top-k + gate + up + SwiGLU, down + weighting. Final norm and lm_head follow.
Activations are quantized by every block for itself where there is one sequence, and once for
all blocks in batches.

Every phase begins by issuing the loads of weights that do not depend on earlier phases, and
only then waits for the barrier. Matrix rows are dealt out in tiles of 8 rows: block i takes
tiles i, i + blocks, i + 2 blocks, ...; its warps split the columns, so a thread multiplies
all its tiles with the same 64 activations, which stay in registers. All reductions have a
fixed order that does not depend on the batch.
"""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.convert.ggml_types import SUPERBLOCK, GGMLType
from qwen3_moe_jax.kernels_pallas.decode_step import primitives_mosaic_gpu as prim
from qwen3_moe_jax.kernels_pallas.decode_step.tile_formats_mosaic_gpu import (
    TILE_FORMATS,
    WEIGHT_KINDS,
    Activations,
)
from qwen3_moe_jax.kernels_pallas.decode_step.weights import column_names
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter_option

Array = Any
WARPGROUPS = 2
CHUNK = 1024
"""Activations that one warpgroup quantizes at a time: four superblocks."""
STEP = WARPGROUPS * CHUNK
SLOTS = 16
"""Tiles of 8 rows in one store of results: a row a lane."""
TOGETHER = 4
"""Sequences that are normed at a time, at most."""
GROUP = 4
"""Tiles whose rows are one subblock of the activations that they make."""
KV_TILE = 64
MAX_SPLITS = 128
QUANT_MAX = 127 * 128
LOG2E = prim.LOG2E
QUANTIZED = ("hidden", "attended", "swiglu")
"""Activations that batches quantize once in the grid: after a norm, after attention, after SwiGLU."""
REDUCE_SITES = ("norm", "router", "split_largest", "split_sum")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most ``most``."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


@dataclass(frozen=True)
class StepConfig:
    """Everything that is fixed when the kernel is compiled.

    Attributes:
      qkv_types: the types that q, k and v have in any layer, the most frequent first;
      qkv_always: 8-row tiles that have the first of them in every layer.
      o_types, gate_up_types, down_types: the types of those tensors in any layer.
      blocks: one per multiprocessor, all running at once, a multiple of 4; 1 in the interpreter, which has no
        grid barrier.
      splits: parts that attention over one sequence and KV head is split into, at most.
      replay: expert ids are given instead of chosen.
    """

    batch: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    moe_width: int
    vocab: int
    cache_length: int
    eps: float
    qkv_types: tuple[GGMLType, ...]
    qkv_always: int
    o_types: tuple[GGMLType, ...]
    gate_up_types: tuple[GGMLType, ...]
    down_types: tuple[GGMLType, ...]
    lm_head_type: GGMLType
    blocks: int
    splits: int
    cache_dtype: Any = jnp.bfloat16
    replay: bool = False
    emulate: bool = False
    first_sequence: int = 0
    """Where in the cache's batch axis this kernel's sequences begin."""

    @property
    def shares(self) -> bool:
        """Whether one block quantizes activations for all; at batch 1 each block for itself is quicker."""
        return self.batch > 1

    @property
    def pairs(self) -> int:
        return self.batch * self.experts_per_token

    @property
    def padded_batch(self) -> int:
        return ceil_div(self.batch, 4) * 4

    @property
    def qkv_tiles(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim // 8

    @property
    def padded_experts(self) -> int:
        return ceil_div(self.experts, 128) * 128

    @property
    def down_parts(self) -> int:
        """Into how many parts of its experts a token's down projection is split, to use all blocks."""
        parts = 1
        while self.hidden // 32 * parts * 2 <= self.blocks and self.experts_per_token % (4 * parts) == 0:
            parts *= 2
        return parts

    def row_stride(self, rows: int) -> int:
        """Rows to which a matrix of ``rows`` rows is padded so that blocks store whole groups of tiles."""
        return ceil_div(ceil_div(rows // 8, self.blocks), SLOTS) * SLOTS * self.blocks * 8

    def columns(self) -> dict[str, int]:
        """Columns of the table that says where a layer's weights lie in the stacks."""
        return column_names(len(self.qkv_types))


def scalar_count(c: StepConfig) -> int:
    """Length of the table, the positions and the flags of who goes on, padded for one load a lane."""
    return ceil_div(c.layers * len(c.columns()) + 2 * c.batch, 128) * 128


OPERANDS = (
    "scalars_in", "rope", "replay_ids", "input_norm", "post_norm", "q_norm", "k_norm",
    "final_norm", "router", "weights", "state", "k_cache", "v_cache",
)  # fmt: skip


def output_types(c: StepConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Results and the buffers through which blocks hand over activations."""
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    rep = c.heads // c.kv_heads
    out = {
        "logits": f32(c.batch, c.row_stride(c.vocab) // (8 * c.blocks), c.blocks, 8),
        "expert_ids": jax.ShapeDtypeStruct((c.layers, c.batch, c.experts_per_token), jnp.int32),
        "qkv": f32(c.batch, c.row_stride(c.qkv_tiles * 8) // c.head_dim, 2, c.head_dim // 2),
        "attention": f32(c.batch, c.heads, c.head_dim),
        "part": f32(c.batch, c.kv_heads, c.splits, rep, c.head_dim),
        "part_stats": f32(c.batch, c.kv_heads, 2, 64, MAX_SPLITS),
        "router_logits": f32(WARPGROUPS, c.padded_batch, c.padded_experts),
    }
    if not c.shares:
        return out | {"swiglu": f32(expert_slots(c)[0], c.blocks, 8)}
    widths = (c.hidden, c.heads * c.head_dim, c.experts_per_token * c.moe_width)
    for name, width in zip(QUANTIZED, widths, strict=True):
        out |= {f"{name}_{k}": v for k, v in quantized_types(c.batch, width // SUPERBLOCK).items()}
    return out


def quantized_types(batch: int, superblocks: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Quantized activations of all sequences: two int8 parts, scales of 32 and sums of 16."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((batch, *shape), dtype)
    return {
        "words": array(jnp.int32, 2, superblocks, 4, 2, 2, 4),
        "scale": array(jnp.float32, superblocks, 4, 2),
        "sums": array(jnp.int32, superblocks, 4, 2, 2),
    }


def state_shape(c: StepConfig) -> tuple[int, ...]:
    """Residual stream and the parts of the last down projection, as the kernel's state operand."""
    return (1 + c.down_parts, c.batch, c.row_stride(c.hidden) // 32, 2, 4, 4)


def expert_slots(c: StepConfig) -> tuple[int, int, int]:
    """(padded slots in all, slots a chunk, chunks) of the gate and up projections.

    Where activations are shared, four neighbouring slots are a subblock of one expert's SwiGLU.
    """
    each = GROUP if c.shares else 1
    slots = ceil_div(c.pairs * c.moe_width // 8, c.blocks * each) * each
    chunks = ceil_div(slots, SLOTS)
    used = ceil_div(ceil_div(slots, chunks), each) * each
    return chunks * used + SLOTS, used, chunks


def scratch_types(c: StepConfig) -> dict[str, Any]:
    superblocks = (
        max(
            c.hidden,
            c.heads * c.head_dim,
            ceil_div(c.experts_per_token // c.down_parts * c.moe_width, CHUNK) * CHUNK,
        )
        // SUPERBLOCK
    )
    parts = max(8 * max(c.hidden, c.heads * c.head_dim) // STEP, 4 * c.moe_width // SUPERBLOCK)
    swizzled = lambda *shape: plgpu.SMEM(
        shape, c.cache_dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    )
    head = c.head_dim
    tables = (c.padded_batch, c.experts_per_token)
    return {
        **{f"x_{k}": plgpu.SMEM(v.shape, v.dtype) for k, v in quantized_types(c.batch, superblocks).items()},
        "zeros": plgpu.SMEM((16,), jnp.int32),
        "plan": plgpu.SMEM((c.padded_batch + 4, 4), jnp.int32),
        "ids": plgpu.SMEM(tables, jnp.int32),
        "routing": plgpu.SMEM(tables, jnp.float32),
        "order": plgpu.SMEM((c.pairs,), jnp.int32),
        "either": plgpu.RefUnion(
            plgpu.SMEM((max(2, c.batch), SLOTS, parts + 1, 8), jnp.float32),
            [
                plgpu.SMEM((WARPGROUPS, 64, head), c.cache_dtype),
                swizzled(WARPGROUPS, KV_TILE, head),
                swizzled(WARPGROUPS, KV_TILE, head),
            ],
        ),
        "scalars": plgpu.SMEM((scalar_count(c),), jnp.int32),
        "new_score": plgpu.SMEM((WARPGROUPS, 64), jnp.float32),
        "new_value": plgpu.SMEM((WARPGROUPS, head), jnp.float32),
        "split_weight": plgpu.SMEM((WARPGROUPS, MAX_SPLITS), jnp.float32),
        "reduce": plgpu.SMEM((WARPGROUPS, len(REDUCE_SITES), 2, 2 * TOGETHER, 4), jnp.float32),
        "squares": plgpu.SMEM((WARPGROUPS, c.padded_batch), jnp.float32),
        "barrier": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }  # fmt: skip


def inverse_scale(largest):
    """By what values are multiplied so that the largest of them becomes ``QUANT_MAX``."""
    return jnp.where(largest > 0, QUANT_MAX / largest, 0.0)


def integers(x, inverse) -> tuple:
    """(q, high, low): x times ``inverse`` as an integer q = 128 * high + low, both parts int8."""
    q = jnp.round(x * inverse).astype(jnp.int32)
    high = (q + 64) >> 7
    return q, high, q - (high << 7)


def weight_kinds(formats: list) -> list:
    """The kinds of register arrays that can hold a tile of any of the formats."""
    kinds = []
    for fmt in formats:
        for kind in dict.fromkeys(fmt.kinds):  # in order: the program must be the same in every process
            missing = fmt.kinds.count(kind) - kinds.count(kind)
            kinds += [kind] * max(missing, 0)
    return kinds


def pad_weights(fmt, weights: tuple, kinds: list) -> tuple:
    """Puts a format's arrays into the places of ``kinds``, with zeros elsewhere."""
    left = list(zip(fmt.kinds, weights, strict=True))
    out = []
    for kind in kinds:
        found = next((item for item in left if item[0] == kind), None)
        if found is None:
            shape, dtype, layout = WEIGHT_KINDS[kind]
            out.append(prim.full(shape, 0, dtype, layout))
        else:
            left = [item for item in left if item is not found]
            out.append(found[1])
    return tuple(out)


def take_weights(fmt, padded: tuple) -> tuple:
    """The inverse of :func:`pad_weights`."""
    kinds, arrays = padded
    left = list(zip(kinds, arrays, strict=True))
    out = []
    for kind in fmt.kinds:
        found = next(item for item in left if item[0] == kind)
        left = [item for item in left if item is not found]
        out.append(found[1])
    return tuple(out)


class Step:
    """The kernel's body. Methods are phases; attributes are its references and indices."""

    def __init__(self, config: StepConfig, refs: dict[str, Any]):
        self.c = config
        sums, (q, k, v) = refs["either"]  # attention needs no sums, and the rest no tiles
        self.r = refs | {"sums": sums, "q": q, "k": k, "v": v}
        self.col = config.columns()
        self.prim = {"emulate": config.emulate}
        self.begin()
        # One block needs no grid barrier, and the interpreter has none.
        self.semaphore = pl.get_global(plgpu.SemaphoreType.REGULAR) if config.blocks > 1 else None
        self.state = refs["state"]
        tiles = config.row_stride(config.hidden) // (8 * config.blocks)
        leading = (1 + config.down_parts, config.batch)
        self.state_rows = prim.View(self.state, (*leading, tiles, config.blocks, 8), leading=2, **self.prim)

    def begin(self) -> None:
        """Begins a phase: this block and warpgroup, as numbers that the compiler has to take as new.

        Else it computes the addresses of all phases before the loop over layers, some 250 of them, and keeps
        them in registers that the phases need, or in memory (docs/design/decode-kernel.md has the figures).
        """
        self.block, self.wg = (prim.as_new(lax.axis_index(name), **self.prim) for name in ("sm", "wg"))

    # Small helpers

    def table(self, layer, name: str):
        return self.r["scalars"][layer * len(self.col) + self.col[name]]

    def position(self, b):
        return self.r["scalars"][self.c.layers * len(self.col) + b]

    def goes_on(self, b):
        """1 where sequence b's results are wanted."""
        return self.r["scalars"][self.c.layers * len(self.col) + self.c.batch + b]

    def stream(self, items: int, load, multiply, tiles: tuple, *, together: int = 1, index=None) -> tuple:
        """``multiply(i, tiles)`` of items i, i + 1, ..., ``together`` at a time, for all items.

        A loop and not straight code: a layer's instructions have to fit the instruction cache.
        Each of the loop's registers is refilled where it was used: moving a register whose load
        is in flight would wait for the load.

        Args:
          load: ``load(i)`` makes the tiles after the first.
          tiles: the first tiles, loaded; their number divides ``items``.
          index: ``index(group, j)`` stands for the j-th item of a group of as many, in place of a number.

        Returns:
          The tiles that were loaded ahead.
        """
        depth = len(tiles)
        index = index or (lambda group, j: group * depth + j)
        if items == depth:

            def rotate(i, tiles):
                multiply(index(0, i * together), tiles[:together])
                return (*tiles[together:], *tiles[:together])

            return lax.fori_loop(0, items // together, rotate, tiles)

        def several(group, tiles):
            tiles = list(tiles)
            for j in range(0, depth, together):
                multiply(index(group, j), tiles[j : j + together])
                for k in range(j, j + together):
                    tiles[k] = load(index(group + 1, k))
            return tuple(tiles)

        return lax.fori_loop(0, items // depth, several, tiles)

    def signal(self, *, by_first: bool = False) -> None:
        """Ends a phase: the block's results are written, ``by_first``: by the first warpgroup alone."""
        if not by_first:
            self.sync_block()

        @pl.when(self.wg == 0)
        def _():
            prim.grid_signal(self.semaphore, **self.prim)

    @jax.named_scope("wait")
    def wait(self, count) -> None:
        """Waits until blocks have signalled ``count`` times in all."""
        prim.grid_wait(self.semaphore, count, self.r["barrier"], **self.prim)

    def sync_block(self) -> None:
        prim.block_barrier(self.r["barrier"], **self.prim)

    def sync_warpgroup(self) -> None:
        prim.warpgroup_barrier(**self.prim)

    def totals(self, values: list, layout, operation: str, site: str, turn) -> list:
        """The sum or maximum of all of each of at most ``2 * TOGETHER`` arrays, in every lane.

        One barrier serves them all. ``site`` is the place that asks, ``turn`` how often it did.
        """
        scratch = self.r["reduce"].at[self.wg, REDUCE_SITES.index(site), turn % 2]
        return prim.warpgroup_reduce(values, layout, operation, scratch, **self.prim)

    def for_batch(self, body) -> None:
        prim.fori(self.c.batch, body)

    # Activations

    def for_groups(self, together: int, body) -> None:
        """``body(number, first, size)`` for groups of sequences, whose loads a body issues at once."""
        together = min(together, self.c.batch)
        whole, rest = divmod(self.c.batch, together)
        prim.fori(whole, lambda i: body(i, i * together, together))
        if rest:
            body(whole, whole * together, rest)

    def residual(self, b, chunk, parts: int):
        """float32 [32, 2, 4, 4]: 1,024 values of the residual stream, ``parts`` parts added to it."""
        total = None
        for part in range(1 + parts):
            ref = self.state.at[part, b, pl.ds(chunk * 32, 32)]
            value = plgpu.load(ref, layout=prim.SUBBLOCKS, optimized=False)
            total = value if total is None else total + value
        return total

    @property
    def own_chunks(self) -> list:
        """Chunks of 1,024 columns that this warpgroup norms."""
        return [i + self.wg for i in range(0, self.c.hidden // CHUNK, WARPGROUPS)]

    def norm_weights(self, norm_ref) -> list:
        """This warpgroup's chunks of a norm's weights; load them before waiting for activations."""
        refs = [norm_ref.at[pl.ds(i * 32, 32)] for i in self.own_chunks]
        return [plgpu.load(ref, layout=prim.SUBBLOCKS, optimized=False) for ref in refs]

    def normed(self, b, norms: list, parts: int) -> list:
        """This warpgroup's chunks of sequence b's normed residual stream."""
        chunks = [self.residual(b, i, parts) for i in self.own_chunks]
        (total,) = self.totals([sum(v * v for v in chunks)], prim.SUBBLOCKS, "add", "norm", 0)
        self.r["squares"][self.wg, b] = total
        self.sync_block()
        return self.scaled(b, chunks, norms)

    def norm_scale(self, load):
        """A norm's scale; ``load`` reads a warpgroup's sums of squares of the sequences that are meant."""
        first, second = (load(self.r["squares"].at[i]) for i in range(WARPGROUPS))
        return lax.rsqrt((first + second) / self.c.hidden + self.c.eps)

    def scaled(self, b, chunks: list, norms: list) -> list:
        """This warpgroup's chunks of sequence b, normed; both warpgroups' squares are there."""
        scale = self.norm_scale(lambda squares: squares[b])
        return [v * scale * w for v, w in zip(chunks, norms, strict=True)]

    def quantized(self, name: str, b) -> list:
        """Where sequence b's quantized activations are: words, scales, sums. "x": in shared memory."""
        return [self.r[f"{name}_{part}"].at[b] for part in ("words", "scale", "sums")]

    def quantize(self, b, chunk, x, into: str = "x") -> None:
        """Quantizes 1,024 values in two int8 parts, one scale for 32."""
        largest = jnp.max(jnp.max(jnp.max(jnp.abs(x), axis=3), axis=2), axis=1)
        inverse = inverse_scale(largest)
        spread = lax.broadcast_in_dim(inverse, x.shape, (0,))
        q, high, low = integers(x, plgpu.layout_cast(spread, prim.SUBBLOCKS))
        shift = plgpu.broadcasted_iota(jnp.int32, x.shape, 3, layout=prim.SUBBLOCKS) * 8
        words, scale, sums = self.quantized(into, b)
        for part, value in enumerate((high, low)):
            packed = jnp.sum((value & 0xFF) << shift, axis=3)
            prim.store_subblocks(words.at[part], chunk, packed, **self.prim)
        prim.store_subblocks(scale, chunk, largest * (1.0 / QUANT_MAX), **self.prim)
        prim.store_subblocks(sums, chunk, jnp.sum(jnp.sum(q, axis=3), axis=2), **self.prim)

    def quantize_chunks(self, b, chunks: list, into: str = "x") -> None:
        for i, x in zip(self.own_chunks, chunks, strict=True):
            self.quantize(b, i, x, into)

    def quantize_lanes(self, x, layout, into: str, place, warps: int = 4) -> None:
        """Quantizes 128 values, one a lane: a warp's 32 are a subblock.

        Args:
          place: ``place(warp)`` is that subblock's (sequence, index in its row).
          warps: those of the first warps are stored.
        """
        largest = prim.warp_largest(jnp.abs(x), layout, **self.prim)
        q, high, low = integers(x, inverse_scale(largest))
        scale = largest * (1.0 / QUANT_MAX)
        for warp in range(warps):
            b, subblock = place(warp)
            refs = self.quantized(into, b)
            prim.store_lanes(refs, subblock, warp, [high, low], scale, q, layout, **self.prim)

    def for_own(self, first, size: int, body) -> None:
        """Runs ``body(b)`` for that of the sequences from ``first`` on that this block quantizes for all."""
        c = self.c
        if c.blocks < c.batch:
            prim.fori(size, lambda i: body(first + i))
            return
        each = c.blocks // c.batch
        b = self.block // each
        pl.when((self.block % each == 0) & (b >= first) & (b < first + size))(lambda: body(b))

    def share_normed(self, norm_ref, count) -> None:
        """The normed residual stream, quantized by the owners of sequences, with a signal for each."""

        def one(b):
            norms = self.norm_weights(norm_ref)
            self.wait(count)
            self.quantize_chunks(b, self.normed(b, norms, self.c.down_parts), "hidden")
            self.signal()

        self.for_own(0, self.c.batch, one)

    def fetch(self, name: str, first, superblocks: int, sequences: int = 0, sequence=lambda i: i) -> None:
        """Begins to copy superblocks of sequences' quantized activations to shared memory.

        Args:
          sequences: how many, 0 for all; ``sequence(i)`` is the number of the i-th.
        """

        def one(i):
            b = sequence(i)
            here, there = self.quantized("x", b), self.quantized(name, b)
            words = (
                here[0].at[self.wg, pl.ds(0, superblocks)],
                there[0].at[self.wg, pl.ds(first, superblocks)],
            )
            half = superblocks // WARPGROUPS
            own = self.wg * half
            halves = [
                (to.at[pl.ds(own, half)], source.at[pl.ds(first + own, half)])
                for to, source in zip(here[1:], there[1:], strict=True)
            ]
            for to, source in (words, *halves):
                prim.copy_to_shared(to, source, **self.prim)

        prim.fori(sequences or self.c.batch, one)

    def fetched(self) -> None:
        """Waits for what :meth:`fetch` copies, for both warpgroups."""
        prim.wait_for_copies(**self.prim)
        self.sync_block()

    def activations(self, b, superblock, *, shared: bool = False) -> Activations:
        """This lane's activations of four superblocks, or of one for all warps (``shared``)."""
        at = superblock if shared else pl.ds(superblock, 4)
        value = prim.TILE_LANES.reduce((0, 1) if shared else 1)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)
        words, scale, sums = self.r["x_words"], self.r["x_scale"], self.r["x_sums"]
        fragments = prim.load_fragments(words.at[b, :, at], self.r["zeros"], shared=shared, **self.prim)
        return Activations(
            fragments=fragments,
            scale=[load(scale.at[b, at, :, s], value) for s in range(2)],
            sums=[[load(sums.at[b, at, :, s, h], value) for h in range(2)] for s in range(2)],
            dimensions=(2,) if shared else (0, 2),
        )

    def normed_activations(self, norm_ref, count) -> None:
        """Has the last layer's output, normed and quantized, in shared memory.

        Where activations are shared, ``share_normed`` was called before weights were asked for: the
        owners' registers are free then, and the others wait for them anyway.
        """
        c = self.c
        if c.shares:
            self.wait(count + c.batch)
            self.fetch("hidden", 0, c.hidden // SUPERBLOCK)
            self.fetched()
        else:
            norms = self.norm_weights(norm_ref)
            self.wait(count)
            self.quantize_chunks(0, self.normed(0, norms, c.down_parts))
            self.sync_warpgroup()

    # Dense projections

    def mine(self, superblock_step: int):
        """This warpgroup's four superblocks of a step."""
        return pl.ds(superblock_step * 8 + self.wg * 4, 4)

    def multiply_into_sums(self, fmt, tiles, slots, step, x=None) -> None:
        """Multiplies loaded tiles for every sequence and leaves the sums of lanes in shared memory."""

        def group(_, first, size):
            here = [x or self.activations(first + j, step * 8 + self.wg * 4) for j in range(size)]
            for i in range(0, len(tiles), 2):
                for j in range(size):  # one sequence's products pass the time that the other's take
                    values = fmt.multiply(tiles[i : i + 2], here[j], **self.prim)
                    for slot, value in zip(slots[i : i + 2], values, strict=True):
                        self.store_sums(first + j, slot, step, value)

        self.for_groups(2, group)

    def own_activations(self, steps: int) -> Activations | None:
        """Activations that stay in registers: one sequence whose columns take one step."""
        return self.activations(0, self.wg * 4) if self.c.batch == 1 and steps == 1 else None

    def store_sums(self, b, slot, step: int, value) -> None:
        self.r["sums"][b, slot, pl.ds(step * 8 + self.wg * 4, 4)] = prim.sum_groups(value)

    def result_rows(self, b, steps: int):
        """float32 [16 slots, 8 rows]: the finished rows of this block's tiles."""
        total = None
        for part in range(8 * steps):
            ref = self.r["sums"].at[b, :, part]
            value = plgpu.load(ref, layout=prim.OUTPUT_ROWS, optimized=False)
            total = value if total is None else total + value
        return total

    def for_my_batch(self, body) -> None:
        """Runs ``body(i, b)`` for this warpgroup's i-th sequence b: every second one."""
        for i in range(ceil_div(self.c.batch, WARPGROUPS)):
            b = i * WARPGROUPS + self.wg
            if (i + 1) * WARPGROUPS <= self.c.batch:
                body(i, b)
            else:
                pl.when(b < self.c.batch)(partial(body, i, b))

    def one_type(self, types, selector, body) -> None:
        """Runs ``body(index)`` for the type of this layer."""
        if len(types) == 1:
            body(0)
            return
        for i in range(len(types)):

            @pl.when(selector == i)
            def _(i=i):
                body(i)

    @jax.named_scope("qkv")
    def qkv(self, layer, count) -> None:
        self.begin()
        c, w = self.c, self.r["weights"]["qkv"]
        steps = c.hidden // STEP
        slots = ceil_div(c.qkv_tiles, c.blocks)
        static = slots <= SLOTS
        always = c.qkv_always // c.blocks if static else 0
        counts = [self.table(layer, f"qkv_count{i}") for i in range(len(c.qkv_types))]
        offsets = [self.table(layer, f"qkv_offset{i}") for i in range(len(c.qkv_types))]
        first = TILE_FORMATS[c.qkv_types[0]]
        norm_ref = self.r["input_norm"].at[layer]
        if c.shares:
            self.share_normed(norm_ref, count)

        def load(i):
            tile = offsets[0] + i // steps * c.blocks + self.block
            return first.load(w[0], (tile, self.mine(i % steps)))

        items = always * steps
        ahead = tuple(load(i) for i in range(divisor(items, 5))) if items else ()
        mixed = list(range(always, slots)) if static else []
        mixed_ahead = (
            [self.load_mixed(w, slot, counts, offsets) for slot in mixed] if len(mixed) <= 2 else None
        )
        self.normed_activations(norm_ref, count)
        x = self.own_activations(steps)
        if steps == 1 and items == len(ahead):  # all tiles are in registers and share their activations
            self.multiply_into_sums(first, ahead, range(items), 0, x)
        elif items:
            self.stream(
                items,
                lambda i: load(jnp.minimum(i, items - 1)),
                lambda i, tiles: self.multiply_into_sums(first, tiles, [i // steps], i % steps, x),
                ahead,
            )

        def any_type(slot, place, loaded=None):
            tile = slot * c.blocks + self.block
            start = 0
            for i, type in enumerate(c.qkv_types):
                fmt, begin = TILE_FORMATS[type], start

                @pl.when((tile >= begin) & (tile < begin + counts[i]))
                def _(i=i, fmt=fmt, begin=begin):
                    for step in range(steps):
                        if loaded is None:
                            tile_weights = fmt.load(w[i], (offsets[i] + tile - begin, self.mine(step)))
                        else:
                            tile_weights = take_weights(fmt, loaded[step])
                        self.multiply_into_sums(fmt, [tile_weights], [place], step, x)

                start = start + counts[i]

        def store(_, b, chunk):
            shape = (c.batch, c.row_stride(c.qkv_tiles * 8) // (8 * c.blocks), c.blocks, 8)
            out = prim.View(self.r["qkv"], shape, leading=1, **self.prim)
            out.store((b, pl.ds(chunk * SLOTS, SLOTS), self.block), self.result_rows(b, steps))

        if static:
            for i, slot in enumerate(mixed):
                any_type(slot, slot, mixed_ahead and mixed_ahead[i])
            self.sync_block()
            self.for_my_batch(lambda i, b: store(i, b, 0))
        else:

            def chunk(i):
                prim.fori(SLOTS, lambda slot: any_type(i * SLOTS + slot, slot))
                self.sync_block()
                self.for_my_batch(lambda n, b: store(n, b, i))
                self.sync_block()

            prim.fori(ceil_div(slots, SLOTS), chunk)
        self.signal(by_first=c.batch == 1)

    def load_mixed(self, stacks: list, slot: int, counts: list, offsets: list) -> list:
        """The weights of a tile of q, k or v whose type depends on the layer, one tuple a step."""
        c = self.c
        tile = slot * c.blocks + self.block
        formats = [TILE_FORMATS[t] for t in c.qkv_types]
        kinds = weight_kinds(formats)
        starts = [sum(counts[:i]) for i in range(len(formats))]

        def load(i, step):
            index = jnp.clip(tile - starts[i], 0, counts[i] - 1) + offsets[i]
            return pad_weights(formats[i], formats[i].load(stacks[i], (index, self.mine(step))), kinds)

        def choose(i, step):
            if i == len(formats) - 1:
                return load(i, step)
            return lax.cond(tile < starts[i] + counts[i], lambda: load(i, step), lambda: choose(i + 1, step))

        return [(kinds, choose(0, step)) for step in range(c.hidden // STEP)]

    def dense(self, fmt, stack, offset, tiles: int, steps: int, prepare, store, *, group: int) -> None:
        """A projection whose matrix has one type.

        Args:
          prepare: waits for the activations, and leaves them in shared memory.
          store: ``store(i, b, chunk)`` takes the finished rows of this warpgroup's i-th sequence b.
        """
        c = self.c
        slots = ceil_div(tiles, c.blocks)

        chunks = ceil_div(slots, SLOTS)
        here = min(slots, SLOTS)
        items = here * steps

        def load(i):
            """Item i counts steps first, then slots, then chunks."""
            slot = i // steps
            tile = jnp.minimum(slot * c.blocks + self.block, tiles - 1)
            return fmt.load(stack, (offset + tile, self.mine(i % steps)))

        ahead = tuple(load(i) for i in range(divisor(items, group)))
        prepare()
        x = self.own_activations(steps)

        together = 2 if steps == 1 and len(ahead) % 2 == 0 else 1

        def multiply(i, tiles):
            slots = [i // steps + j for j in range(together)]
            self.multiply_into_sums(fmt, tiles, slots, i % steps, x)

        def chunk(i, ahead):
            first = i * items
            last = chunks * items - 1
            ahead = self.stream(
                items, lambda j: load(jnp.minimum(first + j, last)), multiply, ahead, together=together
            )
            self.sync_block()
            self.for_my_batch(lambda n, b: store(n, b, i))
            if chunks > 1:
                self.sync_block()
            return ahead

        if chunks == 1 and items == len(ahead):
            for step in range(steps):
                self.multiply_into_sums(fmt, ahead[step::steps], range(here), step, x)
            self.sync_block()
            self.for_my_batch(lambda i, b: store(i, b, 0))
        else:
            prim.carried(chunks, chunk, ahead)

    # Attention

    def plan_splits(self):
        """The split of every sequence's attention, by its length alone, into shared memory; items in all.

        Row b: tiles of earlier tokens, tiles a split, splits, number of the first item (a KV head's split).
        """
        c = self.c

        def one(b, items):
            tiles = (self.position(b) + KV_TILE - 1) // KV_TILE
            each = jnp.where(tiles <= 2, 2, (tiles + c.splits - 1) // c.splits)
            splits = jnp.maximum((tiles + each - 1) // each, 1)
            for i, value in enumerate((tiles, each, splits, items)):
                self.r["plan"][b, i] = value
            return items + splits * c.kv_heads

        @pl.when(self.wg == 0)
        def _():
            self.r["plan"][c.batch, 3] = lax.fori_loop(0, c.batch, one, jnp.int32(0))

        self.sync_block()
        return self.r["plan"][c.batch, 3]

    def splits_of(self, b) -> list:
        """What :meth:`plan_splits` found for sequence b."""
        return [self.r["plan"][b, i] for i in range(3)]

    @jax.named_scope("attention")
    def attention(self, layer, count) -> None:
        self.begin()
        c = self.c
        workers, own = WARPGROUPS * c.blocks, self.wg * c.blocks + self.block
        heads = [self.table(layer, f"{n}_head") for n in "qkv"]
        half = c.head_dim // 2
        self.norms = {
            n: [
                plgpu.load(
                    self.r[f"{n}_norm"].at[layer, pl.ds(i * half, half)],
                    layout=prim.HEAD_HALVES.reduce(0),
                    optimized=False,
                )
                for i in range(2)
            ]
            for n in "qk"
        }
        self.wait(count)

        def one(i, _):
            item, b = i * workers + own, 0
            for later in range(1, c.batch):
                b = jnp.where(item >= self.r["plan"][later, 3], later, b)
            tiles, each, splits = self.splits_of(b)
            item -= self.r["plan"][b, 3]
            head, split = item % c.kv_heads, item // c.kv_heads
            start = split * each
            self.attend(layer, b, head, split, splits, start, jnp.minimum(start + each, tiles), heads)

        items = self.r["plan"][c.batch, 3]
        if c.batch * c.kv_heads * c.splits <= workers:
            pl.when(own < items)(lambda: one(0, None))
        else:
            lax.fori_loop(0, (items - own + workers - 1) // workers, one, None)
        self.signal()

    def rotated(self, b, halves, norm: list, scale: float, axis: int | None):
        """q/k-norm and RoPE (pairs j, j + 64) of one KV head's halves [64], or of query heads' [8, 64]."""
        layout = prim.HEAD_HALVES.reduce(0)
        load = lambda ref: plgpu.load(ref, layout=layout, optimized=False)
        cos, sin = (load(self.r["rope"].at[b, i]) for i in range(2))
        if axis is None:
            # Stay in vectors: every lane group holds the whole of it.
            mean = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=0) / self.c.head_dim
            inverse = lax.rsqrt(mean + self.c.eps)
            spread = lambda v: v
        else:
            shape = halves[0].shape
            mean = jnp.sum(halves[0] * halves[0] + halves[1] * halves[1], axis=1) / self.c.head_dim
            inverse = lax.broadcast_in_dim(lax.rsqrt(mean + self.c.eps), shape, (0,))
            inverse = plgpu.layout_cast(inverse, prim.HEAD_HALVES)
            spread = lambda v: plgpu.layout_cast(lax.broadcast_in_dim(v, shape, (1,)), prim.HEAD_HALVES)
        first, second = (h * inverse * spread(n) for h, n in zip(halves, norm, strict=True))
        cos, sin = spread(cos * scale), spread(sin * scale)
        return first * cos - second * sin, second * cos + first * sin

    def attend(self, layer, b, head, split, splits, start, stop, heads) -> None:
        """One warpgroup's attention over tiles start..stop of one sequence and KV head.

        The last split also takes the new token, whose key and value never pass through the
        cache: they are where its running softmax starts. Everything is loaded up front.
        """
        c, half = self.c, self.c.head_dim // 2
        rep = c.heads // c.kv_heads
        q_head, k_head, v_head = heads
        q_s, k_s, v_s = (self.r[n].at[self.wg] for n in "qkv")
        qkv, position = self.r["qkv"], self.position(b)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)
        copy = plgpu.Layout.SMEM_GMEM_COPY((KV_TILE, c.head_dim), c.cache_dtype, 128)
        one_head = prim.HEAD_HALVES.reduce(0)
        wgmma, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        spread = lambda v, n: plgpu.layout_cast(lax.broadcast_in_dim(v, (64, n), (0,)), wgmma)
        is_last = split == splits - 1

        def load_tile(i):
            i = jnp.minimum(i, c.cache_length // KV_TILE - 1)
            rows = (layer, b + c.first_sequence, pl.ds(i * KV_TILE, KV_TILE), head)
            return load(self.r["k_cache"].at[rows], copy), load(self.r["v_cache"].at[rows], copy)

        query = [
            [load(qkv.at[b, pl.ds(q_head + head * rep + i * 8, 8), j], prim.HEAD_HALVES) for j in range(2)]
            for i in range(rep // 8)
        ]
        key = [load(qkv.at[b, k_head + head, j], one_head) for j in range(2)]
        value = [load(qkv.at[b, v_head + head, j], one_head) for j in range(2)]
        first_tile = load_tile(start)
        key = self.rotated(b, key, self.norms["k"], 1.0, None)
        key = [v.astype(c.cache_dtype) for v in key]
        value = [v.astype(c.cache_dtype) for v in value]
        self.sync_warpgroup()  # the last item is done with shared memory
        for i, halves in enumerate(query):
            halves = self.rotated(b, halves, self.norms["q"], LOG2E * c.head_dim**-0.5, 1)
            score = 0.0
            for j in range(2):
                rounded = halves[j].astype(c.cache_dtype)
                q_s[pl.ds(i * 8, 8), pl.ds(j * half, half)] = rounded
                other = lax.broadcast_in_dim(key[j].astype(jnp.float32), (8, half), (1,))
                other = plgpu.layout_cast(other, prim.HEAD_HALVES)
                score += rounded.astype(jnp.float32) * other
            score = plgpu.layout_cast(jnp.sum(score, axis=1), prim.HEAD_HALVES.reduce(1))
            self.r["new_score"][self.wg, pl.ds(i * 8, 8)] = score
        for j in range(2):
            self.r["new_value"][self.wg, pl.ds(j * half, half)] = value[j].astype(jnp.float32)

        @pl.when(is_last)
        def _():
            for j in range(2):
                at = (layer, b + c.first_sequence, position, head, pl.ds(j * half, half))
                self.r["k_cache"][at] = key[j]
                self.r["v_cache"][at] = value[j]

        self.sync_warpgroup()
        new_score = load(self.r["new_score"].at[self.wg], row)
        new_value = load(self.r["new_value"].at[self.wg], wgmma.reduce(0))
        new_value = plgpu.layout_cast(lax.broadcast_in_dim(new_value, (64, c.head_dim), (1,)), wgmma)

        def tile(i, carry):
            k, v, largest, total, out = carry
            self.sync_warpgroup()  # the last tile's products are done with k_s and v_s
            k_s[...] = k
            v_s[...] = v
            plgpu.commit_smem()
            following = load_tile(jnp.minimum(i + 1, stop - 1))  # at the end one that is in cache

            s = prim.matmul(load(q_s, wgmma), k_s, KV_TILE, transposed=True, **self.prim)
            column = plgpu.broadcasted_iota(jnp.int32, (64, KV_TILE), 1, layout=wgmma)
            s = jnp.where(column + i * KV_TILE < position, s, -1e30)
            new = jnp.maximum(largest, jnp.max(s, axis=1))
            decay = jnp.exp2(largest - new)
            p = jnp.exp2(s - spread(new, KV_TILE))
            total = total * decay + jnp.sum(p, axis=1)

            weighted = prim.matmul(p.astype(c.cache_dtype), v_s, c.head_dim, transposed=False, **self.prim)
            out = out * spread(decay, c.head_dim) + weighted
            return *following, new, total, out

        nothing = lambda shape, value, layout: prim.full(shape, value, jnp.float32, layout)
        *_, largest, total, out = lax.fori_loop(
            start,
            stop,
            tile,
            (
                *first_tile,
                jnp.where(is_last, new_score, nothing((64,), -1e30, row)),
                jnp.where(is_last, nothing((64,), 1.0, row), nothing((64,), 0.0, row)),
                jnp.where(is_last, new_value, nothing((64, c.head_dim), 0.0, wgmma)),
            ),
        )
        out = out * spread(1.0 / total, c.head_dim)

        @pl.when(splits == 1)
        def _():
            prim.store_first_rows(self.r["attention"].at[b, pl.ds(head * rep, rep)], out, **self.prim)
            if c.shares:
                self.sync_warpgroup()
                chunks = rep * c.head_dim // CHUNK
                for i in range(chunks):
                    chunk = head * chunks + i
                    self.quantize(b, chunk, self.attended(b, chunk), "attended")

        @pl.when(splits > 1)
        def _():
            prim.store_first_rows(self.r["part"].at[b, head, split], out, **self.prim)
            self.r["part_stats"][b, head, 0, :, split] = largest
            self.r["part_stats"][b, head, 1, :, split] = total

    def attended(self, b, chunk):
        """float32 [32, 2, 4, 4]: 1,024 values of attention's output."""
        c = self.c
        shape = (c.batch, c.heads * c.head_dim // 32, 2, 4, 4)
        view = prim.View(self.r["attention"], shape, leading=1, **self.prim)
        return view.load((b, pl.ds(chunk * 32, 32)), prim.SUBBLOCKS)

    @jax.named_scope("combine")
    def combine(self, count) -> None:
        """Joins the splits of long contexts, in their order."""
        self.begin()
        c = self.c
        workers = WARPGROUPS * c.blocks
        rep = c.heads // c.kv_heads
        layout = prim.lanes(128)
        load = lambda ref: plgpu.load(ref, layout=layout, optimized=False)
        self.wait(count)

        def one(i):
            item = i * workers + self.wg * c.blocks + self.block
            b, head = item // c.heads, item % c.heads
            clipped = jnp.minimum(b, c.batch - 1)
            _, _, splits = self.splits_of(clipped)

            @pl.when((b < c.batch) & (splits > 1))
            def _():
                group, row = head // rep, head % rep
                largest = load(self.r["part_stats"].at[b, group, 0, row])
                total = load(self.r["part_stats"].at[b, group, 1, row])
                used = plgpu.broadcasted_iota(jnp.int32, (MAX_SPLITS,), 0, layout=layout) < splits
                largest = jnp.where(used, largest, -1e30)
                (shift,) = self.totals([largest], layout, "max", "split_largest", i)
                weight = jnp.where(used, total * jnp.exp2(largest - shift), 0.0)
                (total,) = self.totals([weight], layout, "add", "split_sum", i)
                self.r["split_weight"][self.wg] = weight / total
                self.sync_warpgroup()

                def add(split, acc):
                    value = load(self.r["part"].at[b, group, split, row])
                    return acc + value * self.r["split_weight"][self.wg, split]

                out = lax.fori_loop(0, splits, add, prim.full((128,), 0.0, jnp.float32, layout))
                if c.shares:
                    self.quantize_lanes(out, layout, "attended", lambda warp: (b, head * 4 + warp))
                else:
                    self.r["attention"][b, head] = out
                self.sync_warpgroup()

        prim.fori(ceil_div(c.batch * c.heads, workers), one)
        self.signal()

    @jax.named_scope("output_projection")
    def output_projection(self, layer, count) -> None:
        self.begin()
        c = self.c
        width = c.heads * c.head_dim
        steps = width // STEP
        tiles = c.hidden // 8
        early = ceil_div(tiles, c.blocks) <= SLOTS
        before = {}

        def prepare():
            self.wait(count)
            if c.shares:
                self.fetch("attended", 0, width // SUPERBLOCK)
                load_old()
                self.fetched()
                return
            chunks = [2 * step + self.wg for step in range(steps)]
            loaded = [self.attended(0, chunk) for chunk in chunks]
            load_old()
            for chunk, x in zip(chunks, loaded, strict=True):
                self.quantize(0, chunk, x)
            self.sync_warpgroup()

        def load_old():
            """The residual stream's rows: after the products, each sequence would wait for memory."""
            for i in range(ceil_div(c.batch, WARPGROUPS) if early else 0):
                before[i] = residual_rows(jnp.minimum(i * WARPGROUPS + self.wg, c.batch - 1), 0)

        def residual_rows(b, chunk):
            at = (b, pl.ds(chunk * SLOTS, SLOTS), self.block)
            parts = range(1 + c.down_parts)
            return sum(self.state_rows.load((part, *at), prim.OUTPUT_ROWS) for part in parts)

        def store(i, b, chunk):
            old = before[i] if early else residual_rows(b, chunk)
            at = (b, pl.ds(chunk * SLOTS, SLOTS), self.block)
            self.state_rows.store((0, *at), self.result_rows(b, steps) + old)

        def run(i):
            fmt = TILE_FORMATS[c.o_types[i]]
            stack = self.r["weights"]["o"][i]
            offset = self.table(layer, "o_offset")
            self.dense(fmt, stack, offset, tiles, steps, prepare, store, group=4)

        self.one_type(c.o_types, self.table(layer, "o_type"), run)
        self.signal(by_first=c.batch == 1)

    # Experts

    @jax.named_scope("router")
    def router(self, layer, count) -> None:
        """This block's rows of router logits, and the normed activations for the experts.

        A norm's scale is one number a sequence, so the logits are written without it, from one pass over the
        residual stream of which each warpgroup reads its own columns; who reads them multiplies.
        """
        self.begin()
        c = self.c
        rounds = ceil_div(c.experts, c.blocks)
        norms = self.norm_weights(self.r["post_norm"].at[layer])
        own = lambda i: jnp.minimum(i * c.blocks + self.block, c.experts - 1)
        row = lambda i: [w * r for w, r in zip(norms, self.router_row(layer, own(i)), strict=True)]
        rows = [row(i) for i in range(rounds)] if rounds <= 2 else None
        self.wait(count)
        kept = []

        def group(number, first, size):
            sequences = [first + i for i in range(size)]
            x = [[self.residual(b, i, 0) for i in self.own_chunks] for b in sequences]
            turn = number * rounds
            squares = [sum(v * v for v in chunks) for chunks in x]

            def products(i) -> list:
                own_row = rows[i] if rows else row(i)
                return [sum(v * r for v, r in zip(chunks, own_row, strict=True)) for chunks in x]

            def sums(i, values: list) -> list:
                return self.totals(values, prim.SUBBLOCKS, "add", "router", turn + i)

            def store(i, logits: list) -> None:
                for b, total in zip(sequences, logits, strict=True):
                    self.r["router_logits"][self.wg, b, own(i)] = total

            found = sums(0, [*squares, *products(0)])
            for b, total in zip(sequences, found[:size], strict=True):
                self.r["squares"][self.wg, b] = total
            store(0, found[size:])
            if rows:
                for i in range(1, rounds):
                    store(i, sums(i, products(i)))
            else:
                prim.fori(rounds - 1, lambda i: store(i + 1, sums(i + 1, products(i + 1))))
            if not c.shares:
                kept.append((first, x[0]))
                return

            def quantize(b):
                chunks = x[0]
                for other, theirs in zip(sequences[1:], x[1:], strict=True):
                    chunks = [
                        jnp.where(b == other, new, old) for new, old in zip(theirs, chunks, strict=True)
                    ]
                self.sync_block()  # both warpgroups' squares are there
                self.quantize_chunks(b, self.scaled(b, chunks, norms), "hidden")

            self.for_own(first, size, quantize)

        self.for_groups(TOGETHER if c.hidden // CHUNK <= 4 else 1, group)
        self.signal()
        for b, chunks in kept:  # no other block waits for this
            self.quantize_chunks(b, self.scaled(b, chunks, norms))

    def router_row(self, layer, expert) -> list:
        refs = [self.r["router"].at[layer, expert, pl.ds(i * 32, 32)] for i in self.own_chunks]
        return [plgpu.load(ref, layout=prim.SUBBLOCKS, optimized=False) for ref in refs]

    def choose(self, layer) -> None:
        """Top-k experts and their weights for every sequence, and the order of pairs, into shared memory.

        Softmax over all experts followed by renormalization over the chosen is a softmax over
        the chosen: the common denominator cancels.
        """
        c = self.c
        ids, routing = self.r["ids"], self.r["routing"]
        for start in range(0, c.padded_batch, 4):

            @pl.when(self.wg == start // 4 % WARPGROUPS)
            def _(start=start):
                rows = pl.ds(start, 4)
                logits = [
                    plgpu.load(self.r["router_logits"].at[i, rows], layout=prim.EXPERTS, optimized=False)
                    for i in range(WARPGROUPS)
                ]
                scale = self.norm_scale(
                    lambda squares, rows=rows: plgpu.load(
                        squares.at[rows], layout=prim.EXPERTS.reduce(1), optimized=False
                    )
                )
                logits = logits[0] + logits[1]
                if c.experts < c.padded_experts:
                    index = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=prim.EXPERTS)
                    logits = jnp.where(index < c.experts, logits, -1e30)
                count = c.experts_per_token
                prim.top_experts(logits, scale, ids.at[rows], routing.at[rows], count, **self.prim)

        if c.shares:
            self.fetched()
        else:
            self.sync_block()
        if c.replay:

            @pl.when(self.wg == 0)
            def _():
                self.for_batch(lambda b: self.replay(layer, b))

            self.sync_block()
        if c.shares:

            @pl.when(self.wg == 0)
            def _():
                prim.sort_pairs(ids, self.r["order"], **self.prim)

            self.sync_block()

    def replay(self, layer, b) -> None:
        """Overwrites the choice for sequence b by the given experts."""
        chosen = [self.r["replay_ids"][layer, b, i] for i in range(self.c.experts_per_token)]
        scale = self.norm_scale(lambda squares: squares[b])
        logits = [self.r["router_logits"][0, b, e] + self.r["router_logits"][1, b, e] for e in chosen]
        logits = [value * scale for value in logits]
        largest = logits[0]
        for value in logits[1:]:
            largest = jnp.maximum(largest, value)
        powers = [jnp.exp2((value - largest) * LOG2E) for value in logits]
        total = sum(powers)
        for i, (expert, power) in enumerate(zip(chosen, powers, strict=True)):
            self.r["ids"][b, i] = expert
            self.r["routing"][b, i] = power / total

    @jax.named_scope("gate_up")
    def gate_up(self, layer, count) -> None:
        """The choice of experts, and SwiGLU of every chosen one."""
        self.begin()
        c = self.c
        self.wait(count)
        if c.shares:
            self.fetch("hidden", 0, c.hidden // SUPERBLOCK)
        self.choose(layer)  # ends with both warpgroups together and what was fetched in place
        selector = self.table(layer, "gate_up_type")
        self.one_type(c.gate_up_types, selector, lambda i: self.gate_up_type(layer, i))

        @pl.when((self.block == c.blocks - 1) & (self.wg == 1 % WARPGROUPS))
        def _():
            def copy(b):
                for i in range(c.experts_per_token):
                    self.r["expert_ids"][layer, b, i] = self.r["ids"][b, i]

            self.for_batch(copy)

    def gate_up_type(self, layer, type_index: int) -> None:
        c = self.c
        fmt = TILE_FORMATS[c.gate_up_types[type_index]]
        stacks = [self.r["weights"][n][type_index] for n in ("gate", "up")]
        offset = self.table(layer, "gate_up_offset")
        per_expert = c.moe_width // 8
        items = c.pairs * per_expert
        _, used, chunks = expert_slots(c)
        steps = c.hidden // STEP
        x = self.own_activations(steps)
        subblocks = c.moe_width // 32

        def group_at(group):
            """(sequence, which of its experts, subblock of its width) of a block's groups of four tiles."""
            group = jnp.minimum(group * c.blocks + self.block, c.pairs * subblocks - 1)
            pair, subblock = self.r["order"][group // subblocks], group % subblocks
            return pair // c.experts_per_token, pair % c.experts_per_token, subblock

        def item_at(slot):
            """(sequence, which of its experts, tile)."""
            if c.shares:
                b, k, subblock = group_at(slot // GROUP)
                return b, k, subblock * GROUP + slot % GROUP
            item = jnp.minimum(slot * c.blocks + self.block, items - 1)
            return 0, item // per_expert, item % per_expert

        def load(slot):
            b, k, tile = item_at(slot)
            tile = offset + self.r["ids"][b, k] * per_expert + tile
            return [[fmt.load(s, (tile, self.mine(step))) for s in stacks] for step in range(steps)]

        def multiply(slot, place, tiles, first_sums):
            b, _, _ = item_at(slot)
            for step in range(steps):
                here = x or self.activations(b, step * 8 + self.wg * 4)
                for i, pair in enumerate(tiles):
                    for which, value in enumerate(fmt.multiply(pair[step], here, **self.prim)):
                        self.store_sums(first_sums + which, place + i, step, value)

        depth = divisor(used, 4 if c.shares else 3) if steps == 1 else 1
        together = 2 if depth == 4 else 1  # neighbouring tiles of an expert share their activations

        # Chunks whose sums are there at once: both warpgroups take their share of them behind one barrier.
        room = divisor(chunks, self.r["sums"].shape[0] // 2)

        def finish(i, first_sums):
            """SwiGLU of chunk i's tiles."""
            gate, up = (self.result_rows(first_sums + which, steps) for which in range(2))
            value = gate / (1.0 + jnp.exp2(gate * -LOG2E)) * up
            if not c.shares:
                self.r["swiglu"][pl.ds(i * used, SLOTS), self.block] = value
                return

            def place(warp):
                b, k, subblock = group_at(i * (used // GROUP) + warp)
                return b, k * subblocks + subblock

            self.quantize_lanes(value, prim.OUTPUT_ROWS, "swiglu", place, used // GROUP)

        def chunk(i, first_sums, carry):
            first = i * used
            return self.stream(
                used,
                lambda place: load(first + place),
                lambda place, tiles: multiply(first + place, place, tiles, first_sums),
                carry,
                together=together,
            )

        def round_of_chunks(n, carry):
            start = n * room
            carry = prim.carried(room, lambda j, carry: chunk(start + j, 2 * j, carry), carry)
            self.sync_block()

            def own(i):
                j = i * WARPGROUPS + self.wg
                pl.when(j < room)(lambda: finish(start + j, 2 * j))

            prim.fori(ceil_div(room, WARPGROUPS), own)
            if chunks > room:
                self.sync_block()
            return carry

        ahead = tuple(load(slot) for slot in range(depth))
        prim.carried(chunks // room, round_of_chunks, ahead)
        self.signal(by_first=room == 1)

    @jax.named_scope("down")
    def down(self, layer, count) -> None:
        self.begin()
        selector = self.table(layer, "down_type")
        self.one_type(self.c.down_types, selector, lambda i: self.down_type(layer, count, i))
        self.signal(by_first=self.c.batch == 1)

    def down_type(self, layer, count, type_index: int) -> None:
        """Block (tiles of 32 rows, part): that part of each token's experts, summed in top-k order."""
        c = self.c
        fmt = TILE_FORMATS[c.down_types[type_index]]
        stack = self.r["weights"]["down"][type_index]
        offset = self.table(layer, "down_offset")
        per_part = c.experts_per_token // c.down_parts
        superblocks = c.moe_width // SUPERBLOCK
        mine = per_part // WARPGROUPS
        # In batches two tiles of 32 rows for half of the sequences: as many blocks as one for all, but a
        # product has two tiles in it and not one and zeros, and one reading of the activations serves both.
        wide = 2 if c.shares else 1
        sequences = ceil_div(c.batch, wide)
        tiles = c.hidden // (32 * wide)
        rounds = ceil_div(tiles * c.down_parts * wide, c.blocks)
        items = sequences * mine * superblocks
        depth = items if items <= 6 else divisor(items, 4 if wide == 1 else 3)

        def place(i):
            """(tile, part, the share of the sequences) of a block's round."""
            item = i * c.blocks + self.block
            return item // (c.down_parts * wide), item // wide % c.down_parts, item % wide

        def sequence(i, share):
            """The last share may have a sequence less: it does its last one again."""
            return i if wide == 1 else jnp.minimum(share * sequences + i, c.batch - 1)

        def index(group, j):
            """(pair, superblock): items count superblocks first, then own experts, then sequences."""
            if depth % superblocks == 0:
                return group * (depth // superblocks) + j // superblocks, j % superblocks
            i = group * depth + j
            return i // superblocks, i % superblocks

        def load(item, where):
            (step, s), (tile, part, share) = item, where
            step = jnp.minimum(step, sequences * mine - 1)
            k = part * per_part + self.wg * mine + step % mine
            first = offset + self.r["ids"][sequence(step // mine, share), k] * (c.hidden // 8)
            starts = [first + (tile * wide + t) * 4 for t in range(wide)]
            return [fmt.load(stack, (pl.ds(start, 4), s)) for start in starts]

        def multiply(item, loaded, where):
            step, s = item
            b, k = sequence(step // mine, where[2]), self.wg * mine + step % mine
            x = self.activations(b, k * superblocks + s, shared=True)
            for t, value in enumerate(fmt.multiply(loaded, x, **self.prim)):
                self.r["sums"][b, t * per_part + k, pl.ds(s * 4, 4)] = prim.sum_groups(value)

        early = rounds == 1
        tile, *rest = place(0)
        nearest = (jnp.minimum(tile, tiles - 1), *rest)
        ahead = [load(index(0, j), nearest) for j in range(depth)] if early else None
        self.wait(count)

        def one_place(i):
            where = tile, part, share = nearest if early else place(i)
            if c.shares:
                own = partial(sequence, share=share)
                first, count = part * per_part * superblocks, per_part * superblocks
                self.fetch("swiglu", first, count, sequences, own)
                self.fetched()
            else:
                self.quantize_swiglu(part, per_part)
                self.sync_block()
            self.stream(
                items,
                lambda item: load(item, where),
                lambda item, tiles: multiply(item, tiles[0], where),
                tuple(ahead or [load(index(0, j), where) for j in range(depth)]),
                index=index,
            )
            self.sync_block()
            shape = (1 + c.down_parts, c.batch, c.row_stride(c.hidden) // 32, 4, 8)
            out = prim.View(self.state, shape, leading=2, **self.prim)

            def store(i):
                b = sequence(i, share)
                for t in range(wide):
                    total = None
                    for k in range(per_part):
                        at = (b, t * per_part + k)
                        refs = [self.r["sums"].at[*at, pl.ds(s * 4, 4)] for s in range(superblocks)]
                        value = sum(plgpu.load(ref, layout=prim.TILE_ROWS, optimized=False) for ref in refs)
                        value = value * self.r["routing"][b, part * per_part + k]
                        total = value if total is None else total + value
                    out.store((1 + part, b, tile * wide + t), total)

            prim.fori(sequences, lambda i: pl.when(i % WARPGROUPS == self.wg)(lambda: store(i)))

        def guarded(i):
            @pl.when(place(i)[0] < tiles)
            def _():
                one_place(i)

            if rounds > 1:
                self.sync_block()

        prim.fori(rounds, guarded)

    def quantize_swiglu(self, part, per_part: int) -> None:
        """One sequence's SwiGLU of a part of its experts, into shared memory."""
        c = self.c
        swiglu = self.r["swiglu"]
        size = swiglu.shape[0] * swiglu.shape[1] * 8
        source = prim.View(swiglu, (size // 32, 2, 4, 4), leading=0, **self.prim)
        chunks = ceil_div(per_part * c.moe_width, CHUNK)
        own = [n * WARPGROUPS + self.wg for n in range(ceil_div(chunks, WARPGROUPS))]
        starts = [part * per_part * c.moe_width // 32 + jnp.minimum(n, chunks - 1) * 32 for n in own]
        loaded = [source.load((pl.ds(start, 32),), prim.SUBBLOCKS) for start in starts]
        for n, x in zip(own, loaded, strict=True):
            pl.when(n < chunks)(partial(self.quantize, 0, n, x))

    @jax.named_scope("logits")
    def logits(self, count) -> None:
        self.begin()
        c = self.c

        norm_ref = self.r["final_norm"]
        if c.shares:
            self.share_normed(norm_ref, count)

        def prepare():
            self.normed_activations(norm_ref, count)

        def store(_, b, chunk):
            rows = self.result_rows(b, c.hidden // STEP)
            self.r["logits"][b, pl.ds(chunk * SLOTS, SLOTS), self.block] = rows

        fmt, stack = TILE_FORMATS[c.lm_head_type], self.r["weights"]["lm_head"][0]
        self.dense(fmt, stack, 0, c.vocab // 8, c.hidden // STEP, prepare, store, group=4)

    def run(self) -> None:
        c = self.c

        @pl.when(self.wg == 0)
        def _():
            layout = prim.lanes(scalar_count(c))
            self.r["scalars"][...] = plgpu.load(self.r["scalars_in"], layout=layout, optimized=False)
            prim.store_zeros(self.r["zeros"], **self.prim)

        self.sync_block()
        wanted = self.goes_on(0)
        for b in range(1, c.batch):
            wanted |= self.goes_on(b)

        @pl.when(wanted > 0)
        def _():
            self.token()

    def token(self) -> None:
        c = self.c
        split = (self.plan_splits() > c.batch * c.kv_heads).astype(jnp.int32)

        blocks, own = c.blocks, c.batch if c.shares else 0  # signals of a phase, and of owners of sequences

        def layer(i, count):
            self.qkv(i, count)
            count = count + own + blocks
            self.attention(i, count)
            count = count + blocks

            @pl.when(split > 0)
            def _():
                self.combine(count)

            count = count + split * blocks
            self.output_projection(i, count)
            self.router(i, count + blocks)
            self.gate_up(i, count + 2 * blocks)
            self.down(i, count + 3 * blocks)
            return count + 4 * blocks

        count = lax.fori_loop(0, c.layers, layer, jnp.int32(0))
        self.logits(count)
        if self.semaphore is not None:
            self.signal()

            @pl.when((self.block == 0) & (self.wg == 0))
            def _():
                target = count + own + blocks
                plgpu.semaphore_wait(self.semaphore, target, memory_scope="gpu")  # leaves zero behind


def decode_step(
    config: StepConfig, operands: dict[str, Any], *, interpret: Any = None
) -> dict[str, jax.Array]:
    """Runs the kernel.

    Args:
      operands: as ``OPERANDS`` names; ``state``, ``k_cache`` and ``v_cache`` are ``jax.Ref``
        and are updated in place.
      interpret: Pallas' interpreter parameters (``emulate`` must be set too).

    Returns:
      The results and buffers that :func:`output_types` lists.
    """
    outputs, scratch = output_types(config), scratch_types(config)
    leaves, tree = jax.tree.flatten([operands[name] for name in OPERANDS])
    folder = os.environ.get("QWEN3_MOE_DECODE_TRACE")
    profile = {"profile_space": 64 * config.layers, "profile_dir": folder} if folder else {}

    def body(*refs, **scratch_refs):
        named = dict(zip(OPERANDS, jax.tree.unflatten(tree, refs[: len(leaves)]), strict=True))
        named |= dict(zip(outputs, refs[len(leaves) :], strict=True)) | scratch_refs
        Step(config, named).run()

    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=(config.blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        kernel_name="qwen3_moe_decode_step",
        **interpreter_option(interpret, WARPGROUPS),
        compiler_params=plgpu.CompilerParams(
            **profile,
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # layouts are given, not searched for
        ),
    )
    return dict(zip(outputs, kernel(*leaves), strict=True))


__all__ = ["OPERANDS", "StepConfig", "decode_step", "output_types", "state_shape"]
