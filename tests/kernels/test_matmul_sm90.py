"""Prefill kernels for Hopper in Pallas' interpreter on the CPU: values, bounds of tiles, races."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.expert_matmul import kernel_sm90 as expert_sm90
from qwen3_moe_jax.kernels_pallas.gpu.activations import float16_operand, operand_order
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_config import (
    REGISTERS,
    MatmulConfig,
    few_config,
)
from qwen3_moe_jax.kernels_pallas.gpu.grouped_matmul_sm90 import (
    grouped_matmul,
)
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from qwen3_moe_jax.kernels_pallas.gpu.sorting import ROW_ALIGN, Tiles, padded_rows, sort_by_expert
from qwen3_moe_jax.kernels_pallas.moe_mlp import kernel_sm90 as moe_sm90
from qwen3_moe_jax.kernels_pallas.packed.stacks import Matrices, OneOf
from qwen3_moe_jax.kernels_pallas.quantized_matmul import kernel_sm90 as matmul_sm90
from tests import tolerances
from tests.kernels.op_inputs import QUANTIZED, dense64, heavy_tailed, poison, random_weights, rng, tiled
from tests.kernels.op_oracles import check, expert_oracle, silu64
from tests.kernels.races import no_races

__all__ = ["no_races", "rng"]

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
SMALL = MatmulConfig(tile=16, widths=(8, 16), blocks=2, max_x_stages=4)
BFLOAT16 = np.dtype(jnp.bfloat16)
BOUND = tolerances.MATMUL_FLOAT16_NMSE


def interpret():
    return interpreter(detect_races=True)


@pytest.mark.parametrize("type", [*QUANTIZED, GGMLType.Q2_K, GGMLType.IQ4_XS], ids=lambda t: t.name)
def test_matmul_of_a_matrix_in_a_stack(rng, type):
    """Rows that do not fill the last block, tokens that do not fill the last tile, NaN in other matrices."""
    w = poison(random_weights(rng, type, (2, 320, 512)), np.array([1]))
    x = heavy_tailed(rng, (19, 512))
    second = Matrices(Matrices.of(tiled(w)).stack, jnp.int32(320), (320, 512))
    out = matmul_sm90.quantized_matmul(x, second, BFLOAT16, config=SMALL, interpret=interpret())
    check(out, x.astype(np.float64) @ dense64(w[1]).T, BOUND, type.name)


@pytest.mark.parametrize(
    "config", [MatmulConfig(16, (16,), 1, 2, 0, blocks=1), MatmulConfig(8, (8,), 1, 2, 1, blocks=3)]
)
def test_matmul_with_other_sizes_of_pieces(rng, config):
    w, x = random_weights(rng, GGMLType.Q4_K, (128, 512)), heavy_tailed(rng, (9, 512))
    out = matmul_sm90.quantized_matmul(x, tiled(w), BFLOAT16, config=config, interpret=interpret())
    check(out, x.astype(np.float64) @ dense64(w).T, BOUND, config)


@pytest.mark.parametrize("shared", [True, False])
def test_expert_matmul(rng, shared):
    """Empty experts are never read; with ``shared`` one row serves all choices of a token."""
    used = np.array([0, 2, 3])
    w = poison(random_weights(rng, GGMLType.Q5_K, (5, 64, 256)), used)
    ids = np.stack([rng.permutation(used)[:2] for _ in range(21)]).astype(np.int32)
    x = heavy_tailed(rng, (21, 256) if shared else (21, 2, 256))
    out = expert_sm90.expert_matmul(x, tiled(w), ids, BFLOAT16, config=SMALL, interpret=interpret())
    rows = np.broadcast_to(x[:, None], (21, 2, 256)) if shared else x
    check(out, np.einsum("txnk,txk->txn", dense64(w)[ids], rows.astype(np.float64)), BOUND, shared)


def moe_oracle(x, stacks, ids, weights):
    gate, up, down = (dense64(w)[ids] for w in stacks)
    x = x.astype(np.float64)
    hidden = silu64(np.einsum("txfd,td->txf", gate, x)) * np.einsum("txfd,td->txf", up, x)
    return np.einsum("txdf,txf,tx->td", down, hidden, weights)


@pytest.mark.parametrize("routing", ["even", "one expert", "repeated"])
def test_moe_mlp(rng, routing):
    """One slab and two, tiles that a block shares with others."""
    config = {
        "even": replace(SMALL, slabs=1, blocks=3),
        "one expert": replace(SMALL, slabs=1),
        "repeated": SMALL,
    }[routing]
    types = {"even": (GGMLType.Q4_K, GGMLType.Q6_K), "one expert": (GGMLType.Q6_K, GGMLType.Q8_0)}
    up_type, down_type = types.get(routing, (GGMLType.Q8_0, GGMLType.Q4_K))
    choices = 1 if routing == "one expert" else 2
    ids = np.stack([rng.choice(3, choices, replace=routing == "repeated") for _ in range(18)]).astype(
        np.int32
    )
    if routing == "one expert":
        ids[:] = 1
    stacks = [
        random_weights(rng, t, s) for t, s in [(up_type, (3, 256, 256))] * 2 + [(down_type, (3, 256, 256))]
    ]
    stacks = [poison(w, np.unique(ids)) for w in stacks]
    x = rng.standard_normal((18, 256)).astype(np.float32)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    out = moe_sm90.moe_mlp(
        x, *map(tiled, stacks), ids, weights, BFLOAT16, config=config, interpret=interpret()
    )
    check(out, moe_oracle(x, stacks, ids, weights), tolerances.MOE_FLOAT16_NMSE, routing)


@pytest.mark.parametrize(
    ("routing", "tokens", "blocks", "types"),
    [
        ("one expert", 1, 6, (GGMLType.Q4_K, GGMLType.Q8_0)),
        ("the last expert", 9, 4, (GGMLType.Q5_K, GGMLType.Q6_K)),
        ("empty experts", 17, 3, (GGMLType.Q4_K, GGMLType.Q6_K)),
        ("an expert twice", 5, 1, (GGMLType.Q6_K, GGMLType.Q5_K)),
    ],
)
def test_moe_mlp_of_few_tokens(rng, routing, tokens, blocks, types):
    """Fewer items than blocks, as many, and more; 4 items per expert in the first kernel, 2 in the second.

    Every second time with down_proj of one of two types.
    """
    experts = 5
    ids = {
        "one expert": np.full((tokens, 1), 2),
        "the last expert": np.full((tokens, 1), experts - 1),
        "empty experts": np.stack([rng.permutation([0, 2, 3])[:2] for _ in range(tokens)]),
        "an expert twice": np.tile([3, 1, 3], (tokens, 1)),
    }[routing].astype(np.int32)
    gate, up, down = (random_weights(rng, t, (experts, 256, 256)) for t in (types[0], *types))
    stacks = [poison(w, np.unique(ids)) for w in (gate, up, down)]
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    given = list(map(tiled, stacks))
    if blocks % 2:
        other = tiled(poison(random_weights(rng, GGMLType.Q8_0, (experts, 256, 256)), np.array([], int)))
        given[2] = OneOf((Matrices.of(other), Matrices.of(given[2])), jnp.int32(1))
    config = replace(few_config(tokens), warpgroups=2, blocks=blocks)
    out = moe_sm90.moe_mlp(x, *given, ids, weights, BFLOAT16, config=config, interpret=interpret())
    check(out, moe_oracle(x, stacks, ids, weights), tolerances.MOE_FLOAT16_NMSE, routing)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_moe_mlp_of_experts_of_which_some_are_elsewhere(rng, is_sorted):
    """Three of six are here: pairs of the others add nothing, and no matrix is read for them."""
    ids = np.stack([rng.permutation([0, 2, 4, 5])[:2] for _ in range(9)]).astype(np.int32)
    ids[4] = [5, 4]  # a token of which nothing is here
    ids = np.minimum(ids, 3)
    stacks = [random_weights(rng, GGMLType.Q4_K, (3, 256, 256)) for _ in range(3)]
    given = [tiled(poison(w, np.array([0, 2]))) for w in stacks]
    x = rng.standard_normal((9, 256)).astype(np.float32)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    config = SMALL if is_sorted else replace(few_config(9), warpgroups=2, blocks=3)
    out = moe_sm90.moe_mlp(
        x, *given, ids, weights, BFLOAT16, all_experts=6, config=config, interpret=interpret()
    )
    expected = moe_oracle(x, stacks, np.minimum(ids, 2), np.where(ids < 3, weights, 0))
    check(out, expected, tolerances.MOE_FLOAT16_NMSE, is_sorted)
    assert not np.asarray(out)[4].any()


@pytest.mark.parametrize(("tokens", "blocks"), [(3, 11), (17, 12), (24, 13)])
def test_a_matrix_summed_in_parts(rng, tokens, blocks):
    """12 items: 3 blocks of rows, 4 parts of K; with fewer blocks, as many and more."""
    w, x = random_weights(rng, GGMLType.Q6_K, (320, 1024)), heavy_tailed(rng, (tokens, 1024))
    config = replace(few_config(tokens), warpgroups=2, blocks=blocks)
    out = matmul_sm90.quantized_matmul(x, tiled(w), BFLOAT16, config=config, splits=4, interpret=interpret())
    check(out, x.astype(np.float64) @ dense64(w).T, BOUND, tokens)


def test_four_warpgroups(rng):
    stacks = [random_weights(rng, GGMLType.Q4_K, (3, 256, 256)) for _ in range(3)]
    ids, x = np.array([[0, 2]] * 3, np.int32), rng.standard_normal((3, 256)).astype(np.float32)
    weights = rng.uniform(size=ids.shape).astype(np.float32)
    config = replace(few_config(3), blocks=2)
    assert config.warpgroups == 4
    out = moe_sm90.moe_mlp(
        x, *map(tiled, stacks), ids, weights, BFLOAT16, config=config, interpret=interpret()
    )
    check(out, moe_oracle(x, stacks, ids, weights), tolerances.MOE_FLOAT16_NMSE, "four warpgroups")


def test_what_the_kernels_do_not_take_is_named(rng):
    w, x = random_weights(rng, GGMLType.Q4_K, (64, 256)), np.ones((2, 256), np.float32)
    run = matmul_sm90.quantized_matmul
    with pytest.raises(NotImplementedError, match=r"9\.0"):
        run(x, tiled(w), BFLOAT16)
    with pytest.raises(NotImplementedError, match="float32"):
        run(x, tiled(w), np.dtype(np.float32), interpret=interpret())
    with pytest.raises(NotImplementedError, match="rows"):
        run(x, w, BFLOAT16, interpret=interpret())
    with pytest.raises(NotImplementedError, match="64s"):
        run(x, tiled(random_weights(rng, GGMLType.Q4_K, (72, 256))), BFLOAT16, interpret=interpret())


# Preparation in plain jnp


@pytest.mark.parametrize("peak", [0.0, 1e-30, 3.0, 2.0**15, 1e30])
def test_operands_keep_eleven_bits_at_any_magnitude(rng, peak):
    x = rng.uniform(-1, 1, (3, 256)).astype(np.float32) * np.float32(peak)
    operand, scale = float16_operand(jnp.asarray(x))
    back = np.asarray(operand, np.float32) * np.asarray(scale)[:, None] * 16
    np.testing.assert_allclose(back, x[:, operand_order(256)], rtol=2.0**-11, atol=peak * 2.0**-24)


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "tile"),
    [(300, 8, 128, 64), (5, 2, 4, 8), (1, 1, 1, 16), (64, 8, 128, 32)],
)
def test_sorting_gives_every_pair_a_row_of_its_expert(rng, tokens, choices, experts, tile):
    ids = rng.zipf(1.3, (tokens, choices)) % experts
    order = sort_by_expert(jnp.asarray(ids, jnp.int32), experts, tile)
    destination, source = np.asarray(order.destination), np.asarray(order.pair)
    assert len(np.unique(destination)) == ids.size
    np.testing.assert_array_equal(source[destination.reshape(-1)], np.arange(ids.size))
    owner = np.full(len(source), -1)
    for e, start, rows in list(zip(*map(np.asarray, order.tiles[:3]), strict=True))[
        : int(order.tiles.count[0])
    ]:
        assert start % ROW_ALIGN == 0
        assert 0 < rows <= tile
        assert (owner[start : start + rows] == -1).all()
        owner[start : start + rows] = e
        assert start + tile <= len(source) == padded_rows(ids.size, experts, tile)
    np.testing.assert_array_equal(owner[destination], ids)


def test_warpgroups_ask_for_no_more_registers_than_the_launch_gives():
    for warpgroups, (increased, decreased) in REGISTERS.items():
        given = 65536 // (128 * (warpgroups + 1)) // 8 * 8
        assert warpgroups * increased + decreased <= (warpgroups + 1) * given


def test_a_tile_writes_its_own_rows_alone(rng):
    """The tile before another in memory comes after it in time."""
    w, x = random_weights(rng, GGMLType.Q4_K, (2, 64, 256)), heavy_tailed(rng, (32, 256))
    operand, scale = float16_operand(jnp.asarray(x))
    tiles = Tiles(*(jnp.asarray(a, jnp.int32) for a in ([1, 0], [8, 0], [8, 8], [2])))
    config = MatmulConfig(tile=16, widths=(16,), blocks=1)
    weights = (Matrices.of(tiled(w)),)
    out = grouped_matmul(operand, scale, tiles, weights, config=config, interpret=interpret())
    check(out[:16], expert_oracle(x[:16], w, np.repeat([0, 1], 8)[:, None])[:, 0], BOUND, "both tiles")
