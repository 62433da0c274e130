"""Rotary positions: the NumPy tables, the device's tables, and Transformers' YaRN formula agree."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.config import PRESETS, RopeScaling
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.reference.ops import apply_rope
from tests import tolerances

CONFIG = PRESETS["Qwen3-Coder-30B-A3B"]
YARN = RopeScaling("yarn", 4.0, 32768)
SCALINGS = [None, RopeScaling("linear", 2.0, 4096), YARN, replace(YARN, attention_factor=1.5)]


def transformers_yarn(dim, base, factor, original, beta_fast=32, beta_slow=1):
    """``_compute_yarn_parameters`` of Transformers (modeling_rope_utils.py), written out again."""

    def correction_dim(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = (
        max(math.floor(correction_dim(beta_fast)), 0),
        min(math.ceil(correction_dim(beta_slow)), dim - 1),
    )
    pos_freqs = base ** (np.arange(0, dim, 2) / dim)
    extrapolation_factor = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    extrapolated = (1.0 / pos_freqs) * extrapolation_factor
    return (1.0 / (factor * pos_freqs)) * (1 - extrapolation_factor) + extrapolated, 0.1 * math.log(
        factor
    ) + 1


def test_yarn_is_transformers():
    frequencies, magnitude = replace(CONFIG, rope_scaling=YARN).rope_frequencies()
    expected, factor = transformers_yarn(CONFIG.head_dim, CONFIG.rope_theta, YARN.factor, 32768)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-12)
    assert magnitude == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_device_tables_are_right_at_any_position(scaling):
    config = replace(CONFIG, rope_scaling=scaling)
    positions = np.array([0, 1, 77, 4095, 32768, 262_143, 1_048_575])
    frequencies, magnitude = config.rope_frequencies()
    angles = positions[:, None] * frequencies
    cos, sin = ops.rope_tables(jnp.asarray(positions, jnp.int32), config.head_dim, config.rope_theta, scaling)
    np.testing.assert_allclose(cos, np.cos(angles) * magnitude, atol=tolerances.ROPE_TABLES)
    np.testing.assert_allclose(sin, np.sin(angles) * magnitude, atol=tolerances.ROPE_TABLES)


def test_numpy_tables_are_the_same_angles():
    cos, sin = rope_tables(CONFIG, 300)
    on_device = ops.rope_tables(jnp.arange(300), CONFIG.head_dim, CONFIG.rope_theta, None)
    np.testing.assert_allclose(cos, on_device[0], atol=tolerances.ROPE_TABLES)
    np.testing.assert_allclose(sin, on_device[1], atol=tolerances.ROPE_TABLES)


def test_pairs_are_half_a_head_apart():
    x = np.zeros((1, 1, 8), np.float32)
    x[0, 0, 1] = 1.0
    cos, sin = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)  # a quarter turn
    turned = apply_rope(x, cos, sin)
    assert turned[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    on_device = ops.rope(jnp.asarray(x)[None], jnp.asarray(cos)[None], jnp.asarray(sin)[None])
    np.testing.assert_array_equal(on_device[0], turned)
