"""Suspicions that ``bisect`` tests: each mistake, made by hand in a recorded trace, is named."""

from collections.abc import Callable

import numpy as np
import pytest

from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.inspection.trace import trace
from qwen3_moe_jax.parity.bisect import bisect_trace

T = 20
LAYER = 2


@pytest.fixture(scope="module")
def good(reference, text_ids):
    return trace(reference, text_ids[:T])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(get, mask, scale=64**-0.5):
    q, k, v = get("Qcur_rope"), get("Kcur_rope"), get("Vcur")
    out = np.empty_like(q)
    for head in range(8):
        scores = q[:, head] @ k[:, head // 4].T * scale
        out[:, head] = softmax(np.where(mask, scores, -np.inf)) @ v[:, head // 4]
    return out


def turned(get, angle_sign=1, neighbours=False):
    x = get("Qcur_normed")
    angles = angle_sign * np.arange(T)[:, None] * 1e6 ** (-np.arange(32) / 32)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., :32], x[..., 32:])
    a, b = first * cos - second * sin, second * cos + first * sin
    return np.stack([a, b], -1).reshape(x.shape) if neighbours else np.concatenate([a, b], -1)


CASES: dict[str, tuple[str, Callable]] = {
    "there is no causal mask": ("kqv_out", lambda get, w: attention(get, np.ones((T, T), bool))),
    "one position too many": ("kqv_out", lambda get, w: attention(get, np.tri(T, T, 1, dtype=bool))),
    "not scaled by 1/sqrt(H)": ("kqv_out", lambda get, w: attention(get, np.tri(T, dtype=bool), 1.0)),
    "pairs are neighbours": ("Qcur_rope", lambda get, w: turned(get, neighbours=True)),
    "the turn is backwards": ("Qcur_rope", lambda get, w: turned(get, -1)),
    "RoPE is not applied": ("Qcur_rope", lambda get, w: get("Qcur_normed")),
    "the weight is k_norm's": (
        "Qcur_normed",
        lambda get, w: (
            get("Qcur") / np.sqrt((get("Qcur") ** 2).mean(-1, keepdims=True) + 1e-6) * w("self_attn.k_norm")
        ),
    ),
    "the norm's weight is not applied": (
        "ffn_norm",
        lambda get, w: get("ffn_inp") / np.sqrt((get("ffn_inp") ** 2).mean(-1, keepdims=True) + 1e-6),
    ),
    "the residual is not added": ("ffn_inp", lambda get, w: get("attn_out")),
    "a sigmoid stands in place of the softmax": (
        "ffn_moe_probs",
        lambda get, w: 1 / (1 + np.exp(-get("ffn_moe_logits"))),
    ),
    "gate and up are exchanged": (
        "ffn_moe_swiglu",
        lambda get, w: get("ffn_moe_up") / (1 + np.exp(-get("ffn_moe_up"))) * get("ffn_moe_gate"),
    ),
    "experts are not weighted": ("ffn_moe_out", lambda get, w: get("ffn_moe_down").sum(1)),
}


@pytest.mark.parametrize("words", CASES)
def test_mistake_is_named(words, good, source):
    stage, mistake = CASES[words]

    def get(name):
        return good.forward.stages[name, LAYER].astype(np.float64)

    def weight(name):
        return dequantize(source.tensor(f"layers.{LAYER}.{name}")).astype(np.float64)

    true = good.forward.stages[stage, LAYER]
    good.forward.stages[stage, LAYER] = mistake(get, weight).astype(np.float32)
    try:
        found = bisect_trace(source, good)
    finally:
        good.forward.stages[stage, LAYER] = true
    assert (found.stage, found.layer) == (stage, LAYER)
    assert words in found.cause.words
    assert found.cause.proven


def test_wrong_choice_of_experts(good, source):
    true = good.forward.stages["ffn_moe_topk", LAYER]
    wrong = true.copy()
    wrong[5] = np.argsort(good.forward.stages["ffn_moe_probs", LAYER][5])[:4]
    good.forward.stages["ffn_moe_topk", LAYER] = wrong
    try:
        found = bisect_trace(source, good)
    finally:
        good.forward.stages["ffn_moe_topk", LAYER] = true
    assert (found.stage, found.layer, found.judgement.token) == ("ffn_moe_topk", LAYER, 5)
    assert "not the most probable" in found.cause.words


def test_a_nan_is_found_where_it_arises(good, source):
    true = good.forward.stages["attn_out", LAYER]
    wrong = true.copy()
    wrong[3, 7] = np.nan
    good.forward.stages["attn_out", LAYER] = wrong
    try:
        found = bisect_trace(source, good)
    finally:
        good.forward.stages["attn_out", LAYER] = true
    assert (found.stage, found.layer, found.judgement.nonfinite) == ("attn_out", LAYER, 1)
    assert found.judgement.token == 3
