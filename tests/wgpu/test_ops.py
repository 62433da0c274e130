"""Every kernel against a float64 oracle: all types, several settings of the kernels, real widths.

The shared cases of matrix and expert products are in test_op_cases.py.

Outputs are poisoned with NaN and guarded behind their end by ``Ops`` itself.
"""

import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.reference.ops import apply_rope, attention, choose_experts, rms_norm
from tests.tolerances import WGPU_ATTENTION_NMSE, WGPU_FLOAT16_CACHE_NMSE, WGPU_NMSE, WGPU_ROUTER_WEIGHTS
from tests.wgpu import gpu_work
from tests.wgpu.cases import (
    activations,
    expert_matmul64,
    matmul64,
    nmse,
    random_weights,
    rng_of,
    swiglu64,
)

Q4_K, Q5_K, Q6_K, F32 = GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.F32
TYPES = pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda t: t.name)
MAIN_TYPES = pytest.mark.parametrize("type", [Q4_K, Q6_K], ids=lambda t: t.name)
TYPES_AND_DEVICES = pytest.mark.parametrize(
    ("type", "on"),
    [(t, "own") for t in SUPPORTED_TYPES]
    + [(t, d) for d in ("hardware", "subgroups") for t in (Q4_K, Q6_K, F32)],
    ids=lambda value: getattr(value, "name", value),
)
REAL = PRESETS["Qwen3-30B-A3B"]


@TYPES_AND_DEVICES
def test_matmul_of_every_type(gpu, type, on):
    for rows, tokens, columns in [(16, 1, 256), (16, 9, 256), (33, 8, 512), (1, 7, 1024)]:
        rng = rng_of(type, rows, tokens, columns)
        weight, x = random_weights(rng, type, (rows, columns)), activations(rng, tokens, columns)
        for decode in (False, True):
            found = gpu(gpu_work.op, "matmul", x, weight, decode=decode, on=on)
            assert nmse(found, matmul64(x, weight)) <= WGPU_NMSE, (rows, tokens, columns, decode)


TILED = pytest.mark.parametrize(
    ("type", "on"),
    [(t, "hardware") for t in SUPPORTED_TYPES] + [(t, "subgroups") for t in (Q4_K, Q6_K, F32)],
    ids=lambda value: getattr(value, "name", value),
)


@TILED
def test_tiles_of_every_type(gpu, type, on):
    """Rows and tokens that end inside a tile; experts with more pairs than a tile, with few, none."""
    rng = rng_of("tiles", type)
    weight, x = random_weights(rng, type, (600, 512)), activations(rng, 75, 512)
    found = gpu(gpu_work.op, "matmul", x, weight, wide=True, on=on)
    assert nmse(found, matmul64(x, weight)) <= WGPU_NMSE
    gate, up = (random_weights(rng, type, (5, 72, 256)) for _ in range(2))
    ids = rng.choice([0, 0, 0, 1, 2, 4], (91, 2)).astype(np.int32)
    for shape in ((91, 256), (91, 2, 256)):
        x = 0.01 * activations(rng, *shape)
        parts = [expert_matmul64(x, ids, w) for w in (gate, up)]
        for weights, truth in (((gate,), parts[0]), ((gate, up), swiglu64(*parts))):
            found = gpu(gpu_work.op, "expert_matmul", x, ids, *weights, wide=True, on=on)
            assert nmse(found, truth) <= WGPU_NMSE, (shape, len(weights))


@pytest.mark.parametrize("on", ["own", "hardware"])
@pytest.mark.parametrize("types", [(Q4_K, Q4_K, Q6_K), (Q5_K, Q6_K, F32)], ids=str)
def test_three_matrices_of_one_buffer(gpu, types, on):
    rng = rng_of(types)
    weights = [random_weights(rng, t, (rows, 512)) for t, rows in zip(types, (40, 17, 8), strict=True)]
    x = activations(rng, 5, 512)
    for decode in (False, True):
        found = gpu(gpu_work.op, "matmul", x, *weights, decode=decode, on=on)
        assert nmse(found, matmul64(x, *weights)) <= WGPU_NMSE
    tall = [random_weights(rng, t, (rows, 512)) for t, rows in zip(types, (520, 130, 72), strict=True)]
    assert nmse(gpu(gpu_work.op, "matmul", x, *tall, wide=True, on=on), matmul64(x, *tall)) <= WGPU_NMSE


@TYPES_AND_DEVICES
def test_expert_matmul_of_every_type(gpu, type, on):
    rng = rng_of(type)
    weight = random_weights(rng, type, (5, 24, 256))
    ids = rng.integers(0, 5, (11, 2)).astype(np.int32)
    for shape in ((11, 256), (11, 2, 256)):
        x = activations(rng, *shape)
        truth = expert_matmul64(x, ids, weight)
        for decode in (False, True):
            found = gpu(gpu_work.op, "expert_matmul", x, ids, weight, decode=decode, on=on)
            assert nmse(found, truth) <= WGPU_NMSE, (shape, decode)


@pytest.mark.parametrize("heavy_tailed", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "types"),
    [
        (768, 2048, (Q4_K, Q4_K)),
        (768, 2048, (Q4_K, Q6_K)),
        (2048, 768, (Q4_K,)),
        (2048, 768, (Q6_K,)),
    ],
    ids=str,
)
def test_experts_at_real_shapes(gpu, rows, columns, types, tokens, heavy_tailed):
    """Gate+up+SwiGLU and down of Qwen3-30B-A3B, eight experts of which six are resident."""
    rng = rng_of(rows, columns, types, tokens, heavy_tailed)
    weights = [random_weights(rng, t, (6, rows, columns)) for t in types]
    ids = rng.integers(0, 6, (tokens, 8)).astype(np.int32)
    x = activations(rng, tokens, columns, heavy_tailed=heavy_tailed) * np.float32(
        0.01 if len(types) == 2 else 1
    )
    parts = [expert_matmul64(x, ids, w) for w in weights]
    truth = swiglu64(*parts) if len(parts) == 2 else parts[0]
    for decode in (False, True):
        assert nmse(gpu(gpu_work.op, "expert_matmul", x, ids, *weights, decode=decode), truth) <= WGPU_NMSE


@pytest.mark.parametrize("type", [Q4_K, Q6_K, GGMLType.Q8_0], ids=lambda t: t.name)
def test_windows_of_a_tensor(gpu, type):
    """A stack and a table larger than one binding."""
    rng = rng_of("windows", type)
    weight = random_weights(rng, type, (11, 64, 1024))
    ids, x = rng.integers(0, 11, (6, 3)).astype(np.int32), activations(rng, 6, 1024)
    for decode in (False, True):
        found = gpu(gpu_work.op, "expert_matmul", x, ids, weight, decode=decode, on="small bindings")
        assert nmse(found, expert_matmul64(x, ids, weight)) <= WGPU_NMSE
    tokens = rng.integers(0, 704, 20)
    table = weight.__class__({k: a.reshape(704, -1) for k, a in weight.arrays.items()}, type)
    found = gpu(gpu_work.op, "embed", table, tokens, on="small bindings")
    assert nmse(found, dequantize(table, np.float64)[tokens]) <= WGPU_NMSE


@TYPES
def test_embedding_rows(gpu, type):
    rng = rng_of("embed", type)
    table = random_weights(rng, type, (37, 512))
    tokens = rng.integers(0, 37, 9)
    assert nmse(gpu(gpu_work.op, "embed", table, tokens), dequantize(table, np.float64)[tokens]) <= WGPU_NMSE


@pytest.mark.parametrize("on", ["own", "hardware"])
@pytest.mark.parametrize(
    ("experts", "chosen"),
    [
        (8, 2),
        (31, 4),
        (32, 8),
        (40, 8),
        (71, 8),
        (128, 8),
        (128, 128),
        (129, 8),
        (160, 8),
        (256, 8),
        (288, 8),
    ],
)
def test_router(gpu, experts, chosen, on):
    rng = rng_of("router", experts, chosen)
    logits = (3 * rng.standard_normal((9, experts))).astype(np.float32)
    logits[1] = 0.5  # all equal: the lowest ids
    logits[2, ::3] = 7.0  # ties at the top
    probs, ids, weights = gpu(gpu_work.op, "choose_experts", logits, chosen, on=on)
    true_probs, true_ids, true_weights = choose_experts(logits.astype(np.float64), chosen)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(weights, true_weights, rtol=WGPU_ROUTER_WEIGHTS)
    np.testing.assert_allclose(probs, true_probs, rtol=WGPU_ROUTER_WEIGHTS)


def test_router_with_forced_experts(gpu):
    rng = rng_of("forced")
    logits = rng.standard_normal((5, 32)).astype(np.float32)
    forced = np.stack([rng.permutation(32)[:4] for _ in range(5)]).astype(np.int32)
    _, ids, weights = gpu(gpu_work.op, "choose_experts", logits, 4, forced)
    np.testing.assert_array_equal(ids, forced)
    expected = choose_experts(logits.astype(np.float64), 4, forced)[2]
    np.testing.assert_allclose(weights, expected, rtol=WGPU_ROUTER_WEIGHTS)


def test_router_of_a_nan_row_stays_in_range(gpu):
    logits = np.zeros((2, 16), np.float32)
    logits[0] = np.nan
    _, ids, weights = gpu(gpu_work.op, "choose_experts", logits, 4)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3]] * 2)
    assert np.isnan(weights[0]).all()
    assert np.isfinite(weights[1]).all()


@pytest.mark.parametrize("on", ["own", "hardware"])
@pytest.mark.parametrize("deltas", [0, 1, 8])
def test_residual_and_norm(gpu, deltas, on):
    rng = rng_of("norm", deltas)
    x, weight = activations(rng, 3, 2048, heavy_tailed=True), activations(rng, 2048)
    delta = activations(rng, 3, deltas, 2048) if deltas else None
    delta_weights = activations(rng, 3, deltas) if deltas > 1 else None
    residual, h = gpu(gpu_work.op, "norm", x, weight, 1e-6, delta, delta_weights, on=on)
    expected = x.astype(np.float64)
    if deltas:
        scale = np.ones((3, 1)) if delta_weights is None else delta_weights
        expected = expected + np.einsum("txd,tx->td", delta.astype(np.float64), scale)
    assert nmse(residual, expected) <= WGPU_NMSE
    assert nmse(h, rms_norm(expected, weight, 1e-6)) <= WGPU_NMSE


ATTENTIONS = [
    # tokens, heads, kv heads, head_dim, chunk, span
    (5, 8, 2, 64, None, None),
    (5, 8, 2, 64, 1, None),
    (300, 4, 2, 64, 100, 512),
    (150, 4, 1, 128, 64, 128),
    (300, 32, 4, 128, 300, 128),
    (260, 6, 2, 32, 1, 128),
    (40, 3, 3, 8, 7, 128),
]


def true_attention(qkv, norms, rope, heads):
    """Head norms, RoPE and attention in float64."""
    kv_heads = (qkv.shape[1] - heads) // 2
    qkv, norms = qkv.astype(np.float64), norms.astype(np.float64)
    cos, sin = (a[: len(qkv)].astype(np.float64) for a in rope)
    q = apply_rope(rms_norm(qkv[:, :heads], norms[0], 1e-6), cos, sin)
    k = apply_rope(rms_norm(qkv[:, heads : heads + kv_heads], norms[1], 1e-6), cos, sin)
    return attention(q, k, qkv[:, heads + kv_heads :], np.arange(len(qkv)))


@pytest.mark.parametrize("on", ["own", "hardware"])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim", "chunk", "span"), ATTENTIONS)
def test_attention(gpu, tokens, heads, kv_heads, head_dim, chunk, span, on):
    rng = rng_of("attention", tokens, heads, kv_heads, head_dim)
    qkv = activations(rng, tokens, heads + 2 * kv_heads, head_dim)
    norms = 3 * activations(rng, 2, head_dim)
    rope = tuple(activations(rng, tokens + 3, head_dim // 2) for _ in range(2))
    truth = true_attention(qkv, norms, rope, heads)
    found = gpu(gpu_work.op, "attention", qkv, norms, rope, heads, chunk=chunk, span=span, on=on)
    assert nmse(found, truth) <= WGPU_ATTENTION_NMSE
    halved = gpu(gpu_work.op, "attention", qkv, norms, rope, heads, chunk=chunk, span=span, on=on, f16=True)
    assert WGPU_ATTENTION_NMSE < nmse(halved, truth) <= WGPU_FLOAT16_CACHE_NMSE


@pytest.mark.parametrize("on", ["own", "hardware"])
@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim", "chunk", "span"), ATTENTIONS)
def test_attention_of_several_tokens_together(
    gpu, tokens, heads, kv_heads, head_dim, chunk, span, together, on
):
    rng = rng_of("attention", tokens, heads, kv_heads, head_dim)
    qkv = activations(rng, tokens, heads + 2 * kv_heads, head_dim)
    norms = 3 * activations(rng, 2, head_dim)
    rope = tuple(activations(rng, tokens + 3, head_dim // 2) for _ in range(2))
    options = {"chunk": chunk, "span": span, "together": together, "on": on}
    found = gpu(gpu_work.op, "attention", qkv, norms, rope, heads, **options)
    assert nmse(found, true_attention(qkv, norms, rope, heads)) <= WGPU_ATTENTION_NMSE


def test_attention_with_real_angles(gpu):
    rng = rng_of("angles")
    rope = rope_tables(REAL, 40)
    qkv, norms = activations(rng, 40, 40, 128), activations(rng, 2, 128)
    truth = true_attention(qkv, norms, rope, 32)
    assert nmse(gpu(gpu_work.op, "attention", qkv, norms, rope, 32), truth) <= WGPU_ATTENTION_NMSE
