"""Full-size models by their shapes alone: parameters, cache and step, without a byte of weights."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types, tensor_specs
from qwen3_moe_jax.core.stages import LAYER_STAGES, STAGES
from qwen3_moe_jax.jax_backend.decode_path import read
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, abstract_params, plan_layers
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.kernels_pallas import LayerTable
from qwen3_moe_jax.machine.memory import cache_nbytes

FILE_GB = {"Qwen3-30B-A3B": 18.55, "Qwen3-235B-A22B": 142.2, "Qwen3-Coder-480B-A35B": 290.1}
"""Sizes of the Q4_K_M files, from their tensor tables."""

PACKED_GROWTH = 1.04


def abstract(config, types):
    """Parameters and one step of a model, as shapes."""
    model = Qwen3Moe(config)
    cache = jax.eval_shape(lambda: KVCache.create(config, 2, 64))
    tokens, start = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2,), jnp.int32)
    params = abstract_params(config, types, {})
    step = jax.eval_shape(lambda p, c: model.bind(p)(tokens, c, start), params, cache)
    logits = jax.eval_shape(lambda p, h: model.bind(p).logits(h), params, step.hidden)
    return params, step, logits


@pytest.mark.parametrize("name", FILE_GB)
def test_full_size_model(name):
    config = PRESETS[name]
    params, step, logits = abstract(config, q4_k_m_types(config))
    assert step.hidden.shape == (2, 3, config.hidden_size)
    assert step.expert_ids.shape == (config.num_hidden_layers, 2, 3, config.num_experts_per_tok)
    assert logits.shape == (2, 3, config.vocab_size)
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert FILE_GB[name] <= nbytes / 1e9 <= FILE_GB[name] * PACKED_GROWTH


@pytest.mark.parametrize("roles", [{}, GPU_ROLES], ids=["own", "qkv"])
def test_stacks_hold_every_tensor_once(roles):
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=8)
    types = q4_k_m_types(config)
    table = plan_layers(config, types, roles)
    rows = dict.fromkeys(table.stacks, 0)
    for layer in range(config.num_hidden_layers):
        for tensor in table.tensors:
            stack, _ = tensor.place(layer)
            assert tensor.first[layer] == rows[stack], "tensors of a stack follow each other"
            rows[stack] += tensor.rows
            assert table.stacks[stack].shape[1] == tensor.shape[-1]
            if len(tensor.shape) > 1:
                assert table.stacks[stack].type is types[f"layers.{layer}.{tensor.name}"]
    assert rows == {name: stack.shape[0] for name, stack in table.stacks.items()}
    assert [t.name for t in table.tensors] == [
        s.path.removeprefix("layers.0.") for s in tensor_specs(config) if s.path.startswith("layers.0.")
    ]


def test_only_types_that_differ_have_several_stacks():
    config = PRESETS["Qwen3-30B-A3B"]
    table = plan_layers(config, q4_k_m_types(config), {})
    mixed = sorted(name for name in table.stacks if name.endswith(".Q6_K"))
    assert mixed == ["mlp.experts.down_proj.Q6_K", "self_attn.v_proj.Q6_K"]
    rows = [table.stacks[f"self_attn.v_proj.{t}"].shape[0] for t in ("Q6_K", "Q4_K")]
    assert rows == [24 * 512, 24 * 512]


def test_the_type_of_most_rows_comes_first():
    shapes = {"q": (8, 4), "v": (8, 4)}
    q4, q6 = GGMLType.Q4_K, GGMLType.Q6_K
    types = [{"q": q6, "v": q4}, {"q": q6, "v": q6}]
    own = LayerTable.plan(shapes, types, {})
    assert own["v"].stacks == ("v.Q4_K", "v.Q6_K"), "equals: the lower type"
    assert own["q"].neighbours == ("q",)
    shared = LayerTable.plan(shapes, types, {"q": "qv", "v": "qv"})
    assert shared["v"].stacks == ("qv.Q6_K", "qv.Q4_K")
    assert (shared["v"].first, shared["v"].which) == ((0, 16), (1, 0))
    assert (shared["q"].first, shared["q"].which) == ((0, 8), (0, 0))
    assert shared["q"].neighbours == shared["v"].neighbours == ("q", "v")
    np.testing.assert_array_equal(shared.columns([shared["v"].first, shared["v"].which]), [[0, 1], [16, 0]])
    with pytest.raises(KeyError, match="no tensor k"):
        shared["k"]
    with pytest.raises(ValueError, match="3 numbers"):
        shared.columns([(1, 2, 3)])


def test_cache_size_is_what_a_plan_says():
    config = PRESETS["Qwen3-30B-A3B"]
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 4096, jnp.float16))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert nbytes == cache_nbytes(config, 4096, itemsize=2) == 4096 * 96 * 1024


def test_stages_are_captured_as_flax_says():
    """Flax warns of values that are sown where nothing captures them, and gives that way up."""
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=3)
    cache = jax.eval_shape(lambda: KVCache.create(config, 2, 64))
    tokens, start = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2,), jnp.int32)
    params = abstract_params(config, q4_k_m_types(config), {})
    model = Qwen3Moe(config, capture=frozenset(STAGES))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        step = jax.eval_shape(lambda p, c: read(model, p, tokens, start, c), params, cache)
    of_layers = {stage.name for stage in LAYER_STAGES}
    assert set(step.stages) == set(STAGES)
    for name, value in step.stages.items():
        assert value.shape[: 1 + (name in of_layers)] == ((3, 2) if name in of_layers else (2,)), name


def test_what_is_shown_is_what_goes_on():
    """XLA may compute a value twice, with other sums each time: a barrier is before each that is shown."""
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=1)
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 64))
    tokens, start = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1,), jnp.int32)
    params = abstract_params(config, q4_k_m_types(config), {})

    def barriers(*stages: str) -> int:
        model = Qwen3Moe(config, capture=frozenset(stages))
        return str(jax.make_jaxpr(lambda p, c: read(model, p, tokens, start, c))(params, cache)).count(
            "optimization_barrier"
        )

    none = barriers()
    assert barriers("Kcur") == none + 1
    assert barriers("Qcur", "Kcur", "Kcur_normed") == none + 3
