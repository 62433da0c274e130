"""What each stage should be in float64, given the stages captured before it, and how far rounding may go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3_moe_jax.convert.config import MIN_WEIGHT_SUM, Qwen3MoeConfig
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.core.runner import Forward
from qwen3_moe_jax.core.stages import STAGES, StageKey
from qwen3_moe_jax.machine.threads import ALONE, Workers
from qwen3_moe_jax.parity.noise import (
    FLOAT32,
    MAX_SIGMAS,
    ROUNDING,
    SMALLEST_NORMAL,
    swiglu_sigma,
    within_float32,
)
from qwen3_moe_jax.parity.products import MAX_SILU_SLOPE, coherent_spread, products
from qwen3_moe_jax.reference.ops import (
    ROWS_AT_A_TIME,
    apply_rope,
    rms_norm,
    silu,
    softmax,
)


@dataclass(frozen=True)
class Expectation:
    """What a stage should be, given its inputs.

    Attributes:
      value: float64 [T, ...].
      sigma: float64, as value: one standard deviation of the rounding that is allowed.
      channels: which of the flattened last axes are judged, or None for all.
    """

    value: np.ndarray
    sigma: np.ndarray
    channels: np.ndarray | None = None


def sample(size: int, limit: int | None) -> np.ndarray | None:
    """``limit`` of ``size`` indices, spread evenly with first and last; None means every one."""
    if limit is None or limit >= size:
        return None
    return np.unique(np.linspace(0, size - 1, limit).astype(np.int64))


@dataclass
class Expectations:
    """Expectations of the stages of one captured forward pass.

    Attributes:
      source: the true weights and config.
      facts: the runner's ``describe()``; ``compute_dtype`` sets what rounding is allowed.
      token_ids: the prompt.
      forward: the pass, with captured stages.
      layers: the layers that were run, in order; none given are all.
      max_rows: rows of each matrix to judge; None judges all.
      max_tokens: positions of the prompt to judge; None judges all.
      workers: share the work on a matrix.
      careful: allow what ``noise.careful_sigma`` does, which takes longer.
      tensors: what gives the tensors, if not the source.
    """

    source: ModelSource
    facts: Mapping[str, object]
    token_ids: np.ndarray
    forward: Forward
    layers: Sequence[int] = ()
    max_rows: int | None = None
    max_tokens: int | None = None
    workers: Workers = ALONE
    careful: bool = False
    tensors: Mapping[str, PackedTensor] | None = None
    _tensors: dict[str, PackedTensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.config = self.source.config
        self.token_ids = np.asarray(self.token_ids)
        picked = sample(len(self.token_ids), self.max_tokens)
        self.tokens = np.arange(len(self.token_ids)) if picked is None else picked
        self.layers = tuple(self.layers or range(self.config.num_hidden_layers))
        self.operand = ROUNDING[str(self.facts["compute_dtype"])]
        self.cache_rounding = ROUNDING[str(self.facts.get("cache_dtype", "float32"))]

    def tensor_path(self, key: StageKey) -> str | None:
        """Path of the parameter that a stage reads, or None."""
        name, layer = key
        relative = STAGES[name].tensor
        if relative is None or layer is not None:
            return relative and f"layers.{layer}.{relative}"
        return "embed_tokens" if relative == "lm_head" and self.config.tie_word_embeddings else relative

    def parameter(self, key: StageKey) -> str:
        """Path of the parameter of a stage that reads one."""
        path = self.tensor_path(key)
        assert path is not None, f"{key[0]} reads no parameter"
        return path

    def expectation(self, key: StageKey) -> Expectation:
        """What the stage should be, given the captured stages before it."""
        name, layer = key
        return _EXPECTATIONS[name](self, layer)

    def value(self, name: str, layer: int | None) -> np.ndarray:
        """A captured stage in float64, at the judged positions."""
        return self.forward.stages[name, layer][self.tokens].astype(np.float64)

    def chosen(self, layer: int | None) -> np.ndarray:
        """The experts that the runner chose, at the judged positions."""
        return self.forward.stages["ffn_moe_topk", layer][self.tokens]

    def layer_input(self, layer: int | None) -> np.ndarray:
        """What goes into a layer: the output of the layer before it, or the embedding."""
        before = next(i for i, number in enumerate(self.layers) if number == layer) - 1
        return self.value("inp_embd", None) if before < 0 else self.value("l_out", self.layers[before])

    def weight(self, path: str) -> PackedTensor:
        """A tensor of the source; those of one layer are kept until another layer is asked for."""
        if path not in self._tensors:
            layer = path.split(".")[:2]
            self._tensors = {p: t for p, t in self._tensors.items() if p.split(".")[:2] == layer}
            self._tensors[path] = self.source.tensor(path) if self.tensors is None else self.tensors[path]
        return self._tensors[path]

    def norm(self, x: np.ndarray, path: str) -> Expectation:
        """RMS norm of x with the vector at ``path``."""
        weight = dequantize(self.weight(path)).astype(np.float64)
        value = rms_norm(x, weight, self.config.rms_norm_eps)
        power = np.sum(x * x, axis=-1, keepdims=True)
        scale = 1 / np.sqrt(power / x.shape[-1] + self.config.rms_norm_eps)
        flushed = SMALLEST_NORMAL * (1 + np.abs(weight) * scale + np.abs(x) * scale)
        sigma = FLOAT32 * (4 + x.shape[-1] ** 0.5 / 2) * np.abs(value) + flushed
        return Expectation(value, within_float32(sigma, power))

    def matmul(self, x: np.ndarray, weight: PackedTensor, operand: float | None = None) -> Expectation:
        """x [T, K] times the transpose of weight [N, K]."""
        channels = sample(weight.shape[0], self.max_rows)
        rows = weight if channels is None else weight[channels]
        stride = ROWS_AT_A_TIME // self.workers.count

        def part(start: int) -> tuple[np.ndarray, np.ndarray]:
            return self._dense(x, rows[start : start + stride], operand)

        values, sigmas = zip(*self.workers.map(part, range(0, rows.shape[0], stride)), strict=True)
        return Expectation(np.concatenate(values, -1), np.concatenate(sigmas, -1), channels)

    def expert_matmul(self, x: np.ndarray, path: str, layer: int | None) -> Expectation:
        """x [T, X, K] times the matrices of the experts that the runner chose."""
        ids, weight = self.chosen(layer), self.weight(path)
        channels = sample(weight.shape[1], self.max_rows)
        count = weight.shape[1] if channels is None else len(channels)
        value, sigma = np.empty((*ids.shape, count)), np.empty((*ids.shape, count))
        for expert in np.unique(ids):
            matrix = weight[int(expert)]
            rows = matrix if channels is None else matrix[channels]
            value[ids == expert], sigma[ids == expert] = self._dense(x[ids == expert], rows)
        return Expectation(value, sigma, channels)

    def rope(
        self,
        name: str,
        layer: int | None,
        positions: np.ndarray | None = None,
        *,
        config: Qwen3MoeConfig | None = None,
        channels: np.ndarray | None = None,
    ) -> Expectation:
        """RoPE of the captured normed queries or keys.

        Args:
          name: the stage before it.
          layer: which.
          positions: of the judged tokens, if other than they are; negative ones turn backwards.
          config: another config to take angles from.
          channels: an order of the head's channels in which pairs are (j, j + H/2).
        """
        x = self.value(name, layer)
        positions = self.tokens if positions is None else positions
        channels = np.arange(x.shape[-1]) if channels is None else channels
        cos, sin = rope_tables(config or self.config, int(np.abs(positions).max()) + 1)
        cos = cos[np.abs(positions)].astype(np.float64)
        sin = sin[np.abs(positions)].astype(np.float64) * np.sign(positions)[:, None]
        value, ordered = np.empty_like(x), x[..., channels]
        value[..., channels] = apply_rope(ordered, cos, sin)
        half = x.shape[-1] // 2
        pair, sigma = np.hypot(ordered[..., :half], ordered[..., half:]), np.empty_like(x)
        sigma[..., channels] = 8 * FLOAT32 * np.concatenate([pair, pair], axis=-1)
        return Expectation(value, sigma)

    def attention(
        self,
        layer: int | None,
        kv_head: Callable[[int], int] | None = None,
        shift: int = 0,
        scale: float | None = None,
    ) -> Expectation:
        """Causal attention over the captured queries, keys and values.

        Args:
          layer: which.
          kv_head: KV head of a query head, if another than ``n // (N / K)``.
          shift: positions after its own that a query sees.
          scale: of the scores, if another than ``1 / sqrt(H)``.
        """
        q = self.value("Qcur_rope", layer)
        k, v = (self.forward.stages[name, layer].astype(np.float64) for name in ("Kcur_rope", "Vcur"))
        groups, size = q.shape[1] // k.shape[1], q.shape[-1]
        kv_head = kv_head or (lambda head: head // groups)
        factor = size**-0.5 if scale is None else scale
        future = np.arange(len(k))[None, :] > self.tokens[:, None] + shift
        value, sigma = np.empty_like(q), np.empty_like(q)
        for head in range(q.shape[1]):
            keys, values = k[:, kv_head(head)], v[:, kv_head(head)]
            scores = np.where(future, -np.inf, q[:, head] @ keys.T * factor)
            probs = softmax(scores)
            value[:, head] = probs @ values
            root = np.where(future, 0, np.sqrt((q[:, head] ** 2) @ (self._cached_size(keys) ** 2).T) * factor)
            largest = np.abs(np.where(future, 0, scores)).max(axis=-1)
            error = self.cache_rounding * size**0.5 * root.max(axis=-1) + FLOAT32 * (
                largest + 4 + len(k) ** 0.5
            )
            # Scores whose error is not small may give any other key the weight.
            likely = np.minimum(probs * np.exp(np.minimum(2 * MAX_SIGMAS * error, 700.0))[:, None], 1.0)
            spread = (error + self.cache_rounding)[:, None] * (likely @ self._cached_size(values))
            sigma[:, head] = within_float32(spread, root.max(axis=-1, keepdims=True) * size / factor)
        return Expectation(value, sigma)

    def _cached_size(self, vectors: np.ndarray) -> np.ndarray:
        """What the rounding of cached values [S, H] is relative to."""
        size = np.abs(vectors)
        if self.facts.get("cache_dtype") != "int8":
            return size
        return np.broadcast_to(size.max(axis=-1, keepdims=True), size.shape)

    def sum(self, a: np.ndarray, b: np.ndarray) -> Expectation:
        """A residual connection."""
        size = np.abs(a) + np.abs(b)
        return Expectation(a + b, within_float32(FLOAT32 * size, size))

    def probs(self, layer: int | None) -> Expectation:
        """Softmax over all experts."""
        logits = self.value("ffn_moe_logits", layer)
        value = softmax(logits)
        depth = logits.max(axis=-1, keepdims=True) - logits
        return Expectation(value, FLOAT32 * (4 + logits.shape[-1] ** 0.5 + depth) * value)

    def choice(self, layer: int | None) -> Expectation:
        """The most probable experts (for show: validity is judged by ``_valid_choice``)."""
        probs = self.value("ffn_moe_probs", layer)
        ids = np.argsort(-probs, axis=-1, kind="stable")[:, : self.config.num_experts_per_tok]
        return Expectation(ids.astype(np.float64), np.zeros(ids.shape))

    def _valid_choice(self, key: StageKey) -> np.ndarray:
        """Whether each token's experts are distinct, in range and no less probable than any other: [T, X]."""
        probs, ids = self.value("ffn_moe_probs", key[1]), self.chosen(key[1])
        in_range = (ids >= 0) & (ids < probs.shape[-1])
        ids = np.where(in_range, ids, 0)
        distinct = np.array([len(set(row)) == len(row) for row in ids.tolist()])
        others = probs.copy()
        np.put_along_axis(others, ids, -np.inf, axis=-1)
        chosen = np.take_along_axis(probs, ids, axis=-1)
        ties = 1 - 4 * FLOAT32
        floor = others.max(axis=-1, keepdims=True) * ties - SMALLEST_NORMAL
        return in_range & distinct[:, None] & (chosen >= floor)

    def expert_weights(self, layer: int | None) -> Expectation:
        """The chosen probabilities, renormalized."""
        ids = self.chosen(layer)
        chosen = np.take_along_axis(self.value("ffn_moe_probs", layer), ids, axis=-1)
        value = chosen / np.maximum(chosen.sum(-1, keepdims=True), MIN_WEIGHT_SUM)
        return Expectation(value, 4 * FLOAT32 * value)

    def swiglu(self, layer: int | None) -> Expectation:
        gate, up = self.value("ffn_moe_gate", layer), self.value("ffn_moe_up", layer)
        value = silu(gate) * up
        return Expectation(value, swiglu_sigma(gate, up))

    def experts_input(self, layer: int | None) -> np.ndarray:
        """ffn_norm, once for each chosen expert: [T, X, D]."""
        ids = self.chosen(layer)
        return np.repeat(self.value("ffn_norm", layer)[:, None, :], ids.shape[1], axis=1)

    def moe_out(self, layer: int | None) -> Expectation:
        """The experts' weighted sum: of the captured ``ffn_moe_down``, or of all that a fused op did."""
        weights = self.value("ffn_moe_weights_norm", layer)
        if ("ffn_moe_down", layer) not in self.forward.stages:
            return self._fused_moe_out(layer, weights)
        down = self.value("ffn_moe_down", layer)
        value = np.einsum("txd,tx->td", down, weights)
        spread = np.einsum("txd,tx->td", np.abs(down), np.abs(weights))
        return Expectation(value, within_float32(FLOAT32 * weights.shape[1] ** 0.5 * spread, spread))

    def _fused_moe_out(self, layer: int | None, weights: np.ndarray) -> Expectation:
        """The whole expert layer from ``ffn_norm``; roundings inside it add up as variances."""
        prefix = f"layers.{layer}.mlp.experts."
        gate_proj, up_proj, down_proj = (
            self.weight(prefix + name) for name in ("gate_proj", "up_proj", "down_proj")
        )
        ids, x = self.chosen(layer), self.value("ffn_norm", layer)
        channels = sample(down_proj.shape[1], self.max_rows)
        count = down_proj.shape[1] if channels is None else len(channels)
        value, variance = np.zeros((len(x), count)), np.zeros((len(x), count))

        def of_expert(expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tokens, choices = np.nonzero(ids == expert)
            matrix = down_proj[int(expert)]
            down, its_variance = self._expert(
                x[tokens],
                gate_proj[int(expert)],
                up_proj[int(expert)],
                matrix if channels is None else matrix[channels],
            )
            weight = weights[tokens, choices][:, None]
            return tokens, weight * down, weight**2 * its_variance

        for tokens, its_value, its_variance in self.workers.map(of_expert, np.unique(ids)):
            value[tokens] += its_value
            variance[tokens] += its_variance
        spread = FLOAT32 * ids.shape[1] ** 0.5 * np.abs(value)
        return Expectation(value, np.sqrt(variance) + spread, channels)

    def _expert(
        self, x: np.ndarray, gate_proj: PackedTensor, up_proj: PackedTensor, down_proj: PackedTensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output and variance of one expert for x [T, D]."""
        gate, gate_sigma = self._dense(x, gate_proj)
        up, up_sigma = self._dense(x, up_proj)
        act = silu(gate) * up
        slope = MAX_SILU_SLOPE * np.abs(up)
        variance = (slope * gate_sigma) ** 2 + (silu(gate) * up_sigma) ** 2 + swiglu_sigma(gate, up) ** 2
        down, own, spread = products(act, down_proj, self.operand, careful=self.careful, variance=variance)
        if self.careful:  # equal rows of gate and up have equal errors
            matrices = gate_proj, up_proj, down_proj
            spread = coherent_spread(x, matrices, (gate, up), self.operand) + spread
        return down, own**2 + spread

    def _dense(
        self, x: np.ndarray, weight: PackedTensor, operand: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Product and sigma with every row of one matrix."""
        operand = self.operand if operand is None else operand
        return products(x, weight, operand, careful=self.careful)[:2]

    def embedding(self) -> Expectation:
        value = dequantize(self.weight("embed_tokens")[self.token_ids[self.tokens]]).astype(np.float64)
        return Expectation(value, FLOAT32 * np.abs(value))


def _matrix(stage: str, name: str) -> Callable[[Expectations, int | None], Expectation]:
    """Expectation of a product of the captured ``stage`` with the matrix of the stage ``name``."""

    def expect(judge: Expectations, layer: int | None) -> Expectation:
        x = judge.value(stage, layer)
        operand = FLOAT32 if name == "ffn_moe_logits" else None  # the router computes in float32
        weight = judge.weight(judge.parameter((name, layer)))
        return judge.matmul(x.reshape(len(x), -1), weight, operand)

    return expect


def _norm(stage: str, name: str) -> Callable[[Expectations, int | None], Expectation]:
    return lambda judge, layer: judge.norm(judge.value(stage, layer), judge.parameter((name, layer)))


def _experts(name: str) -> Callable[[Expectations, int | None], Expectation]:
    return lambda judge, layer: judge.expert_matmul(
        judge.value("ffn_moe_swiglu", layer) if name == "ffn_moe_down" else judge.experts_input(layer),
        judge.parameter((name, layer)),
        layer,
    )


_EXPECTATIONS: dict[str, Callable[[Expectations, int | None], Expectation]] = {
    "inp_embd": lambda judge, _: judge.embedding(),
    "attn_norm": lambda judge, layer: judge.norm(
        judge.layer_input(layer), judge.parameter(("attn_norm", layer))
    ),
    "Qcur": _matrix("attn_norm", "Qcur"),
    "Kcur": _matrix("attn_norm", "Kcur"),
    "Vcur": _matrix("attn_norm", "Vcur"),
    "Qcur_normed": _norm("Qcur", "Qcur_normed"),
    "Kcur_normed": _norm("Kcur", "Kcur_normed"),
    "Qcur_rope": lambda judge, layer: judge.rope("Qcur_normed", layer),
    "Kcur_rope": lambda judge, layer: judge.rope("Kcur_normed", layer),
    "kqv_out": lambda judge, layer: judge.attention(layer),
    "attn_out": _matrix("kqv_out", "attn_out"),
    "ffn_inp": lambda judge, layer: judge.sum(judge.layer_input(layer), judge.value("attn_out", layer)),
    "ffn_norm": _norm("ffn_inp", "ffn_norm"),
    "ffn_moe_logits": _matrix("ffn_norm", "ffn_moe_logits"),
    "ffn_moe_probs": lambda judge, layer: judge.probs(layer),
    "ffn_moe_topk": lambda judge, layer: judge.choice(layer),
    "ffn_moe_weights_norm": lambda judge, layer: judge.expert_weights(layer),
    "ffn_moe_gate": _experts("ffn_moe_gate"),
    "ffn_moe_up": _experts("ffn_moe_up"),
    "ffn_moe_swiglu": lambda judge, layer: judge.swiglu(layer),
    "ffn_moe_down": _experts("ffn_moe_down"),
    "ffn_moe_out": lambda judge, layer: judge.moe_out(layer),
    "l_out": lambda judge, layer: judge.sum(judge.value("ffn_inp", layer), judge.value("ffn_moe_out", layer)),
    "result_norm": lambda judge, _: judge.norm(judge.value("l_out", judge.layers[-1]), "norm"),
    "result_output": _matrix("result_norm", "result_output"),
}
