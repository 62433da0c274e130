"""Qwen3-MoE in NumPy: what every other backend is held against.

Written to be read, in the order of the forward pass. Weights stay packed and
are dequantized where they are used: a matrix in slices of rows, an expert when
a token chose it. ``dtype`` float64 computes everything in double precision.

Equations: Qwen3 technical report (arXiv 2505.09388) as implemented in Hugging
Face Transformers' ``modeling_qwen3_moe.py`` and in llama.cpp at commit
0c1e57098, ``src/models/qwen3moe.cpp``; stage names are the latter's.
"""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Unpack

import numpy as np

from qwen3_moe_jax.convert.config import MIN_WEIGHT_SUM
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.errors import ContextOverflowError, NumericalError
from qwen3_moe_jax.core.likelihood import target_log_likelihoods
from qwen3_moe_jax.core.one_at_a_time import (
    OneAtATime,
)
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.core.runner import (
    Forward,
    ForwardOptions,
    TokenIds,
)
from qwen3_moe_jax.core.runner_arguments import (
    checked_forward,
    checked_prompt,
    checked_text,
    open_throughout,
)
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import StageKey
from qwen3_moe_jax.machine.memory import cache_nbytes
from qwen3_moe_jax.machine.threads import ALONE, Workers
from qwen3_moe_jax.reference.sampling import Sampler

ROWS_AT_A_TIME = 8192
"""Rows of a matrix that are dequantized at a time, by all workers together."""

SCORED_TOKENS = 256
"""Tokens whose logits are there at once where only log-likelihoods are asked for."""


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates pairs (j, j + H/2) of x [T, heads, H] by the angles of cos, sin [T, H/2] (NEOX order)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)``; an exponential that overflows makes it the zero that it nearly is."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def matmul(x: np.ndarray, weight: PackedTensor, workers: Workers = ALONE) -> np.ndarray:
    """x [T, K] times the transpose of weight [N, K]: [T, N]."""
    stride = ROWS_AT_A_TIME // workers.count

    def part(start: int) -> np.ndarray:
        return x @ dequantize(weight[start : start + stride], x.dtype).T

    parts = list(workers.map(part, range(0, weight.shape[0], stride)))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def expert_matmul(
    x: np.ndarray, weight: PackedTensor, expert_ids: np.ndarray, workers: Workers = ALONE
) -> np.ndarray:
    """x [T, X, K] times, for every (token, choice), the expert weight[expert_ids] [N, K]: [T, X, N]."""
    out = np.empty((*expert_ids.shape, weight.shape[1]), x.dtype)

    def fill(expert: int) -> None:
        chosen = expert_ids == expert
        out[chosen] = x[chosen] @ dequantize(weight[expert], x.dtype).T

    list(workers.map(fill, np.unique(expert_ids)))
    return out


def choose_experts(
    logits: np.ndarray, num_experts_per_tok: int, forced_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Softmax over all experts, the most probable ones, and their renormalized weights.

    Args:
      logits: [T, E].
      num_experts_per_tok: X.
      forced_ids: int32 [T, X], experts to take in place of the most probable.

    Returns:
      probs [T, E], expert_ids int32 [T, X] (lowest id first among equals), weights [T, X].
    """
    probs = softmax(logits)
    expert_ids = forced_ids
    if expert_ids is None:
        expert_ids = np.argsort(-probs, axis=-1, kind="stable")[:, :num_experts_per_tok].astype(np.int32)
    chosen = np.take_along_axis(probs, expert_ids, axis=-1)
    return probs, expert_ids, chosen / np.maximum(chosen.sum(-1, keepdims=True), MIN_WEIGHT_SUM)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Causal grouped-query attention.

    Args:
      q: [T, N, H] queries at ``positions`` [T].
      k: [S, K, H] keys of positions 0..S-1.
      v: [S, K, H] values.

    Returns:
      [T, N, H]; query head n uses KV head ``n // (N / K)``.
    """
    groups = q.shape[1] // k.shape[1]
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    future = np.arange(k.shape[0])[None, :] > positions[:, None]
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head // groups].T) * scale
        out[:, head] = softmax(np.where(future, -np.inf, scores)) @ v[:, head // groups]
    return out


class TensorsOnDemand(Mapping[str, PackedTensor]):
    """A file's tensors, each read when it is asked for and not kept: a large model in little memory."""

    def __init__(self, source: ModelSource):
        self._source = source

    def __getitem__(self, path: str) -> PackedTensor:
        if path not in self:
            raise KeyError(path)
        return self._source.tensor(path)

    def __contains__(self, path: object) -> bool:
        return path in self._source.types

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.types)

    def __len__(self) -> int:
        return len(self._source.types)


class ReferenceRunner(OneAtATime):
    """The model on the CPU in NumPy; see ``runner.Runner`` for the protocol."""

    name = "reference"

    def __init__(
        self,
        source: ModelSource,
        *,
        max_context: int | None = None,
        dtype: type = np.float32,
        resident: bool = True,
        workers: Workers = ALONE,
    ):
        """Loads the weights.

        Args:
          source: an open model.
          max_context: tokens of a prompt and what is written after it; None is the model's own limit.
          dtype: np.float32 or np.float64.
          resident: keep every packed tensor in memory; False reads each from ``source`` when it is used.
          workers: share the work on a matrix.
        """
        self.config = source.config
        self.max_context = source.config.max_position_embeddings if max_context is None else max_context
        self.dtype = np.dtype(dtype)
        self.workers = workers
        self.weights: Mapping[str, PackedTensor] = TensorsOnDemand(source)
        if resident:
            self.weights = {path: source.tensor(path) for path in source.paths()}
        self._types = sorted({t.name for t in source.types.values()})
        self._rope: tuple[np.ndarray, np.ndarray] | None = None
        self.is_closed = False

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values of ``max_context`` tokens."""
        return cache_nbytes(self.config, self.max_context, self.dtype.itemsize)

    def describe(self) -> dict[str, object]:
        return {
            "backend": self.name,
            "device": "CPU (NumPy)",
            "compute_dtype": self.dtype.name,
            "implementations": dict.fromkeys(self._types, "numpy"),
            "fallbacks": [],
            "batch_invariant": True,  # one sequence at a time
        }

    def close(self) -> None:
        """Drops the weights; streams that are open end with ModelClosedError."""
        self.is_closed = True
        self.weights, self._rope = {}, None

    def forward(self, token_ids: TokenIds, **options: Unpack[ForwardOptions]) -> Forward:
        r = checked_forward(self, token_ids, **options)
        stages: dict[StageKey, list[np.ndarray]] = {}

        def record(name: str, layer: int | None, value: np.ndarray) -> None:
            if name in r.capture:
                stages.setdefault((name, layer), []).append(value)

        cache, logits, chosen = self._empty_cache(), [], []
        chunk = max(r.chunk_sizes, default=len(r.token_ids))
        for start in range(0, len(r.token_ids), chunk):
            part = slice(start, start + chunk)
            forced = None if r.expert_ids is None else r.expert_ids[:, part]
            with open_throughout(self):
                hidden, ids, cache = self._layers(r.token_ids[part], cache, record, forced, r.layers)
                logits.append(self._logits(hidden, record).astype(np.float32))
            chosen.append(ids)
        joined = {key: np.concatenate(values) for key, values in stages.items()}
        return Forward(np.concatenate(logits), np.concatenate(chosen, axis=1), joined)

    def log_likelihoods(self, token_ids: TokenIds, *, first: int = 1) -> np.ndarray:
        tokens = checked_text(self, token_ids, first)
        inputs, targets = tokens[:-1], tokens[1:]
        cache, found = self._empty_cache(), []
        for start in range(0, len(inputs), SCORED_TOKENS):
            part = slice(start, start + SCORED_TOKENS)
            every_layer = range(self.config.num_hidden_layers)
            skip = max(0, first - 1 - start)
            with open_throughout(self):
                hidden, _, cache = self._layers(inputs[part], cache, _ignore, None, every_layer)
                logits = self._logits(hidden[skip:], _ignore)
            if len(logits):
                found.append(target_log_likelihoods(logits, targets[part][skip:]))
        return np.concatenate(found)

    def stream(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        reuse: bool = False,
    ) -> Generator[int]:
        tokens = checked_prompt(self, token_ids)
        return self._stream(tokens, max_tokens, Sampler(sampling, tokens.tolist()), stop_ids)

    def _stream(
        self, token_ids: np.ndarray, max_tokens: int, sampler: Sampler, stop_ids: Collection[int]
    ) -> Generator[int]:
        cache, new_ids = self._empty_cache(), token_ids
        every_layer = range(self.config.num_hidden_layers)
        for _ in range(min(max_tokens, self.max_context - len(token_ids))):
            with open_throughout(self):
                hidden, _, cache = self._layers(new_ids, cache, _ignore, None, every_layer)
                logits = self._logits(hidden[-1:], _ignore)[0]
            if not np.isfinite(logits).all():
                raise NumericalError(
                    f"the reference backend's logits are not finite at position {cache[0][0].shape[0] - 1}: "
                    "run `qwen3-moe trace` to find the first stage that is not"
                )
            token = sampler.choose(logits)
            if token in stop_ids:
                return
            yield token
            new_ids = np.asarray([token])

    def _empty_cache(self) -> list[tuple[np.ndarray, np.ndarray]]:
        c = self.config
        empty = np.zeros((0, c.num_key_value_heads, c.head_dim), self.dtype)
        return [(empty, empty)] * c.num_hidden_layers

    def _rope_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._rope is None or self._rope[0].shape[0] <= positions[-1]:
            self._rope = rope_tables(self.config, int(positions[-1]) + 256)
        cos, sin = self._rope
        return cos[positions].astype(self.dtype), sin[positions].astype(self.dtype)

    def _norm_weight(self, path: str) -> np.ndarray:
        return dequantize(self.weights[path], self.dtype)

    def _matmul(self, x: np.ndarray, weight: PackedTensor) -> np.ndarray:
        return matmul(x, weight, self.workers)

    def _layers(self, token_ids, cache, record, expert_ids, layers):
        """These decoder layers; returns hidden [T, D], the chosen experts [L, T, X] and the longer cache."""
        start = cache[0][0].shape[0]
        if start + len(token_ids) > self.max_context:
            raise ContextOverflowError(start + len(token_ids), self.max_context)
        positions = np.arange(start, start + len(token_ids))
        x = dequantize(self.weights["embed_tokens"][token_ids], self.dtype)
        record("inp_embd", None, x)
        chosen, new_cache = [], []
        for index, layer in enumerate(layers):
            forced = None if expert_ids is None else expert_ids[index]
            x, layer_cache = self._attention_block(layer, x, cache[index], positions, record)
            x, ids = self._moe_block(layer, x, record, forced)
            chosen.append(ids)
            new_cache.append(layer_cache)
        return x, np.stack(chosen), new_cache

    def _attention_block(self, layer, x, cache, positions, record):
        config, eps = self.config, self.config.rms_norm_eps
        prefix = f"layers.{layer}"
        heads = (len(positions), -1, config.head_dim)

        h = rms_norm(x, self._norm_weight(f"{prefix}.input_layernorm"), eps)
        record("attn_norm", layer, h)
        q = self._matmul(h, self.weights[f"{prefix}.self_attn.q_proj"]).reshape(heads)
        k = self._matmul(h, self.weights[f"{prefix}.self_attn.k_proj"]).reshape(heads)
        v = self._matmul(h, self.weights[f"{prefix}.self_attn.v_proj"]).reshape(heads)
        record("Qcur", layer, q)
        record("Kcur", layer, k)
        record("Vcur", layer, v)
        q = rms_norm(q, self._norm_weight(f"{prefix}.self_attn.q_norm"), eps)
        k = rms_norm(k, self._norm_weight(f"{prefix}.self_attn.k_norm"), eps)
        record("Qcur_normed", layer, q)
        record("Kcur_normed", layer, k)
        cos, sin = self._rope_at(positions)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        record("Qcur_rope", layer, q)
        record("Kcur_rope", layer, k)

        keys, values = np.concatenate([cache[0], k]), np.concatenate([cache[1], v])
        out = attention(q, keys, values, positions)
        record("kqv_out", layer, out)
        out = self._matmul(out.reshape(len(positions), -1), self.weights[f"{prefix}.self_attn.o_proj"])
        record("attn_out", layer, out)
        x = x + out
        record("ffn_inp", layer, x)
        return x, (keys, values)

    def _moe_block(self, layer, x, record, forced_ids):
        prefix = f"layers.{layer}.mlp"
        h = rms_norm(
            x, self._norm_weight(f"layers.{layer}.post_attention_layernorm"), self.config.rms_norm_eps
        )
        record("ffn_norm", layer, h)
        logits = self._matmul(h, self.weights[f"{prefix}.router"])
        probs, ids, weights = choose_experts(logits, self.config.num_experts_per_tok, forced_ids)
        record("ffn_moe_logits", layer, logits)
        record("ffn_moe_probs", layer, probs)
        record("ffn_moe_topk", layer, ids)
        record("ffn_moe_weights_norm", layer, weights)

        inputs = np.repeat(h[:, None, :], ids.shape[1], axis=1)
        gate = expert_matmul(inputs, self.weights[f"{prefix}.experts.gate_proj"], ids, self.workers)
        up = expert_matmul(inputs, self.weights[f"{prefix}.experts.up_proj"], ids, self.workers)
        act = silu(gate) * up
        down = expert_matmul(act, self.weights[f"{prefix}.experts.down_proj"], ids, self.workers)
        record("ffn_moe_gate", layer, gate)
        record("ffn_moe_up", layer, up)
        record("ffn_moe_swiglu", layer, act)
        record("ffn_moe_down", layer, down)

        out = np.zeros_like(h)
        for choice in range(ids.shape[1]):  # the order of the sum is part of the definition
            out = out + down[:, choice] * weights[:, choice, None]
        record("ffn_moe_out", layer, out)
        x = x + out
        record("l_out", layer, x)
        return x, ids

    def _logits(self, hidden, record):
        h = rms_norm(hidden, self._norm_weight("norm"), self.config.rms_norm_eps)
        record("result_norm", None, h)
        logits = self._matmul(h, self.weights["lm_head" if "lm_head" in self.weights else "embed_tokens"])
        record("result_output", None, logits)
        return logits


def _ignore(name: str, layer: int | None, value: np.ndarray) -> None:
    """A recorder for runs that capture nothing."""
