"""The Hopper kernels as compiled code: they lower for CUDA anywhere, and pass the shared cases on a GPU."""

import faulthandler
import os
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.packed import GPU_TILES, PackedTensor
from qwen3_moe_jax.kernels_pallas.attention import kernel_sm90 as attention_sm90
from qwen3_moe_jax.kernels_pallas.gpu import device
from qwen3_moe_jax.kernels_pallas.gpu.device import RUNTIME_VARIABLE, ask_ptxas_once, tell_runtime
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    MAX_FEW_ROWS,
    MAX_UNSORTED,
    dense_config,
    experts_config,
    few_config,
    pick_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_sm90 import (
    grouped_matmul,
)
from qwen3_moe_jax.kernels_pallas.gpu.sorting import UsedExperts, dense_tiles
from qwen3_moe_jax.kernels_pallas.moe_mlp import kernel_sm90 as moe_sm90
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from qwen3_moe_jax.kernels_pallas.quantized_matmul import kernel_sm90 as matmul_sm90
from tests import tolerances
from tests.kernels.op_cases import OpCases
from tests.kernels.op_inputs import (
    QUANTIZED,
    dense64,
    heavy_tailed,
    needs_hopper_gpu,
    poison,
    random_weights,
    rng,
    uniform,
)
from tests.kernels.op_oracles import attention_oracle, check, expert_oracle, moe_oracle, silu64

__all__ = ["rng"]


def lower(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


CONFIGS = {
    **{f"few {config.tile}": config for config in map(few_config, range(8, MAX_UNSORTED + 1, 8))},
    **{f"dense {tokens}": dense_config(tokens, 4096, 2048)[0] for tokens in (8, 40)},
    "of experts": experts_config(),
    "sorted, few rows": pick_config(8),
    "sorted, many rows": pick_config(100),
}
"""Every size that an op chooses."""


def lowering_cases():
    for name in CONFIGS:
        for type in (
            QUANTIZED
            if name in ("few 8", "of experts", "sorted, few rows", "sorted, many rows")
            else QUANTIZED[:1]
        ):
            yield from ((name, type, matrices) for matrices in ((1, 2) if "dense" not in name else (1,)))


@pytest.mark.parametrize(
    ("name", "type", "matrices"), list(lowering_cases()), ids=lambda v: getattr(v, "name", str(v))
)
def test_grouped_matmul_lowers_for_cuda(rng, name, type, matrices):
    """Each distinct kernel that the cases below run on a GPU."""
    experts = 2
    w = Matrices.of(jax.tree.map(jnp.asarray, to_gpu_tiles(random_weights(rng, type, (experts, 256, 256)))))
    config = CONFIGS[name]
    few = name.startswith("few")
    rows = config.tile * experts if few and matrices == 1 else config.tile
    scatter = {"destinations": jnp.zeros(config.tile * experts, jnp.int32), "out_rows": 9}

    def run(x, scale, w):
        used = UsedExperts(jnp.arange(experts), jnp.full(1, experts))
        work = used if few else dense_tiles(config.tile, config.tile)
        options = scatter if few and matrices == 1 else {}
        return grouped_matmul(x, scale, work, (w,) * matrices, config=config, **options)

    assert "grouped_matmul_" in lower(run, jnp.zeros((rows, 256), jnp.float16), jnp.ones(rows), w)


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_ops_lower_for_cuda(rng, monkeypatch, tokens):
    """The ops as the model calls them, with a choice of types."""
    monkeypatch.setattr(device, "require_hopper", lambda interpret: None)
    tiles = lambda type, *shape: jax.tree.map(jnp.asarray, to_gpu_tiles(random_weights(rng, type, shape)))
    types = QUANTIZED[0], QUANTIZED[2]
    stack = tiles(types[0], 4, 256, 512)
    one_of = lambda *shape: ops.OneOf(tuple(Matrices.of(tiles(t, *shape)) for t in types), jnp.int32(0))
    x, ids = jnp.ones((tokens, 512)), jnp.zeros((tokens, 2), jnp.int32)
    dtype = np.dtype(jnp.bfloat16)
    experts = lower(
        lambda x, *w: moe_sm90.moe_mlp(x, *w, ids, jnp.ones(ids.shape), dtype),
        x, stack, stack, one_of(4, 512, 256),
    )  # fmt: skip
    # Few tokens run both types' kernels, one of them without work; many branch.
    assert ("stablehlo.case" in experts) == (tokens > MAX_FEW_ROWS)
    dense = lower(lambda x, w: matmul_sm90.quantized_matmul(x, w, dtype), x, one_of(256, 512))
    assert "grouped_matmul_q6_k_plain" in dense


def test_attention_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(attention_sm90, "require_hopper", lambda interpret: None)
    cache = jnp.zeros((2, 1, 256, 2, 128), jnp.bfloat16)
    q, positions = jnp.zeros((1, 20, 16, 128)), jnp.zeros((1, 20), jnp.int32)
    args = (q, cache, cache, positions, jnp.int32(0))
    assert "prefill_attention" in lower(attention_sm90.attention, *args)
    assert "prefill_attention" in lower(attention_sm90.attention, *args, jnp.zeros(1, jnp.int32))


def check_one_of(cases: OpCases, rng) -> None:
    """``OneOf`` gives what the meant option alone gives; the others are not read."""
    types = (GGMLType.Q4_K, GGMLType.Q6_K)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(9)]).astype(np.int32)
    weights, x = rng.uniform(size=ids.shape).astype(np.float32), uniform(rng, (9, 256))
    gate, up = (random_weights(rng, GGMLType.Q4_K, (4, 256, 256)) for _ in range(2))
    downs = [random_weights(rng, t, (4, 256, 256)) for t in types]
    dtype = cases.dtypes[0]
    for meant in range(2):
        kept = [w if i == meant else poison(w, np.array([], int)) for i, w in enumerate(downs)]

        def one_of(part, kept=kept, meant=meant):
            options = tuple(ops.Matrices.of(cases.prepare(part(w))) for w in kept)
            return ops.OneOf(options, jnp.int32(meant))

        actual = cases.matmul(x, one_of(lambda w: w[1]), dtype)
        check(actual, x @ dense64(downs[meant])[1].T, cases.matmul_bound(dtype), "matrix")
        actual = cases.expert_matmul(x, one_of(lambda w: w), ids, dtype)
        check(actual, expert_oracle(x, downs[meant], ids), cases.matmul_bound(dtype), "experts")
        stacks = (cases.prepare(gate), cases.prepare(up), one_of(lambda w: w))
        actual = cases.moe(x, *stacks, ids, weights, dtype=dtype)
        check(actual, moe_oracle(x, gate, up, downs[meant], ids, weights), cases.moe_bound(dtype), "layer")


def test_weights_of_one_of_several_types_in_xla(rng):
    cases = OpCases()
    cases.implementation, cases.layout = "xla", GPU_TILES
    check_one_of(cases, rng)


SECONDS_A_CALL = 120
"""Compilation of a kernel is a few of them; a test of many shapes is minutes."""


@needs_hopper_gpu
class TestHopper(OpCases):
    """The shared cases on the real kernels; shapes and types that they do not take are skipped."""

    implementation, layout, dtypes = "hopper", GPU_TILES, (jnp.bfloat16,)
    # Weights have no other use in this layout, and the kernels no derivative.
    test_dequantization_is_bit_exact = test_embedding_lookup_is_bit_exact = None
    test_gradients = test_vmap_over_a_batch = test_matmul_in_tiles_of_rows = None
    # The router has no kernel of its own, attention takes other sizes and no derivative.
    test_router = test_router_replays_given_experts = test_router_keeps_a_nan_row_to_itself = None
    test_attention_ignores_what_lies_beyond_positions = test_attention_gradients = None
    test_attention_over_an_int8_cache = None  # XLA's: the kernel reads 16-bit caches
    cache_dtypes = (jnp.bfloat16, jnp.float16)

    @pytest.fixture(autouse=True)
    def ends(self):
        """A kernel that waits for ever cannot be interrupted: the process says where it is and ends."""
        faulthandler.dump_traceback_later(SECONDS_A_CALL, exit=True, file=sys.__stderr__)
        yield
        faulthandler.cancel_dump_traceback_later()

    def prepare(self, w: PackedTensor) -> PackedTensor:
        try:
            tiles = to_gpu_tiles(w)
        except NotImplementedError as error:
            pytest.skip(str(error))
        return jax.tree.map(jnp.asarray, tiles)

    def matmul_bound(self, dtype) -> float:
        return tolerances.MATMUL_FLOAT16_NMSE

    def moe_bound(self, dtype) -> float:
        return tolerances.MOE_FLOAT16_NMSE

    def attention_bound(self) -> float:
        return tolerances.ATTENTION_BFLOAT16_NMSE

    def supported(self, op, *args, **kwargs):
        faulthandler.dump_traceback_later(SECONDS_A_CALL, exit=True, file=sys.__stderr__)
        try:
            return op(*args, **kwargs, compute_dtype=jnp.bfloat16, implementation=self.implementation)
        except NotImplementedError as error:
            pytest.skip(str(error))

    def matmul(self, x, w, dtype):
        return self.supported(ops.quantized_matmul, x, w)

    def expert_matmul(self, x, w, ids, dtype):
        return self.supported(ops.expert_matmul, x, w, ids)

    def moe(self, *args, dtype=None, **kwargs):
        return self.supported(ops.moe_mlp, *args, **kwargs)

    def test_weights_of_one_of_several_types(self, rng):
        check_one_of(self, rng)

    @pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
    def test_matmul_of_heavy_tailed_inputs(self, rng, type):
        """As for other implementations, at shapes that the kernels take: few, one tile, several."""
        w = random_weights(rng, type, (192, 1024))
        for tokens in (1, 7, 8, 9, 33, 64, 65, 130, 300):
            x = heavy_tailed(rng, (tokens, 1024))
            check(self.matmul(x, self.prepare(w), None), x @ dense64(w).T, self.matmul_bound(None), tokens)

    @pytest.mark.parametrize("tokens", [2, 60, 80])
    def test_moe_mlp_stages(self, rng, tokens):
        """Stages are products of float16 operands; together they are not the fused op bit for bit."""
        types = (GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K)  # gate and up are one product
        gate, up, down = (random_weights(rng, t, (6, 256, 256)) for t in types)
        ids = np.stack([rng.permutation(6)[:2] for _ in range(tokens)]).astype(np.int32)
        weights, x = rng.uniform(size=(tokens, 2)).astype(np.float32), uniform(rng, (tokens, 256))
        prepared = [self.prepare(w) for w in (gate, up)] + [self.prepare(down)]
        stages = {}
        out = self.moe(x, *prepared, ids, weights, on_stage=lambda n, value: stages.setdefault(n, value))
        gates, ups = expert_oracle(x, gate, ids), expert_oracle(x, up, ids)
        swiglu = silu64(gates) * ups
        expected = {"gate": gates, "up": ups, "swiglu": swiglu, "down": expert_oracle(swiglu, down, ids)}
        for name, value in expected.items():
            check(stages[f"ffn_moe_{name}"], value, self.moe_bound(None), name)
        total = (expected["down"] * weights[..., None]).sum(axis=1)
        for which in (out, self.moe(x, *prepared, ids, weights)):
            check(which, total, self.moe_bound(None), "sum")

    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 8, 2, 64, 1), (2, 5, 8, 2, 128, 7), (1, 300, 4, 1, 64, 520), (3, 17, 8, 2, 128, 256)],
        ids=str,
    )
    def test_attention(self, rng, shape):
        B, T, N, K, H, S = shape
        q, k, v = (
            jnp.asarray(uniform(rng, s) * 3, jnp.bfloat16) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
        )
        positions = rng.integers(0, S, (B, T)).astype(np.int32)
        positions[:, -1] = S - 1
        positions[0, 0] = -1 if T > 1 else positions[0, 0]  # padding sees nothing
        expected = attention_oracle(*(np.asarray(a, np.float32) for a in (q, k, v)), positions)
        actual = ops.attention(q, k, v, positions, implementation="hopper")
        check(actual, expected, tolerances.ATTENTION_BFLOAT16_NMSE, shape)


def test_what_has_not_run_is_not_chosen_for_many_rows():
    assert pick_config(2048).tile == 128
    assert pick_config(1).tile == 64


def test_ptxas_is_asked_once(monkeypatch):
    asked = []
    bindings = SimpleNamespace(_get_ptxas_isa_version=lambda: asked.append(1) or 90)
    module = ModuleType("mosaic_gpu")
    module._mosaic_gpu_ext = bindings
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", module)
    ask_ptxas_once()
    ask_ptxas_once()
    assert [bindings._get_ptxas_isa_version() for _ in range(3)] == [90] * 3
    assert len(asked) == 1
    module._mosaic_gpu_ext = SimpleNamespace()
    ask_ptxas_once()  # a JAX that has no such function
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", None)
    ask_ptxas_once()  # a machine without the bindings


def test_xla_is_told_of_the_library_that_launches_kernels(tmp_path, monkeypatch):
    """The import of Mosaic tells it; without that a kept program with kernels is not loaded."""
    monkeypatch.setenv(RUNTIME_VARIABLE, "mine")
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", None)
    assert not tell_runtime()
    module = ModuleType("mosaic_gpu")
    module._mosaic_gpu_ext = SimpleNamespace(__file__=str(tmp_path / "_mosaic_gpu_ext.so"))
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", module)
    assert not tell_runtime(), "another layout of the package"
    library = tmp_path / "libmosaic_gpu_runtime.so"
    library.touch()
    assert tell_runtime()
    assert os.environ[RUNTIME_VARIABLE] == "mine"
    monkeypatch.delenv(RUNTIME_VARIABLE)
    assert tell_runtime()
    assert os.environ[RUNTIME_VARIABLE] == str(library)
