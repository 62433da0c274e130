"""The Hopper kernels as compiled code: they lower for CUDA anywhere, and pass the shared cases on a GPU."""

import jax
import jax.numpy as jnp
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)
pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import kernels_pallas as ops
from convert.gpu_tiles import to_gpu_tiles
from convert.packed import GPU_TILES, PackedTensor
from kernels_pallas.attention import pallas_sm90 as attention_sm90
from kernels_pallas.matrices import Matrices
from kernels_pallas.prefill.device import require_hopper
from kernels_pallas.prefill.matmul_sm90 import grouped_matmul, pick_config
from kernels_pallas.prefill.sorting import dense_tiles
from tests import tolerances
from tests.kernels.op_cases import QUANTIZED, OpCases, random_weights, rng

__all__ = ["rng"]


def lower(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("matrices", [1, 2], ids=["plain", "swiglu"])
@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_grouped_matmul_lowers_for_cuda(rng, type, matrices):
    w = Matrices.of(jax.tree.map(jnp.asarray, to_gpu_tiles(random_weights(rng, type, (256, 256)))))
    config = pick_config(8 if matrices == 1 else 100)
    x, scale = jnp.zeros((512, 256), jnp.float16), jnp.ones(512)

    def run(x, scale, w):
        return grouped_matmul(x, scale, dense_tiles(256, config.tile), (w,) * matrices, config=config)

    assert "grouped_matmul_" in lower(run, x, scale, w)


def test_attention_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(attention_sm90, "require_hopper", lambda interpret: None)
    cache = jnp.zeros((2, 1, 256, 2, 128), jnp.bfloat16)
    q, positions = jnp.zeros((1, 20, 16, 128)), jnp.zeros((1, 20), jnp.int32)
    args = (q, cache, cache, positions, jnp.int32(0))
    assert "prefill_attention" in lower(attention_sm90.attention, *args)
    assert "prefill_attention" in lower(attention_sm90.attention, *args, jnp.zeros(1, jnp.int32))


def no_hopper_gpu() -> str:
    """Why the kernels cannot run here, or nothing."""
    try:
        require_hopper()
    except NotImplementedError as error:
        return str(error)
    return ""


@pytest.mark.gpu
@pytest.mark.skipif(bool(no_hopper_gpu()), reason=no_hopper_gpu() or "runs here")
class TestHopper(OpCases):
    """The shared cases on the real kernels; shapes and types that they do not take are skipped."""

    implementation, layout, dtypes = "pallas", GPU_TILES, (jnp.bfloat16,)
    cache_dtypes = (jnp.bfloat16, jnp.float16)
    # Weights have no other use in this layout, and the kernels no derivative.
    test_dequantization_is_bit_exact = test_embedding_lookup_is_bit_exact = None
    test_gradients = test_vmap_over_a_batch = test_matmul_in_tiles_of_rows = None
    test_attention_gradients = None

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
        try:
            return op(*args, **kwargs, implementation="pallas")
        except NotImplementedError as error:
            pytest.skip(str(error))

    def matmul(self, x, w, dtype):
        return self.supported(ops.quantized_matmul, x, w, compute_dtype=jnp.bfloat16)

    def expert_matmul(self, x, w, ids, dtype):
        return self.supported(ops.expert_matmul, x, w, ids, compute_dtype=jnp.bfloat16)

    def moe(self, *args, dtype=None, **kwargs):
        return self.supported(ops.moe_mlp, *args, **kwargs, compute_dtype=jnp.bfloat16)

    def attention(self, *args, **kwargs):
        return self.supported(ops.attention, *args, **kwargs)


def test_sizes_that_have_run_on_a_gpu_are_chosen():
    assert pick_config(2048).tile == 128
    assert pick_config(1).tile == 64
