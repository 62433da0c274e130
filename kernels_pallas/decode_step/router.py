"""The router, and the choice of experts that every block makes for itself."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.config import MAX_NORMED, PIECE, WARPGROUPS, ceil_div
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid, Phases, fori
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import (
    EXPERTS,
    LOG2E,
    RANKED,
    SUBBLOCKS,
    lanes,
    load,
)

Array = Any


class Router(Phases):
    """The phase :meth:`router`, and the choice that every block makes for itself after it."""

    def __init__(self, grid: Grid, activations: Activations):
        super().__init__(grid)
        self.x = activations

    @jax.named_scope("router")
    def router(self, layer: Array, count: Array) -> None:
        """``r = rms_norm(x) @ W_router``: float32 [warpgroups, B, E], and the normed activations for experts.

        A norm's scale is one number per sequence, so the logits are written without it, from one pass over
        the residual stream of which each warpgroup reads its own columns; who reads them multiplies.

        Waits for the output projection (``count``); every block signals once.
        """
        self.g.begin()
        c = self.c
        phase = _RouterRows(self, layer)
        self.g.wait_for_output(layer, count)
        self.g.for_groups(MAX_NORMED if c.hidden_size <= 4 * PIECE else 1, phase.group)
        self.g.signal()
        for b, pieces in phase.kept:  # no other block waits for this
            self.x.quantize_pieces(b, self.x.scaled(b, pieces, phase.norms), self.shared.x_smem)

    def choose(self, layer: Array) -> None:
        """Top-k experts and their weights for every sequence, and the order of pairs, into shared memory.

        Softmax over all experts followed by renormalization over the chosen is a softmax over
        the chosen: the common denominator cancels.
        """
        c, ids = self.c, self.shared.ids_smem
        if c.ranks_experts:
            self.rank()
            self.g.sync_block()
            return
        for start in range(0, c.padded_batch, 4):
            pl.when(self.g.wg == start // 4 % WARPGROUPS)(partial(self.choose_rows, pl.ds(start, 4)))
        if c.shares:
            self.x.fetched()
        else:
            self.g.sync_block()
        if c.replay:

            @pl.when(self.g.wg == 0)
            def _():
                self.g.for_batch(lambda b: self.replay(layer, b))

            self.g.sync_block()
        if c.shares:

            @pl.when(self.g.wg == 0)
            def _():
                self.prim.sort_pairs(ids, self.shared.pair_order_smem)

            self.g.sync_block()

    def here(self, b: Array, k: Array) -> tuple[Array, Array]:
        """(which of this device's experts sequence b's k-th is, whether it has it); the first where not."""
        each = self.c.num_experts // self.c.mesh.ep
        local = self.shared.ids_smem[b, k] - self.g.device // self.c.mesh.tp * each
        is_here = (local >= 0) & (local < each)
        return jnp.where(is_here, local, 0), is_here

    def expert(self, b: Array, k: Array) -> Array:
        """Sequence b's k-th expert, as a number in this device's stacks."""
        return self.shared.ids_smem[b, k] if self.c.mesh.ep == 1 else self.here(b, k)[0]

    def weight(self, b: Array, k: Array) -> Array:
        """The weight of that expert in this device's part of the sum: 0 where another device has it."""
        weight = self.shared.routing_smem[b, k]
        return weight if self.c.mesh.ep == 1 else jnp.where(self.here(b, k)[1], weight, 0.0)

    def rank(self) -> None:
        """One sequence's experts and their logits into shared memory; :meth:`weigh` makes weights of it."""
        c, shared, layout = self.c, self.shared, lanes(RANKED)
        first, second = (load(self.outputs.router_logits_gmem.at[i, 0], layout) for i in range(WARPGROUPS))
        logits = (first + second) * self.x.norm_scale(lambda squares: squares[0])
        if c.num_experts < RANKED:
            index = plgpu.broadcasted_iota(jnp.int32, (RANKED,), 0, layout=layout)
            logits = jnp.where(index < c.num_experts, logits, -1e30)
        scratch = shared.rank_smem.at[self.g.wg]
        self.prim.rank_experts(logits, scratch, shared.ids_smem.at[0], shared.best_smem, self.g.wg)

    def weigh(self) -> None:
        """The weights of one sequence's experts, when nobody waits for it; needed after the next barrier."""
        if self.c.ranks_experts:
            pl.when(self.g.wg == WARPGROUPS - 1)(
                lambda: self.prim.weigh_experts(self.shared.best_smem, self.shared.routing_smem.at[0])
            )

    def choose_rows(self, rows: Any) -> None:
        """Top-k of four sequences, one per warp."""
        c, shared = self.c, self.shared
        logits = [load(self.outputs.router_logits_gmem.at[i, rows], EXPERTS) for i in range(WARPGROUPS)]
        scale = self.x.norm_scale(lambda squares: load(squares.at[rows], EXPERTS.reduce(1)))
        logits = logits[0] + logits[1]
        if c.num_experts < c.padded_experts:
            index = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=EXPERTS)
            logits = jnp.where(index < c.num_experts, logits, -1e30)
        ids, routing = shared.ids_smem.at[rows], shared.routing_smem.at[rows]
        self.prim.top_experts(logits, scale, ids, routing, c.num_experts_per_tok)

    def replay(self, layer: Array, b: Array) -> None:
        """Overwrites the choice for sequence b by the given experts."""
        logits_gmem = self.outputs.router_logits_gmem
        chosen = [self.inputs.replay_ids_gmem[layer, b, i] for i in range(self.c.num_experts_per_tok)]
        scale = self.x.norm_scale(lambda squares: squares[b])
        logits = [logits_gmem[0, b, e] + logits_gmem[1, b, e] for e in chosen]
        logits = [value * scale for value in logits]
        largest = logits[0]
        for value in logits[1:]:
            largest = jnp.maximum(largest, value)
        powers = [jnp.exp2((value - largest) * LOG2E) for value in logits]
        total = sum(powers)
        for i, (expert, power) in enumerate(zip(chosen, powers, strict=True)):
            self.shared.ids_smem[b, i] = expert
            self.shared.routing_smem[b, i] = power / total


class _RouterRows:
    """This block's rows of the router. ``kept``: the one sequence's pieces, where nobody else needs them."""

    def __init__(self, router: Router, layer: Array):
        self.p, self.c, self.x, self.layer = router, router.c, router.x, layer
        self.rounds = ceil_div(self.c.num_experts, self.c.blocks)
        self.norms = self.x.own_columns(router.inputs.post_norm_gmem.at[layer])
        self.kept: list = []
        self.rows = [self.row(i) for i in range(self.rounds)] if self.rounds <= 2 else None

    def expert(self, i: Array) -> Array:
        return jnp.minimum(i * self.c.blocks + self.p.g.block, self.c.num_experts - 1)

    def row(self, i: Array) -> list:
        """The router's row of this block's i-th expert times the norm's weights, this warpgroup's pieces."""
        row = self.x.own_columns(self.p.inputs.router_gmem.at[self.layer, self.expert(i)])
        row = [r.astype(jnp.float32) for r in row]
        return [w * r for w, r in zip(self.norms, row, strict=True)]

    def group(self, number: Array, first: Array, size: int) -> None:
        """The logits of ``size`` sequences from ``first`` on; their owners quantize the activations."""
        sequences = [first + i for i in range(size)]
        slots = self.c.slots.after_output(self.layer)
        x = [[self.x.residual(b, i, slots) for i in self.x.own_pieces] for b in sequences]
        turn = number * self.rounds
        squares = [sum(v * v for v in pieces) for pieces in x]
        found = self.sums(turn, [*squares, *self.products(0, x)])
        for b, total in zip(sequences, found[:size], strict=True):
            self.p.shared.squares_smem[self.p.g.wg, b] = total
        self.store(0, sequences, found[size:])
        more = lambda i: self.store(i, sequences, self.sums(turn + i, self.products(i, x)))
        if self.rows:
            for i in range(1, self.rounds):
                more(i)
        else:
            fori(self.rounds - 1, lambda i: more(i + 1))
        if self.c.shares:
            self.p.g.for_own(first, size, lambda b: self.quantize(b, sequences, x))
        else:
            self.kept.append((first, x[0]))

    def products(self, i: Array, x: list) -> list:
        own_row = self.rows[i] if self.rows else self.row(i)
        return [sum(v * r for v, r in zip(pieces, own_row, strict=True)) for pieces in x]

    def sums(self, turn: Array, values: list) -> list:
        return self.p.g.totals(values, SUBBLOCKS, "add", "router", turn)

    def store(self, i: Array, sequences: list, logits: list) -> None:
        for b, total in zip(sequences, logits, strict=True):
            self.p.outputs.router_logits_gmem[self.p.g.wg, b, self.expert(i)] = total

    def quantize(self, b: Array, sequences: list, x: list) -> None:
        """Sequence b's normed activations for all blocks."""
        pieces = x[0]
        for other, theirs in zip(sequences[1:], x[1:], strict=True):
            pieces = [jnp.where(b == other, new, old) for new, old in zip(theirs, pieces, strict=True)]
        self.p.g.sync_block()  # both warpgroups' squares are there
        self.x.quantize_pieces(b, self.x.scaled(b, pieces, self.norms), self.p.outputs.hidden_gmem)
