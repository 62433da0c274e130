"""Judges each stage of a forward pass on its own, from the inputs that the backend itself had.

To compare a backend's stage 300 with a reference's stage 300 is to see the sum
of all errors so far. Here the reference computes, in float64, what a stage
should have been **given the captured values that went into it**; what is left
is the error that this stage made. A fault shows in the stage that has it and
in no other, a large model can be judged by a few layers or a few rows of each
matrix, and by induction over the stages a pass with no departure is right.

How much error is allowed follows from arithmetic, not from taste. A product of
operands rounded to relative precision u, summed over K terms, has standard
deviation about ``u sqrt(2/3) sqrt(sum (x w)^2)``, and the sum in float32 adds
``2^-24 sqrt(K)`` of the same root. Every expectation carries such a sigma for
each element, and a departure is an error above ``MAX_SIGMAS`` of them: among
10^9 normal deviates the largest is expected at 6. Operands are allowed 1.5
times the root above: the 32 weights of a subblock take 16 values, so that their
roundings are not independent (8.9 of the plain sigmas were measured in 5
million products of the embedded model in bfloat16).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.model_source import ModelSource
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.core.runner import Forward
from qwen3_moe_jax.core.stages import INPUT_STAGES, LAYER_STAGES, OUTPUT_STAGES, STAGES, StageKey
from qwen3_moe_jax.machine.workers import ALONE, Workers
from qwen3_moe_jax.parity.metrics import nmse
from qwen3_moe_jax.reference.model import (
    ROWS_AT_A_TIME,
    SMALLEST_WEIGHT_SUM,
    apply_rope,
    rms_norm,
    silu,
    softmax,
)

MAX_SIGMAS = 8.0

ROUNDING = {"float64": 2.0**-24, "float32": 2.0**-24, "tensorfloat32": 2.0**-12, "float16": 2.0**-12}
ROUNDING["bfloat16"] = 2.0**-9
ROUNDING["int8"] = 1 / 254
"""Largest relative error of rounding to a dtype; float64 runs still read weights that are float32. In an
int8 KV cache it is relative to the largest value of a head's vector."""

FLOAT32 = ROUNDING["float32"]

INSIDE_EXPERTS = ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down")
"""Stages inside the expert layer, which a fused kernel does not show."""

FUSED_STAGES = tuple(name for name in STAGES if name not in INSIDE_EXPERTS)
"""What a capture asks for to see the expert layer as it runs in production."""

EXACT_STAGES = frozenset({"ffn_moe_topk"})


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


@dataclass(frozen=True)
class Judgement:
    """What one stage of one layer is found to be.

    Attributes:
      stage, layer: which.
      tensor: path of the parameter that the stage reads, or None.
      type: that parameter's quantization type, or None.
      sigmas: largest error, in standard deviations of the allowed rounding; inf if not finite.
      nmse: squared error over squared expectation, of the whole stage.
      nonfinite: how many values are NaN or infinite.
      token: position of the largest error.
      wrong: share of the judged values that depart.
      missing: positions of the prompt that the stage lacks.
    """

    stage: str
    layer: int | None
    tensor: str | None
    type: str | None
    sigmas: float
    nmse: float
    nonfinite: int
    token: int
    wrong: float
    missing: int = 0

    @property
    def departs(self) -> bool:
        """Whether the stage is wrong beyond rounding."""
        return self.missing > 0 or self.nonfinite > 0 or self.sigmas > MAX_SIGMAS

    @property
    def where(self) -> str:
        """The stage as llama.cpp writes it: "ffn_norm-12"."""
        return self.stage if self.layer is None else f"{self.stage}-{self.layer}"


def sample(size: int, most: int | None) -> np.ndarray | None:
    """``most`` of ``size`` indices, spread evenly with first and last; None means every one."""
    if most is None or most >= size:
        return None
    return np.unique(np.linspace(0, size - 1, most).astype(np.int64))


@dataclass
class StageJudge:
    """Expectations and judgements for one captured forward pass.

    Attributes:
      source: the true weights and config.
      facts: the runner's ``describe()``; ``compute_dtype`` sets what rounding is allowed.
      token_ids: the prompt.
      forward: the pass, with captured stages.
      layers: the layers that were run, in order.
      most_rows: rows of each matrix to judge; None judges all.
      most_tokens: positions of the prompt to judge; None judges all.
      workers: share the work on a matrix.
    """

    source: ModelSource
    facts: Mapping[str, object]
    token_ids: np.ndarray
    forward: Forward
    layers: Sequence[int] | None = None
    most_rows: int | None = None
    most_tokens: int | None = None
    workers: Workers = ALONE
    _tensors: dict[str, PackedTensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.config = self.source.config
        self.token_ids = np.asarray(self.token_ids)
        picked = sample(len(self.token_ids), self.most_tokens)
        self.tokens = np.arange(len(self.token_ids)) if picked is None else picked
        self.layers = tuple(range(self.config.num_hidden_layers) if self.layers is None else self.layers)
        self.operand = ROUNDING[str(self.facts["compute_dtype"])]
        self.cache_rounding = ROUNDING[str(self.facts.get("cache_dtype", "float32"))]

    # What is judged

    def keys(self) -> list[StageKey]:
        """The captured stages, in the order of the forward pass."""
        order = [(s.name, None) for s in INPUT_STAGES]
        order += [(s.name, layer) for layer in self.layers for s in LAYER_STAGES]
        order += [(s.name, None) for s in OUTPUT_STAGES]
        return [key for key in order if key in self.forward.stages]

    def judgements(self) -> Iterator[Judgement]:
        """Judges every captured stage, in the order of the forward pass."""
        for key in self.keys():
            yield self.judge(key)

    def first_departure(self) -> Judgement | None:
        """The first stage that is wrong beyond rounding, or None."""
        return next((j for j in self.judgements() if j.departs), None)

    def judge(self, key: StageKey) -> Judgement:
        """Holds one captured stage against what its inputs make it."""
        name, layer = key
        tensor = self.tensor_path(key)
        actual = self.forward.stages[key]
        facts = (name, layer, tensor, self.source.types[tensor].name if tensor else None)
        missing = len(self.token_ids) - len(actual)
        if missing:
            return Judgement(*facts, np.inf, np.inf, 0, len(actual), 1.0, missing)
        nonfinite = int(np.size(actual) - np.isfinite(actual).sum())
        with np.errstate(invalid="ignore", over="ignore"):
            expected = self.expectation(key)
            sigmas = self.sigmas(key, expected)
        token = int(self.tokens[np.argmax(sigmas.reshape(len(sigmas), -1).max(axis=1))])
        error = self._nmse(key, expected)
        wrong = float(np.mean(sigmas > MAX_SIGMAS))
        return Judgement(*facts, float(sigmas.max()), error, nonfinite, token, wrong)

    def sigmas(self, key: StageKey, expected: Expectation) -> np.ndarray:
        """Errors of a captured stage in standard deviations; inf where it is not finite."""
        actual = self.actual(key, expected)
        if key[0] in EXACT_STAGES:
            return np.where(self._valid_choice(key), 0.0, np.inf)
        error = np.abs(actual - expected.value)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            sigmas = np.where(error == 0, 0.0, error / np.maximum(expected.sigma, np.finfo(np.float64).tiny))
        return np.where(np.isfinite(actual) & np.isfinite(expected.value), sigmas, np.inf)

    def actual(self, key: StageKey, expected: Expectation) -> np.ndarray:
        """The captured values that ``expected`` speaks of."""
        value = self.value(*key)
        if expected.channels is None:
            return value.reshape(expected.value.shape)
        shape = (*expected.value.shape[:-1], -1)
        return value.reshape(shape)[..., expected.channels]

    def tensor_path(self, key: StageKey) -> str | None:
        """Path of the parameter that a stage reads, or None."""
        name, layer = key
        relative = STAGES[name].tensor
        if relative is None or layer is not None:
            return relative and f"layers.{layer}.{relative}"
        return "embed_tokens" if relative == "lm_head" and self.config.tie_word_embeddings else relative

    def _nmse(self, key: StageKey, expected: Expectation) -> float:
        if key[0] in EXACT_STAGES:
            return 0.0
        return float(nmse(self.actual(key, expected).reshape(1, -1), expected.value.reshape(1, -1))[0])

    # What should be

    def expectation(self, key: StageKey) -> Expectation:
        """What the stage should be, given the captured stages before it."""
        name, layer = key
        return _EXPECTATIONS[name](self, layer)

    def value(self, name: str, layer: int | None) -> np.ndarray:
        """A captured stage in float64, at the judged positions."""
        return self.forward.stages[name, layer][self.tokens].astype(np.float64)

    def chosen(self, layer: int) -> np.ndarray:
        """The experts that the runner chose, at the judged positions."""
        return self.forward.stages["ffn_moe_topk", layer][self.tokens]

    def layer_input(self, layer: int) -> np.ndarray:
        """What goes into a layer: the output of the layer before it, or the embedding."""
        before = self.layers.index(layer) - 1
        return self.value("inp_embd", None) if before < 0 else self.value("l_out", self.layers[before])

    def weight(self, path: str) -> PackedTensor:
        """A tensor of the source; those of one layer are kept until another layer is asked for."""
        if path not in self._tensors:
            layer = path.split(".")[:2]
            self._tensors = {p: t for p, t in self._tensors.items() if p.split(".")[:2] == layer}
            self._tensors[path] = self.source.tensor(path)
        return self._tensors[path]

    def norm(self, x: np.ndarray, path: str) -> Expectation:
        """RMS norm of x with the vector at ``path``."""
        weight = dequantize(self.weight(path)).astype(np.float64)
        value = rms_norm(x, weight, self.config.rms_norm_eps)
        return Expectation(value, FLOAT32 * (4 + x.shape[-1] ** 0.5 / 2) * np.abs(value))

    def matmul(self, x: np.ndarray, weight: PackedTensor, operand: float | None = None) -> Expectation:
        """x [T, K] times the transpose of weight [N, K]."""
        channels = sample(weight.shape[0], self.most_rows)
        rows = weight if channels is None else weight[channels]
        step = ROWS_AT_A_TIME // self.workers.count

        def part(start: int) -> tuple[np.ndarray, np.ndarray]:
            return self._dense(x, rows[start : start + step], operand)

        values, sigmas = zip(*self.workers.map(part, range(0, rows.shape[0], step)), strict=True)
        return Expectation(np.concatenate(values, -1), np.concatenate(sigmas, -1), channels)

    def product_sigma(self, x2: np.ndarray, w2: np.ndarray, operand: float | None = None) -> np.ndarray:
        """Standard deviation of the rounding of ``x @ w.T``, from the squares of x [T, K] and w [N, K]."""
        operand = self.operand if operand is None else operand
        rounding = 1.5 * operand * (2 / 3) ** 0.5 if operand > FLOAT32 else 0.0
        power = x2.astype(np.float32) @ w2.astype(np.float32).T
        return (rounding + FLOAT32 * x2.shape[-1] ** 0.5) * np.sqrt(power.astype(np.float64))

    def expert_matmul(self, x: np.ndarray, path: str, layer: int) -> Expectation:
        """x [T, X, K] times the matrices of the experts that the runner chose."""
        ids, weight = self.chosen(layer), self.weight(path)
        channels = sample(weight.shape[1], self.most_rows)
        count = weight.shape[1] if channels is None else len(channels)
        value, sigma = np.empty((*ids.shape, count)), np.empty((*ids.shape, count))
        for expert in np.unique(ids):
            matrix = weight[int(expert)]
            dense = dequantize(matrix if channels is None else matrix[channels]).astype(np.float64)
            rows = x[ids == expert]
            value[ids == expert] = rows @ dense.T
            sigma[ids == expert] = self.product_sigma(rows * rows, dense * dense)
        return Expectation(value, sigma, channels)

    def rope(
        self,
        name: str,
        layer: int,
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
        layer: int,
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
        scale = size**-0.5 if scale is None else scale
        future = np.arange(len(k))[None, :] > self.tokens[:, None] + shift
        value, sigma = np.empty_like(q), np.empty_like(q)
        for head in range(q.shape[1]):
            keys, values = k[:, kv_head(head)], v[:, kv_head(head)]
            scores = np.where(future, -np.inf, q[:, head] @ keys.T * scale)
            probs = softmax(scores)
            value[:, head] = probs @ values
            root = np.where(future, 0, np.sqrt((q[:, head] ** 2) @ (self._cached_size(keys) ** 2).T) * scale)
            largest = np.abs(np.where(future, 0, scores)).max(axis=-1)
            error = self.cache_rounding * size**0.5 * root.max(axis=-1) + FLOAT32 * (
                largest + 4 + len(k) ** 0.5
            )
            sigma[:, head] = (error + self.cache_rounding)[:, None] * (probs @ self._cached_size(values))
        return Expectation(value, sigma)

    def _cached_size(self, vectors: np.ndarray) -> np.ndarray:
        """What the rounding of cached values [S, H] is relative to."""
        size = np.abs(vectors)
        if self.facts.get("cache_dtype") != "int8":
            return size
        return np.broadcast_to(size.max(axis=-1, keepdims=True), size.shape)

    def sum(self, a: np.ndarray, b: np.ndarray) -> Expectation:
        """A residual connection."""
        return Expectation(a + b, FLOAT32 * (np.abs(a) + np.abs(b)))

    def probs(self, layer: int) -> Expectation:
        """Softmax over all experts."""
        logits = self.value("ffn_moe_logits", layer)
        value = softmax(logits)
        depth = logits.max(axis=-1, keepdims=True) - logits
        return Expectation(value, FLOAT32 * (4 + logits.shape[-1] ** 0.5 + depth) * value)

    def choice(self, layer: int) -> Expectation:
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
        return in_range & distinct[:, None] & (chosen >= others.max(axis=-1, keepdims=True) * ties)

    def expert_weights(self, layer: int) -> Expectation:
        """The chosen probabilities, renormalized."""
        ids = self.chosen(layer)
        chosen = np.take_along_axis(self.value("ffn_moe_probs", layer), ids, axis=-1)
        value = chosen / np.maximum(chosen.sum(-1, keepdims=True), SMALLEST_WEIGHT_SUM)
        return Expectation(value, 4 * FLOAT32 * value)

    def swiglu(self, layer: int) -> Expectation:
        gate, up = self.value("ffn_moe_gate", layer), self.value("ffn_moe_up", layer)
        value = silu(gate) * up
        return Expectation(value, FLOAT32 * (4 + np.abs(gate)) * np.abs(value))

    def experts_input(self, layer: int) -> np.ndarray:
        """ffn_norm, once for each chosen expert: [T, X, D]."""
        ids = self.chosen(layer)
        return np.repeat(self.value("ffn_norm", layer)[:, None, :], ids.shape[1], axis=1)

    def moe_out(self, layer: int) -> Expectation:
        """The experts' weighted sum: of the captured ``ffn_moe_down``, or of all that a fused op did."""
        weights = self.value("ffn_moe_weights_norm", layer)
        if ("ffn_moe_down", layer) not in self.forward.stages:
            return self._fused_moe_out(layer, weights)
        down = self.value("ffn_moe_down", layer)
        value = np.einsum("txd,tx->td", down, weights)
        spread = np.einsum("txd,tx->td", np.abs(down), np.abs(weights))
        return Expectation(value, FLOAT32 * weights.shape[1] ** 0.5 * spread)

    def _fused_moe_out(self, layer: int, weights: np.ndarray) -> Expectation:
        """The whole expert layer from ``ffn_norm``; roundings inside it add up as variances."""
        prefix = f"layers.{layer}.mlp.experts."
        gate_proj, up_proj, down_proj = (
            self.weight(prefix + name) for name in ("gate_proj", "up_proj", "down_proj")
        )
        ids, x = self.chosen(layer), self.value("ffn_norm", layer)
        channels = sample(down_proj.shape[1], self.most_rows)
        count = down_proj.shape[1] if channels is None else len(channels)
        value, variance = np.zeros((len(x), count)), np.zeros((len(x), count))

        def of_expert(expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tokens, choices = np.nonzero(ids == expert)
            gate, gate_sigma = self._dense(x[tokens], gate_proj[int(expert)])
            up, up_sigma = self._dense(x[tokens], up_proj[int(expert)])
            act = silu(gate) * up
            slope = 1.1 * np.abs(up)  # |silu'| is at most 1.0999
            act_variance = (slope * gate_sigma) ** 2 + (silu(gate) * up_sigma) ** 2
            act_variance += (FLOAT32 * (4 + np.abs(gate)) * act) ** 2
            matrix = down_proj[int(expert)]
            dense = dequantize(matrix if channels is None else matrix[channels]).astype(np.float64)
            weight = weights[tokens, choices][:, None]
            own = self.product_sigma(act * act, dense * dense) ** 2
            return tokens, weight * (act @ dense.T), weight**2 * (own + act_variance @ (dense * dense).T)

        for tokens, its_value, its_variance in self.workers.map(of_expert, np.unique(ids)):
            value[tokens] += its_value
            variance[tokens] += its_variance
        spread = FLOAT32 * ids.shape[1] ** 0.5 * np.abs(value)
        return Expectation(value, np.sqrt(variance) + spread, channels)

    def _dense(
        self, x: np.ndarray, weight: PackedTensor, operand: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Product and sigma with every row of one matrix."""
        dense = dequantize(weight).astype(np.float64)
        return x @ dense.T, self.product_sigma(x * x, dense * dense, operand)

    def embedding(self) -> Expectation:
        value = dequantize(self.weight("embed_tokens")[self.token_ids[self.tokens]]).astype(np.float64)
        return Expectation(value, FLOAT32 * np.abs(value))


def _matrix(stage: str, name: str) -> Callable[[StageJudge, int | None], Expectation]:
    """Expectation of a product of the captured ``stage`` with the matrix of the stage ``name``."""

    def expect(judge: StageJudge, layer: int | None) -> Expectation:
        x = judge.value(stage, layer)
        operand = FLOAT32 if name == "ffn_moe_logits" else None  # the router computes in float32
        weight = judge.weight(judge.tensor_path((name, layer)))
        return judge.matmul(x.reshape(len(x), -1), weight, operand)

    return expect


def _norm(stage: str, name: str) -> Callable[[StageJudge, int | None], Expectation]:
    return lambda judge, layer: judge.norm(judge.value(stage, layer), judge.tensor_path((name, layer)))


def _experts(name: str) -> Callable[[StageJudge, int | None], Expectation]:
    return lambda judge, layer: judge.expert_matmul(
        judge.value("ffn_moe_swiglu", layer) if name == "ffn_moe_down" else judge.experts_input(layer),
        judge.tensor_path((name, layer)),
        layer,
    )


_EXPECTATIONS: dict[str, Callable[[StageJudge, int | None], Expectation]] = {
    "inp_embd": lambda judge, _: judge.embedding(),
    "attn_norm": lambda judge, layer: judge.norm(
        judge.layer_input(layer), judge.tensor_path(("attn_norm", layer))
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
