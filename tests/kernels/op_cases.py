"""The cases that every implementation of an op must pass, as classes to subclass.

An implementation gets all of them in a line or two::

    class TestXlaRows(OpCases):
        implementation, layout = "xla", ROWS

The oracle of every case is NumPy in float64 on weights that
``qwen3_moe_jax.convert.unpack.dequantize`` gives. Seeds follow from the test's name and are
printed. Experts that no token chose hold NaN scales, so a read of the wrong
expert's weights cannot go unseen; outputs land between canary rows, so a write
beside them cannot either. The shapes are those of llama.cpp's
test-backend-ops (0c1e57098) for Q4_K, run for every quantized type.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.kernels_pallas.quantized_matmul import arg_specs as matmul_specs
from tests import tolerances
from tests.kernels.attention_cases import AttentionCases
from tests.kernels.expert_cases import ExpertCases
from tests.kernels.op_inputs import (
    MATMUL_SHAPES,
    PLAIN,
    QUANTIZED,
    dense64,
    heavy_tailed,
    random_weights,
    uniform,
)
from tests.kernels.op_oracles import check, moe_oracle


class OpCases(ExpertCases, AttentionCases):
    """All cases; a subclass says what to run them on."""

    # Dequantization

    @pytest.mark.parametrize("type", QUANTIZED + PLAIN, ids=lambda t: t.name)
    def test_dequantization_is_bit_exact(self, rng, type):
        w = random_weights(rng, type, (2, 32, 512))
        if type in QUANTIZED:
            w.arrays["d"].reshape(-1)[:6] = (65504, -65504, 6e-8, -6e-8, 0, -0.0)  # extremes of float16
        expected = dequantize(w)
        actual = np.asarray(jax.jit(ops.dequantize)(self.prepare(w)))
        np.testing.assert_array_equal(
            actual.view(np.uint32) & 0x7FFFFFFF, expected.view(np.uint32) & 0x7FFFFFFF
        )
        np.testing.assert_array_equal(actual, expected)  # signs too, but for a zero's
        half = jax.jit(ops.dequantize, static_argnums=1)(self.prepare(w), jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(half), expected.astype(jnp.bfloat16))

    @pytest.mark.parametrize("type", QUANTIZED + PLAIN, ids=lambda t: t.name)
    def test_embedding_lookup_is_bit_exact(self, rng, type):
        w = random_weights(rng, type, (64, 512))
        ids = np.array([63, 0, 17, 17, 16, 15, 1])
        rows = ops.embedding_lookup(self.prepare(w), ids, implementation=self.implementation)
        np.testing.assert_array_equal(np.asarray(rows), dequantize(w)[ids])

    # Matrix products

    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    @pytest.mark.parametrize("rows", sorted({s[0] for s in MATMUL_SHAPES}))
    def test_matmul_shapes(self, rng, rows, type):
        shapes = [s for s in MATMUL_SHAPES if s[0] == rows]
        for columns in sorted({s[2] for s in shapes}):
            w = random_weights(rng, type, (rows, columns))
            prepared, dense = self.prepare(w), dense64(w)
            for tokens in (s[1] for s in shapes if s[2] == columns):
                x = uniform(rng, (tokens, columns))
                shape = (tokens, rows)
                actual = self.between_canaries(self.matmul, shape, x, prepared, dtype=jnp.float32)
                check(actual, x @ dense.T, self.matmul_bound(jnp.float32), (rows, tokens, columns))

    @pytest.mark.parametrize("type", QUANTIZED + PLAIN, ids=lambda t: t.name)
    def test_matmul_of_heavy_tailed_inputs(self, rng, type):
        w = random_weights(rng, type, (96, 512))
        for tokens, dtype in itertools.product((1, 40), self.dtypes):
            x = heavy_tailed(rng, (tokens, 512))
            actual = self.matmul(x, self.prepare(w), dtype)
            check(actual, x @ dense64(w).T, self.matmul_bound(dtype), (tokens, dtype.__name__))

    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    def test_matmul_real_shape(self, rng, type):
        spec = matmul_specs.ARG_SPECS["o_proj_decode1"]
        w = random_weights(rng, type, (spec.rows, spec.columns))
        x = heavy_tailed(rng, (spec.tokens, spec.columns))
        for dtype in self.dtypes:
            check(self.matmul(x, self.prepare(w), dtype), x @ dense64(w).T, self.matmul_bound(dtype), spec)

    def test_matmul_in_tiles_of_rows(self, rng):
        """A matrix too large for one tile, whose last tile overlaps the one before, forward and back."""
        w = random_weights(rng, GGMLType.Q4_K, (4096 + 48, 2048))
        x = uniform(rng, (9, 2048))
        check(self.matmul(x, self.prepare(w), jnp.float32), x @ dense64(w).T, 1e-10, "forward")
        dy = uniform(rng, (9, w.shape[0]))
        dx = jax.vjp(lambda x: self.matmul(x, self.prepare(w), jnp.float32), x)[1](dy)[0]
        check(dx, dy @ dense64(w), self.matmul_bound(jnp.float32), "backward")

    # Gradients and batching

    @pytest.mark.parametrize("tokens", [3, 50])
    def test_gradients(self, rng, tokens):
        gate, up, down = (random_weights(rng, t, (4, 256, 256)) for t in QUANTIZED[:3])
        ids = rng.integers(0, 4, (tokens, 2)).astype(np.int32)
        weights = rng.uniform(size=(tokens, 2)).astype(np.float32)
        x, dy = uniform(rng, (tokens, 256)), uniform(rng, (tokens, 256))

        def dense_moe(x, weights):
            g, u, d = (jnp.asarray(dequantize(w))[ids] for w in (gate, up, down))
            hidden = jax.nn.silu(jnp.einsum("td,txfd->txf", x, g)) * jnp.einsum("td,txfd->txf", x, u)
            return jnp.einsum("txf,txdf,tx->td", hidden, d, weights)

        prepared = [self.prepare(w) for w in (gate, up, down)]
        expected = jax.vjp(dense_moe, x, weights)[1](dy)
        actual = jax.vjp(lambda x, weights: self.moe(x, *prepared, ids, weights), x, weights)[1](dy)
        for name, a, e in zip(("x", "expert_weights"), actual, expected, strict=True):
            check(a, np.asarray(e, np.float64), tolerances.GRADIENT_NMSE, name)

        dense = dense64(gate)
        stack = prepared[0]
        dx = jax.grad(lambda x: jnp.vdot(self.expert_matmul(x, stack, ids, jnp.float32)[:, 0], dy))(x)
        check(dx, np.einsum("tn,tnk->tk", dy, dense[ids[:, 0]]), tolerances.GRADIENT_NMSE, "expert_matmul")
        matrix = self.prepare(gate[1])
        dx = jax.grad(lambda x: jnp.vdot(self.matmul(x, matrix, jnp.float32), dy))(x)
        check(dx, dy @ dense[1], tolerances.GRADIENT_NMSE, "quantized_matmul")

    @pytest.mark.parametrize("tokens", [2, 40])
    def test_vmap_over_a_batch(self, rng, tokens):
        w = random_weights(rng, GGMLType.Q5_K, (4, 256, 256))
        prepared = self.prepare(w)
        x = uniform(rng, (3, tokens, 256))
        ids = rng.integers(0, 4, (3, tokens, 2)).astype(np.int32)
        weights = rng.uniform(size=(3, tokens, 2)).astype(np.float32)
        actual = jax.vmap(lambda x: self.matmul(x, self.prepare(w[2]), jnp.float32))(x)
        check(actual, x @ dense64(w)[2].T, tolerances.MATMUL_FLOAT32_NMSE, "quantized_matmul")
        actual = jax.vmap(lambda x, i, e: self.moe(x, prepared, prepared, prepared, i, e))(x, ids, weights)
        expected = np.stack([moe_oracle(*a[:1], w, w, w, *a[1:]) for a in zip(x, ids, weights, strict=True)])
        check(actual, expected, tolerances.MOE_FLOAT32_NMSE, "moe_mlp")

    # Choice of an implementation

    def test_a_named_implementation_runs_or_raises(self, rng):
        w = self.prepare(random_weights(rng, GGMLType.Q4_K, (16, 256)))
        x = uniform(rng, (1, 256))
        with pytest.raises(NotImplementedError, match="implementation='no such'"):
            ops.quantized_matmul(x, w, implementation="no such")
        with pytest.raises(ValueError, match="do not match"):
            ops.quantized_matmul(x[:, :-1], w, implementation=self.implementation)
        with pytest.raises(ValueError, match="compute_dtype"):
            ops.quantized_matmul(x, w, compute_dtype=jnp.float16, implementation=self.implementation)
