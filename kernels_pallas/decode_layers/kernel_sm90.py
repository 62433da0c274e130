"""decode_layers on NVIDIA GPUs: products and attention in kernels, and what stands between them.

Queries, keys and values are one product of the matrices that lie together in their stack. Between the
products of ``gpu.grouped_matmul_sm90`` and the kernel of ``attention.kernel_sm90``, or from Ampere on those
of the modules that end in ``sm80``, stand the kernels of ``row_kernels`` and ``pair_kernels``, or where these
do not fit the steps of ``row_steps`` by XLA. Kernels find the layer's weights by its number, on the device,
in one table. What experts add to a row is summed by the next layer first.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import ROWS
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm80 as attention_sm80
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm90 as attention
from qwen3_moe_jax.kernels_pallas.decode_layers import row_steps as steps
from qwen3_moe_jax.kernels_pallas.decode_layers.pair_kernels import PairKernels
from qwen3_moe_jax.kernels_pallas.decode_layers.row_kernels import Lookup, RowKernels, Sizes
from qwen3_moe_jax.kernels_pallas.decode_layers.sum_sm90 import WIDTH, sum_of_devices
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import ONE_DEVICE, Split
from qwen3_moe_jax.kernels_pallas.gpu import products
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MAX_FEW_ROWS,
    OfLayer,
    check_supported,
    dense_config,
    experts_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.sorting import dense_tiles
from qwen3_moe_jax.kernels_pallas.packed.dequantize import plain_numbers
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable, LayerTensor, Matrices
from qwen3_moe_jax.kernels_pallas.quantized_matmul.xla import quantized_matmul

_TILES = (32, MAX_FEW_ROWS)
_ROUTER_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
_MIN_ROWS = 17
"""Fewer sequences are for ``decode_step``, or go layer by layer."""


class Kernels(NamedTuple):
    """A set of kernels that layers are made of.

    Attributes:
      product: the grouped product.
      attention: sizes, for one query of each sequence.
      make: makes the attention kernel.
      max_head_dim: that it takes.
      may_read_beyond: copies give zeros beyond the end of an array, as TMA's do. Queries, keys and values
        are one matrix then in layers, too, whose values are of another type: the rows after their keys are
        the next layer's, and after the last layer's there are none.
      joins_steps: what stands between the products is in kernels, too, where the sizes fit.
    """

    product: products.Product
    attention: attention.AttentionConfig
    make: Callable[..., Any]
    max_head_dim: int
    may_read_beyond: bool
    joins_steps: bool = False


HOPPER = Kernels(
    products.HOPPER, attention.ONE_QUERY, attention.make_kernel, 256, may_read_beyond=True, joins_steps=True
)
PORTABLE = Kernels(
    products.PORTABLE,
    attention_sm80.ONE_QUERY,
    attention_sm80.make_kernel,
    attention_sm80.MAX_HEAD_DIM,
    may_read_beyond=False,
)
BY_NAME = {"hopper": HOPPER, "portable": PORTABLE}


def check(
    table: LayerTable, batch: int, cache: jax.Array, interpret: Any = None, kernels: Kernels = HOPPER
) -> None:
    """Raises NotImplementedError, with the reason, for what :func:`decode_layers` does not take."""
    kernels.product.require(interpret)
    if not _MIN_ROWS <= batch <= MAX_FEW_ROWS:
        raise NotImplementedError(
            f"few launches are for {_MIN_ROWS} to {MAX_FEW_ROWS} sequences, not {batch}"
        )
    if cache.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernels read 16-bit caches, not {cache.dtype}")
    w = _Weights.of(table, kernels)
    head_dim = cache.shape[4]
    heads, kv_heads = (rows // head_dim for rows in (w.q_proj.shape[0], w.v_proj.shape[0]))
    fits = head_dim % 64 == 0 and head_dim <= kernels.max_head_dim
    if not fits or heads // kv_heads > kernels.attention.tile:
        raise NotImplementedError(f"{heads // kv_heads} heads of {head_dim} per KV head do not fit")
    router = w.router.options
    if len(router) != 1 or router[0].type not in _ROUTER_TYPES or router[0].layout != ROWS:
        raise NotImplementedError("the router's weights are not all of one type among F32, F16 and BF16")
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
    def of(cls, table: LayerTable, kernels: Kernels) -> "_Weights":
        """Raises NotImplementedError: queries, keys and values do not lie one after the other."""
        norm = lambda name: table[name].options[0]
        return cls(
            *_qkv_as_one(table, may_read_beyond=kernels.may_read_beyond),
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


def _qkv_as_one(
    table: LayerTable, *, may_read_beyond: bool
) -> tuple[LayerTensor, tuple[int, ...], tuple[int, ...]]:
    """The first three of :class:`_Weights`."""
    q, k, v = (table[f"self_attn.{name}_proj"] for name in "qkv")
    if len(q.stacks) != 1 or q.stacks != k.stacks:
        raise NotImplementedError("q_proj and k_proj are not of one type, in one stack")
    inside = [i for i, stack in enumerate(v.stacks) if stack == q.stacks[0]]
    if len(v.stacks) > 1 and not may_read_beyond:
        inside = []
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
    kernels: Kernels = HOPPER,
    mesh: Split = ONE_DEVICE,
    by_stores: bool = False,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``api.decode_layers``."""
    check(table, len(x), cache_k, interpret, kernels)
    weights = _Weights.of(table, kernels)
    rows, layers = len(x), cache_k.shape[0]
    tile = next(t for t in _TILES if rows <= t)
    positions = positions.astype(jnp.int32)
    slots = (jnp.arange(rows) if slots is None else slots).astype(jnp.int32)
    bounds = attention.one_query_rows(positions, cache_k.shape[2], kernels.attention)
    tokens = _Tokens(positions, slots, rope, *bounds)
    share = steps.Share(mesh, weights.gate_proj.shape[0])
    if by_stores and interpret is None and x.shape[1] % WIDTH == 0:
        share = share._replace(add=partial(sum_of_devices, mesh=mesh))
    sizes = Sizes.of(weights, cache_k, rows, tile, num_experts_per_tok, eps)
    run = _OneLayer(table, weights, tokens, share, sizes, on_logits, kernels, interpret)
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
    out = last.x + run.added(jnp.int32(layers), last)
    return out, last.cache_k, last.cache_v, last.expert_ids[:, :rows]


class _Tokens(NamedTuple):
    """Where each sequence's token stands, in all layers. ``attention.one_query_rows`` makes the last two."""

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
      expert_ids: int32 [L, tile, X], those of the first B rows count.
    """

    x: jax.Array
    results: tuple[jax.Array, ...]
    cache_k: jax.Array
    cache_v: jax.Array
    expert_ids: jax.Array


class _OneLayer:
    """One layer of the loop."""

    def __init__(
        self,
        table: LayerTable,
        weights: _Weights,
        tokens: _Tokens,
        share: steps.Share,
        sizes: Sizes,
        on_logits: Callable[[jax.Array, jax.Array], jax.Array] | None,
        kernels: Kernels,
        interpret: Any,
    ):
        self.weights, self.tokens, self.share = weights, tokens, share
        self.rows, self.tile, self.eps, self.on_logits = sizes.rows, sizes.tile, sizes.eps, on_logits
        self.kernels, self.interpret, self.sizes = kernels, interpret, experts_config()
        self.between: tuple[RowKernels, PairKernels] | None = None
        if kernels.joins_steps and sizes.fit:
            self.between = RowKernels(sizes, interpret), PairKernels(sizes, interpret)
        w = weights
        self.order: list[tuple[int, ...]] = []
        self.v_at, self.down_at = self.column(w.v_which), self.column(w.down_proj.which)
        for tensor in (w.qkv, w.v_proj, w.o_proj, w.gate_proj, w.up_proj, w.down_proj):
            self.column(tensor.first)
            self.column(tensor.which)
        # of each number in turn its L values, so that a layer's is at the number's begin + layer
        self.table = jnp.asarray(table.columns(self.order).T.reshape(-1))

    def column(self, of_layers: tuple[int, ...]) -> int:
        """Where these numbers, one per layer, begin in the table."""
        if of_layers not in self.order:
            self.order.append(of_layers)
        return self.order.index(of_layers) * len(of_layers)

    def __call__(self, layer: jax.Array, state: _State) -> _State:
        if self.between is None:
            return self.by_steps(layer, state)
        return self.by_kernels(layer, state, *self.between)

    def by_kernels(self, layer: jax.Array, state: _State, between: RowKernels, pairs: PairKernels) -> _State:
        """All of it in kernels, but for the router's product."""
        w, tokens, at = self.weights, self.tokens, layer[0]
        if self.share.mesh.devices == 1:
            before = Lookup(layer, self.table, self.down_at, back=1)
            x, top = between.norm(state.x, state.results, w.input_layernorm, layer, by_row=True, which=before)
        else:
            added = self.added(at, state)[None]
            x, top = between.norm(state.x, (added,), w.input_layernorm, layer, by_row=False)
        qkv = self.dense(top.operand, top.scale, w.qkv, 0, layer)
        inside = (qkv, w.qkv.shape[0] - w.v_proj.shape[0])
        values = {0: inside} if 0 in w.v_which else {}
        for number, option in enumerate(w.other_v, 1):
            values[number] = (self.dense(top.operand, top.scale, w.v_proj, option, layer), 0)
        q, cache_k, cache_v = between.rotate(
            qkv,
            [values[number] for number in sorted(values)],
            Lookup(layer, self.table, self.v_at, first=min(values)),
            (w.q_norm, w.k_norm),
            tokens.rope,
            (state.cache_k, state.cache_v),
            tokens.slots,
            tokens.positions,
            self.kernels.attention.tile,
        )
        operand, scale = between.attention_operand(self.attend(q, cache_k, cache_v, layer))
        parts = self.dense(operand, scale, w.o_proj, 0, layer)
        if self.share.mesh.devices > 1:
            parts = self.share.summed(steps.sum_parts(parts, self.rows))[None]
        x, mid = between.norm(x, (parts,), w.post_attention_layernorm, layer, by_row=False)
        logits = self.changed(pairs.logits(mid.normed, plain_numbers(w.router.options[0]), layer), at)
        ids, routes, operand, scale = pairs.choose(
            logits, state.expert_ids, layer, mid, self.sizes.tile, self.share
        )
        results = self.experts(operand, scale, routes, layer, ids.shape[2])
        return _State(x, results, cache_k, cache_v, ids)

    def by_steps(self, layer: jax.Array, state: _State) -> _State:
        """What stands between the products by XLA: where there are no kernels of it."""
        w, at = self.weights, layer[0]
        x = state.x + self.added(at, state)
        top = steps.norm(x, w.input_layernorm[at], self.eps, self.tile)
        q, cache_k, cache_v = self.queries(top, layer, state)
        out = self.attend(q, cache_k, cache_v, layer)
        heads = w.q_proj.shape[0] // out.shape[2]
        operand, scale = steps.attention_operand(out, self.rows, heads, self.tile)
        x = x + self.share.summed(steps.sum_parts(self.dense(operand, scale, w.o_proj, 0, layer), self.rows))
        mid = steps.norm(x, w.post_attention_layernorm[at], self.eps, self.tile)
        choices = state.expert_ids.shape[2]
        routes = steps.choose(self.router_logits(mid.normed, at), choices, self.sizes.tile, self.share)
        ids = state.expert_ids.at[at, : self.rows].set(routes.expert_ids)
        operand, scale = mid.operand[routes.rows], mid.scale[routes.rows]
        return _State(x, self.experts(operand, scale, routes, layer, choices), cache_k, cache_v, ids)

    def attend(self, q: jax.Array, cache_k: jax.Array, cache_v: jax.Array, layer: jax.Array) -> jax.Array:
        tokens = self.tokens
        return attention.attend_rows(
            q,
            cache_k,
            cache_v,
            tokens.row_positions,
            tokens.bounds,
            layer,
            tokens.slots,
            self.kernels.attention,
            self.interpret,
            self.kernels.make,
        )

    def added(self, layer: jax.Array, state: _State) -> jax.Array:
        """What the experts of the layer before add: float32 [B, D]."""
        before = jnp.maximum(layer - 1, 0)
        parts = steps.pick(state.results, self.table[self.down_at + before])
        parts = self.share.own(parts, state.expert_ids[before, : self.rows])
        return self.share.summed(functools.reduce(jnp.add, [parts[:, c] for c in range(parts.shape[1])]))

    def queries(
        self, x: steps.NormedRows, layer: jax.Array, state: _State
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The attention kernel's queries, and the caches with this token's keys and values."""
        w, tokens, at = self.weights, self.tokens, layer[0]
        kv_heads, head_dim = state.cache_k.shape[3:]
        heads = w.q_proj.shape[0] // head_dim
        cut = lambda parts: steps.sum_parts(parts, self.rows).reshape(self.rows, -1, head_dim)
        qkv = cut(self.dense(x.operand, x.scale, w.qkv, 0, layer))
        q = steps.rotate(qkv[:, :heads], w.q_norm[at], tokens.rope, self.eps)
        k = steps.rotate(qkv[:, heads : heads + kv_heads], w.k_norm[at], tokens.rope, self.eps)
        values = {0: qkv[:, heads + kv_heads :]} if 0 in w.v_which else {}
        for number, option in enumerate(w.other_v, 1):
            values[number] = cut(self.dense(x.operand, x.scale, w.v_proj, option, layer))
        which = self.table[self.v_at + at] - min(values)
        v = steps.pick([values[number] for number in sorted(values)], which)
        write = partial(steps.write, layer=at, slots=tokens.slots, positions=tokens.positions)
        rows, dtype = self.kernels.attention.tile, state.cache_k.dtype
        q = steps.query_operand(q, kv_heads, rows, dtype)
        return q, write(state.cache_k, k), write(state.cache_v, v)

    def router_logits(self, x: jax.Array, layer: jax.Array) -> jax.Array:
        """float32 [B, E], changed where the caller changes them."""
        router = self.weights.router
        w = Matrices(router.options[0], layer * router.rows, router.shape)
        return self.changed(quantized_matmul(x, w, jnp.dtype(jnp.float32)), layer)

    def changed(self, logits: jax.Array, layer: jax.Array) -> jax.Array:
        """The router's logits as the caller changes them, of the rows that are sequences."""
        if self.on_logits is None:
            return logits
        return logits.at[: self.rows].set(self.on_logits(logits[: self.rows], layer))

    def of_layer(self, layer: jax.Array, weights: tuple[LayerTensor, ...], option: int) -> OfLayer:
        firsts = tuple(self.column(w.first) for w in weights)
        return OfLayer(layer, self.table, firsts, self.column(weights[0].which), option)

    def dense(
        self, operand: jax.Array, scale: jax.Array, w: LayerTensor, option: int, layer: jax.Array
    ) -> jax.Array:
        """Parts of the product [P, tile, N]; undefined in layers where the weights have another type."""
        config, splits = dense_config(self.tile, *w.shape)
        out = self.kernels.product.multiply(
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
        self, operand: jax.Array, scale: jax.Array, routes: steps.Routes, layer: jax.Array, choices: int
    ) -> tuple[jax.Array, ...]:
        """Weighted results of each row's experts, float32 [R, X, D]; of down_proj's types one is written."""
        gate, up, down = self.weights.gate_proj, self.weights.up_proj, self.weights.down_proj
        run = partial(self.kernels.product.multiply, config=self.sizes, interpret=self.interpret)
        both = (_matrices(gate, 0), _matrices(up, 0))
        inner = run(operand, scale, routes.tiles, both, of_layer=self.of_layer(layer, (gate, up), 0))
        out = [
            run(
                inner,
                routes.factors,
                routes.tiles,
                (_matrices(down, option),),
                destinations=routes.pairs,
                out_rows=self.rows * choices,
                of_layer=self.of_layer(layer, (down,), option),
            )
            for option in range(len(down.options))
        ]
        return tuple(o.reshape(self.rows, choices, -1) for o in out)


def _matrices(w: LayerTensor, option: int) -> Matrices:
    """As ``grouped_matmul`` takes them, which finds the first row by ``OfLayer``."""
    return Matrices(w.options[option], jnp.int32(0), w.shape)
