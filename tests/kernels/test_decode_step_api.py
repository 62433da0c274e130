"""What the decode kernel does not support is named before anything is compiled."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, abstract_params, tiled_params
from qwen3_moe_jax.loader import embedded_model

api = pytest.importorskip("qwen3_moe_jax.kernels_pallas.decode_step.api", reason="GPU kernels need JAX 0.11")

from qwen3_moe_jax.kernels_pallas.decode_step.weights import StepWeights, column_names  # noqa: E402

CONFIG = PRESETS["Qwen3-30B-A3B"]
EMBEDDED = open_model(embedded_model()).config
Q4, Q6 = GGMLType.Q4_K, GGMLType.Q6_K
TYPES = {"qkv": (Q4, Q6), "o": (Q4,), "gate": (Q4,), "up": (Q4,), "down": (Q4, Q6), "lm_head": (Q6,)}
CACHE = np.zeros((48, 1, 64, 4, 128), np.float16)
SHAPES = SimpleNamespace(types=TYPES, qkv_always=0, lm_head_tiled=True)


@pytest.mark.parametrize("config", [*PRESETS.values(), EMBEDDED], ids=[*PRESETS, "embedded"])
@pytest.mark.parametrize("batch", [1, 16])
def test_real_models_are_supported(config, batch):
    api.check_supported(config, TYPES, batch)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 320}, "hidden_size 320"),
        ({"head_dim": 96, "num_attention_heads": 64}, "head_dim 96"),
        ({"num_key_value_heads": 1}, "query heads per KV head 32"),
        ({"moe_intermediate_size": 320}, "moe_intermediate_size 320"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6"),
        ({"vocab_size": 1001}, "vocab_size 1001"),
    ],
)
def test_an_unsupported_shape_is_named(change, named):
    with pytest.raises(NotImplementedError, match=named):
        api.check_supported(replace(CONFIG, **change), TYPES, 1)


def test_an_unsupported_type_or_batch_is_named():
    with pytest.raises(NotImplementedError, match="type of o IQ3_S"):
        api.check_supported(CONFIG, {**TYPES, "o": (GGMLType.F16, GGMLType.IQ3_S)}, 1)
    with pytest.raises(NotImplementedError, match="batch 17"):
        api.check_supported(CONFIG, TYPES, 17)


H100 = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)


def a_device(**change):
    return SimpleNamespace(**{**vars(H100), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"platform": "cpu"}, "platform cpu"),
        ({"compute_capability": "7.5"}, "compute capability 7.5"),
        ({"core_count": 3}, "multiprocessors 3"),
    ],
)
def test_a_device_that_cannot_hold_the_grid_is_named(change, named):
    api.check_device(H100)
    with pytest.raises(NotImplementedError, match=named):
        api.check_device(a_device(**change))


@pytest.mark.parametrize(
    ("card", "cores", "blocks"),
    [("SXM", 132, 132), ("PCIe", 114, 112), ("H20", 78, 76), ("a MIG slice", 16, 16), ("half of one", 6, 4)],
)
def test_the_grid_follows_the_multiprocessors(card, cores, blocks):
    """At most one block per multiprocessor: all of them run at once, as a grid barrier needs."""
    api.check_device(a_device(core_count=cores))
    c = api.step_config(SHAPES, CONFIG, 1, CACHE, api.Device.of_cores(cores))
    assert (c.blocks, c.splits) == (blocks, blocks // 2)
    assert c.hidden_size // 32 * c.down_parts <= max(blocks, c.hidden_size // 32)


@pytest.mark.parametrize(
    ("preset", "cores", "sequences", "is_early"),
    [
        ("Qwen3-30B-A3B", 82, 4, False),  # early tiles of 64 tokens have no room
        ("Qwen3-30B-A3B", 128, 4, False),
        ("Qwen3-235B-A22B", 128, 2, False),
    ],
)
def test_sequences_of_cards_with_little_shared_memory(preset, cores, sequences, is_early):
    card = api.Device.of_cores(cores, kernels="portable", shared_memory=101_376)
    assert api.kernel_batch(PRESETS[preset], card) == sequences
    configs = [api.shape_config(PRESETS[preset], batch, card) for batch in (1, 2)]
    assert [c.prefetches for c in configs] == [is_early, False]
    assert len({c.down_parts for c in configs}) == 1  # the same bits alone and in a batch


def abstract(**changed: GGMLType) -> dict:
    """Parameters of two layers, as shapes: Q6_K is v_proj's and down_proj's in layer 0, else Q4_K is."""
    config = replace(CONFIG, num_hidden_layers=2)
    types = {spec.path: Q4 for spec in tensor_specs(config)}
    types |= {path: GGMLType.F32 for path in types if path.endswith("router")}
    types |= {f"layers.0.{name}": Q6 for name in ("self_attn.v_proj", "mlp.experts.down_proj")}
    types |= {path.replace("__", "."): type for path, type in changed.items()}
    return abstract_params(config, types, GPU_ROLES)


def test_the_table_lays_matrices_of_one_type_side_by_side():
    """Layer 0 has a Q6_K v and down, layer 1 has none: offsets run on within each stack."""
    weights = StepWeights.of(abstract())
    columns = column_names(2)
    rows = lambda role: tuple(stack.shape[0] for stack in weights.stacks[role])
    assert weights.types["qkv"] == (Q4, Q6)
    assert rows("qkv") == (8 * (576 + 640), 8 * 64)
    assert rows("down") == (8 * 128 * 256, 8 * 128 * 256)
    assert weights.qkv_always == 576
    at = lambda layer, name: weights.table[layer, columns[name]]
    np.testing.assert_array_equal([at(0, n) for n in ("q_head", "k_head", "v_head")], [0, 32, 36])
    assert (at(0, "qkv_count0"), at(0, "qkv_count1")) == (576, 64)
    assert (at(1, "qkv_offset0"), at(1, "qkv_offset1"), at(1, "qkv_count1")) == (576, 64, 0)
    assert (at(1, "o_offset"), at(1, "gate_up_offset")) == (256, 128 * 96)
    assert (weights.types["down"][at(0, "down_type")], weights.types["down"][at(1, "down_type")]) == (Q6, Q4)


@pytest.mark.parametrize(
    ("path", "type", "named"),
    [
        (
            "layers.1.mlp.router",
            GGMLType.F16,
            "the router is in F32, F16; it must be in one of",
        ),
        ("layers.1.mlp.experts.up_proj", Q6, "gate_proj and up_proj of layer 1 are Q4_K and Q6_K"),
    ],
)
def test_weights_that_the_kernel_does_not_take_are_named(path, type, named):
    with pytest.raises(NotImplementedError, match=named):
        StepWeights.of(abstract(**{path.replace(".", "__"): type}))


def test_weights_must_lie_in_tiles_but_for_tied_embeddings():
    params = abstract()
    with pytest.raises(NotImplementedError, match="layout of .* rows is not supported"):
        api.check(CONFIG, params, 1)
    tiled = tiled_params(params)
    del tiled["lm_head"]
    api.check(CONFIG, tiled, 1)
    assert not StepWeights.of(tiled).lm_head_tiled


@pytest.mark.parametrize("type", [GGMLType.F16, GGMLType.BF16])
def test_a_router_of_16_bits_is_taken(type):
    params = abstract(**{f"layers__{i}__mlp__router": type for i in range(2)})
    (stack,) = params["layers"]["mlp.router"].options
    assert stack.type is type
    StepWeights.of(params)
