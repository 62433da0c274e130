"""The reference's matrix products against float64, by the cases that every implementation passes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.kernels_pallas.expert_matmul.routing import ROW_TILE
from qwen3_moe_jax.reference import ops
from tests.kernels.op_cases import OpCases
from tests.kernels.op_inputs import EXPERT_SHAPES, QUANTIZED, rng, routing_patterns, seed_of
from tests.kernels.op_oracles import CANARY, check_canaries

__all__ = ["rng"]


class TestReference(OpCases):
    """Matrix and expert products, and the expert layer; whole passes are in tests/model."""

    dtypes = (jnp.float32,)
    is_traceable = False

    def prepare(self, w):
        return w

    def matmul(self, x, w, dtype):
        return ops.matmul(np.asarray(x, np.float32), w)

    def expert_matmul(self, x, w, ids, dtype):
        x = np.asarray(x, np.float32)
        inputs = x if x.ndim == 3 else np.repeat(x[:, None], ids.shape[1], axis=1)
        return ops.expert_matmul(inputs, w, ids)

    def moe(self, x, gate, up, down, ids, weights, dtype=jnp.float32):
        act = ops.silu(self.expert_matmul(x, gate, ids, dtype)) * self.expert_matmul(x, up, ids, dtype)
        return np.einsum("txd,tx->td", self.expert_matmul(act, down, ids, dtype), weights)

    @pytest.mark.parametrize("dtype", dtypes, ids=lambda d: d.__name__)
    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    def test_expert_matmul_routing(self, rng, type, dtype):
        super().test_expert_matmul_routing(rng, type, dtype)


def _of_jax() -> list[str]:
    """Cases of JAX's own arrays and transformations, and of ops that the reference has in another form."""
    parts = ("dequantization", "embedding", "in_tiles_of_rows", "stages", "gradients", "vmap", "router")
    parts += ("attention", "named_implementation")
    return [name for name in dir(OpCases) if name.startswith("test_") and any(p in name for p in parts)]


for _name in _of_jax():
    setattr(TestReference, _name, None)


# The cases themselves


def parameters(test, name: str) -> list:
    """The values that a test is run with."""
    return next(list(mark.args[1]) for mark in test.pytestmark if mark.args[0] == name)


def test_there_are_87_expert_cases_of_every_quantized_type():
    assert parameters(OpCases.test_expert_matmul_shapes, "type") == list(QUANTIZED)
    assert {t.name for t in QUANTIZED} == {"Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    shapes = parameters(OpCases.test_expert_matmul_shapes, "shape")
    cases = [case for shape in shapes for case in EXPERT_SHAPES if case[4:] == shape]
    assert sorted(cases) == sorted(EXPERT_SHAPES)  # each once
    assert len(cases) >= 87
    grid = itertools.product((4, 8), (1, 2, 4), (False, True), (1, 4, 5, 17, 32, 129))
    assert {(*case, 512, 256) for case in grid} <= set(cases)


def test_every_routing_pattern_is_there():
    patterns = routing_patterns(np.random.default_rng(0))
    assert {"uniform", "one expert takes all", "tile edges"} <= patterns.keys()
    tile = ROW_TILE
    assert np.bincount(patterns["tile edges"][1]).tolist() == [1, tile - 1, tile, tile + 1]
    assert parameters(OpCases.test_expert_matmul_routing, "type") == list(QUANTIZED)


def test_a_write_beside_the_output_is_seen():
    buffer = np.full((20, 3), CANARY)
    buffer[8:12] = 1
    assert (check_canaries(buffer) == 1).all()
    for row in (7, 12):
        wrong = buffer.copy()
        wrong[row, 2] = 1
        with pytest.raises(AssertionError, match="beside the output"):
            check_canaries(wrong)


def test_seeds_are_fixed(rng, request):
    again = np.random.default_rng(seed_of(request.node.name))
    assert rng.integers(1 << 30) == again.integers(1 << 30)
