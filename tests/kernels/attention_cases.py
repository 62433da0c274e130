"""The cases of attention over a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from tests import tolerances
from tests.kernels.op_inputs import uniform
from tests.kernels.op_oracles import attention_oracle, check
from tests.kernels.op_under_test import OpUnderTest


class AttentionCases(OpUnderTest):
    """See ``op_cases``."""

    cache_dtypes = (jnp.float32, jnp.bfloat16)

    def attention(self, q, k_cache, v_cache, positions, **kwargs):
        implementation = self.implementation
        return ops.attention(q, k_cache, v_cache, positions, implementation=implementation, **kwargs)

    def attention_bound(self) -> float:
        return tolerances.ATTENTION_NMSE

    @pytest.mark.parametrize(
        "shape",
        [
            (1, 1, 8, 2, 32, 1),
            (2, 5, 8, 2, 32, 7),
            (2, 1, 4, 4, 64, 700),
            (1, 300, 4, 1, 64, 520),
            (3, 17, 6, 2, 16, 256),
        ],
        ids=str,
    )
    def test_attention(self, rng, shape):
        B, T, N, K, H, S = shape
        q, *cache = (uniform(rng, s) * 3 for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
        positions = rng.integers(0, S, (B, T)).astype(np.int32)
        positions[:, -1] = S - 1
        for dtype in self.cache_dtypes:
            k, v = (jnp.asarray(a, dtype) for a in cache)
            expected = attention_oracle(q, *(np.asarray(a, np.float32) for a in (k, v)), positions)
            actual = self.attention(q, k, v, positions)
            check(actual, expected, self.attention_bound(), (shape, dtype.__name__))

    def test_attention_ignores_what_lies_beyond_positions(self, rng):
        q, k, v = (uniform(rng, s) for s in ((2, 3, 4, 64), (2, 600, 2, 64), (2, 600, 2, 64)))
        positions = np.array([[4, 5, 6], [-1, 0, 299]], np.int32)
        for dtype in self.cache_dtypes:
            rounded = [np.array(jnp.asarray(a, dtype), np.float32) for a in (k, v)]
            expected = attention_oracle(q, *rounded, positions)
            for a in rounded:
                a[0, 7:], a[1, 300:] = 1e4, 1e4
            actual = self.attention(q, *(jnp.asarray(a, dtype) for a in rounded), positions)
            check(actual, expected, self.attention_bound(), "positions beyond")
            np.testing.assert_array_equal(actual[1, 0], 0)  # position -1 sees nothing

    @pytest.mark.parametrize("slots", [(4, 1), None], ids=["rows in any order", "the first rows"])
    @pytest.mark.parametrize("tokens", [1, 20])
    def test_attention_reads_the_rows_that_are_meant(self, rng, tokens, slots):
        """Two sequences over a cache of three layers and five rows: NaN wherever nothing may be read."""
        q = uniform(rng, (2, tokens, 4, 64))
        cache = uniform(rng, (2, 5, 200, 2, 64))
        positions = np.array([[150], [30]], np.int32) + np.arange(tokens, dtype=np.int32)
        rows = np.array(slots or (0, 1), np.int32)
        for dtype in self.cache_dtypes:
            k, v = (np.asarray(jnp.asarray(a, dtype), np.float32) for a in cache)
            expected = attention_oracle(q, k[rows], v[rows], positions)
            layers = [np.full((3, *a.shape), np.nan, np.float32) for a in (k, v)]
            for stack, a in zip(layers, (k, v), strict=True):
                stack[1, rows] = a[rows]
            stacks = (jnp.asarray(a, dtype) for a in layers)
            places = None if slots is None else jnp.asarray(rows)
            actual = self.attention(q, *stacks, positions, layer=jnp.int32(1), slots=places)
            check(actual, expected, self.attention_bound(), dtype.__name__)

    @pytest.mark.parametrize("tokens", [1, 20])
    def test_attention_over_an_int8_cache(self, rng, tokens):
        """Scales of every vector; NaN in those of rows and layers that are not meant."""
        q = uniform(rng, (2, tokens, 4, 64))
        values = rng.integers(-127, 128, (2, 2, 4, 300, 2, 64)).astype(np.int8)
        scales = np.full((2, 2, 4, 300, 2), np.nan, np.float32)
        rows = np.array([3, 0], np.int32)
        scales[:, 1, rows] = rng.uniform(0.001, 0.03, (2, 2, 300, 2))
        positions = np.array([[200], [-1]], np.int32) + np.arange(tokens, dtype=np.int32)
        k, v = values[:, 1, rows] * scales[:, 1, rows, ..., None]
        actual = self.attention(
            q,
            *(jnp.asarray(a) for a in values),
            positions,
            layer=jnp.int32(1),
            slots=jnp.asarray(rows),
            scales=tuple(jnp.asarray(a) for a in scales),
        )
        check(actual, attention_oracle(q, k, v, positions), self.attention_bound(), tokens)

    def test_attention_names_shapes_that_do_not_match(self, rng):
        q, cache = jnp.zeros((3, 1, 4, 64)), jnp.zeros((2, 64, 2, 64))
        positions = jnp.zeros((3, 1), jnp.int32)
        with pytest.raises(ValueError, match=r"do not match: q \(3, 1, 4, 64\), k_cache"):
            ops.attention(q, cache, cache, positions)
        with pytest.raises(ValueError, match="slots \\(2,\\)"):
            ops.attention(q, cache, cache, positions, slots=jnp.zeros(2, jnp.int32))
        whole = cache.astype(jnp.int8)
        with pytest.raises(ValueError, match="a cache of int8 needs scales"):
            ops.attention(q[:2], whole, whole, positions[:2])

    def test_attention_gradients(self, rng):
        q, k, v, dy = (uniform(rng, s) for s in ((1, 3, 4, 16), (1, 9, 2, 16), (1, 9, 2, 16), (1, 3, 4, 16)))
        positions = np.array([[2, 5, 8]], np.int32)

        def loss(*args):
            return jnp.vdot(ops.attention(*args, positions, implementation=self.implementation), dy)

        gradients = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
        for which, gradient in enumerate(gradients):
            args = [a.astype(np.float64) for a in (q, k, v)]
            direction = rng.standard_normal(args[which].shape)
            step = 1e-5 * direction

            def value(sign, which=which, args=args, step=step):
                moved = [a + sign * step if i == which else a for i, a in enumerate(args)]
                return (attention_oracle(*moved, positions) * dy).sum()

            expected = (value(1) - value(-1)) / 2e-5
            actual = float((np.asarray(gradient, np.float64) * direction).sum())
            assert actual == pytest.approx(expected, rel=tolerances.GRADIENT_RELATIVE)
