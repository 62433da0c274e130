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
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts import lanes16 as layouts
from qwen3_moe_jax.convert.packed import ROWS, PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.kernels_pallas.expert_matmul import arg_specs as expert_specs
from qwen3_moe_jax.kernels_pallas.expert_matmul.routing import ROW_TILE
from qwen3_moe_jax.kernels_pallas.gpu.device import require_hopper
from qwen3_moe_jax.kernels_pallas.quantized_matmul import arg_specs as matmul_specs
from qwen3_moe_jax.testing import low_bits
from tests import tolerances

QUANTIZED = (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0)
PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
DTYPES = (jnp.float32, jnp.bfloat16)

# (rows N, tokens T, columns K)
MATMUL_SHAPES = (
    *((16, t, 256) for t in range(1, 10)),
    *((16, t, 4096) for t in (1, 8)),
    *((4096, t, 1024) for t in range(1, 9)),
    *((1023, t, 4096) for t in range(1, 9)),
    *((n, 2, 1024) for n in (6271, 6272, 6273)),
    (1, 64, 256),
)

# (experts E, used X, one x row for all experts of a token, tokens T, rows N, columns K)
EXPERT_SHAPES = (
    *(
        (e, x, shared, t, 512, 256)
        for e, x, shared, t in itertools.product((4, 8), (1, 2, 4), (False, True), (1, 4, 5, 17, 32, 129))
    ),
    *((4, 4, True, t, 512, 256) for t in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49)),
    (8, 1, True, 1, 512, 256),
    (4, 2, True, 16, 64, 768),
    *((128, 4, True, t, 64, 2048) for t in (16, 32, 64)),
)

CANARY = np.float32(-1.2345678e30)
CANARY_ROWS = 8

TOPK_EXPERTS = (8, 31, 32, 40, 71, 128, 129, 160, 256, 288)


def needs_hopper_gpu(test):
    """Marks a test or a class of them as one for Hopper GPUs, which alone is skipped without one."""
    reason = ""
    try:
        require_hopper()
    except NotImplementedError as error:
        reason = str(error)
    return pytest.mark.gpu(pytest.mark.skipif(bool(reason), reason=reason or "runs here")(test))


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers of this test: the seed is the test's name, without its class."""
    name = request.node.name
    print(f"seed {seed_of(name)} of {name}")
    return np.random.default_rng(seed_of(name))


def seed_of(name: str) -> int:
    """The seed of the test of this name."""
    return zlib.crc32(name.encode())


def random_weights(rng: np.random.Generator, type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    """Random bytes with scales of both signs and a few per mille in size; NumPy, layout "rows"."""
    block = BLOCK_FORMATS[type]
    count = int(np.prod(shape)) // block.weights
    if type in PLAIN:
        values = rng.standard_normal(count).astype("<f4")
        raw = values.view("<u4") >> 16 if type is GGMLType.BF16 else values
        raw = raw.astype({GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.BF16: "<u2"}[type])
        return pack(raw.view(np.uint8), type, shape)
    blocks = rng.integers(0, 256, (count, block.nbytes), dtype=np.uint8)
    for name in low_bits.scale_names(type):
        scale = rng.uniform(1e-3, 4e-3, count) * rng.choice((-1, 1), count)
        low_bits.set_scale(blocks, type, name, scale)
    return pack(blocks.reshape(-1), type, shape)


def poison(w: PackedTensor, keep: np.ndarray) -> PackedTensor:
    """The same stack with NaN in every expert but those of ``keep``."""
    name = next(name for name in ("d", "w", "e") if name in w.arrays)
    poisoned = w.arrays[name].copy()
    poisoned[np.setdiff1d(np.arange(w.shape[0]), keep)] = 255 if name == "e" else np.nan
    return PackedTensor({**w.arrays, name: poisoned}, w.type, w.layout)


def scatter_experts(some: PackedTensor, ids: np.ndarray, experts: int) -> PackedTensor:
    """A stack of ``experts`` with ``some`` at ``ids`` and NaN everywhere else."""
    arrays = {}
    for name, array in some.arrays.items():
        arrays[name] = np.full(
            (experts, *array.shape[1:]), np.nan if array.dtype.kind == "f" else 1, array.dtype
        )
        arrays[name][ids] = array
    return PackedTensor(arrays, some.type, some.layout)


def dense64(w: PackedTensor) -> np.ndarray:
    return dequantize(w).astype(np.float64)


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Like activations: Student's t with 2.5 degrees of freedom, three channels 300 times as large."""
    x = rng.standard_t(2.5, shape)
    x[..., rng.choice(shape[-1], 3, replace=False)] *= 300
    return x.astype(np.float32)


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    """Squared error over the square of what is expected; infinite where finiteness differs."""
    actual = np.asarray(actual, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(((actual - expected) ** 2).sum() / max((expected**2).sum(), 1e-300))


@partial(jax.jit, static_argnames=("op", "dtype"), donate_argnames="buffer")
def write_between(op, dtype, buffer: jax.Array, *arrays) -> jax.Array:
    """Rows of ``buffer`` become the op's result; XLA lets the op write there itself where it can."""
    rows = op(*arrays, dtype)
    return jax.lax.dynamic_update_slice(buffer, rows, (CANARY_ROWS,) + (0,) * (rows.ndim - 1))


def check_canaries(buffer: np.ndarray) -> np.ndarray:
    """The rows between the canaries, which are as they were."""
    around = np.concatenate([buffer[:CANARY_ROWS], buffer[-CANARY_ROWS:]])
    assert (around == CANARY).all(), "rows beside the output were written"
    return buffer[CANARY_ROWS:-CANARY_ROWS]


def check(actual: jax.Array, expected: np.ndarray, bound: float, what: object) -> None:
    error = nmse(np.asarray(actual), expected)
    assert error <= bound, f"NMSE {error:.3g} > {bound:g} for {what}"


def silu64(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expert_oracle(x: np.ndarray, w: PackedTensor | np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float64 [T, X, N] of x [T, K] or [T, X, K] and packed or dense w [E, N, K]."""
    rows = np.broadcast_to(x[:, None] if x.ndim == 2 else x, (*ids.shape, x.shape[-1])).astype(np.float64)
    out = np.empty((*ids.shape, w.shape[1]))
    for e in np.unique(ids):
        out[ids == e] = rows[ids == e] @ (dense64(w[e]) if isinstance(w, PackedTensor) else w[e]).T
    return out


def moe_oracle(x, gate: PackedTensor, up: PackedTensor, down: PackedTensor, ids, weights) -> np.ndarray:
    swiglu = silu64(expert_oracle(x, gate, ids)) * expert_oracle(x, up, ids)
    return (expert_oracle(swiglu, down, ids) * weights[..., None].astype(np.float64)).sum(axis=1)


def routing_patterns(rng: np.random.Generator) -> dict[str, tuple[int, np.ndarray]]:
    """Patterns by name: (E, expert of each row), enough rows for the sorted form."""
    per_expert = [1, ROW_TILE - 1, ROW_TILE, ROW_TILE + 1]
    edges = np.repeat(np.arange(4), per_expert)
    return {
        "uniform": (8, rng.integers(0, 8, 200)),
        "one expert takes all": (8, np.full(200, 5)),
        "tile edges": (4, rng.permutation(edges)),
        "tile edges, reversed": (4, rng.permutation(3 - edges)),
        "E no power of two": (5, rng.integers(0, 5, 97)),
        "last expert empty": (3, rng.integers(0, 2, 100)),
        "last expert alone": (6, np.full(41, 5)),
        "Zipf": (16, rng.zipf(1.3, 200) % 16),
    }


class OpCases:
    """All cases; a subclass says what to run them on."""

    implementation: str | None = None
    layout: str = ROWS
    dtypes = DTYPES
    shape_dtypes = (jnp.float32,)
    """Dtypes of the cases of every shape; ``dtypes`` are those of heavy tails, routing and real shapes."""
    is_traceable = True
    """Whether the ops run under ``jax.jit``, and so write between canary rows."""
    cache_dtypes = (jnp.float32, jnp.bfloat16)

    def prepare(self, w: PackedTensor) -> PackedTensor:
        """The tensor as this implementation takes it; rows where it has no other layout for the shape."""
        possible = layouts.supports(self.layout, w.type, w.shape)
        return jax.tree_util.tree_map(jnp.asarray, layouts.to_layout(w, self.layout if possible else ROWS))

    def bound(self, dtype, float32: float, bfloat16: float) -> float:
        return float32 if dtype == jnp.float32 else bfloat16

    def matmul_bound(self, dtype) -> float:
        return self.bound(dtype, tolerances.MATMUL_FLOAT32_NMSE, tolerances.MATMUL_BFLOAT16_NMSE)

    def moe_bound(self, dtype) -> float:
        return self.bound(dtype, tolerances.MOE_FLOAT32_NMSE, tolerances.MOE_BFLOAT16_NMSE)

    def matmul(self, x, w: PackedTensor, dtype) -> jax.Array:
        return ops.quantized_matmul(x, w, compute_dtype=dtype, implementation=self.implementation)

    def expert_matmul(self, x, w: PackedTensor, ids, dtype) -> jax.Array:
        return ops.expert_matmul(x, w, ids, compute_dtype=dtype, implementation=self.implementation)

    def between_canaries(self, op, shape: tuple[int, ...], *arrays, dtype) -> np.ndarray:
        """``op(*arrays, dtype)``, whose result has this shape, written between canary rows."""
        if not self.is_traceable:
            return np.asarray(op(*arrays, dtype))
        buffer = jnp.full((shape[0] + 2 * CANARY_ROWS, *shape[1:]), CANARY)
        return check_canaries(np.asarray(write_between(op, dtype, buffer, *arrays)))

    def moe(self, *args, dtype=jnp.float32, **kwargs):
        return ops.moe_mlp(*args, compute_dtype=dtype, implementation=self.implementation, **kwargs)

    def attention(self, q, k_cache, v_cache, positions, **kwargs):
        implementation = self.implementation
        return ops.attention(q, k_cache, v_cache, positions, implementation=implementation, **kwargs)

    def attention_bound(self) -> float:
        return tolerances.ATTENTION_NMSE

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

    # Products with experts

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

    # Attention

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


def attention_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64, one query and head at a time."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    B, T, N, H = q.shape
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        seen = positions[b, t] + 1
        kv_head = n // (N // k.shape[2])
        if seen > 0:
            scores = k[b, :seen, kv_head] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, :seen, kv_head] / weights.sum()
    return out
