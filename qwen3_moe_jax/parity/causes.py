"""Why a stage departs: known mistakes are made on purpose, and one that gives the same numbers is named.

A stage's inputs are known, so a suspicion can be tested: compute the stage with
RoPE's positions one too large, say, and see whether that is what the backend
has. What matches is named as the cause; what matches nothing is described by
where it is wrong (rows, experts, tokens) and by how much.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.fused import with_parts
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.core.stages import INSIDE_EXPERTS, STAGES, StageKey
from qwen3_moe_jax.parity.expectations import Expectation
from qwen3_moe_jax.parity.judge import Judgement, StageJudge
from qwen3_moe_jax.parity.noise import MAX_SIGMAS, ROUNDING
from qwen3_moe_jax.reference.ops import rms_norm, softmax

MATCHING_SHARE = 0.99
"""Share of the values that a suspicion has to explain."""

FEW_ROWS = 0.1
"""Rows of a matrix below this share are named one by one."""

OTHER_THETAS = (1e4, 5e5, 1e6, 5e6, 1e7)

MAX_CANDIDATE_EXPERTS = 256

SUBBLOCK_SIZES = {kind: form.subblock for kind, form in FORMATS.items() if form.subblock > 1}
"""Weights that share a scale."""


@dataclass(frozen=True)
class Cause:
    """What is wrong with a stage.

    Attributes:
      words: one sentence part.
      proven: whether a suspicion gave the same numbers.
      expert: the expert whose rows are wrong, if it is one (or the first of a pair).
      rows: rows of the matrix that are wrong, if they are few.
    """

    words: str
    proven: bool = False
    expert: int | None = None
    rows: tuple[int, ...] = ()


def explain(judge: StageJudge, judgement: Judgement) -> Cause:
    """The likely cause of a departure."""
    if judgement.missing:
        return _missing(judge, judgement)
    key = (judgement.stage, judgement.layer)
    for finder in (_known_mistake, _misread, _wrong_experts, _wrong_rows, _coarser_rounding):
        cause = finder(judge, key)
        if cause:
            return cause
    return _description(judge, judgement)


def _missing(judge: StageJudge, judgement: Judgement) -> Cause:
    total = len(judge.token_ids)
    if judgement.missing < 0:
        return Cause(f"there are {-judgement.missing} positions more than the prompt's {total}", proven=True)
    return Cause(
        f"only {total - judgement.missing} of {total} positions were computed: "
        "the last chunk of the prompt was dropped",
        proven=True,
    )


def _matches(judge: StageJudge, key: StageKey, suspicion: Expectation) -> bool:
    """Whether a stage is what a suspicion makes it."""
    sigmas = judge.sigmas(key, suspicion)
    comparable = np.isfinite(suspicion.value)
    return bool(comparable.any() and (sigmas[comparable] <= MAX_SIGMAS).mean() >= MATCHING_SHARE)


# Mistakes of code


def _known_mistake(judge: StageJudge, key: StageKey) -> Cause | None:
    for words, suspicion in _MISTAKES.get(key[0], lambda judge, key: iter(()))(judge, key):
        if suspicion is not None and _matches(judge, key, suspicion):
            return Cause(words, proven=True)
    return None


Suspicions = Iterator[tuple[str, Expectation | None]]


def _loose(value: np.ndarray, like: Expectation | None = None) -> Expectation:
    """A suspicion with the rounding of float32 or of the true expectation."""
    floor = 16 * ROUNDING["float32"] * np.abs(value)
    return Expectation(value, floor if like is None else np.maximum(floor, like.sigma))


def _norm_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    name, layer = key
    before = {"Qcur_normed": "Qcur", "Kcur_normed": "Kcur", "ffn_norm": "ffn_inp"}
    if name == "attn_norm":
        x = judge.layer_input(layer)
    elif name == "result_norm":
        x = judge.value("l_out", judge.layers[-1])
    else:
        x = judge.value(before[name], layer)
    weight = dequantize(judge.weight(judge.parameter(key))).astype(np.float64)
    eps = judge.config.rms_norm_eps
    yield "the norm is missing: the output is the input", _loose(x)
    yield "the norm's weight is not applied", _loose(rms_norm(x, np.ones_like(weight), eps))
    for other in (0.0, 1e-5, 1e-6):
        yield f"eps is {other:g}, not {eps:g}", _loose(rms_norm(x, weight, other))
    centred = x - x.mean(axis=-1, keepdims=True)
    yield "the mean is subtracted, as a layer norm does", _loose(rms_norm(centred, weight, eps))
    if name in ("Qcur_normed", "Kcur_normed"):
        wrong = "k_norm" if name == "Qcur_normed" else "q_norm"
        other = dequantize(judge.weight(f"layers.{layer}.self_attn.{wrong}")).astype(np.float64)
        yield f"the weight is {wrong}'s", _loose(rms_norm(x, other, eps))


def _rope_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    name, layer = key
    before = {"Qcur_rope": "Qcur_normed", "Kcur_rope": "Kcur_normed"}[name]
    x, config = judge.value(before, layer), judge.config
    tokens = judge.tokens
    for shift in (1, -1):
        moved = judge.rope(before, layer, tokens + shift)
        direction = "large" if shift > 0 else "small"
        yield f"positions are 1 too {direction}", moved
    yield "RoPE is not applied", _loose(x)
    for theta in OTHER_THETAS:
        other = replace(config, rope_theta=theta)
        yield (
            f"rope_theta is {theta:.0f}, not {config.rope_theta:.0f}",
            judge.rope(before, layer, config=other),
        )
    if config.rope_scaling is not None:
        plain = replace(config, rope_scaling=None)
        yield "RoPE scaling is not applied", judge.rope(before, layer, config=plain)
    half = x.shape[-1] // 2
    paired = np.concatenate([np.arange(0, 2 * half, 2), np.arange(1, 2 * half, 2)])
    rotated = judge.rope(before, layer, channels=paired)
    yield "pairs are neighbours (2j, 2j + 1), not (j, j + H/2)", rotated
    yield "the turn is backwards", judge.rope(before, layer, -tokens)


def _attention_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    _, layer = key
    kv_heads = judge.config.num_key_value_heads
    groups = judge.config.num_attention_heads // kv_heads
    yield (
        "query head n reads KV head n % K, not n // (N / K)",
        judge.attention(layer, kv_head=lambda n: n % kv_heads),
    )
    yield "every query head reads KV head 0", judge.attention(layer, kv_head=lambda n: 0)
    reversed_heads = judge.attention(layer, kv_head=lambda n: kv_heads - 1 - n // groups)
    yield "KV heads are in reverse order", reversed_heads
    yield "there is no causal mask", judge.attention(layer, shift=len(judge.token_ids))
    yield "the causal mask lets a query see one position too many", judge.attention(layer, shift=1)
    size = judge.config.head_dim
    yield "scores are not scaled by 1/sqrt(H)", judge.attention(layer, scale=1.0)
    yield "scores are scaled by 1/H", judge.attention(layer, scale=1.0 / size)


def _probs_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    logits = judge.value("ffn_moe_logits", key[1])
    ids = judge.chosen(key[1])
    after = np.zeros_like(logits)
    np.put_along_axis(after, ids, softmax(np.take_along_axis(logits, ids, axis=-1)), axis=-1)
    yield "softmax is taken after the choice, over the chosen experts alone", _loose(after)
    yield "a sigmoid stands in place of the softmax", _loose(1 / (1 + np.exp(-logits)))
    yield "logits stand in place of probabilities", _loose(logits)


def _weights_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    layer = key[1]
    chosen = np.take_along_axis(judge.value("ffn_moe_probs", layer), judge.chosen(layer), axis=-1)
    yield "the chosen probabilities are not renormalized", _loose(chosen)
    yield "every chosen expert has the same weight", _loose(np.full_like(chosen, 1 / chosen.shape[1]))
    yield "weights are in reverse order", _loose((chosen / chosen.sum(-1, keepdims=True))[:, ::-1])


def _residual_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    name, layer = key
    through, added = (
        (judge.layer_input(layer), judge.value("attn_out", layer))
        if name == "ffn_inp"
        else (judge.value("ffn_inp", layer), judge.value("ffn_moe_out", layer))
    )
    yield "the residual is not added", _loose(added)
    yield "the layer's own result is not added to the residual", _loose(through)


def _swiglu_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    gate, up = judge.value("ffn_moe_gate", key[1]), judge.value("ffn_moe_up", key[1])
    sigmoid = 1 / (1 + np.exp(-np.clip(gate, -80, 80)))
    yield "gate and up are exchanged", _loose(up / (1 + np.exp(-np.clip(up, -80, 80))) * gate)
    yield "sigmoid stands in place of silu", _loose(sigmoid * up)
    gelu = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    yield "gelu stands in place of silu", Expectation(gelu * up, 1e-4 * np.abs(gelu * up))


def _moe_out_mistakes(judge: StageJudge, key: StageKey) -> Suspicions:
    layer = key[1]
    if ("ffn_moe_down", layer) in judge.forward.stages:
        yield "experts are not weighted", _loose(judge.value("ffn_moe_down", layer).sum(axis=1))


_MISTAKES: dict[str, Callable[[StageJudge, StageKey], Suspicions]] = {
    **dict.fromkeys(("attn_norm", "Qcur_normed", "Kcur_normed", "ffn_norm", "result_norm"), _norm_mistakes),
    **dict.fromkeys(("Qcur_rope", "Kcur_rope"), _rope_mistakes),
    **dict.fromkeys(("ffn_inp", "l_out"), _residual_mistakes),
    "kqv_out": _attention_mistakes,
    "ffn_moe_probs": _probs_mistakes,
    "ffn_moe_weights_norm": _weights_mistakes,
    "ffn_moe_swiglu": _swiglu_mistakes,
    "ffn_moe_out": _moe_out_mistakes,
}


# Mistakes of weights


def _misread(judge: StageJudge, key: StageKey) -> Cause | None:
    """Whether the tensor's bytes were taken for another type's."""
    path = judge.tensor_path(key)
    if path is None or len(judge.source.specs[path].shape) == 1 or judge.source.path.is_dir():
        return None
    spec, true = judge.source.specs[path], judge.source.types[path]
    with GGUFFile.open(judge.source.path) as file:
        raw = file.read(with_parts(file.tensors, judge.source.config)[spec.gguf_name])
    for other in GGMLType:
        block = BLOCK_FORMATS[other]
        if other is true or spec.shape[-1] % block.weights or block.weights == 1:
            continue
        needed = int(np.prod(spec.shape)) // block.weights * block.nbytes
        wrong = replace_weight(judge, path, pack(np.resize(raw, needed), other, spec.shape))
        with np.errstate(all="ignore"):
            if _matches(wrong, key, wrong.expectation(key)):
                return Cause(f"{true.name} bytes are read as {other.name}", proven=True)
    return None


def replace_weight(judge: StageJudge, path: str, weight: PackedTensor) -> StageJudge:
    """The same judge, with another tensor at ``path``."""
    other = replace(judge)
    other.weight(path)
    other._tensors = {**judge._tensors, path: weight}
    return other


def _wrong_experts(judge: StageJudge, key: StageKey) -> Cause | None:
    """Experts whose rows are wrong while those of others are right, and whose weights they are."""
    name, layer = key
    if name not in INSIDE_EXPERTS or STAGES[name].tensor is None:
        return None
    expected = judge.expectation(key)
    wrong = (judge.sigmas(key, expected) > MAX_SIGMAS).any(axis=-1)  # [T, X]
    ids = judge.chosen(layer)
    bad, good = set(ids[wrong].tolist()), set(ids[~wrong].tolist())
    guilty = sorted(bad - good)
    if not guilty or not good:
        return None
    taken = {e: t for e in guilty if (t := _whose(judge, key, e)) is not None}
    pairs = [(a, b) for a, b in taken.items() if a < b and taken.get(b) == a]
    if pairs:
        a, b = pairs[0]
        return Cause(f"experts {a} and {b} are swapped", proven=True, expert=a)
    if taken:
        a, b = next(iter(taken.items()))
        return Cause(f"expert {a} has the weights of expert {b}", proven=True, expert=a)
    rows = _wrong_rows(judge, key)
    if rows:
        return rows
    one = guilty[0] if len(guilty) == 1 else None
    listed = ", ".join(map(str, guilty[:8]))
    return Cause(f"only the rows of expert {listed} are wrong", expert=one)


def _whose(judge: StageJudge, key: StageKey, expert: int) -> int | None:
    """Another expert whose weights give what this one's rows are."""
    name, layer = key
    token, choice = (int(i[0]) for i in np.nonzero(judge.chosen(layer) == expert))
    inside = judge.value("ffn_moe_swiglu", layer) if name == "ffn_moe_down" else judge.experts_input(layer)
    x = inside[token, choice][None]
    actual = judge.value(name, layer)[token, choice]
    weight = judge.weight(judge.parameter(key))
    for other in range(min(weight.shape[0], MAX_CANDIDATE_EXPERTS)):
        suspicion = judge.matmul(x, weight[other])
        channels = slice(None) if suspicion.channels is None else suspicion.channels
        error = np.abs(actual[channels] - suspicion.value[0])
        if other != expert and (error <= MAX_SIGMAS * suspicion.sigma[0]).mean() >= MATCHING_SHARE:
            return other
    return None


def _wrong_rows(judge: StageJudge, key: StageKey) -> Cause | None:
    """A few rows of a matrix that are wrong, and the subblock that explains one."""
    path = judge.tensor_path(key)
    if path is None or len(judge.source.specs[path].shape) == 1 or key[0] == "inp_embd":
        return None
    expected = judge.expectation(key)
    sigmas = judge.sigmas(key, expected)
    wrong = (sigmas > MAX_SIGMAS).reshape(-1, sigmas.shape[-1])
    channels = np.flatnonzero(wrong.any(axis=0))
    if not channels.size or channels.size > max(1, FEW_ROWS * wrong.shape[1]):
        return None
    rows = channels if expected.channels is None else expected.channels[channels]
    experts: list[int] = []
    if key[0] in INSIDE_EXPERTS:
        ids = judge.chosen(key[1]).reshape(-1)
        experts = sorted(set(ids[wrong.any(axis=1)].tolist()))
    expert = experts[0] if len(experts) == 1 else None
    words = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows from {rows[0]} on"
    words += f" of expert {expert}" if expert is not None else ""
    words += " is wrong" if len(rows) == 1 else " are wrong"
    where = _guilty_subblock(judge, key, expected, int(channels[0]), int(rows[0]), expert)
    return Cause(words + (f": {where}" if where else ""), bool(where), expert, tuple(map(int, rows[:16])))


def _guilty_subblock(
    judge: StageJudge, key: StageKey, expected: Expectation, channel: int, row: int, expert: int | None
) -> str | None:
    """The subblock whose scale and min, changed, give the error of a row.

    A changed scale moves a row's result by a multiple of the subblock's own
    part in it, and a changed min by a multiple of the sum of its inputs.
    """
    path = judge.parameter(key)
    size = SUBBLOCK_SIZES.get(judge.source.types[path])
    if size is None:
        return None
    x, error = _inputs_and_error(judge, key, expected, channel, expert)
    weight = judge.weight(path) if expert is None else judge.weight(path)[expert]
    dense = dequantize(weight[row : row + 1]).astype(np.float64)[0]
    parts = (x * dense).reshape(len(x), -1, size).sum(-1)
    sums = x.reshape(len(x), -1, size).sum(-1)
    if len(x) < 4:
        return None
    residuals = [_residual(np.stack([parts[:, s], sums[:, s]], 1), error) for s in range(parts.shape[1])]
    best = int(np.argmin(residuals))
    if residuals[best] > 0.05:
        return None
    return f"the scale or min of subblock {best} (columns {best * size}-{(best + 1) * size - 1})"


def _residual(basis: np.ndarray, error: np.ndarray) -> float:
    """Share of the error's power that the basis leaves unexplained."""
    solution = np.linalg.lstsq(basis, error, rcond=None)[0]
    return float(np.sum((basis @ solution - error) ** 2) / np.sum(error**2))


def _inputs_and_error(
    judge: StageJudge, key: StageKey, expected: Expectation, channel: int, expert: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [n, K] of a product and the errors [n] of one of its channels."""
    name, layer = key
    error = judge.actual(key, expected) - expected.value
    error = error.reshape(-1, error.shape[-1])[:, channel]
    if name in INSIDE_EXPERTS:
        inside = (
            judge.value("ffn_moe_swiglu", layer) if name == "ffn_moe_down" else judge.experts_input(layer)
        )
        x, ids = inside.reshape(-1, inside.shape[-1]), judge.chosen(layer).reshape(-1)
        return (x, error) if expert is None else (x[ids == expert], error[ids == expert])
    before = {"attn_out": "kqv_out", "ffn_moe_logits": "ffn_norm", "result_output": "result_norm"}
    x = judge.value(before.get(name, "attn_norm"), layer)
    return x.reshape(len(x), -1), error


# What is left


def _coarser_rounding(judge: StageJudge, key: StageKey) -> Cause | None:
    """Whether a product is right but for operands rounded more than they should be."""
    if STAGES[key[0]].tensor is None or key[0] == "inp_embd":
        return None
    for dtype, rounding in sorted(ROUNDING.items(), key=lambda item: item[1]):
        if rounding <= judge.operand:
            continue
        coarse = replace(judge)
        coarse.operand = rounding
        if (coarse.sigmas(key, coarse.expectation(key)) <= MAX_SIGMAS).all():
            claimed = judge.facts["compute_dtype"]
            return Cause(f"operands are rounded to {dtype} or as coarse, not {claimed}", proven=True)
    return None


def _description(judge: StageJudge, judgement: Judgement) -> Cause:
    if judgement.nonfinite:
        return Cause(f"{judgement.nonfinite} values are NaN or infinite, though the inputs are finite")
    if judgement.stage == "ffn_moe_topk":
        return Cause("the chosen experts are not the most probable ones")
    expected = judge.expectation((judgement.stage, judgement.layer))
    sigmas = judge.sigmas((judgement.stage, judgement.layer), expected)
    tokens = judge.tokens[(sigmas.reshape(len(sigmas), -1) > MAX_SIGMAS).any(axis=1)]
    where = "at every position" if len(tokens) == len(sigmas) else f"from position {tokens[0]} on"
    if len(tokens) < len(sigmas) and len(tokens) <= 4:
        where = f"at position {', '.join(map(str, tokens))} only"
    return Cause(
        f"no known mistake gives these numbers; {judgement.wrong:.1%} of the values are wrong, {where}, "
        f"NMSE {judgement.nmse:.1e}"
    )
