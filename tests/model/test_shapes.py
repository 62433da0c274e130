"""Full-size models by their shapes alone: parameters, cache and step, without a byte of weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types, tensor_specs
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.model import Qwen3Moe
from qwen3_moe_jax.jax_backend.stacks import stack_layers
from qwen3_moe_jax.machine.memory import cache_nbytes

FILE_GB = {"Qwen3-30B-A3B": 18.55, "Qwen3-235B-A22B": 142.2, "Qwen3-Coder-480B-A35B": 290.1}
"""Sizes of the Q4_K_M files, from their tensor tables."""

PACKED_GROWTH = 1.04


def abstract(config, types):
    """Parameters and one step of a model, as shapes."""
    model = Qwen3Moe(config, types=FrozenDict(types))
    cache = jax.eval_shape(lambda: KVCache.create(config, 2, 64))
    tokens, start = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, cache, start)["params"]
    step = jax.eval_shape(lambda p, c: model.apply({"params": p}, tokens, c, start), params, cache)
    logits = jax.eval_shape(lambda p, h: model.apply({"params": p}, h, method="logits"), params, step.hidden)
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


@pytest.mark.parametrize(
    "roles", [{}, {f"self_attn.{n}_proj": "self_attn.qkv" for n in "qkv"}], ids=["own", "qkv"]
)
def test_stacks_hold_every_tensor_once(roles):
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=8)
    types = q4_k_m_types(config)
    places, shapes = stack_layers(config, types, roles)
    rows = {name: 0 for name in shapes}
    for spec in tensor_specs(config):
        if not spec.path.startswith("layers."):
            continue
        place = places[spec.path]
        assert place.first == rows[place.stack], "tensors of a stack follow each other"
        rows[place.stack] += place.rows
        assert shapes[place.stack].columns == spec.shape[-1]
        assert shapes[place.stack].type in (None, types[spec.path])
    assert rows == {name: shape.rows for name, shape in shapes.items()}


def test_only_types_that_differ_have_several_stacks():
    config = PRESETS["Qwen3-30B-A3B"]
    _, shapes = stack_layers(config, q4_k_m_types(config), {})
    mixed = sorted(name for name in shapes if name.endswith(".Q6_K"))
    assert mixed == ["mlp.experts.down_proj.Q6_K", "self_attn.v_proj.Q6_K"]
    assert shapes["self_attn.v_proj.Q6_K"].rows == shapes["self_attn.v_proj.Q4_K"].rows == 24 * 512


def test_cache_size_is_what_a_plan_says():
    config = PRESETS["Qwen3-30B-A3B"]
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 4096, jnp.float16))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert nbytes == cache_nbytes(config, 4096, itemsize=2) == 4096 * 96 * 1024
