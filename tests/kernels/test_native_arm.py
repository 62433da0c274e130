"""The CPU's own products on ARM: compiled always, run where an emulator of its processors is installed.

Without one (qemu-user and libc6-arm64-cross, which ``scripts/test`` installs) these tests hold that the code
compiles for ARM and has ARM's dot products, and warn that it was not run.
"""

import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.kernels_pallas.native.operands import ARRAYS
from qwen3_moe_jax.machine.kernels import NATIVE
from tests import tolerances
from tests.kernels import emulated
from tests.kernels.op_inputs import heavy_tailed, random_weights, rng
from tests.kernels.test_native import arranged, columns_of, names

__all__ = ["rng"]

SDOT = {0x4E809400, 0x4F80E000}
"""The instruction and its form with one word for all lanes, without their operands."""
OPERANDS = {0x4E809400: 0xFFE0FC00, 0x4F80E000: 0xFFC0F400}


@pytest.fixture(scope="module")
def program():
    return emulated.replayer()


def runs_here() -> bool:
    if emulated.emulator() is None:
        warnings.warn("ARM's products are compiled and not run: qemu-aarch64 is not installed", stacklevel=2)
        return False
    return True


def test_it_is_compiled_for_arm_with_its_dot_products(program):
    code = program.read_bytes()
    assert (code[:4], int.from_bytes(code[18:20], "little")) == (b"\x7fELF", 183)
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4")
    assert sum(((words & OPERANDS[code]) == code).sum() for code in SDOT) > 500


@pytest.mark.parametrize("type", ARRAYS, ids=names)
def test_products_on_arm_are_those_of_this_processor(native, program, rng, type):
    columns = columns_of(type, 2)
    w = arranged(random_weights(rng, type, (48, columns)))
    x = heavy_tailed(rng, (16, columns))
    multiply = lambda x: np.asarray(ops.quantized_matmul(x, w, implementation="native"))
    expected = multiply(x)
    if not runs_here():
        return
    with emulated.emulated_calls(threads=3):
        found = multiply(x)
        several = {count: multiply(x[:count]) for count in (1, 2, 5, 11)}
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.NATIVE_FORMS * np.abs(expected).max())
    for count, alone in several.items():
        np.testing.assert_array_equal(alone, found[:count])


def test_the_whole_model_on_arm(source, native, program, golden):
    """Attention, router and experts too, with the bits of one thread on three."""
    runner = JaxRunner(source, max_context=64, kernels=NATIVE)
    network = runner.decoder.model.bind(runner.params)
    ids = golden["ids0"][:24]
    rows, positions = jnp.asarray([ids]), jnp.zeros(1, jnp.int32)
    if not runs_here():
        return
    found = []
    for threads in (1, 3):
        cache = KVCache.create(source.config, 1, 64)
        with emulated.emulated_calls(threads):
            found.append(
                np.asarray(network.logits(network(rows, cache, [Span(positions, len(ids))]).hidden)[0])
            )
    np.testing.assert_array_equal(*found)
    expected = golden["float32_logits0"][: len(ids)].astype(np.float64)
    norms = np.linalg.norm(found[0], axis=-1) * np.linalg.norm(expected, axis=-1)
    assert ((found[0] * expected).sum(-1) / norms).min() >= tolerances.NATIVE_COSINE


def test_sections_of_a_long_context_on_arm(source, native, program, golden):
    """One row behind 1,200 keys whose sections are dealt out, and rows that take them one after the other."""
    if not runs_here():
        return
    network = JaxRunner(source, max_context=64, kernels=NATIVE)
    bound = network.decoder.model.bind(network.params)
    draw = np.random.default_rng(5)
    empty = KVCache.create(source.config, 1, 1280)
    k, v = (jnp.asarray(draw.standard_normal(x.shape, np.float32)) for x in (empty.k, empty.v))

    def logits(count: int) -> np.ndarray:
        rows, span = jnp.asarray([golden["ids0"][:count]]), Span(jnp.full(1, 1200), count)
        return np.asarray(bound.logits(bound(rows, replace(empty, k=k, v=v), [span]).hidden)[0])

    expected = logits(3).astype(np.float64)
    with emulated.emulated_calls(threads=3):
        found, alone = logits(3), logits(1)
    np.testing.assert_array_equal(alone[0], found[0])
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    assert ((found * expected).sum(-1) / norms).min() >= tolerances.NATIVE_COSINE
