"""The decode kernel's shared memory against each card's limit, before anything is compiled."""

import dataclasses

import jax
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.config import MAX_SPLITS, output_types
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import (
    check_shared_memory,
    scratch_types,
    shared_memory_budget,
)
from qwen3_moe_jax.kernels_pallas.gpu import cards
from qwen3_moe_jax.testing.decode_kernel import trace_step

SMALL, MIDDLE, LARGE = "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B"
ALLOCATED = {1: 138240, 2: 74752, 8: 163840}
"""Bytes that Pallas allocated for the kernel of each batch (its resource dump), without barriers."""


def device(version: str, kernels: str = "portable") -> api.Device:
    """The first card of a compute capability."""
    known = cards.capabilities()[version]
    cores = next(iter(known.multiprocessors.values()))
    return api.Device.of_cores(cores, kernels=kernels, shared_memory=known.shared_memory)


@pytest.mark.parametrize("batch", ALLOCATED)
def test_the_budget_is_what_pallas_allocates(batch):
    budget = shared_memory_budget(api.shape_config(PRESETS[SMALL], batch, device("9.0", "hopper")))
    assert sum(budget.values()) - budget["barriers"] == ALLOCATED[batch]


@pytest.mark.parametrize(
    ("preset", "version", "kernels", "at_least"),
    [
        (SMALL, "9.0", "hopper", 8),
        (SMALL, "9.0", "portable", 8),
        (SMALL, "8.0", "portable", 6),
        (SMALL, "8.6", "portable", 4),
        (SMALL, "8.9", "portable", 4),
        (SMALL, "12.0", "portable", 4),
        (MIDDLE, "9.0", "hopper", 3),
        (LARGE, "9.0", "hopper", 2),
    ],
)
def test_kernels_are_as_large_as_a_card_holds(preset, version, kernels, at_least):
    grid = device(version, kernels)
    batch = api.kernel_batch(PRESETS[preset], grid)
    fits = lambda n: sum(shared_memory_budget(api.shape_config(PRESETS[preset], n, grid)).values())
    assert batch >= at_least
    assert fits(batch) <= grid.shared_memory
    assert batch == api.KERNEL_BATCH or fits(batch + 1) > grid.shared_memory


@pytest.mark.parametrize("version", cards.capabilities())
def test_every_card_takes_four_sequences_in_one_kernel(version):
    """Those of the table and of any other number of multiprocessors."""
    known = cards.capabilities()[version]
    for cores in {*known.multiprocessors.values(), 4, 16, 63, 64, 127, 128, 192}:
        grid = api.Device.of_cores(cores, kernels="portable", shared_memory=known.shared_memory)
        assert api.kernel_batch(PRESETS[SMALL], grid) >= 4, cores


@pytest.mark.parametrize(
    ("preset", "cores", "batch", "passes"),
    [
        (SMALL, 82, 1, 1),  # one sequence has room for all experts' activations
        (SMALL, 82, 2, 1),
        (SMALL, 82, 4, 2),
        (SMALL, 128, 4, 1),  # a block has half of the experts there
        (LARGE, 82, 1, 2),
    ],
)
def test_experts_come_in_passes_only_where_they_must(preset, cores, batch, passes):
    grid = api.Device.of_cores(cores, kernels="portable", shared_memory=101_376)
    shape = api.shape_config(PRESETS[preset], batch, grid)
    assert shape.down_passes == passes
    assert sum(shared_memory_budget(shape).values()) <= grid.shared_memory


def test_hoppers_kernel_has_no_passes():
    grid = dataclasses.replace(device("9.0", "hopper"), shared_memory=101_376)
    assert api.shape_config(PRESETS[SMALL], 4, grid).down_passes == 1


def test_too_little_shared_memory_is_named():
    grid = dataclasses.replace(device("8.9"), shared_memory=40_000)
    with pytest.raises(
        NotImplementedError, match=r"batch of 1 needs \d+ bytes of shared memory .* has 40000"
    ):
        api.kernel_batch(PRESETS[SMALL], grid)
    check_shared_memory(api.shape_config(PRESETS[SMALL], 1, device("8.9")), 101376)


@pytest.mark.parametrize(("preset", "batch"), [(MIDDLE, 2), (LARGE, 2)])
@pytest.mark.parametrize("kernels", ["hopper", "portable"])
def test_larger_models_are_traced(preset, batch, kernels):
    """235B has 16 query heads for a KV head, 480B 12 and three steps of columns."""
    config = dataclasses.replace(PRESETS[preset], num_hidden_layers=2, vocab_size=4096)
    traced = trace_step(config, batch=batch, device=device("9.0", kernels))
    assert traced.out_info.shape[0] == batch


def test_cards_have_blocks_that_are_a_multiple_of_four():
    """By rule, without a table: an RTX 3090 has 82 multiprocessors and takes 80 blocks."""
    for known in cards.capabilities().values():
        for cores in known.multiprocessors.values():
            blocks = api.Device.of_cores(cores).blocks
            assert blocks % 4 == 0
            assert cores - 4 < blocks <= cores
    assert cards.capability("7.5") is None
    assert cards.capability_of("sm_89").version == "8.9"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_eight_rows_of_a_tile_lie_in_different_banks(head_dim):
    """Eight lanes read 16 bytes of 8 rows at once: unpadded rows would all lie in the same four banks."""
    config = dataclasses.replace(PRESETS[SMALL], head_dim=head_dim)
    shape = api.shape_config(config, 1, device("9.0"))
    _, (queries, *_) = scratch_types(shape).sums_or_attention_smem.refs
    (tiles,) = scratch_types(shape).tiles_smem.refs
    for tile in (queries, *tiles):
        nbytes = tile.shape[-1] * jax.numpy.dtype(tile.dtype).itemsize
        assert len({row * nbytes % 128 // 16 for row in range(8)}) == 8


@pytest.mark.parametrize(("preset", "heads"), [(SMALL, 8), (MIDDLE, 16), (LARGE, 12)])
def test_splits_leave_what_their_query_heads_have(preset, heads):
    """Products have 8 or 16 columns; a KV head's query heads are the first, and a join reads no others."""
    out = output_types(api.shape_config(PRESETS[preset], 2, device("9.0", "hopper")))
    batch, kv_heads, splits, *rest = out.part_gmem.shape
    assert rest == [heads, PRESETS[preset].head_dim]
    assert splits <= MAX_SPLITS
    assert out.part_stats_gmem.shape == (batch, kv_heads, 2, heads, MAX_SPLITS)


@pytest.mark.parametrize(("batch", "is_early"), [(1, True), (2, False)])
def test_tiles_that_are_asked_for_early_have_room_of_their_own(batch, is_early):
    """A copy that begins before sums are read would write over them where these lie."""
    scratch = scratch_types(api.shape_config(PRESETS[SMALL], batch, device("9.0", "hopper")))
    assert (scratch.tiles_smem is not None) == is_early
