"""The cases of products with experts, of the expert layer and of the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.expert_matmul import arg_specs as expert_specs
from tests import tolerances
from tests.kernels.op_inputs import (
    DTYPES,
    EXPERT_SHAPES,
    QUANTIZED,
    dense64,
    heavy_tailed,
    poison,
    random_weights,
    routing_patterns,
    scatter_experts,
    uniform,
)
from tests.kernels.op_oracles import check, expert_oracle, moe_oracle, silu64
from tests.kernels.op_under_test import OpUnderTest

TOPK_EXPERTS = (8, 31, 32, 40, 71, 128, 129, 160, 256, 288)


class ExpertCases(OpUnderTest):
    """See ``op_cases``."""

    def moe_bound(self, dtype) -> float:
        return self.bound(dtype, tolerances.MOE_FLOAT32_NMSE, tolerances.MOE_BFLOAT16_NMSE)

    def expert_matmul(self, x, w: PackedTensor, ids, dtype) -> jax.Array:
        return ops.expert_matmul(x, w, ids, compute_dtype=dtype, implementation=self.implementation)

    def moe(self, *args, dtype=jnp.float32, **kwargs):
        return ops.moe_mlp(*args, compute_dtype=dtype, implementation=self.implementation, **kwargs)

    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    @pytest.mark.parametrize("shape", sorted({(s[4], s[5]) for s in EXPERT_SHAPES}), ids=str)
    def test_expert_matmul_shapes(self, rng, shape, type):
        """Cases of 4 experts run on a stack of 8 whose second half is NaN, so that they share programs."""
        rows, columns = shape
        cases = [s for s in EXPERT_SHAPES if s[4:] == shape]
        stack_size = max(s[0] for s in cases)
        w = random_weights(rng, type, (stack_size, rows, columns))
        stacks = {n: self.prepare(poison(w, np.arange(n))) for n in {s[0] for s in cases}}
        dense = dense64(w)
        for case in cases:
            experts, used, shared, tokens, _, _ = case
            ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
            x = uniform(rng, (tokens, columns) if shared else (tokens, used, columns))
            if experts == 128:
                x *= rng.choice((1, 1e3, 1e5), x.shape).astype(np.float32)
            expected = expert_oracle(x, dense, ids)
            for dtype in self.shape_dtypes:
                actual = self.between_canaries(
                    self.expert_matmul, expected.shape, x, stacks[experts], ids, dtype=dtype
                )
                check(actual, expected, self.matmul_bound(dtype), (case, dtype.__name__))

    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    def test_expert_matmul_real_shapes(self, rng, type):
        for name in ("gate_up_decode1", "down_q4_decode1"):
            spec = expert_specs.ARG_SPECS[name]
            ids = rng.permutation(spec.experts)[None, : spec.used].astype(np.int32)
            some = random_weights(rng, type, (spec.used, spec.rows, spec.columns))
            w = scatter_experts(some, ids[0], spec.experts)
            x = heavy_tailed(rng, (1, spec.columns) if spec.shared_input else (1, spec.used, spec.columns))
            expected = expert_oracle(x, some, np.arange(spec.used)[None])
            for dtype in self.dtypes:
                check(
                    self.expert_matmul(x, self.prepare(w), ids, dtype),
                    expected,
                    self.matmul_bound(dtype),
                    spec,
                )

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    def test_expert_matmul_routing(self, rng, type, dtype):
        for name, (experts, ids) in routing_patterns(rng).items():
            w = poison(random_weights(rng, type, (experts, 64, 256)), ids)
            x = heavy_tailed(rng, (len(ids), 256))
            ids = ids[:, None].astype(np.int32)
            expected = expert_oracle(x, w, ids)
            actual = self.between_canaries(
                self.expert_matmul, expected.shape, x, self.prepare(w), ids, dtype=dtype
            )
            check(actual, expected, self.matmul_bound(dtype), name)

    @pytest.mark.parametrize("rows", [7, 80])
    def test_every_pattern_of_empty_experts(self, rng, rows):
        w = random_weights(rng, GGMLType.Q4_K, (8, 64, 256))
        dense = dense64(w)
        x = uniform(rng, (rows, 256))
        for pattern in range(1, 256):
            in_use = [e for e in range(8) if pattern >> e & 1]
            ids = rng.choice(in_use, (rows, 1)).astype(np.int32)
            expected = np.einsum("tk,tnk->tn", x.astype(np.float64), dense[ids[:, 0]])[:, None]
            actual = self.expert_matmul(x, self.prepare(poison(w, np.array(in_use))), ids, jnp.float32)
            check(actual, expected, self.matmul_bound(jnp.float32), f"{pattern=:08b}")

    # The expert layer

    @pytest.mark.parametrize("tokens", [1, 8, 60])
    @pytest.mark.parametrize("down_type", QUANTIZED, ids=lambda t: t.name)
    def test_moe_mlp(self, rng, down_type, tokens):
        experts, used, hidden, width = 10, 3, 256, 512
        gate, up = (random_weights(rng, GGMLType.Q4_K, (experts, width, hidden)) for _ in range(2))
        down = random_weights(rng, down_type, (experts, hidden, width))
        ids = np.stack([rng.permutation(experts - 2)[:used] for _ in range(tokens)]).astype(np.int32)
        stacks = [poison(w, np.unique(ids)) for w in (gate, up, down)]
        weights = rng.dirichlet(np.ones(used), tokens).astype(np.float32)
        x = heavy_tailed(rng, (tokens, hidden)) / 100
        expected = moe_oracle(x, gate, up, down, ids, weights)
        prepared = [self.prepare(w) for w in stacks]
        for dtype in self.dtypes:
            actual = self.moe(x, *prepared, ids, weights, dtype=dtype)
            check(actual, expected, self.moe_bound(dtype), (tokens, dtype.__name__))

    @pytest.mark.parametrize("tokens", [1, 17, 70])
    def test_moe_mlp_routing(self, rng, tokens):
        """Skew as real routers have it, and worse: experts without tokens are never read."""
        experts, used = 12, 3
        stacks = [random_weights(rng, t, (experts, 256, 256)) for t in (*[GGMLType.Q4_K] * 2, GGMLType.Q6_K)]
        popular = 1 / np.arange(1, experts + 1) ** 1.5
        patterns = {
            "even": np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]),
            "one expert": np.full((tokens, 1), 4),
            "the last expert": np.full((tokens, 1), experts - 1),
            "the same for all": np.tile([7, 0, experts - 1], (tokens, 1)),
            "Zipf": np.stack(
                [rng.choice(experts, used, replace=False, p=popular / popular.sum()) for _ in range(tokens)]
            ),
            "an expert twice": np.tile([3, 5, 3], (tokens, 1)),
        }
        x = uniform(rng, (tokens, 256))
        for name, ids in patterns.items():
            ids = ids.astype(np.int32)
            weights = rng.uniform(size=ids.shape).astype(np.float32)
            expected = moe_oracle(x, *stacks, ids, weights)
            prepared = [self.prepare(poison(w, np.unique(ids))) for w in stacks]
            for dtype in self.dtypes:
                actual = self.moe(x, *prepared, ids, weights, dtype=dtype)
                check(actual, expected, self.moe_bound(dtype), (name, dtype.__name__))

    @pytest.mark.parametrize("tokens", [2, 60])
    def test_moe_mlp_stages(self, rng, tokens):
        gate, up, down = (random_weights(rng, t, (6, 256, 256)) for t in QUANTIZED[:3])
        ids = rng.integers(0, 6, (tokens, 2)).astype(np.int32)
        weights = rng.uniform(size=(tokens, 2)).astype(np.float32)
        x = uniform(rng, (tokens, 256))
        prepared = [self.prepare(w) for w in (gate, up, down)]
        stages = {}
        out = self.moe(x, *prepared, ids, weights, on_stage=lambda n, value: stages.setdefault(n, value))
        expected = moe_oracle(x, gate, up, down, ids, weights)
        for which in (out, self.moe(x, *prepared, ids, weights)):
            check(which, expected, tolerances.MOE_FLOAT32_NMSE, "sum")
        gates, ups = expert_oracle(x, gate, ids), expert_oracle(x, up, ids)
        swiglu = silu64(gates) * ups
        downs = expert_oracle(swiglu, down, ids)
        expected = {"gate": gates, "up": ups, "swiglu": swiglu, "down": downs}
        assert set(stages) == {f"ffn_moe_{name}" for name in expected}
        for name, value in expected.items():
            check(stages[f"ffn_moe_{name}"], value, tolerances.MOE_FLOAT32_NMSE, name)

    # The router

    @pytest.mark.parametrize("experts", TOPK_EXPERTS)
    def test_router(self, rng, experts):
        used = 128 if experts == 128 else 8
        w = random_weights(rng, GGMLType.F32, (experts, 64))
        x = uniform(rng, (22, 64))
        x[0] = 0  # equal logits
        routing = ops.router(x, self.prepare(w), used, implementation=self.implementation)
        logits = x @ dense64(w).T
        check(routing.logits, logits, tolerances.MATMUL_FLOAT32_NMSE, "logits")
        probs = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(routing.probs, probs, rtol=0, atol=tolerances.ROUTER_WEIGHTS)
        ids = np.argsort(-np.asarray(routing.probs), axis=1, kind="stable")[:, :used]  # ties: lowest id first
        np.testing.assert_array_equal(routing.expert_ids, ids)
        np.testing.assert_array_equal(routing.expert_ids[0], np.arange(used))
        chosen = np.take_along_axis(probs, ids, axis=1)
        expected = chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 6.103515625e-5)
        np.testing.assert_allclose(routing.weights, expected, rtol=0, atol=tolerances.ROUTER_WEIGHTS)

    def test_router_replays_given_experts(self, rng):
        w = random_weights(rng, GGMLType.F32, (12, 64))
        x = uniform(rng, (5, 64))
        ids = np.stack([rng.permutation(12)[:3] for _ in range(5)]).astype(np.int32)
        free = ops.router(x, self.prepare(w), 3, implementation=self.implementation)
        forced = ops.router(x, self.prepare(w), 3, ids, implementation=self.implementation)
        np.testing.assert_array_equal(forced.expert_ids, ids)
        np.testing.assert_array_equal(forced.probs, free.probs)
        chosen = np.take_along_axis(np.asarray(free.probs), ids, axis=1)
        expected = chosen / chosen.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(forced.weights, expected, rtol=0, atol=tolerances.ROUTER_WEIGHTS)

    def test_router_keeps_a_nan_row_to_itself(self, rng):
        w = random_weights(rng, GGMLType.F32, (16, 64))
        x = uniform(rng, (4, 64))
        clean = ops.router(x, self.prepare(w), 4, implementation=self.implementation)
        x[2] = np.nan
        routing = ops.router(x, self.prepare(w), 4, implementation=self.implementation)
        others = np.array([0, 1, 3])
        np.testing.assert_array_equal(routing.expert_ids[others], clean.expert_ids[others])
        np.testing.assert_array_equal(routing.weights[others], clean.weights[others])
        nan_ids = np.asarray(routing.expert_ids[2])
        assert len(set(nan_ids)) == 4
        assert ((nan_ids >= 0) & (nan_ids < 16)).all()
        stack = self.prepare(random_weights(rng, GGMLType.Q4_K, (16, 256, 256)))
        inputs = uniform(rng, (4, 256))
        out = self.moe(inputs, stack, stack, stack, routing.expert_ids, routing.weights)
        assert np.isfinite(out[others]).all()
        assert np.isnan(out[2]).all()
