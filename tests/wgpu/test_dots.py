"""Products of long prompts by dots of bytes: exact but for the rounding of activations."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qwen3_moe_jax.commands.common import dtype_of
from qwen3_moe_jax.commands.verify import TARGETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.wgpu_backend.adapter import TUNINGS, tuning_for
from qwen3_moe_jax.wgpu_backend.tiles import expert_kernel, expert_tile
from tests.tolerances import WGPU_DOTS_NMSE, WGPU_DOTS_STAGE_NMSE, WGPU_NMSE, WGPU_TOP
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
TYPES = pytest.mark.parametrize("type", [Q4_K, Q5_K, Q6_K], ids=lambda t: t.name)
TAILS = pytest.mark.parametrize("heavy_tailed", [False, True])


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations as rounded.wgsl rounds them: float64, of x's shape."""
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = np.rint(blocks * (np.float32(WGPU_TOP) / largest)).clip(-WGPU_TOP, WGPU_TOP)
    scales = (largest / np.float32(WGPU_TOP)).astype(np.float64)
    return np.where(largest < 1e-30, 0.0, numbers * scales).reshape(x.shape)


@TYPES
@TAILS
def test_rows_and_tokens_that_end_inside_a_tile(gpu, type, heavy_tailed):
    rng = rng_of("dots", type, heavy_tailed)
    weight = random_weights(rng, type, (600, 512))
    x = activations(rng, 75, 512, heavy_tailed=heavy_tailed)
    found = gpu(gpu_work.op, "matmul", x, weight, wide=True, on="dots")
    # A number whose product with the factor is near a half may be rounded to either side: 2^-24 of them.
    assert nmse(found, matmul64(rounded(x), weight)) <= WGPU_NMSE
    if not heavy_tailed:
        assert WGPU_NMSE < nmse(found, matmul64(x, weight)) <= WGPU_DOTS_NMSE


@TYPES
@TAILS
def test_experts_with_more_pairs_than_a_tile_with_few_and_with_none(gpu, type, heavy_tailed):
    rng = rng_of("dots of experts", type, heavy_tailed)
    gate, up = (random_weights(rng, type, (5, 72, 256)) for _ in range(2))
    ids = rng.choice([0, 0, 0, 1, 2, 4], (91, 2)).astype(np.int32)
    for shape in ((91, 256), (91, 2, 256)):
        x = 0.01 * activations(rng, *shape, heavy_tailed=heavy_tailed)
        parts = [expert_matmul64(rounded(x), ids, w) for w in (gate, up)]
        for weights, truth in (((gate,), parts[0]), ((gate, up), swiglu64(*parts))):
            found = gpu(gpu_work.op, "expert_matmul", x, ids, *weights, wide=True, on="dots")
            assert nmse(found, truth) <= WGPU_NMSE, (shape, len(weights))


@pytest.mark.parametrize("types", [(Q4_K, Q4_K, Q6_K), (Q5_K, Q6_K, Q4_K)], ids=str)
def test_three_matrices_of_one_buffer(gpu, types):
    rng = rng_of("dots", types)
    weights = [random_weights(rng, t, (rows, 512)) for t, rows in zip(types, (520, 130, 72), strict=True)]
    x = activations(rng, 70, 512)
    found = gpu(gpu_work.op, "matmul", x, *weights, wide=True, on="dots")
    assert nmse(found, matmul64(rounded(x), *weights)) <= WGPU_NMSE


def test_a_matrix_of_another_type_beside_them_is_left_to_float32(gpu):
    rng = rng_of("dots and floats")
    weights = [random_weights(rng, t, (300, 512)) for t in (Q4_K, F32)]
    x = activations(rng, 70, 512)
    found = gpu(gpu_work.op, "matmul", x, *weights, wide=True, on="dots")
    assert nmse(found, matmul64(x, *weights)) <= WGPU_NMSE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_token_alone(gpu, value):
    rng = rng_of("not finite")
    weight, x = random_weights(rng, Q4_K, (600, 256)), activations(rng, 70, 256)
    truth = matmul64(rounded(x), weight)
    x[5, 100] = value
    found = gpu(gpu_work.op, "matmul", x, weight, wide=True, on="dots")
    assert not np.isfinite(found[5]).any()
    others = np.delete(np.arange(70), 5)
    assert nmse(found[others], truth[others]) <= WGPU_NMSE


def test_blocks_of_zeros_and_of_tiny_numbers_are_zero_and_of_large_ones_are_not(gpu):
    rng = rng_of("tiny")
    weight, x = random_weights(rng, Q6_K, (600, 256)), activations(rng, 70, 256)
    x[0], x[1], x[2, :32], x[3] = 0, x[1] * np.float32(1e-31), 0, x[3] * np.float32(1e30)
    found = gpu(gpu_work.op, "matmul", x, weight, wide=True, on="dots")
    np.testing.assert_array_equal(found[:2], 0)
    truth = matmul64(rounded(x), weight)
    for token in (2, 3):
        assert nmse(found[token], truth[token]) <= WGPU_NMSE


def test_every_stage_of_a_model(gpu, reference_runner):
    tokens = rng_of("dots of a model").integers(0, 4000, 100)
    truth = reference_runner.forward(tokens, capture=list(STAGES))
    found = gpu(
        gpu_work.forward,
        gpu_work.EMBEDDED,
        tokens,
        capture=list(STAGES),
        expert_ids=truth.expert_ids,
        on="dots",
    )
    assert found.stages.keys() == truth.stages.keys()
    for key, value in truth.stages.items():
        assert nmse(found.stages[key], value) <= WGPU_DOTS_STAGE_NMSE, key


@pytest.mark.parametrize(("on", "dtype"), [("dots", "int15"), ("hardware", "float32"), ("own", "float32")])
def test_a_runner_says_what_its_products_round_to(gpu, on, dtype):
    assert gpu(gpu_work.described, gpu_work.EMBEDDED, on)["compute_dtype"] == dtype


def test_experts_of_a_layer_share_their_tiles():
    def stack(type):
        return SimpleNamespace(type=type, rows=768, columns=2048)

    tuning = TUNINGS["DiscreteGPU"]
    tiles, gate_up = tuning.tiles, (stack(Q4_K), stack(Q4_K))
    for down, tokens in ((Q6_K, tiles.dots.tokens), (F32, tiles.tokens)):
        assert expert_tile(tuning, [gate_up, (stack(down),)]) == tokens
    assert expert_tile(tuning, [(stack(Q4_K), stack(Q6_K))]) == tuning.prefill_tokens
    assert expert_tile(replace(tuning, tiles=replace(tiles, dots=None)), [gate_up]) == tiles.tokens
    assert expert_kernel(tiles, gate_up, tiles.dots.tokens) == ("tile_bytes", tiles.dots)
    assert expert_kernel(tiles, gate_up, tiles.tokens) == ("tile", tiles)
    assert expert_kernel(tiles, gate_up, 1) == ("matmul", None)


@pytest.mark.parametrize(
    ("vendor", "exact", "shared", "dots"),
    [(0x10DE, False, 49152, True), (0x10DE, False, 16384, True), (0x10DE, True, 49152, False)]
    + [(0x1002, False, 49152, False), (0, False, 49152, False)],
)
def test_who_gets_dots(vendor, exact, shared, dots):
    limits = {"max-compute-workgroup-storage-size": shared}
    tuning = tuning_for(SimpleNamespace(type="DiscreteGPU", vendor=vendor, limits=limits), exact=exact)
    assert (tuning.tiles.dots is not None) == dots
    assert tuning.tiles.nbytes <= shared
    assert replace(tuning, tiles=None) == replace(TUNINGS["DiscreteGPU"], tiles=None)
    assert tuning_for(SimpleNamespace(type="CPU", vendor=vendor, limits=limits)) == TUNINGS["CPU"]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("wgpu", None), ("wgpu:float32", "float32"), ("jax", "float32"), ("jax:bfloat16", "bfloat16")],
)
def test_what_is_verified_is_what_runs_unless_float32_is_named(target, dtype):
    assert dtype_of(target) == dtype
    assert target in TARGETS
