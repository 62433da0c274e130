"""The kernels between the products of few launches, in Pallas' interpreter, against the steps in jnp."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.kernels_pallas.decode_layers import row_steps as steps
from qwen3_moe_jax.kernels_pallas.decode_layers.pair_kernels import PairKernels
from qwen3_moe_jax.kernels_pallas.decode_layers.row_kernels import Lookup, RowKernels, Sizes
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import DEVICE_AXES, Split
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from tests.kernels.op_inputs import hopper_marks, rng
from tests.kernels.races import no_races

__all__ = ["no_races", "rng"]

SIZES = Sizes(
    rows=18, tile=32, hidden=512, heads=16, kv_heads=2, head_dim=64, experts=128, choices=4, eps=1e-6
)
LAYER = jnp.ones(1, jnp.int32)


@pytest.fixture(params=["interpreted", pytest.param("on_a_gpu", marks=hopper_marks())])
def interpret(request):
    """Of kernels: parameters of the interpreter, or None for the GPU."""
    return interpreter(detect_races=True) if request.param == "interpreted" else None


@pytest.fixture
def run(interpret):
    return RowKernels(SIZES, interpret)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_norm_of_parts(rng, run):
    """The sum and its norm; the operand is that of the norm's result, and zeros after the last row."""
    x, parts = normal(rng, SIZES.rows, SIZES.hidden), normal(rng, 3, SIZES.tile, SIZES.hidden)
    weight = normal(rng, 2, SIZES.hidden)
    total, out = run.norm(x, (parts,), weight, LAYER, by_row=False)
    np.testing.assert_allclose(total, x + steps.sum_parts(parts, SIZES.rows), rtol=1e-6, atol=1e-6)
    expected = steps.norm(total, weight[1], SIZES.eps, SIZES.tile)
    np.testing.assert_allclose(out.normed[: SIZES.rows], expected.normed, rtol=1e-5, atol=1e-6)
    again = steps.float16_operand(out.normed[: SIZES.rows], SIZES.tile)
    np.testing.assert_array_equal(out.operand, again[0])
    np.testing.assert_array_equal(out.scale[: SIZES.rows], again[1][: SIZES.rows])
    assert not np.asarray(out.normed[SIZES.rows :]).any()
    assert np.isfinite(out.scale).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_norm_of_results_of_the_layer_before(rng, run, layer):
    """Of the type of the layer before; what the other type's hold, were it NaN, does not matter."""
    x, weight = normal(rng, SIZES.rows, SIZES.hidden), normal(rng, 2, SIZES.hidden)
    results = [normal(rng, SIZES.rows, SIZES.choices, SIZES.hidden) for _ in range(2)]
    results[0] = jnp.full_like(results[0], jnp.nan)
    table = jnp.asarray([9, 1, 0], jnp.int32)
    which = Lookup(jnp.full(1, layer, jnp.int32), table, 1, back=1)
    layer = jnp.full(1, layer, jnp.int32)
    total, _ = run.norm(x, tuple(results), weight, layer, by_row=True, which=which)
    np.testing.assert_allclose(total, x + results[1].sum(axis=1), rtol=1e-5, atol=1e-5)


def test_attention_operand(rng, run):
    out = jnp.asarray(rng.normal(size=(SIZES.rows * SIZES.kv_heads, 16, SIZES.head_dim)), jnp.float16)
    operand, scale = run.attention_operand(out.at[:, SIZES.group :].set(jnp.nan))
    expected = steps.attention_operand(out, SIZES.rows, SIZES.heads, SIZES.tile)
    np.testing.assert_array_equal(operand, expected[0])
    np.testing.assert_array_equal(scale[: SIZES.rows], expected[1][: SIZES.rows])


@pytest.mark.parametrize(("number", "heads"), [(0, 16), (1, 24)])
def test_rotation_and_the_caches(rng, interpret, number, heads):
    """Queries, keys and values as the steps have them; other layers, slots and positions stay."""
    s = SIZES._replace(heads=heads)
    run = RowKernels(s, interpret)
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    qkv = normal(rng, 2, s.tile, width)
    other = normal(rng, 3, s.tile, s.kv_heads * s.head_dim)
    norms = normal(rng, 2, s.head_dim), normal(rng, 2, s.head_dim)
    angle = rng.uniform(0, 6, (s.rows, s.head_dim // 2)).astype(np.float32)
    rope = jnp.cos(angle), jnp.sin(angle)
    caches = [jnp.asarray(rng.normal(size=(2, 20, 8, s.kv_heads, s.head_dim)), jnp.float16) for _ in "kv"]
    slots = jnp.asarray(rng.permutation(20)[: s.rows], jnp.int32)
    positions = jnp.asarray(rng.integers(0, 8, s.rows), jnp.int32)
    values = [(qkv, (s.heads + s.kv_heads) * s.head_dim), (other, 0)]
    which = Lookup(LAYER, jnp.asarray([0, 9, number], jnp.int32), 1)
    q, k, v = run.rotate(qkv, values, which, norms, rope, tuple(caches), slots, positions, 16)
    cut = lambda parts: steps.sum_parts(parts, s.rows).reshape(s.rows, -1, s.head_dim)
    all_heads = cut(qkv)
    at = (1, slots, positions)
    expected = steps.rotate(all_heads[:, : s.heads], norms[0][1], rope, s.eps)
    expected = steps.query_operand(expected, s.kv_heads, 16, jnp.float16)
    np.testing.assert_allclose(q[:, : s.group], expected[:, : s.group], rtol=2e-3, atol=1e-3)
    key = steps.rotate(all_heads[:, s.heads : s.heads + s.kv_heads], norms[1][1], rope, s.eps)
    value = cut(other) if number else all_heads[:, s.heads + s.kv_heads :]
    for cache, before, new in ((k, caches[0], key), (v, caches[1], value)):
        np.testing.assert_allclose(cache[at], new.astype(jnp.float16), rtol=2e-3, atol=1e-3)
        np.testing.assert_array_equal(cache.at[at].set(before[at]), before)


@pytest.mark.parametrize(("ep", "experts"), [(1, 128), (2, 128), (1, 160)])
def test_choice_and_rows(rng, interpret, ep, experts):
    """The choice, the order of pairs and the rows that are brought are the steps'."""
    s = SIZES._replace(experts=experts)
    logits = jnp.asarray(np.round(rng.normal(size=(s.tile, experts)), 1), jnp.float32)
    x = steps.norm(normal(rng, s.rows, s.hidden), jnp.ones(s.hidden), s.eps, s.tile)
    ids = jnp.full((2, s.tile, s.choices), 77, jnp.int32)
    share = steps.Share(Split(ep=ep), experts // ep)
    run = PairKernels(s, interpret)
    for device in range(ep):
        with on_device(device):
            expected = steps.choose(logits[: s.rows], s.choices, 8, share)
            new, routes, operand, scale = run.choose(logits, ids, LAYER, x, 8, share)
        np.testing.assert_array_equal(new[1, : s.rows], expected.expert_ids)
        np.testing.assert_array_equal(new[0], ids[0])
        used = int(expected.tiles.count[0])
        assert int(routes.tiles.count[0]) == used
        for actual, wanted in zip(routes.tiles[:3], expected.tiles[:3], strict=True):
            np.testing.assert_array_equal(actual[:used], wanted[:used])
        count = len(expected.pairs)
        np.testing.assert_array_equal(routes.pairs[:count], expected.pairs)
        assert (np.asarray(routes.pairs[count:]) == -1).all()
        held = np.flatnonzero(np.asarray(expected.pairs) >= 0)
        rows = np.asarray(expected.pairs)[held] // s.choices
        np.testing.assert_array_equal(operand[held], x.operand[rows])
        np.testing.assert_array_equal(scale[held], x.scale[rows])
        np.testing.assert_allclose(routes.factors[held], expected.factors[held], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_router_logits(rng, interpret, dtype):
    """The product with the layer's rows; those of other layers, were they NaN, do not matter."""
    s = SIZES._replace(experts=16)
    x, w = normal(rng, s.tile, s.hidden), normal(rng, 3 * s.experts, s.hidden).astype(dtype)
    own = slice(s.experts, 2 * s.experts)
    w = jnp.full_like(w, jnp.nan).at[own].set(w[own])
    logits = PairKernels(s, interpret).logits(x, w, LAYER)
    exact = np.asarray(x, np.float64) @ np.asarray(w[own], np.float64).T
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=2e-5)


def test_choice_of_a_row_that_is_not_finite(rng, interpret):
    """Its weights are NaN; the others' are not."""
    logits = np.array(rng.normal(size=(SIZES.tile, SIZES.experts)), np.float32)
    run = PairKernels(SIZES, interpret)
    logits[3, 7], logits[5] = np.inf, np.nan
    weights = run.top_experts(jnp.asarray(logits), jax.new_ref(jnp.zeros((2, 32, 4), jnp.int32)), LAYER)
    np.testing.assert_array_equal(np.isnan(weights).any(axis=1), np.isin(np.arange(32), [3, 5]))


def on_device(number: int):
    """As the device of this number along ``ep``."""
    real = lax.axis_index
    fake = lambda name: jnp.int32(number) if name == DEVICE_AXES[0] else real(name)
    return mock.patch.object(lax, "axis_index", fake)
