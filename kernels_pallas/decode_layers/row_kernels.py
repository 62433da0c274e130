"""The steps of ``decode_layers`` between its products as kernels: few launches where XLA makes dozens.

Each is what the step of the same name in ``row_steps`` says, up to the order of sums. A block of one
warpgroup has a row, a KV head of a row, or a few rows of choices; what a row becomes depends on that row
alone. They look the layer up themselves, so that no launch picks anything.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_layers.row_primitives import (
    UNIT,
    row_layout,
    store_operand,
)
from qwen3_moe_jax.kernels_pallas.decode_layers.row_steps import NormedRows
from qwen3_moe_jax.kernels_pallas.decode_step import primitives
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    WARPGROUP,
    full,
    head_halves,
    load,
)
from qwen3_moe_jax.kernels_pallas.gpu.activations import WEIGHT_SCALE, operand_scale
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter_option

Array = Any
_HEADS = 8
"""Query heads that are rotated at a time."""


class Lookup(NamedTuple):
    """A layer's entry in the table of all layers.

    Attributes:
      layer: int32 [1].
      table: int32 [n].
      at: where in the table the layers' entries begin.
      first: what is taken off the entry.
      back: layers before ``layer``; before the first layer there is the first.
    """

    layer: jax.Array
    table: jax.Array
    at: int
    first: int = 0
    back: int = 0


class Sizes(NamedTuple):
    """What the kernels are made for.

    Attributes:
      rows: R.
      tile: rows of an operand, R at least.
      hidden: D.
      heads, kv_heads, head_dim: N, K, H.
      experts, choices: all experts E, and X.
      eps: of the norms.
    """

    rows: int
    tile: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    choices: int
    eps: float

    @classmethod
    def of(cls, weights: Any, cache: jax.Array, rows: int, tile: int, choices: int, eps: float) -> "Sizes":
        """Those of a device's weights and cache [L, C, S, K, H]."""
        head_dim = cache.shape[4]
        heads, kv_heads = (w.shape[0] // head_dim for w in (weights.q_proj, weights.v_proj))
        experts, hidden = weights.router.shape
        return cls(rows, tile, hidden, heads, kv_heads, head_dim, experts, choices, eps)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def fit(self) -> bool:
        """Whether there are kernels of these sizes."""
        return (
            self.hidden % UNIT == 0
            and self.head_dim in (64, 128)
            and self.group >= _HEADS
            and self.group * self.head_dim % UNIT == 0
            and self.tile * self.choices % WARPGROUP == 0
            and self.experts % 4 == 0
        )


class Launcher:
    """Makes kernels of blocks of one warpgroup, for one size."""

    def __init__(self, sizes: Sizes, interpret: Any):
        self.s, self.interpret = sizes, interpret
        self.prim = primitives.choose("portable", emulate=interpret is not None)
        self.emulate = interpret is not None

    def launch(
        self, body: Callable, name: str, grid: tuple[int, ...], out: Sequence, scratch: dict | None = None
    ) -> Callable:
        axes = ("block", "head")[: len(grid)]
        return plgpu.kernel(
            body,
            out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out),
            scratch_types=scratch or {},
            grid=grid,
            grid_names=axes,
            num_threads=1,
            thread_name="wg",
            kernel_name=f"qwen3_moe_{name}",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            **interpreter_option(self.interpret, 1),
        )


class RowKernels(Launcher):
    """The steps, for one size."""

    def total(self, x: Array, operation: str, scratch: Array) -> Array:
        """The sum or maximum of a row."""
        return self.prim.warpgroup_reduce([x], row_layout(*x.shape), operation, scratch)[0]

    def put_operand(self, x: list, operand: Array, scale: Array, row: Array, scratch: Array) -> None:
        """A row, in pieces of equal length, as an operand."""
        largest = jnp.abs(x[0])
        for piece in x[1:]:
            largest = jnp.maximum(largest, jnp.abs(piece))
        power = operand_scale(self.total(largest, "max", scratch))
        inverse = 1 / (power * WEIGHT_SCALE)  # powers of two
        for number, piece in enumerate(x):
            columns = pl.ds(number * piece.shape[0], piece.shape[0])
            store_operand(operand.at[row, columns], piece * inverse, emulate=self.emulate)
        scale[row] = power

    def norm(
        self,
        x: jax.Array,
        parts: tuple[jax.Array, ...],
        weight: jax.Array,
        layer: jax.Array,
        *,
        by_row: bool,
        which: Lookup | None = None,
    ) -> tuple[jax.Array, NormedRows]:
        """x with parts added, float32 [R, D], and its norm: [tile, D] with zeros after row R.

        Args:
          parts: float32 [R, n, D] (``by_row``) or [n, R or more, D], added in order; of several ``which``
            says whose, and what the others hold does not matter.
          weight: float32 [L, D].
        """
        s = self.s
        table = which or Lookup(layer, layer, 0)
        layout = row_layout(s.hidden)

        def summed(ref: Array, row: Array) -> Array:
            count = ref.shape[1 if by_row else 0]
            at = (lambda n: ref.at[row, n]) if by_row else (lambda n: ref.at[n, row])
            total = load(at(0), layout)
            for n in range(1, count):
                total += load(at(n), layout)
            return total

        def body(layer, number, table, weight, x, *refs, scratch):
            *parts, total, normed, operand, scale = refs
            row = lax.axis_index("block")

            @pl.when(row < s.rows)
            def _():
                value, w = load(x.at[row], layout), load(weight.at[layer[0]], layout).astype(jnp.float32)
                if which is None:
                    value += summed(parts[0], row)
                else:
                    option = table[which.at + jnp.maximum(number[0] - which.back, 0)] - which.first
                    branches = [partial(summed, part, row) for part in parts]
                    value += branches[0]() if len(branches) == 1 else lax.switch(option, branches)
                total[row] = value
                squares = self.total(value * value, "add", scratch.at[0])
                out = value * lax.rsqrt(squares / s.hidden + s.eps) * w
                normed[row] = out
                self.put_operand([out], operand, scale, row, scratch.at[1])

            @pl.when(row >= s.rows)
            def _():
                zeros = full((s.hidden,), 0.0, jnp.float32, layout)
                normed[row] = zeros
                operand[row] = zeros.astype(jnp.float16)
                scale[row] = jnp.float32(1)

        shape = (s.tile, s.hidden)
        out = [((s.rows, s.hidden), jnp.float32), (shape, jnp.float32), (shape, jnp.float16)]
        scratch = {"scratch": plgpu.SMEM((2, 1, 4), jnp.float32)}
        run = self.launch(body, "norm", (s.tile,), [*out, ((s.tile,), jnp.float32)], scratch)
        total, normed, operand, scale = run(layer, table.layer, table.table, weight, x, *parts)
        return total, NormedRows(normed, operand, scale)

    def attention_operand(self, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The attention kernel's result [R * K, q_rows, H] as an operand, float16 [tile, N * H] and scale."""
        s = self.s
        width = s.group * s.head_dim
        layout = row_layout(width)

        def body(x, operand, scale, scratch):
            row = lax.axis_index("block")

            @pl.when(row < s.rows)
            def _():
                pieces = [load(x.at[row, k, pl.ds(0, width)], layout) for k in range(s.kv_heads)]
                pieces = [piece.astype(jnp.float32) for piece in pieces]
                self.put_operand(pieces, operand, scale, row, scratch)

            @pl.when(row >= s.rows)
            def _():
                zeros = full((width,), 0.0, jnp.float16, layout)
                for k in range(s.kv_heads):
                    operand[row, pl.ds(k * width, width)] = zeros
                scale[row] = jnp.float32(1)

        types = [((s.tile, s.kv_heads * width), jnp.float16), ((s.tile,), jnp.float32)]
        scratch = {"scratch": plgpu.SMEM((1, 4), jnp.float32)}
        run = self.launch(body, "attention_operand", (s.tile,), types, scratch)
        return run(out.reshape(s.rows, s.kv_heads, -1))

    def rotate(
        self,
        qkv: jax.Array,
        values: Sequence[tuple[jax.Array, int]],
        which: Lookup,
        norms: tuple[jax.Array, jax.Array],
        rope: tuple[jax.Array, jax.Array],
        caches: tuple[jax.Array, jax.Array],
        slots: jax.Array,
        positions: jax.Array,
        query_rows: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys normed and rotated; keys and values into the caches.

        Args:
          qkv: parts float32 [P, tile, n], a row's queries, then its keys.
          values: parts of a product and the first of its columns that is a value's; ``which`` says whose.
          norms: of queries and keys, float32 [L, H].
          rope: cos and sin, float32 [R, H / 2].
          caches: [L, C, S, K, H], changed in place where XLA can.
          slots, positions: int32 [R].
          query_rows: of the result.

        Returns:
          Queries [R * K, query_rows, H], not written after a head's own, and the caches.
        """
        s, dtype, half = self.s, caches[0].dtype, self.s.head_dim // 2
        layout = head_halves(s.head_dim)
        one = layout.reduce(0)
        length = caches[0].shape[2]
        halves = lambda parts: parts.reshape(*parts.shape[:2], -1, 2, half)

        def body(layer, table, slots, positions, q_norm, k_norm, cos, sin, k_cache, v_cache, qkv, *refs):
            *values_refs, out = refs
            row, head = lax.axis_index("block"), lax.axis_index("head")
            at = layer[0]
            angles = [load(ref.at[row], one) for ref in (cos, sin)]

            def read(ref, first, count, layout):
                """The sum of parts of some heads, as halves."""
                heads = first if count is None else pl.ds(first, count)
                found = []
                for j in range(2):
                    total = load(ref.at[0, row, heads, j], layout)
                    for part in range(1, ref.shape[0]):
                        total += load(ref.at[part, row, heads, j], layout)
                    found.append(total)
                return found

            def rotated(x, norm, axis, spread):
                squares = jnp.sum(x[0] * x[0] + x[1] * x[1], axis=axis)
                inverse = lax.rsqrt(squares / s.head_dim + s.eps)
                if axis:
                    inverse = plgpu.layout_cast(lax.broadcast_in_dim(inverse, x[0].shape, (0,)), layout)
                norm = [load(norm.at[at, pl.ds(j * half, half)], one) for j in range(2)]
                first, second = (h * inverse * spread(w) for h, w in zip(x, norm, strict=True))
                cos, sin = map(spread, angles)
                return first * cos - second * sin, second * cos + first * sin

            wide = lambda v: plgpu.layout_cast(lax.broadcast_in_dim(v, (_HEADS, half), (1,)), layout)
            for number in range(0, s.group, _HEADS):
                group = min(number, s.group - _HEADS)  # the last may share heads with the one before
                query = read(qkv, head * s.group + group, _HEADS, layout)
                for j, value in enumerate(rotated(query, q_norm, 1, wide)):
                    heads, columns = pl.ds(group, _HEADS), pl.ds(j * half, half)
                    out[row * s.kv_heads + head, heads, columns] = value.astype(dtype)
            place = (at, slots[row], jnp.minimum(positions[row], length - 1), head)
            key = rotated(read(qkv, s.heads + head, None, one), k_norm, 0, lambda v: v)
            option = table[which.at + at] - which.first
            branches = [
                partial(read, ref, first // s.head_dim + head, None, one)
                for ref, (_, first) in zip(values_refs, values, strict=True)
            ]
            value = branches[0]() if len(branches) == 1 else lax.switch(option, branches)
            for ref, new in ((k_cache, key), (v_cache, value)):
                for j, part in enumerate(new):
                    ref[(*place, pl.ds(j * half, half))] = part.astype(dtype)

        shape = (s.rows * s.kv_heads, query_rows, s.head_dim)
        run = self.launch(body, "rotate", (s.rows, s.kv_heads), [(shape, dtype)])
        k_ref, v_ref = map(jax.new_ref, caches)
        others = [halves(parts) for parts, _ in values]
        fixed = (which.layer, which.table, slots, positions, *norms, *rope)
        (q,) = run(*fixed, k_ref, v_ref, halves(qkv), *others)
        return q, jax.freeze(k_ref), jax.freeze(v_ref)
