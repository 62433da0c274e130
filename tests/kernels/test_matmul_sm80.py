"""The portable grouped product in Pallas' interpreter on the CPU: values, bounds of tiles, races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.gpu import device, grouped_matmul_sm80, mma
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import MatmulConfig, few_config, pick_config
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from qwen3_moe_jax.kernels_pallas.gpu.products import PORTABLE
from qwen3_moe_jax.kernels_pallas.implementations import recording, using
from qwen3_moe_jax.kernels_pallas.moe_mlp import kernel_sm90 as moe
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices
from qwen3_moe_jax.kernels_pallas.quantized_matmul import kernel_sm90 as matmul
from tests import tolerances
from tests.kernels.op_inputs import QUANTIZED, dense64, heavy_tailed, poison, random_weights, rng, tiled
from tests.kernels.op_oracles import check, moe_oracle
from tests.kernels.races import no_races

__all__ = ["no_races", "rng"]

SMALL = MatmulConfig(tile=16, widths=(8, 16), blocks=2, max_x_stages=3)
BFLOAT16 = np.dtype(jnp.bfloat16)


def options(config: MatmulConfig | None = SMALL) -> dict:
    return {"config": config, "interpret": interpreter(detect_races=True), "product": PORTABLE}


@pytest.mark.parametrize(("type", "rows"), [(GGMLType.Q4_K, 256), (GGMLType.Q6_K, 320)], ids=str)
def test_a_matrix_in_a_stack(rng, type, rows):
    """Two warpgroups and one, tokens that do not fill the last tile, NaN in other matrices."""
    w = poison(random_weights(rng, type, (2, rows, 512)), np.array([1]))
    x = heavy_tailed(rng, (19, 512))
    second = Matrices(Matrices.of(tiled(w)).stack, jnp.int32(rows), (rows, 512))
    out = matmul.quantized_matmul(x, second, BFLOAT16, **options())
    check(out, x.astype(np.float64) @ dense64(w[1]).T, tolerances.MATMUL_FLOAT16_NMSE, type.name)


@pytest.mark.parametrize("is_few", [False, True])
def test_moe_mlp(rng, is_few):
    """Sorted rows, and all rows with every expert in use; experts that none chose are not read."""
    types, tokens = ((GGMLType.Q2_K, GGMLType.IQ4_XS), 9) if is_few else ((GGMLType.Q8_0, GGMLType.Q4_K), 18)
    ids = np.stack([rng.permutation([0, 2])[:2] for _ in range(tokens)]).astype(np.int32)
    shapes = [(types[0], (3, 256, 256))] * 2 + [(types[1], (3, 256, 256))]
    gate, up, down = (poison(random_weights(rng, *shape), np.unique(ids)) for shape in shapes)
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    config = few_config(tokens) if is_few else SMALL
    out = moe.moe_mlp(x, *map(tiled, (gate, up, down)), ids, weights, BFLOAT16, **options(config))
    check(out, moe_oracle(x, gate, up, down, ids, weights), tolerances.MOE_FLOAT16_NMSE, "moe")


def test_every_size_that_is_chosen_fits_every_card():
    for type in QUANTIZED:
        for rows in (256, 320, 768, 151936):
            for config in (*map(few_config, range(8, 65, 8)), pick_config(8), pick_config(128)):
                w = Matrices(random_stack(type, rows), jnp.int32(0), (rows, 2048))
                for fused in (False, True)[: 1 + (rows % 256 == 0)]:
                    chosen = grouped_matmul_sm80.sizes(config, w)
                    kernel = grouped_matmul_sm80.PortableKernel(w, fused, chosen, 1, None)
                    assert kernel.x_stages >= 2
                    assert rows % (kernel.block_rows) == 0


def random_stack(type: GGMLType, rows: int):
    from qwen3_moe_jax.kernels_pallas.packed.stacks import abstract_packed

    return abstract_packed(type, (rows, 2048))


def test_contiguous_axes_are_copied_as_one():
    whole = mma._runs((2, 4, 64), [[256, 64, 1]] * 2, 2)
    assert whole == [(64, (16, 16))]
    rows = mma._runs((3, 64), [[72, 1], [512, 1]], 2)
    assert rows == [(8, (16, 16)), (3, (144, 1024))]
    with pytest.raises(AssertionError, match="contiguous bytes"):
        mma._runs((3, 4), [[8, 1], [16, 1]], 2)


def test_the_choice_of_portable_kernels_asks_for_them(rng, monkeypatch):
    asked = []

    def refuse(interpret=None):
        asked.append(interpret)
        raise NotImplementedError("no card")

    monkeypatch.setattr(device, "require_ampere", refuse)
    w = tiled(random_weights(rng, GGMLType.Q4_K, (64, 256)))
    with using("portable"), recording() as record:
        ops.quantized_matmul(jnp.ones((2, 256)), w, compute_dtype=jnp.bfloat16)
    (ran,) = record
    assert (ran.implementation, ran.refused, len(asked)) == ("xla", ("portable: no card",), 1)
