"""The load gate with weights that strain arithmetic: no false alarm, and faults are still seen."""

import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.parity import noise
from qwen3_moe_jax.parity.gate import inspect
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.random_models import (
    SMALL,
    constant_blocks,
    random_blocks,
    raw_blocks,
    shifted,
    write_random_gguf,
)
from scripts.check_gate import STYLES, Case, cases, check, is_far
from tests import tolerances

STRAINED = [
    ("constant", "q4_k"),
    ("constant", "q5_k"),
    ("bytes", "q4_k"),
    ("bytes", "q6_k"),
    ("mean 10", "all"),
]
OUT_OF_RANGE = [("norms 1e30", "q4_k_m"), ("norms 1e-30", "all"), ("denormal", "f32"), ("large", "q8_0")]


@pytest.fixture
def opened(tmp_path, request):
    """A random file of a style and a mix, open."""
    style, mix = request.param
    path = tmp_path / "model.gguf"
    write_random_gguf(path, SMALL, mix=mix, seed=4, style=STYLES[style])
    with open_model(path) as source:
        yield source


@pytest.mark.parametrize("opened", STRAINED + OUT_OF_RANGE, indirect=True, ids=str)
def test_a_right_backend_passes(opened):
    with np.errstate(over="ignore", invalid="ignore"):
        departures = inspect(ReferenceRunner(opened), opened).departures
    assert not departures


@pytest.mark.parametrize("opened", [("constant", "q4_k"), ("mean -10", "q4_k_m")], indirect=True, ids=str)
def test_jax_passes(opened):
    from qwen3_moe_jax.jax_backend.runner import JaxRunner

    assert not inspect(JaxRunner(opened, max_context=64), opened).departures


@pytest.mark.parametrize(
    ("style", "mix", "bound"),
    [
        ("mean 10", "all", tolerances.LOGITS_OF_FLOAT32),
        ("ordinary", "q4_k_m", tolerances.LOGITS_OF_FLOAT32),
        ("constant", "only_q4_k", np.inf),
        ("bytes", "only_q4_k", np.inf),
    ],
)
def test_logits_are_as_near_as_the_roundings_of_their_products_allow(tmp_path, style, mix, bound):
    """Constant blocks and random bytes make roundings grow: the bound is then the file's own."""
    found = check(Case(4, style, mix, {}), "reference", tmp_path)
    assert not found["departures"]
    assert not is_far(found)
    assert found["distance"] < bound


def test_a_right_backend_may_be_further_than_one_draw(tmp_path):
    """These bytes condition the file so badly that draws differ by a factor of 30: one was below."""
    (case,) = (case for case in cases(100) if case.number == 66)
    found = check(case, "jax", tmp_path)
    assert not found["departures"]
    assert not is_far(found)


@pytest.mark.parametrize("opened", STRAINED, indirect=True, ids=str)
def test_a_wrong_matrix_departs(opened):
    """One row of a matrix is 1 percent too large."""
    runner = ReferenceRunner(opened)
    path = "layers.1.self_attn.o_proj"
    wrong = dequantize(runner.weights[path]).copy()
    wrong[0] *= 1.01
    runner.weights[path] = pack(wrong.reshape(-1).view(np.uint8), GGMLType.F32, wrong.shape)
    departures = inspect(runner, opened).departures
    assert [d.where for d in departures][:1] == ["attn_out-1"]


def test_numbers_that_are_not_finite_depart(opened_ordinary):
    runner = ReferenceRunner(opened_ordinary)
    weight = dequantize(runner.weights["layers.1.self_attn.o_proj"]).copy()
    weight[:] = np.nan
    runner.weights["layers.1.self_attn.o_proj"] = pack(
        weight.reshape(-1).view(np.uint8), GGMLType.F32, weight.shape
    )
    with np.errstate(invalid="ignore"):
        departures = inspect(runner, opened_ordinary).departures
    assert departures[0].where == "attn_out-1"
    assert departures[0].nonfinite


@pytest.fixture
def opened_ordinary(tmp_path):
    write_random_gguf(tmp_path / "model.gguf", SMALL, mix="q4_k_m", seed=4)
    with open_model(tmp_path / "model.gguf") as source:
        yield source


def _float32_product(x: np.ndarray, weight) -> np.ndarray:
    """Sums of x a and x b of each subblock apart, in float32, as packed products do it."""
    minus = noise.subtracted(weight)
    plus = (dequantize(weight, np.float64) + minus).astype(np.float32)
    total = np.zeros((len(x), len(plus)), np.float32)
    for start in range(0, x.shape[1], noise.SUBBLOCK):
        part = slice(start, start + noise.SUBBLOCK)
        total += x[:, part] @ plus[:, part].T - x[:, part] @ minus.astype(np.float32)[:, part].T
    return total


@pytest.mark.parametrize("blocks", [random_blocks, constant_blocks, raw_blocks, shifted(5.0).blocks])
@pytest.mark.parametrize("kind", [t.name for t in SUPPORTED_TYPES if BLOCK_FORMATS[t].weights > 1])
def test_careful_sigma_holds_packed_products_and_sees_coarse_ones(blocks, kind):
    rng = np.random.default_rng(3)
    type = GGMLType[kind]
    raw = blocks(type, 64 * 2048 // BLOCK_FORMATS[type].weights, rng)
    weight = pack(raw.reshape(-1), type, (64, 2048))
    x32 = (1 + rng.standard_normal((4, 2048))).astype(np.float32)
    x, w, bfloat16 = x32.astype(np.float64), dequantize(weight, np.float64), noise.ROUNDING["bfloat16"]
    exact = x @ w.T
    sigma = noise.careful_sigma(x, weight, noise.FLOAT32)
    assert (np.abs(_float32_product(x32, weight) - exact) <= noise.MAX_SIGMAS * sigma).all()
    coarse = noise.rounded(x, bfloat16) @ noise.rounded(w, bfloat16).T
    assert np.mean(np.abs(coarse - exact) > noise.MAX_SIGMAS * sigma) > 0.5
    allowed = noise.careful_sigma(x, weight, bfloat16)
    assert (np.abs(coarse - exact) <= noise.MAX_SIGMAS * allowed).all()


def test_rounding_is_to_even_and_relative():
    values = np.array([1.0, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, -3e-30])
    found = noise.rounded(values, noise.ROUNDING["bfloat16"])
    assert found[:4].tolist() == [1.0, 1.0, 1.0, 1 + 2**-6]
    assert abs(found[4] / values[4] - 1) <= 2**-9


def test_cases_have_every_style():
    assert {c.style for c in cases(len(STYLES))} == set(STYLES)
