"""decode_layers on Hopper GPUs: 12 launches per layer, and one per further type of v_proj and down_proj.

Queries, keys and values are one product of the matrices that lie together in their stack. Between
the products of ``gpu.grouped_matmul_sm90`` and the kernel of ``attention.kernel_sm90`` stand
the steps of ``row_steps_triton``. All find the layer's weights by its number, on the device, in one
table. What experts add to a row is summed by the next layer's first step.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import ROWS
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm90 as attention
from qwen3_moe_jax.kernels_pallas.decode_layers import row_steps_triton as steps
from qwen3_moe_jax.kernels_pallas.gpu.device import require_hopper
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MAX_FEW_ROWS,
    OfLayer,
    check_supported,
    dense_config,
    few_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_sm90 import (
    grouped_matmul,
)
from qwen3_moe_jax.kernels_pallas.gpu.sorting import UsedExperts, dense_tiles
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable, LayerTensor, Matrices

_TILES = (32, MAX_FEW_ROWS)
_MIN_ROWS = 17
"""Fewer sequences are for ``decode_step``, or go layer by layer."""


def check(table: LayerTable, batch: int, cache: jax.Array, interpret: Any = None) -> None:
    """Raises NotImplementedError, with the reason, for what :func:`decode_layers` does not take."""
    require_hopper(interpret)
    if not _MIN_ROWS <= batch <= MAX_FEW_ROWS:
        raise NotImplementedError(
            f"few launches are for {_MIN_ROWS} to {MAX_FEW_ROWS} sequences, not {batch}"
        )
    if cache.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the Hopper kernels read 16-bit caches, not {cache.dtype}")
    w = _Weights.of(table)
    kv_heads, head_dim = cache.shape[3:]
    heads = w.q_proj.shape[0] // head_dim
    experts, columns = w.router.shape
    powers = {"hidden_size": columns, "queries": w.q_proj.shape[0], "head_dim": head_dim}
    powers |= {"experts": experts, "queries per KV head": heads // kv_heads}
    for name, size in powers.items():
        if size & (size - 1):
            raise NotImplementedError(f"Triton's arrays have powers of two, and {name} is {size}")
    if head_dim % 64 or heads // kv_heads > attention.ONE_QUERY.tile or columns % 512 or experts % 16:
        raise NotImplementedError(f"heads of {head_dim}, {columns} columns or {experts} experts do not fit")
    router = w.router.options
    if len(router) != 1 or router[0].type is not GGMLType.F32 or router[0].layout != ROWS:
        raise NotImplementedError("the router's weights are not all float32")
    for tensor in (w.q_proj, w.v_proj, w.o_proj, w.down_proj):
        for option in range(len(tensor.options)):
            check_supported((_matrices(tensor, option),))
    for tensor in (w.o_proj, w.gate_proj, w.up_proj):
        if len(tensor.options) > 1:
            raise NotImplementedError(f"{tensor.name} is of several types")
    check_supported((_matrices(w.gate_proj, 0), _matrices(w.up_proj, 0)))


class _Weights(NamedTuple):
    """All layers' tensors, with queries, keys and, where they lie there, values as one matrix.

    Attributes:
      other_v: v_proj's stacks that are not the matrix'.
      v_which: int [L], whose result has a layer's values: 0 for the matrix', 1 for the first of
        ``other_v``, and so on.
    """

    qkv: LayerTensor
    other_v: tuple[int, ...]
    v_which: tuple[int, ...]
    q_proj: LayerTensor
    v_proj: LayerTensor
    o_proj: LayerTensor
    router: LayerTensor
    gate_proj: LayerTensor
    up_proj: LayerTensor
    down_proj: LayerTensor
    q_norm: jax.Array
    k_norm: jax.Array
    input_layernorm: jax.Array
    post_attention_layernorm: jax.Array

    @classmethod
    def of(cls, table: LayerTable) -> "_Weights":
        """Raises NotImplementedError: queries, keys and values do not lie one after the other."""
        norm = lambda name: table[name].options[0]
        return cls(
            *_qkv_as_one(table),
            table["self_attn.q_proj"],
            table["self_attn.v_proj"],
            table["self_attn.o_proj"],
            table["mlp.router"],
            *(table[f"mlp.experts.{name}_proj"] for name in ("gate", "up", "down")),
            norm("self_attn.q_norm"),
            norm("self_attn.k_norm"),
            norm("input_layernorm"),
            norm("post_attention_layernorm"),
        )


def _qkv_as_one(table: LayerTable) -> tuple[LayerTensor, tuple[int, ...], tuple[int, ...]]:
    """The first three of :class:`_Weights`."""
    q, k, v = (table[f"self_attn.{name}_proj"] for name in "qkv")
    if len(q.stacks) != 1 or q.stacks != k.stacks:
        raise NotImplementedError("q_proj and k_proj are not of one type, in one stack")
    inside = [i for i, stack in enumerate(v.stacks) if stack == q.stacks[0]]
    others = tuple(i for i in range(len(v.stacks)) if i not in inside)
    which = tuple(0 if w in inside else 1 + others.index(w) for w in v.which)
    for layer, first in enumerate(q.first):
        after_q, after_k = first + q.rows, first + q.rows + k.rows
        if k.first[layer] != after_q or (not which[layer] and v.first[layer] != after_k):
            raise NotImplementedError("q_proj, k_proj and v_proj do not lie one after the other")
    rows = q.rows + k.rows + (v.rows if inside else 0)
    return replace(q, name="self_attn.qkv", shape=(rows, q.shape[1])), others, which


def decode_layers(
    x: jax.Array,
    table: LayerTable,
    cache_k: jax.Array,
    cache_v: jax.Array,
    positions: jax.Array,
    slots: jax.Array | None,
    rope: tuple[jax.Array, jax.Array],
    *,
    num_experts_per_tok: int,
    eps: float,
    on_logits: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``api.decode_layers``."""
    check(table, len(x), cache_k, interpret)
    weights = _Weights.of(table)
    rows, layers = len(x), cache_k.shape[0]
    tile = next(t for t in _TILES if rows <= t)
    positions = positions.astype(jnp.int32)
    slots = (jnp.arange(rows) if slots is None else slots).astype(jnp.int32)
    places = _Places(positions, slots, rope, *attention.one_query_rows(positions, cache_k.shape[2]))
    run = _Step(table, weights, places, rows, tile, eps, on_logits, interpret)
    shape = (rows, num_experts_per_tok, x.shape[1])
    first = _State(
        x=x.astype(jnp.float32),
        results=tuple(jnp.zeros(shape, jnp.float32) for _ in weights.down_proj.options),
        cache_k=cache_k,
        cache_v=cache_v,
        expert_ids=jnp.zeros((layers, tile, num_experts_per_tok), jnp.int32),
    )
    # A loop by hand: a scan's layer would be picked from an array, by a launch.
    last = lax.while_loop(
        lambda carry: carry[0] < layers,
        lambda carry: (carry[0] + 1, run(carry[0].reshape(1), carry[1])),
        (jnp.int32(0), first),
    )[1]
    results = last.results[weights.down_proj.which[-1]]
    out = last.x + sum((results[:, choice] for choice in range(1, results.shape[1])), results[:, 0])
    return out, last.cache_k, last.cache_v, last.expert_ids[:, :rows]


class _Places(NamedTuple):
    """Where the tokens stand: the same for all layers. See ``attention.one_query_rows`` for the last two."""

    positions: jax.Array
    slots: jax.Array
    rope: tuple[jax.Array, jax.Array]
    row_positions: jax.Array
    bounds: jax.Array


class _State(NamedTuple):
    """What goes from layer to layer.

    Attributes:
      x: float32 [B, D], without what the experts of the last layer add.
      results: float32 [B, X, D] for each type of down_proj; that of the last layer's is to be added.
      cache_k, cache_v: [L, C, S, K, H].
      expert_ids: int32 [L, tile, X].
    """

    x: jax.Array
    results: tuple[jax.Array, ...]
    cache_k: jax.Array
    cache_v: jax.Array
    expert_ids: jax.Array


class _Step:
    """One layer of the loop."""

    def __init__(
        self,
        table: LayerTable,
        weights: _Weights,
        places: _Places,
        rows: int,
        tile: int,
        eps: float,
        on_logits: Callable[[jax.Array, jax.Array], jax.Array] | None,
        interpret: Any,
    ):
        self.weights, self.places, self.rows, self.tile = weights, places, rows, tile
        self.eps, self.on_logits, self.interpret = eps, on_logits, interpret
        self.plain = interpret is not None  # how Triton's kernels are interpreted
        w = weights
        self.order: list[tuple[int, ...]] = []
        self.v_at, self.down_at = self.column(w.v_which), self.column(w.down_proj.which)
        for tensor in (w.qkv, w.v_proj, w.o_proj, w.gate_proj, w.up_proj, w.down_proj):
            self.column(tensor.first)
            self.column(tensor.which)
        # of one number after the other its L, so that a layer's is at the number's begin + layer
        self.table = jnp.asarray(table.columns(self.order).T.reshape(-1))

    def column(self, of_layers: tuple[int, ...]) -> int:
        """Where these numbers, one per layer, begin in the table."""
        if of_layers not in self.order:
            self.order.append(of_layers)
        return self.order.index(of_layers) * len(of_layers)

    def __call__(self, layer: jax.Array, state: _State) -> _State:
        w, places, tile = self.weights, self.places, self.tile
        kv_heads, head_dim = state.cache_k.shape[3:]
        heads = w.q_proj.shape[0] // head_dim
        norm = partial(
            steps.add_and_norm, layer=layer, table=self.table, eps=self.eps, tile=tile, interpret=self.plain
        )
        before = lambda layer, table: table[self.down_at + jnp.maximum(layer[0] - 1, 0)]
        top = norm(state.x, steps.Addends(state.results, before, by_row=True), w.input_layernorm)
        q, cache_k, cache_v = steps.finish_qkv(
            self.dense(top.operand, top.scale, w.qkv, 0, layer),
            tuple(self.dense(top.operand, top.scale, w.v_proj, o, layer) for o in w.other_v),
            frozenset(w.v_which),
            lambda layer, table: table[self.v_at + layer[0]],
            (w.q_norm, w.k_norm),
            places.rope,
            (state.cache_k, state.cache_v),
            layer,
            self.table,
            places.positions,
            places.slots,
            heads=heads,
            q_rows=attention.ONE_QUERY.tile,
            eps=self.eps,
            interpret=self.plain,
        )
        out = attention.attend_rows(
            q,
            cache_k,
            cache_v,
            places.row_positions,
            places.bounds,
            layer,
            places.slots,
            attention.ONE_QUERY,
            self.interpret,
        )
        operand, scale = steps.attention_operand(out, self.rows, kv_heads, heads, tile, self.plain)
        parts = self.dense(operand, scale, w.o_proj, 0, layer)
        mid = norm(top.x, steps.Addends((parts,)), w.post_attention_layernorm)
        logits = steps.router_parts(
            mid.normed, w.router.options[0].arrays["w"], layer, w.router.shape[0], self.plain
        )
        if self.on_logits is not None:
            changed = self.on_logits(jnp.sum(logits, axis=0)[: self.rows], layer[0])
            logits = jnp.pad(changed, ((0, tile - self.rows), (0, 0)))[None]
        routes = steps.choose_experts(logits, state.expert_ids, layer, self.rows, self.plain)
        choices = routes.expert_ids.shape[2]
        return _State(mid.x, self.experts(mid, routes, layer, choices), cache_k, cache_v, routes.expert_ids)

    def of_layer(self, layer: jax.Array, weights: tuple[LayerTensor, ...], option: int) -> OfLayer:
        firsts = tuple(self.column(w.first) for w in weights)
        return OfLayer(layer, self.table, firsts, self.column(weights[0].which), option)

    def dense(
        self, operand: jax.Array, scale: jax.Array, w: LayerTensor, option: int, layer: jax.Array
    ) -> jax.Array:
        """Parts of the product [P, tile, N]; undefined in layers where the weights have another type."""
        config, splits = dense_config(self.tile, *w.shape)
        out = grouped_matmul(
            operand,
            scale,
            dense_tiles(self.tile, self.tile),
            (_matrices(w, option),),
            config=config,
            splits=splits,
            of_layer=self.of_layer(layer, (w,), option),
            interpret=self.interpret,
        )
        return out.reshape(splits, self.tile, -1)

    def experts(
        self, x: steps.NormedRows, routes: steps.Routes, layer: jax.Array, choices: int
    ) -> tuple[jax.Array, ...]:
        """Weighted results of each row's experts, float32 [R, X, D]; of down_proj's types one is written."""
        used = UsedExperts(routes.used, routes.count)
        gate, up, down = self.weights.gate_proj, self.weights.up_proj, self.weights.down_proj
        config = few_config(self.tile, gate.options[0].type)
        run = partial(grouped_matmul, config=config, interpret=self.interpret)
        both = (_matrices(gate, 0), _matrices(up, 0))
        inner = run(x.operand, x.scale, used, both, of_layer=self.of_layer(layer, (gate, up), 0))
        out = [
            run(
                inner,
                routes.factors.reshape(-1),
                used,
                (_matrices(down, option),),
                places=routes.places.reshape(-1),
                out_rows=self.rows * choices,
                of_layer=self.of_layer(layer, (down,), option),
            )
            for option in range(len(down.options))
        ]
        return tuple(o.reshape(self.rows, choices, -1) for o in out)


def _matrices(w: LayerTensor, option: int) -> Matrices:
    """As ``grouped_matmul`` takes them, which finds the first row by ``OfLayer``."""
    return Matrices(w.options[option], jnp.int32(0), w.shape)
