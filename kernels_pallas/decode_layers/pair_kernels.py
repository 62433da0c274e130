"""The choice of experts and the order of its pairs as kernels; what stands between is ``row_kernels``'."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_layers.row_kernels import Launcher
from qwen3_moe_jax.kernels_pallas.decode_layers.row_primitives import NO_EXPERT, sort_pairs
from qwen3_moe_jax.kernels_pallas.decode_layers.row_steps import NormedRows, Routes, Share
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import DEVICE_AXES
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import EXPERTS, WARPGROUP, full, lanes, load
from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE, WEIGHT_SCALE
from qwen3_moe_jax.kernels_pallas.gpu.sorting import Tiles, padded_rows

_ROWS = 4
"""Rows whose experts a block chooses, one per warp; and pairs whose rows it brings together."""


_LOGIT_ROWS = 16
"""Rows whose logits a block computes: with four experts each, 128 blocks for 64 rows and 128 experts."""
_LOGIT_COLUMNS = 2048
"""Columns of four experts' weights that a block keeps in registers, 64 per lane."""


class PairKernels(Launcher):
    """The steps, for one size."""

    def logits(self, x: jax.Array, w: jax.Array, layer: jax.Array) -> jax.Array:
        """The router's product.

        A block has four experts, one per warp, and some rows. XLA makes three launches of it: a copy of the
        layer's weights, parts of the product, and their sum.

        Args:
          x: float32 [tile, D].
          w: float32, float16 or bfloat16 [L * E, D].
          layer: int32 [1].

        Returns:
          float32 [tile, E].
        """
        s = self.s
        columns = min(s.hidden, _LOGIT_COLUMNS)
        starts = range(0, s.hidden, columns)
        shape, row_layout = (_ROWS, columns), EXPERTS.reduce(0)

        def body(layer, x, w, out):
            group, rows = lax.axis_index("head"), lax.axis_index("block") * _LOGIT_ROWS
            experts = pl.ds(layer[0] * s.experts + group * _ROWS, _ROWS)
            weights = lambda start: load(w.at[experts, pl.ds(start, columns)], EXPERTS).astype(jnp.float32)
            kept = weights(0) if len(starts) == 1 else None

            def one(i, carry):
                total: Any = None
                for start in starts:
                    value = load(x.at[rows + i, pl.ds(start, columns)], row_layout)
                    value = plgpu.layout_cast(lax.broadcast_in_dim(value, shape, (1,)), EXPERTS)
                    product = value * (weights(start) if kept is None else kept)
                    part = jnp.sum(product, axis=1)
                    total = part if total is None else total + part
                out[rows + i, pl.ds(group * _ROWS, _ROWS)] = total
                return carry

            lax.fori_loop(0, _LOGIT_ROWS, one, None)

        grid = (s.tile // _LOGIT_ROWS, s.experts // _ROWS)
        return self.launch(body, "router_logits", grid, [((s.tile, s.experts), jnp.float32)])(layer, x, w)[0]

    def choose(
        self,
        logits: jax.Array,
        expert_ids: jax.Array,
        layer: jax.Array,
        x: NormedRows,
        tile: int,
        share: Share,
    ) -> tuple[jax.Array, Routes, jax.Array, jax.Array]:
        """The choice of experts, and the rows of their operand.

        Args:
          logits: float32 [tile, E]; rows after R do not matter.
          expert_ids: int32 [L, tile, X], the layer's to be written.
          x: what experts multiply.
          tile: rows of a tile of one expert.

        Returns:
          ``expert_ids``; the routes, without ``rows``; x's operand [S, D] and scale [S], of which rows of no
          pair are not written.
        """
        missing = -logits.shape[1] % WARPGROUP
        logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        ids_ref = jax.new_ref(expert_ids)
        weights = self.top_experts(logits, ids_ref, layer)
        expert_ids = jax.freeze(ids_ref)
        tiles, pairs, factors, operand, scale = self.bring(expert_ids, weights, layer, x, tile, share)
        routes = Routes(expert_ids, tiles, pairs, pairs, factors)
        return expert_ids, routes, operand, scale

    def top_experts(self, logits: jax.Array, ids_ref: Any, layer: jax.Array) -> jax.Array:
        """Weights float32 [tile, X] of the chosen; their ids are written to ``ids_ref`` [L, tile, X]."""
        s = self.s

        def body(layer, logits, ids, weights):
            rows = pl.ds(lax.axis_index("block") * _ROWS, _ROWS)
            ones = full((_ROWS,), 1.0, jnp.float32, EXPERTS.reduce(1))
            chosen = ids.at[layer[0], rows]
            self.prim.top_experts(load(logits.at[rows], EXPERTS), ones, chosen, weights.at[rows], s.choices)

        run = self.launch(body, "top_experts", (s.tile // _ROWS,), [((s.tile, s.choices), jnp.float32)])
        return run(layer, logits, ids_ref)[0]

    def bring(
        self,
        expert_ids: jax.Array,
        weights: jax.Array,
        layer: jax.Array,
        x: NormedRows,
        tile: int,
        share: Share,
    ) -> tuple[Tiles, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Tiles, pairs [S], factors [S], operand [S, D] and its scale [S], sorted by expert.

        Every block sorts all pairs, and brings the rows of four.
        """
        s = self.s
        pairs, columns = s.rows * s.choices, x.operand.shape[1]
        padded = s.tile * s.choices
        rows = -(-padded_rows(pairs, share.experts, tile) // WARPGROUP) * WARPGROUP
        blocks = -(-pairs // _ROWS)
        limit = min(pairs, pairs // tile + share.experts)
        layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=4)
        factor = 1 / (SWIGLU_SCALE * WEIGHT_SCALE)

        def body(layer, ids, weights, scale, operand, *refs, ids_smem, counts, pair_smem, row_smem):
            *tiles, out_pairs, factors, out, out_scale = refs
            block = lax.axis_index("block")
            number = plgpu.broadcasted_iota(jnp.int32, (padded,), 0, layout=lanes(padded))
            found = load(ids.at[layer[0]], lanes(padded))
            ids_smem[...] = jnp.where(number < pairs, found, NO_EXPERT)
            first = jnp.int32(0)
            if share.mesh.ep > 1:
                first = lax.axis_index(DEVICE_AXES[0]) * share.experts
            sizes = {"experts": share.experts, "tile": tile, "emulate": self.emulate}
            buffers = (ids_smem, first, counts, pair_smem, row_smem)

            @pl.when(block == 0)
            def _():
                sort_pairs(*buffers, tuple(tiles), **sizes)
                out_pairs[...] = load(pair_smem, lanes(rows))

            @pl.when(block > 0)
            def _():
                sort_pairs(*buffers, (), **sizes)

            moved = []
            for n in range(_ROWS):
                pair = block + n * blocks
                row = jnp.minimum(lax.div(pair, jnp.int32(s.choices)), s.rows - 1)
                moved.append((pair, load(operand.at[row], layout)))
            for pair, value in moved:
                row = row_smem[pair]

                @pl.when((row >= 0) & (pair < pairs))
                def _(pair=pair, value=value, row=row):
                    out[row] = value
                    factors[row] = weights[pair] * factor
                    out_scale[row] = scale[lax.div(pair, jnp.int32(s.choices))]

        flat = ((rows,), jnp.float32)
        types = [*[((limit,), jnp.int32)] * 3, ((1,), jnp.int32), ((rows,), jnp.int32), flat]
        scratch = {
            "ids_smem": plgpu.SMEM((padded,), jnp.int32),
            "counts": plgpu.SMEM((4,), jnp.int32),
            "pair_smem": plgpu.SMEM((rows,), jnp.int32),
            "row_smem": plgpu.SMEM((max(padded, blocks * _ROWS),), jnp.int32),
        }
        types += [((rows, columns), jnp.float16), flat]
        run = self.launch(body, "bring_rows", (blocks,), types, scratch)
        ids = expert_ids.reshape(expert_ids.shape[0], -1)
        *tiles, out_pairs, factors, operand, scale = run(layer, ids, weights.reshape(-1), x.scale, x.operand)
        return Tiles(*tiles), out_pairs, factors, operand, scale
