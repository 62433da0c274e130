"""Joining the parts into which attention over a long context is split."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.config import MAX_SPLITS, WARPGROUPS, ceil_div
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, Phases, fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import full, lanes, load

Array = Any
NO_SCORE = -1e30
JOINED = 36
"""Splits whose outputs a join asks for at once, at most; each takes a register."""


class SplitsJoined(Phases):
    """The phase :meth:`join`, and what ``Attention.plan_splits`` has planned."""

    def __init__(self, grid: Grid, activations: Activations):
        super().__init__(grid)
        self.x = activations

    def splits_of(self, b: Array) -> list:
        """Tiles, tiles per split and splits of sequence b."""
        return [self.shared.split_plan_smem[b, i] for i in range(3)]

    @jax.named_scope("combine")
    def join(self, count: Array) -> None:
        """Joins the splits of long contexts, in their order: float32 [B, heads, head_dim].

        Waits for attention (``count``); every block signals once. Runs only where a context is split.
        """
        if self.c.splits == 1:
            return
        self.g.begin()
        c = self.c
        workers = WARPGROUPS * c.blocks
        self.g.wait(count)

        def one(i):
            number = i * workers + self.g.wg * c.blocks + self.g.block
            b, head = number // c.num_attention_heads, number % c.num_attention_heads
            clipped = jnp.minimum(b, c.batch - 1)
            _, _, splits = self.splits_of(clipped)
            pl.when((b < c.batch) & (splits > 1))(lambda: self.join_head(i, b, head, splits))

        fori(ceil_div(c.batch * c.num_attention_heads, workers), one)
        self.g.signal()

    def join_head(self, turn: Array, b: Array, head: Array, splits: Array) -> None:
        """Joins the splits of one query head; a warpgroup's ``turn``-th."""
        c, out, layout = self.c, self.outputs, lanes(128)
        weight_smem = self.shared.split_weight_smem
        group, row = head // c.group_heads, head % c.group_heads
        together = ceil_div(c.splits, ceil_div(c.splits, JOINED))

        def ask(first):
            """Outputs of splits that lie far apart: one by one, each would wait for memory by itself."""
            splits_here = [jnp.minimum(first + j, splits - 1) for j in range(together)]
            return [load(out.part_gmem.at[b, group, split, row], layout) for split in splits_here]

        def add(first, values, joined):
            for j, value in enumerate(values):  # what is after the last split has the weight 0
                joined += value * weight_smem[self.g.wg, first + j]
            return joined

        values = ask(0)
        largest = load(out.part_stats_gmem.at[b, group, 0, row], layout)
        total = load(out.part_stats_gmem.at[b, group, 1, row], layout)
        used = plgpu.broadcasted_iota(jnp.int32, (MAX_SPLITS,), 0, layout=layout) < splits
        largest = jnp.where(used, largest, NO_SCORE)
        (shift,) = self.g.totals([largest], layout, "max", "split_largest", turn)
        weight = jnp.where(used, total * jnp.exp2(largest - shift), 0.0)
        (total,) = self.g.totals([weight], layout, "add", "split_sum", turn)
        weight_smem[self.g.wg] = weight / total
        self.g.sync_warpgroup()

        joined = add(0, values, full((128,), 0.0, jnp.float32, layout))
        rest = lambda i, joined: add(i * together, ask(i * together), joined)
        joined = lax.fori_loop(1, (splits + together - 1) // together, rest, joined)
        if c.shares:
            self.x.quantize_lanes(joined, layout, out.attended_gmem, lambda warp: (b, head * 4 + warp))
        else:
            out.attention_gmem[b, head] = joined
        self.g.sync_warpgroup()
