"""Qwen3-MoE as a Flax model on packed weights: the definition of the network.

Every matrix is a ``PackedTensor`` of its own quantization type, and the operations on it are
``kernels_pallas``'. Weights have Hugging Face's names. Norms, router and softmax are float32
whatever the compute dtype.

The layers are one loop over stacked weights (``ops.LayerTable``): a program holds the code of one
layer, however many there are, and reads a layer's weights from the stacks without a copy. Where a
tensor's type differs from layer to layer (``v_proj`` and ``down_proj`` of a Q4_K_M file), its
operation alone is a switch.

``stage`` names the values that ``qwen3-moe trace`` shows: it shows those that are captured, and it is
where an intervention changes them.

The modules are of ``flax.nnx``: weights are attributes, and a module lives while a program is traced,
made of the parameters or of one layer's view of them. ``qwen3_moe.Qwen3Moe`` is what such a program
depends on besides; this module and Flax are imported when a program is traced. In ``flax.linen``
weights were looked up by strings, and the same program took 1.0 s to trace in place of 0.7 s.

Equations: Qwen3 technical report (arXiv 2505.09388); Transformers'
``modeling_qwen3_moe.py``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.core.stages import INSIDE_EXPERTS
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span, write_positions
from qwen3_moe_jax.jax_backend.qwen3_moe import OUTSIDE_LAYERS, Output, Qwen3Moe
from qwen3_moe_jax.jax_backend.sharding import BOTH, EP
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.kernels_pallas.all_layers import api as all_layers

Matrix = PackedTensor | ops.OneOf
"""A packed matrix, or experts: whole, or one layer's inside stacks (``LayerTable.layer``)."""


P = ParamSpec("P")
R = TypeVar("R")


def _with_its_kernels(
    method: "Callable[Concatenate[Network, P], R]",
) -> "Callable[Concatenate[Network, P], R]":
    """The method of a network; operations in it take the kernels of the network's settings."""

    @functools.wraps(method)
    def run(self: "Network", *args: P.args, **kwargs: P.kwargs) -> R:
        with implementations.using(self.settings.kernels):
            return method(self, *args, **kwargs)

    return run


class _Part(nnx.Module):
    """A part of the network, whose attributes are its weights: packed matrices, or float32 of norms."""

    def __init__(self, weights: Mapping[str, Any], settings: Qwen3Moe):
        self.settings = settings
        for name, value in weights.items():
            if not isinstance(value, Mapping):
                setattr(self, name, nnx.data(value))

    def stage(self, name: str, value: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """Names a value of the forward pass: applies interventions, then shows it to a trace.

        What is shown is what goes on: without the barrier XLA may compute a value once to show it and again,
        in another order of sums, inside the next fusion. A GPU did so with products of few rows.
        """
        for intervention in self.settings.interventions:
            if intervention.stage == name:
                changed = intervention.change(value)
                everywhere = layer is None or intervention.layer is None
                value = changed if everywhere else jnp.where(layer == intervention.layer, changed, value)
        if name in self.settings.capture:
            value = jax.lax.optimization_barrier(value)
            self.show(name, value)
        return value

    def show(self, name: str, value: jax.Array) -> None:
        """Gives a value to :meth:`watched`, which must be running."""
        self.sow(nnx.Intermediate, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: value)

    def watched(self, run: Callable[..., R], *args: Any) -> tuple[R, dict[str, jax.Array]]:
        """``run(self, *args)``, and the values that this part and those inside it have shown meanwhile."""
        if not self.settings.capture:
            return run(self, *args), {}
        result, state = nnx.capture(run, nnx.Intermediate)(self, *args)
        return result, {str(path[-1]): value.get_value() for path, value in nnx.to_flat_state(state)}

    def matmul(self, x: jax.Array, w: Matrix, dtype: Any = None) -> jax.Array:
        """x [B, T, K] times the transpose of w [N, K]: float32 [B, T, N]."""
        flat, dtype = x.reshape(-1, x.shape[-1]), dtype or self.settings.compute_dtype
        return ops.quantized_matmul(flat, w, compute_dtype=dtype).reshape(*x.shape[:-1], -1)

    def rms_norm(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """RMS norm of the last axis."""
        return ops.rms_norm(x, w, self.settings.config.rms_norm_eps)

    def summed(self, x: jax.Array, axes: str | tuple[str, ...] = BOTH) -> jax.Array:
        """The sum of all devices' parts; x itself on one device."""
        return x if self.settings.shards is None else jax.lax.psum(x, axes)


class Attention(_Part):
    """Grouped-query attention with normed queries and keys, over the KV cache."""

    q_proj: Matrix
    k_proj: Matrix
    v_proj: Matrix
    o_proj: Matrix
    q_norm: jax.Array
    k_norm: jax.Array

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        spans: Sequence[Span],
        rope: tuple[jax.Array, jax.Array],
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache]:
        """x [B, T, D], whose positions the spans give, and rope's cos and sin [B, T, H / 2] of them."""
        heads = (*x.shape[:2], -1, self.settings.config.head_dim)
        q = self.stage("Qcur", self.matmul(x, self.q_proj).reshape(heads), layer)
        k = self.stage("Kcur", self.matmul(x, self.k_proj).reshape(heads), layer)
        v = self.stage("Vcur", self.matmul(x, self.v_proj).reshape(heads), layer)
        q = self.stage("Qcur_normed", self.rms_norm(q, self.q_norm), layer)
        k = self.stage("Kcur_normed", self.rms_norm(k, self.k_norm), layer)
        q = self.stage("Qcur_rope", ops.rope(q, *rope), layer)
        k = self.stage("Kcur_rope", ops.rope(k, *rope), layer)

        for span, key, value in zip(spans, _parts(k, spans), _parts(v, spans), strict=True):
            cache = write_positions(cache, key, value, span, layer)
        parts = [
            ops.attention(
                part, cache.k, cache.v, span.positions, layer=layer, slots=span.slots, scales=cache.scales
            )
            for span, part in zip(spans, _parts(q, spans), strict=True)
        ]
        out = self.stage("kqv_out", _joined(parts, x.shape[:2]), layer)
        out = self.summed(self.matmul(out.reshape(*x.shape[:2], -1), self.o_proj))
        return self.stage("attn_out", out, layer), cache


class Experts(_Part):
    """The experts' feed-forward networks."""

    gate_proj: Matrix
    up_proj: Matrix
    down_proj: Matrix

    def __call__(
        self, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, layer: jax.Array
    ) -> jax.Array:
        """x [B, T, D], expert_ids and weights [B, T, X]: the experts' weighted sum [B, T, D]."""
        ids = expert_ids.reshape(-1, expert_ids.shape[-1])
        if self.settings.shards is not None:
            return self._sum_of_devices(x, ids, weights.reshape(ids.shape), layer)

        def stage(name: str, value: jax.Array) -> jax.Array:
            rows = value.reshape(*x.shape[:2], *value.shape[1:])
            return self.stage(name, rows, layer).reshape(value.shape)

        flat = x.reshape(-1, x.shape[-1])
        return self._weighted_sum(flat, ids, weights.reshape(ids.shape), stage).reshape(x.shape)

    def _weighted_sum(
        self,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        stage: Callable[[str, jax.Array], jax.Array],
    ) -> jax.Array:
        """Of x [T, D] and experts and weights [T, X], with what is seen of the values inside."""
        seen = self.settings.capture | {i.stage for i in self.settings.interventions}
        return ops.moe_mlp(
            x,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            ids,
            weights,
            compute_dtype=self.settings.compute_dtype,
            on_stage=stage if seen & INSIDE_EXPERTS else None,
            all_experts=None if self.settings.shards is None else self.settings.config.num_experts,
        )

    def _sum_of_devices(
        self, x: jax.Array, ids: jax.Array, weights: jax.Array, layer: jax.Array
    ) -> jax.Array:
        """As a call, of ids and weights [B * T, X], with this device's experts or its part of each."""
        experts = self.gate_proj.shape[0]
        local = ids - jax.lax.axis_index(EP) * experts
        is_here = (local >= 0) & (local < experts)

        def stage(name: str, value: jax.Array) -> jax.Array:
            rows = jnp.where(is_here[..., None], value, 0).reshape(*x.shape[:2], *value.shape[1:])
            self.stage(name, self.summed(rows, BOTH if name == "ffn_moe_down" else EP), layer)
            return value

        own_ids = jnp.where(is_here, local, experts)
        out = self._weighted_sum(x.reshape(-1, x.shape[-1]), own_ids, weights, stage)
        return self.summed(out).reshape(x.shape)


class SparseMoeBlock(_Part):
    """Router and experts: every layer of the model is sparse, there is no dense FFN."""

    router: Matrix

    def __init__(self, weights: Mapping[str, Any], settings: Qwen3Moe):
        super().__init__(weights, settings)
        self.experts = Experts(weights["experts"], settings)

    def __call__(
        self, x: jax.Array, forced_ids: jax.Array | None, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D], forced_ids [B, T, X] or None: the output [B, T, D] and the experts [B, T, X]."""
        logits = self.stage("ffn_moe_logits", self.matmul(x, self.router, jnp.float32), layer)
        routing = ops.choose_experts(
            logits.reshape(-1, logits.shape[-1]),
            self.settings.config.num_experts_per_tok,
            None if forced_ids is None else forced_ids.reshape(-1, forced_ids.shape[-1]),
        )
        probs, expert_ids, weights = (value.reshape(*x.shape[:2], -1) for value in routing)
        self.stage("ffn_moe_probs", probs, layer)
        expert_ids = self.stage("ffn_moe_topk", expert_ids, layer)
        weights = self.stage("ffn_moe_weights_norm", weights, layer)
        return self.stage("ffn_moe_out", self.experts(x, expert_ids, weights, layer), layer), expert_ids


class DecoderLayer(_Part):
    """Attention and the sparse block, each after a norm and beside the residual."""

    input_layernorm: jax.Array
    post_attention_layernorm: jax.Array

    def __init__(self, weights: Mapping[str, Any], settings: Qwen3Moe):
        super().__init__(weights, settings)
        self.self_attn = Attention(weights["self_attn"], settings)
        self.mlp = SparseMoeBlock(weights["mlp"], settings)

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache,
        spans: Sequence[Span],
        rope: tuple[jax.Array, jax.Array],
        forced_ids: jax.Array | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        h = self.stage("attn_norm", self.rms_norm(x, self.input_layernorm), layer)
        out, cache = self.self_attn(h, cache, spans, rope, layer)
        x = self.stage("ffn_inp", x + out, layer)
        h = self.stage("ffn_norm", self.rms_norm(x, self.post_attention_layernorm), layer)
        out, expert_ids = self.mlp(h, forced_ids, layer)
        return self.stage("l_out", x + out, layer), cache, expert_ids


class Network(_Part):
    """The whole network with its weights: a call runs the decoder layers, ``logits`` the head on chosen rows.

    Lives while a program is traced; ``lm_head`` is not there where it is tied to ``embed_tokens``.
    """

    embed_tokens: PackedTensor
    layers: ops.LayerTable
    norm: jax.Array
    lm_head: PackedTensor

    @_with_its_kernels
    def __call__(
        self,
        token_ids: jax.Array,
        cache: KVCache,
        begins: jax.Array | Sequence[Span],
        expert_ids: jax.Array | None = None,
    ) -> Output:
        """Runs T tokens of B sequences; or, with spans of different lengths, whatever these say.

        Everything but attention treats a token by itself, so tokens of a prompt and of sequences
        that are being written may run together: the weights are read once for all of them.

        Args:
          token_ids: int32 [B, T]; with several spans [1, R], the tokens of one span after the other.
          cache: holds the positions before those of each sequence, and room for them.
          begins: int32 [B], position of each sequence's first token; or spans, which must not
            share a sequence's positions, unless what the last one writes is meant to stay.
          expert_ids: int32 [L, B, T, X] to force the routing of the layers that run, or None.
        """
        chosen_layers = self.settings.layers
        spans = begins if isinstance(begins, Sequence) else (Span(begins, token_ids.shape[1]),)
        x, rope = self.embed(token_ids, spans)
        if self._is_one_call(cache):
            return self._in_one_call(x, rope, cache, spans, expert_ids)
        numbers = range(self.layers.num_layers) if chosen_layers is None else chosen_layers

        def step(carry: tuple[jax.Array, KVCache], xs: Any) -> tuple[Any, Any]:
            layer, forced_ids = xs
            decoder_layer = DecoderLayer(self.layers.layer(layer), self.settings)
            args = (*carry, spans, rope, forced_ids, layer)
            (x, cache, chosen), stages = decoder_layer.watched(DecoderLayer.__call__, *args)
            return (x, cache), (chosen, stages)

        xs = (np.asarray(numbers, np.int32), expert_ids)
        (x, cache), (chosen, stages) = jax.lax.scan(step, (x, cache), xs)
        for name, value in stages.items():
            self.show(name, value)
        return Output(x, cache, chosen)

    def through(self, layers: Callable[..., Output]) -> Callable[..., Output]:
        """A call of this network whose layers are run by ``layers(network, *its arguments)``."""
        return functools.partial(layers, self)

    def _is_one_call(self, cache: KVCache) -> bool:
        """Whether all layers run as one native call; nothing inside them can be seen or changed then."""
        s = self.settings
        if s.kernels != implementations.NATIVE or s.layers is not None:
            return False
        if (s.capture | {i.stage for i in s.interventions}) - OUTSIDE_LAYERS:
            return False
        return all_layers.reason_against(self.layers, cache.k) is None

    def _in_one_call(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: KVCache,
        spans: Sequence[Span],
        expert_ids: jax.Array | None,
    ) -> Output:
        c, rows = self.settings.config, x.shape[:2]
        out = ops.all_layers(
            x.reshape(-1, c.hidden_size),
            self.layers,
            cache.k,
            cache.v,
            jnp.concatenate([span.rows for span in spans]),
            jnp.concatenate([span.real_positions.reshape(-1) for span in spans]),
            (rope[0].reshape(-1, c.head_dim // 2), rope[1].reshape(-1, c.head_dim // 2)),
            num_experts_per_tok=c.num_experts_per_tok,
            eps=c.rms_norm_eps,
            expert_ids=expert_ids,
        )
        chosen = out.expert_ids.reshape(-1, *rows, c.num_experts_per_tok)
        return Output(out.hidden.reshape(*rows, -1), replace(cache, k=out.k, v=out.v), chosen)

    @_with_its_kernels
    def embed(
        self, token_ids: jax.Array, spans: Sequence[Span]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """What the layers start with: float32 [B, T, D], and rope's cos and sin [B, T, H / 2]."""
        c = self.settings.config
        x = ops.embedding_lookup(self.embed_tokens, token_ids.reshape(-1))
        x = self.stage("inp_embd", x.reshape(*token_ids.shape, -1))
        positions = _joined([span.positions for span in spans], token_ids.shape)
        return x, ops.rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)

    @_with_its_kernels
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [B, T, V] of hidden [B, T, D]."""
        h = self.stage("result_norm", self.rms_norm(hidden, self.norm))
        head = self.embed_tokens if self.settings.config.tie_word_embeddings else self.lm_head
        logits = self.matmul(h, head)
        if logits.shape[-1] < self.settings.config.vocab_size:  # a device's part of the vocabulary
            logits = jax.lax.all_gather(logits, BOTH, axis=logits.ndim - 1, tiled=True)
        return self.stage("result_output", logits)


def _parts(rows: jax.Array, spans: Sequence[Span]) -> list[jax.Array]:
    """rows [B, T, ...] of a batch as those of each span, each with its own B and T."""
    flat, parts, first = rows.reshape(-1, *rows.shape[2:]), [], 0
    for span in spans:
        batch, length = span.shape
        parts.append(flat[first : first + batch * length].reshape(batch, length, *rows.shape[2:]))
        first += batch * length
    return parts


def _joined(parts: Sequence[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The rows of all spans as one batch of this (B, T): the reverse of ``_parts``."""
    flat = [part.reshape(-1, *part.shape[2:]) for part in parts]
    rows = flat[0] if len(flat) == 1 else jnp.concatenate(flat)
    return rows.reshape(*shape, *rows.shape[1:])
