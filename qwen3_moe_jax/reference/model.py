"""Qwen3-MoE in NumPy: what every other backend is held against.

Written to be read, in the order of the forward pass; its operations are in
:mod:`ops`. Weights stay packed and are dequantized where they are used. ``dtype``
float64 computes everything in double precision.

Equations: Qwen3 technical report (arXiv 2505.09388) as implemented in Hugging
Face Transformers' ``modeling_qwen3_moe.py`` and in llama.cpp at commit
0c1e57098, ``src/models/qwen3moe.cpp``; stage names are the latter's.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.errors import ContextOverflowError, NumericalError
from qwen3_moe_jax.core.likelihood import target_log_likelihoods
from qwen3_moe_jax.core.lookup import PromptLookup
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
from qwen3_moe_jax.reference.ops import (
    ChosenExperts,
    apply_rope,
    attention,
    by_rows,
    choose_experts,
    fill_experts,
    matmul,
    matmuls,
    rms_norm,
)
from qwen3_moe_jax.reference.sampling import Sampler

SCORED_TOKENS = 256
"""Tokens whose logits are there at once where only log-likelihoods are asked for."""

Cache = list[tuple[np.ndarray, np.ndarray]]
"""Keys and values [S, K, H] of each layer."""


@dataclass
class _Text:
    """New tokens of one text on their way through the layers.

    Attributes:
      x: [T, D].
      positions: [T].
      cache: of the layers that are run; replaced by the longer one.
      forced: int32 [L, T, X], experts to take, or None.
      kept: makes a stage last that lies in memory of the workers.
      is_last: whether no token follows, so that keys and values need not be kept.
      stages: what has been captured, of the names in ``capture``.
      chosen: int32 [T, X] of each layer so far.
    """

    x: np.ndarray
    positions: np.ndarray
    cache: Cache
    forced: np.ndarray | None = None
    capture: Collection[str] = ()
    kept: Callable[[np.ndarray], np.ndarray] = lambda array: array
    is_last: bool = False
    stages: dict[StageKey, np.ndarray] = field(default_factory=dict)
    chosen: list[np.ndarray] = field(default_factory=list)

    def record(self, name: str, layer: int | None, value: np.ndarray) -> None:
        """Keeps a stage that is asked for."""
        if name in self.capture:
            self.stages[name, layer] = self.kept(value)


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


class PartOfTensor:
    """A matrix [N, K], or those of experts [E, N, K], of which rows or one expert are read at a time."""

    def __init__(self, source: ModelSource, path: str):
        self._source, self._path = source, path
        self.shape = source.specs[path].shape

    def __getitem__(self, index: int | slice | np.ndarray) -> PackedTensor:
        whole = [(0, size) for size in self.shape]
        if isinstance(index, np.ndarray):
            rows = {int(row): self[int(row) : int(row) + 1] for row in np.unique(index)}
            first = next(iter(rows.values()))
            arrays = {n: np.stack([rows[int(r)].arrays[n][0] for r in index]) for n in first.arrays}
            return PackedTensor(arrays, first.type)
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return self._source.part(self._path, ((start, stop), *whole[1:]))
        return self._source.part(self._path, ((index, index + 1), *whole[1:]))[0]


class PartsOnDemand(TensorsOnDemand):
    """As those, of each matrix what is used of it: for several processes that share the work on it."""

    def __getitem__(self, path: str) -> Any:
        whole = path not in self or len(self._source.specs[path].shape) == 1
        return super().__getitem__(path) if whole else PartOfTensor(self._source, path)


class ReferenceRunner(OneAtATime):
    """The model on the CPU in NumPy; see ``runner.Runner`` for the protocol."""

    name = "reference"

    def __init__(
        self,
        source: ModelSource,
        *,
        max_context: int | None = None,
        dtype: type = np.float32,
        resident: bool | Mapping[str, PackedTensor] = True,
        workers: Workers = ALONE,
    ):
        """Loads the weights.

        Args:
          source: an open model.
          max_context: tokens of a prompt and what is written after it; None is the model's own limit.
          dtype: np.float32 or np.float64.
          resident: keep every packed tensor in memory; False reads each from ``source`` when it is used.
            A mapping is what gives them.
          workers: share the work on a matrix.
        """
        self.config = source.config
        self.max_context = source.config.max_position_embeddings if max_context is None else max_context
        self.dtype = np.dtype(dtype)
        self.workers = workers
        if isinstance(resident, bool):
            on_demand = TensorsOnDemand(source)
            resident = {path: on_demand[path] for path in source.paths()} if resident else on_demand
        self.weights = resident
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
        return self.forwards([token_ids], **options)[0]

    def forwards(
        self,
        texts: Sequence[TokenIds],
        out: Sequence[np.ndarray] | None = None,
        **options: Unpack[ForwardOptions],
    ) -> list[Forward]:
        """As ``forward`` of each text, bit for bit; a matrix is dequantized once for all of them.

        Args:
          texts: none sees another.
          out: float32 [T, V] for each, where its logits are written.
          options: of all.
        """
        requests = [checked_forward(self, token_ids, **options) for token_ids in texts]
        shapes = [(len(r.token_ids), self.config.vocab_size) for r in requests]
        logits = [np.empty(shape, np.float32) for shape in shapes] if out is None else out
        caches = [self._empty_cache() for _ in requests]
        parts: list[list[_Text]] = [[] for _ in requests]
        longest = max(len(r.token_ids) for r in requests)
        chunk = max(requests[0].chunk_sizes, default=longest)
        for start in range(0, longest, chunk):
            part = slice(start, start + chunk)
            with _computing(self):
                running = [i for i, r in enumerate(requests) if start < len(r.token_ids)]
                for i in running:
                    r = requests[i]
                    forced = None if r.expert_ids is None else r.expert_ids[:, part]
                    text = self._begun(r.token_ids[part], caches[i], forced, r.capture)
                    text.is_last = part.stop >= len(r.token_ids)
                    parts[i].append(text)
                self._layers([parts[i][-1] for i in running], requests[0].layers)
                for i in running:
                    caches[i] = parts[i][-1].cache
                    self._logits(parts[i][-1], logits[i][part])
        return [_joined(*found) for found in zip(logits, parts, strict=True)]

    def log_likelihoods(self, token_ids: TokenIds, *, first: int = 1) -> np.ndarray:
        tokens = checked_text(self, token_ids, first)
        inputs, targets = tokens[:-1], tokens[1:]
        cache, found = self._empty_cache(), []
        for start in range(0, len(inputs), SCORED_TOKENS):
            part = slice(start, start + SCORED_TOKENS)
            every_layer = range(self.config.num_hidden_layers)
            skip = max(0, first - 1 - start)
            with _computing(self):
                text = self._begun(inputs[part], cache)
                self._layers([text], every_layer)
                cache, text.x = text.cache, text.x[skip:]
                logits = self._logits(text)
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
        lookup: PromptLookup | None = None,
    ) -> Generator[int]:
        tokens = checked_prompt(self, token_ids, lookup)
        return self._stream(tokens, max_tokens, Sampler(sampling, tokens.tolist()), stop_ids)

    def _stream(
        self, token_ids: np.ndarray, max_tokens: int, sampler: Sampler, stop_ids: Collection[int]
    ) -> Generator[int]:
        cache, new_ids = self._empty_cache(), token_ids
        every_layer = range(self.config.num_hidden_layers)
        for _ in range(min(max_tokens, self.max_context - len(token_ids))):
            with _computing(self):
                text = self._begun(new_ids, cache)
                self._layers([text], every_layer)
                cache, text.x = text.cache, text.x[-1:]
                logits = self._logits(text)[0]
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

    def _empty_cache(self) -> Cache:
        c = self.config
        empty = np.zeros((0, c.num_key_value_heads, c.head_dim), self.dtype)
        return [(empty, empty)] * c.num_hidden_layers

    def _rope_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tables = self._rope  # other threads may put shorter ones there
        if tables is None or tables[0].shape[0] <= positions[-1]:
            tables = self._rope = rope_tables(self.config, int(positions[-1]) + 256)
        cos, sin = tables
        return cos[positions].astype(self.dtype), sin[positions].astype(self.dtype)

    def _norm_weight(self, path: str) -> np.ndarray:
        return dequantize(self.weights[path], self.dtype)

    def _matmul(self, x: np.ndarray, weight: PackedTensor, out: np.ndarray | None = None) -> np.ndarray:
        return matmul(x, weight, self.workers, out)

    def _normed(self, x: np.ndarray, path: str) -> np.ndarray:
        weight, eps = self._norm_weight(path), self.config.rms_norm_eps
        return by_rows(lambda rows: rms_norm(rows, weight, eps), x, workers=self.workers)

    def _begun(
        self,
        token_ids: np.ndarray,
        cache: Cache,
        forced: np.ndarray | None = None,
        capture: Collection[str] = (),
    ) -> _Text:
        """New tokens after those of a cache, embedded."""
        start = cache[0][0].shape[0]
        if start + len(token_ids) > self.max_context:
            raise ContextOverflowError(start + len(token_ids), self.max_context)
        x = dequantize(self.weights["embed_tokens"][token_ids], self.dtype)
        positions = np.arange(start, start + len(token_ids))
        text = _Text(x, positions, list(cache), forced, capture, self.workers.kept)
        text.record("inp_embd", None, x)
        return text

    def _layers(self, texts: Sequence[_Text], layers: Sequence[int]) -> None:
        """Takes texts through these decoder layers, side by side."""
        beside = self.workers.beside(len(texts) + 1)
        for index, layer in enumerate(layers):
            attention = [partial(self._attention_block, layer, index, text) for text in texts]
            calls: list[Callable[[], Any]] = [partial(self._projections, layer), *attention]
            projections, *_ = beside.map(lambda call: call(), calls)
            self._moe_block(layer, index, texts, projections)

    def _projections(self, layer: int) -> list[PackedTensor]:
        """The experts' gate, up and down, which may have to be read."""
        names = ("gate_proj", "up_proj", "down_proj")
        return [self.weights[f"layers.{layer}.mlp.experts.{name}"] for name in names]

    def _attention_block(self, layer: int, index: int, text: _Text) -> None:
        prefix, x, record = f"layers.{layer}", text.x, text.record
        heads = (len(text.positions), -1, self.config.head_dim)

        h = self._normed(x, f"{prefix}.input_layernorm")
        record("attn_norm", layer, h)
        projections = [self.weights[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"]
        q, k, v = (found.reshape(heads) for found in matmuls(h, projections, self.workers))
        record("Qcur", layer, q)
        record("Kcur", layer, k)
        record("Vcur", layer, v)
        q, k = self._normed(q, f"{prefix}.self_attn.q_norm"), self._normed(k, f"{prefix}.self_attn.k_norm")
        record("Qcur_normed", layer, q)
        record("Kcur_normed", layer, k)
        cos, sin = self._rope_at(text.positions)
        q, k = (by_rows(apply_rope, part, cos, sin, workers=self.workers) for part in (q, k))
        record("Qcur_rope", layer, q)
        record("Kcur_rope", layer, k)

        before = text.cache[index]
        keys, values = np.concatenate([before[0], k]), np.concatenate([before[1], v])
        if not text.is_last:
            text.cache[index] = keys, values
        out = attention(q, keys, values, text.positions, self.workers)
        record("kqv_out", layer, out)
        out = self._matmul(out.reshape(len(x), -1), self.weights[f"{prefix}.self_attn.o_proj"])
        record("attn_out", layer, out)
        text.x = x + out
        record("ffn_inp", layer, text.x)

    def _moe_block(
        self, layer: int, index: int, texts: Sequence[_Text], projections: Sequence[PackedTensor]
    ) -> None:
        width = self.config.moe_intermediate_size
        routed = [self._routed(layer, index, text) for text in texts]
        found = [ChosenExperts(h, ids, width, self.workers) for h, ids, _ in routed]
        fill_experts(found, projections, self.workers)
        for text, experts, (_, ids, weights) in zip(texts, found, routed, strict=True):
            record = text.record
            record("ffn_moe_gate", layer, experts.gate)
            record("ffn_moe_up", layer, experts.up)
            record("ffn_moe_swiglu", layer, experts.act)
            record("ffn_moe_down", layer, experts.down)
            out = experts.weighted_sum(weights, self.workers)
            record("ffn_moe_out", layer, out)
            text.x = text.x + out
            record("l_out", layer, text.x)
            text.chosen.append(ids)

    def _routed(self, layer: int, index: int, text: _Text) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The normed input of a text's experts, their ids and their weights."""
        h = self._normed(text.x, f"layers.{layer}.post_attention_layernorm")
        text.record("ffn_norm", layer, h)
        logits = self._matmul(h, self.weights[f"layers.{layer}.mlp.router"])
        forced = None if text.forced is None else text.forced[index]
        probs, ids, weights = choose_experts(logits, self.config.num_experts_per_tok, forced)
        text.record("ffn_moe_logits", layer, logits)
        text.record("ffn_moe_probs", layer, probs)
        text.record("ffn_moe_topk", layer, ids)
        text.record("ffn_moe_weights_norm", layer, weights)
        return h, ids, weights

    def _logits(self, text: _Text, out: np.ndarray | None = None) -> np.ndarray:
        """Logits [T, V], written to ``out`` too, if that is given."""
        h = self._normed(text.x, "norm")
        text.record("result_norm", None, h)
        weight = self.weights["lm_head" if "lm_head" in self.weights else "embed_tokens"]
        logits = self._matmul(h, weight, out if out is not None and out.dtype == self.dtype else None)
        text.record("result_output", None, logits)
        if out is not None and logits is not out:
            out[:] = logits
        return logits


@contextmanager
def _computing(runner: ReferenceRunner) -> Generator[None]:
    """As ``open_throughout``; no warning of what overflows: logits that are not finite are refused."""
    with open_throughout(runner), np.errstate(over="ignore", invalid="ignore"):
        yield


def _joined(logits: np.ndarray, parts: Sequence[_Text]) -> Forward:
    """What was found of one text, whose parts were run one after the other."""
    stages = {key: np.concatenate([part.stages[key] for part in parts]) for key in parts[0].stages}
    chosen = np.concatenate([np.stack(part.chosen) for part in parts], axis=1)
    return Forward(logits, chosen, stages)
