"""Qwen3-MoE as a Flax model on packed weights: the definition of the network.

Every matrix is a ``PackedTensor`` parameter of its own quantization type, and
the operations on it are ``kernels_pallas``'. Parameters have Hugging Face's
names. Norms, router and softmax are float32 whatever the compute dtype.

``stage`` names the values that ``qwen3-moe trace`` shows: it sows them when the
collection "stages" is mutable, and it is where an intervention changes them.

Equations: Qwen3 technical report (arXiv 2505.09388); Transformers'
``modeling_qwen3_moe.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import FrozenDict

import kernels_pallas as ops
from convert.config import Qwen3MoeConfig
from convert.ggml_types import GGMLType
from convert.packed import ARRAY_FORMATS, PackedTensor, array_shapes
from qwen3_moe_jax.kv_cache import KVCache, write_positions

STAGES_COLLECTION = "stages"
"""Flax collection that receives stages when it is mutable."""

INSIDE_EXPERTS = frozenset({"ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down"})
"""Stages between the fused operations of the sparse layer: to see them is to run it unfused."""


@dataclass(frozen=True)
class Intervention:
    """A change of one stage's value inside the jitted model.

    Attributes:
      stage: name of the stage.
      change: maps the stage's value to another of the same shape; axes as in
        ``stages.STAGES`` with B before T.
      layer: the layer, or None for every layer and for stages outside the layers.
    """

    stage: str
    change: Callable[[jax.Array], jax.Array]
    layer: int | None = None


@struct.dataclass
class Output:
    """Result of the decoder layers.

    Attributes:
      hidden: float32 [B, T, D], after the last layer and before the final norm.
      cache: the cache with T more positions.
      expert_ids: int32 [L, B, T, X].
    """

    hidden: jax.Array
    cache: KVCache
    expert_ids: jax.Array


class _Part(nn.Module):
    """What every part of the network needs.

    Attributes:
      config: hyper-parameters.
      types: quantization type of each parameter, by its whole path; used by ``init`` alone.
      compute_dtype: operands of the matrix products; accumulation is float32.
      interventions: changes of stages, in the order in which they are applied.
      capture: stages that may be sown; names that the fused operations hide make them unfused.
      prefix: path of this part ("layers.3.self_attn.").
      layer: number of the layer, or None outside.
    """

    config: Qwen3MoeConfig
    types: FrozenDict[str, GGMLType]
    compute_dtype: Any = jnp.float32
    interventions: tuple[Intervention, ...] = ()
    capture: frozenset[str] = frozenset()
    prefix: str = ""
    layer: int | None = None

    def part(self, cls: type["_Part"], prefix: str, layer: int | None) -> "_Part":
        """A sub-part with the same settings."""
        return cls(
            self.config, self.types, self.compute_dtype, self.interventions, self.capture, prefix, layer
        )

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """The parameter of this name, of logical ``shape``; its layout is whatever the loader chose."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)

        def zeros(_key: jax.Array) -> PackedTensor:
            ggml_type = self.types[self.prefix + name]
            formats = ARRAY_FORMATS[ggml_type]
            shapes = array_shapes(ggml_type, shape)
            return PackedTensor({n: jnp.zeros(s, formats[n].dtype) for n, s in shapes.items()}, ggml_type)

        return self.param(name, zeros)

    def norm_weight(self, name: str, size: int) -> jax.Array:
        return self.param(name, lambda _key: jnp.ones((size,), jnp.float32))

    def stage(self, name: str, value: jax.Array) -> jax.Array:
        """Names a value of the forward pass: applies interventions, then shows it to a trace."""
        for intervention in self.interventions:
            if intervention.stage == name and intervention.layer in (None, self.layer):
                value = intervention.change(value)
        if name in self.capture:
            self.sow(STAGES_COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return value

    def token_stage(self, name: str, value: jax.Array, batch: tuple[int, int]) -> jax.Array:
        """``stage`` for a value [B * T, ...], with ``batch`` = (B, T)."""
        return self.stage(name, value.reshape(*batch, *value.shape[1:])).reshape(value.shape)

    def matmul(self, x: jax.Array, weight: PackedTensor) -> jax.Array:
        """x [B, T, K] times the transpose of weight [N, K]: float32 [B, T, N]."""
        flat = x.reshape(-1, x.shape[-1])
        out = ops.quantized_matmul(flat, weight, compute_dtype=self.compute_dtype)
        return out.reshape(*x.shape[:-1], -1)


class Attention(_Part):
    """Grouped-query attention with normed queries and keys, over the KV cache."""

    def setup(self) -> None:
        c = self.config
        self.q_proj = self.packed("q_proj", (c.num_attention_heads * c.head_dim, c.hidden_size))
        self.k_proj = self.packed("k_proj", (c.num_key_value_heads * c.head_dim, c.hidden_size))
        self.v_proj = self.packed("v_proj", (c.num_key_value_heads * c.head_dim, c.hidden_size))
        self.o_proj = self.packed("o_proj", (c.hidden_size, c.num_attention_heads * c.head_dim))
        self.q_norm = self.norm_weight("q_norm", c.head_dim)
        self.k_norm = self.norm_weight("k_norm", c.head_dim)

    def __call__(
        self,
        x: jax.Array,
        k_cache: jax.Array,
        v_cache: jax.Array,
        start: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] at positions start [B] and following; returns the output and the written caches."""
        c = self.config
        heads = (*x.shape[:2], -1, c.head_dim)
        q = self.stage("Qcur", self.matmul(x, self.q_proj).reshape(heads))
        k = self.stage("Kcur", self.matmul(x, self.k_proj).reshape(heads))
        v = self.stage("Vcur", self.matmul(x, self.v_proj).reshape(heads))
        q = self.stage("Qcur_normed", ops.rms_norm(q, self.q_norm, c.rms_norm_eps))
        k = self.stage("Kcur_normed", ops.rms_norm(k, self.k_norm, c.rms_norm_eps))
        q = self.stage("Qcur_rope", ops.rope(q, cos, sin))
        k = self.stage("Kcur_rope", ops.rope(k, cos, sin))

        k_cache, v_cache = write_positions(k_cache, k, start), write_positions(v_cache, v, start)
        positions = start[:, None] + jnp.arange(x.shape[1], dtype=start.dtype)
        out = self.stage("kqv_out", ops.attention(q, k_cache, v_cache, positions))
        out = self.stage("attn_out", self.matmul(out.reshape(*x.shape[:2], -1), self.o_proj))
        return out, k_cache, v_cache


class Experts(_Part):
    """The stacked weights of the experts."""

    def setup(self) -> None:
        c = self.config
        up = (c.num_experts, c.moe_intermediate_size, c.hidden_size)
        down = (c.num_experts, c.hidden_size, c.moe_intermediate_size)
        self.gate_proj = self.packed("gate_proj", up)
        self.up_proj = self.packed("up_proj", up)
        self.down_proj = self.packed("down_proj", down)

    def __call__(
        self, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, batch: tuple[int, int]
    ) -> jax.Array:
        """x [B * T, D], expert_ids and weights [B * T, X]: the weighted sum of the experts' outputs, as x."""
        if self._is_observed_inside():
            return self._unfused(x, expert_ids, weights, batch)
        return ops.moe_mlp(
            x,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            expert_ids,
            weights,
            compute_dtype=self.compute_dtype,
        )

    def _is_observed_inside(self) -> bool:
        observed = self.capture | {i.stage for i in self.interventions if i.layer in (None, self.layer)}
        return bool(observed & INSIDE_EXPERTS)

    def _unfused(
        self, x: jax.Array, expert_ids: jax.Array, weights: jax.Array, batch: tuple[int, int]
    ) -> jax.Array:
        def project(value: jax.Array, weight: PackedTensor) -> jax.Array:
            return ops.expert_matmul(value, weight, expert_ids, compute_dtype=self.compute_dtype)

        gate = self.token_stage("ffn_moe_gate", project(x, self.gate_proj), batch)
        up = self.token_stage("ffn_moe_up", project(x, self.up_proj), batch)
        act = self.token_stage("ffn_moe_swiglu", jax.nn.silu(gate) * up, batch)
        down = self.token_stage("ffn_moe_down", project(act, self.down_proj), batch)
        out = jnp.zeros_like(down[:, 0])
        for choice in range(expert_ids.shape[1]):  # the order of the sum is part of the definition
            out = out + down[:, choice] * weights[:, choice, None]
        return out


class SparseMoeBlock(_Part):
    """Router and experts: every layer of the model is sparse, there is no dense FFN."""

    def setup(self) -> None:
        c = self.config
        self.router = self.packed("router", (c.num_experts, c.hidden_size))
        self.experts = self.part(Experts, f"{self.prefix}experts.", self.layer)

    def __call__(self, x: jax.Array, forced_ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D], forced_ids [B, T, X] or None: the output [B, T, D] and the experts [B, T, X]."""
        flat, batch = x.reshape(-1, x.shape[-1]), x.shape[:2]
        logits = self.token_stage("ffn_moe_logits", ops.quantized_matmul(flat, self.router), batch)
        probs, expert_ids, weights = ops.choose_experts(
            logits,
            self.config.num_experts_per_tok,
            None if forced_ids is None else forced_ids.reshape(-1, forced_ids.shape[-1]),
        )
        self.token_stage("ffn_moe_probs", probs, batch)
        expert_ids = self.token_stage("ffn_moe_topk", expert_ids, batch)
        weights = self.token_stage("ffn_moe_weights_norm", weights, batch)
        out = self.experts(flat, expert_ids, weights, batch)
        return self.stage("ffn_moe_out", out.reshape(x.shape)), expert_ids.reshape(*batch, -1)


class DecoderLayer(_Part):
    """Attention and the sparse block, each after a norm and beside the residual."""

    def setup(self) -> None:
        size = self.config.hidden_size
        self.input_layernorm = self.norm_weight("input_layernorm", size)
        self.self_attn = self.part(Attention, f"{self.prefix}self_attn.", self.layer)
        self.post_attention_layernorm = self.norm_weight("post_attention_layernorm", size)
        self.mlp = self.part(SparseMoeBlock, f"{self.prefix}mlp.", self.layer)

    def __call__(self, x, k_cache, v_cache, start, cos, sin, forced_ids):
        eps = self.config.rms_norm_eps
        h = self.stage("attn_norm", ops.rms_norm(x, self.input_layernorm, eps))
        out, k_cache, v_cache = self.self_attn(h, k_cache, v_cache, start, cos, sin)
        x = self.stage("ffn_inp", x + out)
        h = self.stage("ffn_norm", ops.rms_norm(x, self.post_attention_layernorm, eps))
        out, expert_ids = self.mlp(h, forced_ids)
        return self.stage("l_out", x + out), k_cache, v_cache, expert_ids


class Qwen3Moe(_Part):
    """The whole network: ``__call__`` runs the decoder layers, ``logits`` the head on chosen rows."""

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = self.packed("embed_tokens", (c.vocab_size, c.hidden_size))
        self.layers = [self.part(DecoderLayer, f"layers.{i}.", i) for i in range(c.num_hidden_layers)]
        self.norm = self.norm_weight("norm", c.hidden_size)
        if not c.tie_word_embeddings:
            self.lm_head = self.packed("lm_head", (c.vocab_size, c.hidden_size))

    def __call__(
        self,
        token_ids: jax.Array,
        cache: KVCache,
        start: jax.Array,
        expert_ids: jax.Array | None = None,
    ) -> Output:
        """Runs T tokens of B sequences.

        Args:
          token_ids: int32 [B, T].
          cache: holds positions 0 .. start - 1 of each sequence, and room for T more.
          start: int32 [B], position of each sequence's first token.
          expert_ids: int32 [L, B, T, X] to force the routing, or None.
        """
        c = self.config
        x = ops.embedding_lookup(self.embed_tokens, token_ids.reshape(-1))
        x = self.stage("inp_embd", x.reshape(*token_ids.shape, -1))
        positions = start[:, None] + jnp.arange(token_ids.shape[1], dtype=start.dtype)
        cos, sin = ops.rope_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        keys, values, chosen = [], [], []
        for i, layer in enumerate(self.layers):
            forced = None if expert_ids is None else expert_ids[i]
            x, k, v, ids = layer(x, cache.k[i], cache.v[i], start, cos, sin, forced)
            keys.append(k)
            values.append(v)
            chosen.append(ids)
        return Output(x, KVCache(tuple(keys), tuple(values)), jnp.stack(chosen))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [B, T, V] of hidden [B, T, D]."""
        h = self.stage("result_norm", ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps))
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.stage("result_output", self.matmul(h, head))


def parameter_tree(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Nests parameters by their paths into Flax's tree: "layers.3.mlp.router" is layers_3 / mlp / router."""
    tree: dict[str, Any] = {}
    for path, value in parameters.items():
        *parents, name = path.replace("layers.", "layers_", 1).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
