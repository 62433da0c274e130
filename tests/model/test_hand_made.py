"""A sparse layer small enough to compute by hand: the rules of routing, one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.reference import ops as reference

HIDDEN = 4


def stack(*factors: float) -> PackedTensor:
    """Experts that multiply by these factors: [E, D, D]."""
    identity = np.eye(HIDDEN, dtype=np.float32)
    return PackedTensor({"w": np.stack([identity * f for f in factors])}, GGMLType.F32)


def silu(x: float) -> float:
    return x / (1 + np.exp(-x))


def numpy_layer(x, gate, up, down, ids, weights):
    inputs = np.repeat(x[:, None], ids.shape[1], axis=1)
    act = reference.silu(reference.expert_matmul(inputs, gate, ids)) * reference.expert_matmul(
        inputs, up, ids
    )
    return (reference.expert_matmul(act, down, ids) * weights[..., None]).sum(1)


def jax_layer(x, gate, up, down, ids, weights):
    return np.asarray(ops.moe_mlp(jnp.asarray(x), gate, up, down, jnp.asarray(ids), jnp.asarray(weights)))


LAYERS = pytest.mark.parametrize("layer", [numpy_layer, jax_layer])
CHOICES = pytest.mark.parametrize(
    "choose", [reference.choose_experts, lambda *a: [np.asarray(x) for x in ops.choose_experts(*a)]]
)


@LAYERS
def test_weighted_sum_of_the_chosen_experts(layer):
    x = np.ones((1, HIDDEN), np.float32)
    out = layer(
        x,
        stack(1, 2, 3),
        stack(1, 1, 1),
        stack(1, 1, 10),
        np.array([[0, 2]]),
        np.array([[0.25, 0.75]], np.float32),
    )
    np.testing.assert_allclose(out, 0.25 * silu(1) + 0.75 * 10 * silu(3), rtol=1e-6)


@LAYERS
def test_the_weight_comes_after_down_and_up_is_not_activated(layer):
    x = np.full((1, HIDDEN), -2.0, np.float32)
    out = layer(x, stack(1), stack(3), stack(2), np.array([[0]]), np.array([[0.5]], np.float32))
    np.testing.assert_allclose(out, 0.5 * 2 * (silu(-2) * -6), rtol=1e-6)


@LAYERS
def test_each_token_goes_to_its_own_experts(layer):
    x = np.ones((3, HIDDEN), np.float32)
    ids = np.array([[2], [0], [2]])
    out = layer(x, stack(1, 2, 3), stack(1, 1, 1), stack(1, 1, 1), ids, np.ones((3, 1), np.float32))
    np.testing.assert_allclose(out[:, 0], [silu(3), silu(1), silu(3)], rtol=1e-6)


@CHOICES
def test_softmax_is_over_all_experts_and_then_renormalized(choose):
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    probs, ids, weights = choose(logits, 2)
    np.testing.assert_allclose(probs, [[0.1, 0.4, 0.2, 0.3]], rtol=1e-6)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-6)


@CHOICES
def test_equal_logits_choose_the_lowest_ids(choose):
    _, ids, weights = choose(np.zeros((1, 6), np.float32), 3)
    assert ids.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@CHOICES
def test_replayed_experts_keep_this_routers_probabilities(choose):
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    _, ids, weights = choose(logits, 2, np.array([[2, 0]], np.int32))
    assert ids.tolist() == [[2, 0]]
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3]], rtol=1e-6)


@CHOICES
def test_a_tiny_sum_is_clamped(choose):
    logits = np.array([[0.0, -40.0]], np.float32)
    _, _, weights = choose(logits, 1, np.array([[1]], np.int32))
    assert weights[0, 0] < 1e-10
