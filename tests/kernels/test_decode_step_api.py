"""What the decode kernel does not support is named before anything is compiled."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType

api = pytest.importorskip("qwen3_moe_jax.kernels_pallas.decode_step.api", reason="GPU kernels need JAX 0.11")

from qwen3_moe_jax.kernels_pallas.decode_step.weights import LayerTypes, plan_stacks  # noqa: E402

CONFIG = PRESETS["Qwen3-30B-A3B"]
Q4, Q6 = GGMLType.Q4_K, GGMLType.Q6_K
TYPES = {"qkv": (Q4, Q6), "o": (Q4,), "gate": (Q4,), "up": (Q4,), "down": (Q4, Q6), "lm_head": (Q6,)}
CACHE = SimpleNamespace(k=np.zeros((48, 1, 64, 4, 128), np.float16))
SHAPES = SimpleNamespace(types=tuple(TYPES.items()), qkv_always=0)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-Coder-30B-A3B", "Qwen3-235B-A22B"])
@pytest.mark.parametrize("batch", [1, 16])
def test_real_models_are_supported(name, batch):
    api.check_supported(PRESETS[name], TYPES, batch)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 256}, "hidden_size 256"),
        ({"head_dim": 64, "num_attention_heads": 64}, "head_dim 64"),
        ({"num_key_value_heads": 16}, "query heads per KV head 2"),
        ({"moe_intermediate_size": 320}, "moe_intermediate_size 320"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6"),
        ({"vocab_size": 1001}, "vocab_size 1001"),
    ],
)
def test_an_unsupported_shape_is_named(change, named):
    with pytest.raises(NotImplementedError, match=named):
        api.check_supported(replace(CONFIG, **change), TYPES, 1)


def test_an_unsupported_type_or_batch_is_named():
    with pytest.raises(NotImplementedError, match="type of o F16"):
        api.check_supported(CONFIG, {**TYPES, "o": (GGMLType.F16,)}, 1)
    with pytest.raises(NotImplementedError, match="batch 17"):
        api.check_supported(CONFIG, TYPES, 17)


H100 = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)


def a_device(**change):
    return SimpleNamespace(**{**vars(H100), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"platform": "cpu"}, "platform cpu"),
        ({"compute_capability": "8.0"}, "compute capability 8.0"),
        ({"core_count": 3}, "multiprocessors 3"),
    ],
)
def test_a_device_that_cannot_hold_the_grid_is_named(change, named):
    api.check(CONFIG, TYPES, 16, H100)
    with pytest.raises(NotImplementedError, match=named):
        api.check(CONFIG, TYPES, 16, a_device(**change))


@pytest.mark.parametrize(
    ("card", "cores", "blocks"),
    [("SXM", 132, 132), ("PCIe", 114, 112), ("H20", 78, 76), ("a MIG slice", 16, 16), ("half of one", 6, 4)],
)
def test_the_grid_follows_the_multiprocessors(card, cores, blocks):
    """At most one block per multiprocessor: all of them run at once, as a grid barrier needs."""
    api.check(CONFIG, TYPES, 8, a_device(core_count=cores))
    c = api.step_config(SHAPES, CONFIG, 1, CACHE, api.Device.of_cores(cores))
    assert (c.blocks, c.splits) == (blocks, blocks // 2)
    assert c.hidden // 32 * c.down_parts <= max(blocks, c.hidden // 32)


def test_the_table_lays_matrices_of_one_type_side_by_side():
    """Layer 0 has a Q6_K v and down, layer 1 has none: offsets run on within each stack."""
    config = replace(CONFIG, num_hidden_layers=2)
    layers = [LayerTypes(Q4, Q4, Q6, Q4, Q4, Q6), LayerTypes(Q4, Q4, Q4, Q4, Q4, Q4)]
    plan = plan_stacks(layers, config=config)
    assert plan.types["qkv"] == (Q4, Q6)
    assert plan.tiles["qkv"] == (576 + 640, 64)
    assert plan.tiles["down"] == (128 * 256, 128 * 256)
    assert plan.qkv_always == 576
    at = lambda layer, name: plan.table[layer, plan.columns[name]]
    np.testing.assert_array_equal([at(0, n) for n in ("q_head", "k_head", "v_head")], [0, 32, 36])
    assert (at(0, "qkv_count0"), at(0, "qkv_count1")) == (576, 64)
    assert (at(1, "qkv_offset0"), at(1, "qkv_offset1"), at(1, "qkv_count1")) == (576, 64, 0)
    assert (at(1, "o_offset"), at(1, "gate_up_offset")) == (256, 128 * 96)
    assert (plan.types["down"][at(0, "down_type")], plan.types["down"][at(1, "down_type")]) == (Q6, Q4)
