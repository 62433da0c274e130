"""Full-size models by their shapes alone: parameters, cache and step, without a byte of weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict

from convert.config import PRESETS
from convert.packed import PackedTensor
from convert.tensor_names import q4_k_m_types, tensor_specs
from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.memory_plan import cache_nbytes
from qwen3_moe_jax.model import Qwen3Moe, parameter_tree

FILE_GB = {"Qwen3-30B-A3B": 18.55, "Qwen3-235B-A22B": 142.2, "Qwen3-Coder-480B-A35B": 290.1}
"""Sizes of the Q4_K_M files, from their tensor tables."""

PACKED_GROWTH = 1.04


def abstract(config, types):
    """Parameters and one step of a model, as shapes."""
    model = Qwen3Moe(config, FrozenDict(types))
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


def test_parameters_are_the_table_of_tensors():
    config = replace(PRESETS["Qwen3-30B-A3B"], num_hidden_layers=2)
    params, _, _ = abstract(config, q4_k_m_types(config))
    expected = parameter_tree({s.path: s.shape for s in tensor_specs(config)})
    is_leaf = lambda x: isinstance(x, PackedTensor)  # noqa: E731
    assert jax.tree.map(lambda x: x.shape, params, is_leaf=is_leaf) == expected


def test_cache_size_is_what_a_plan_says():
    config = PRESETS["Qwen3-30B-A3B"]
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 4096, jnp.float16))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert nbytes == cache_nbytes(config, 4096, itemsize=2) == 4096 * 96 * 1024
