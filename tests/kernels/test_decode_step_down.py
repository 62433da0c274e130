"""Down of the decode kernel, in the interpreter with one block: parts and passes of a token's experts.

With many blocks each has a part of the experts. Where shared memory is short a part comes in passes.
One block would do neither by itself, so the tests ask for them; ``test_decode_step_memory`` tests the rules.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.config import STORE_GROUP, StepConfig
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from tests.kernels.test_decode_step_kernel import (
    CONFIG,
    SEED,
    cosine,
    random_cache,
    random_model,
    reference,
)
from tests.tolerances import DECODE_STEP_COSINE

ROLES = ("embed", "q", "k", "v", "o", "gate", "down", "lm_head")
TYPES = {**dict.fromkeys(ROLES, GGMLType.Q4_K), "router": GGMLType.F32}

SMALL = replace(
    CONFIG,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    num_experts=16,
)
TOKENS, POSITIONS = np.array([5, 9]), np.array([40, 3])


@pytest.fixture(scope="module")
def models():
    """By the number of a token's experts."""
    return {n: random_model(replace(SMALL, num_experts_per_tok=n), TYPES, SEED) for n in (4, 8)}


def experts_of(config, batch):
    """int32 [1, B, X]: different experts for each sequence, some of them shared."""
    rng = np.random.default_rng(SEED + 2)
    drawn = [rng.permutation(config.num_experts)[: config.num_experts_per_tok] for _ in range(batch)]
    return np.stack(drawn)[None].astype(np.int32)


def cache_of(batch):
    """Keys and values of the first sequences of two."""
    return tuple(a[:, :batch] for a in random_cache(SMALL, 2, length=64, dtype=jnp.float16))


def logits_of(model, batch, **changed):
    """The kernel's logits [B, V]; ``changed`` fields of its ``StepConfig``."""
    device = api.Device(blocks=1, splits=1, kernels="portable", emulate=True, interpret=interpreter())
    cache, ids = cache_of(batch), jnp.asarray(experts_of(model.config, batch))
    tokens, positions = jnp.asarray(TOKENS[:batch]), jnp.asarray(POSITIONS[:batch])
    shape = api.shape_config

    def changed_shape(*args):
        return replace(shape(*args), **changed)

    with mock.patch.object(api, "shape_config", changed_shape):
        step = jax.jit(partial(api.decode_step, config=model.config, expert_ids=ids, device=device))
        out = step(model.weights, token_ids=tokens, positions=positions, k=cache[0], v=cache[1])
    return np.asarray(out.logits)


def assert_right(model, logits):
    """Every sequence's logits are those of plain NumPy."""
    batch = len(logits)
    cache, ids = cache_of(batch), experts_of(model.config, batch)
    for b in range(batch):
        keys, values = (np.asarray(a[:, b], np.float64) for a in cache)
        expected, *_ = reference(model, TOKENS[b], POSITIONS[b], keys, values, ids[:, b])
        assert cosine(logits[b], expected) > DECODE_STEP_COSINE, b


@pytest.fixture(scope="module")
def in_one_pass(models):
    """Logits of one sequence with 8 experts."""
    return logits_of(models[8], 1)


def test_passes_of_experts_give_the_bits_of_one(models, in_one_pass):
    """Each with 4 of 8 experts; a batch quantizes its activations elsewhere than one sequence does."""
    found = logits_of(models[8], 2, down_passes=2)
    assert_right(models[8], found)
    np.testing.assert_array_equal(found[:1], in_one_pass)


def test_half_a_piece_of_activations_per_part(models):
    """4 experts of 256 in two parts: what is read of the second ends after the last expert."""
    with mock.patch.object(StepConfig, "down_parts", 2):
        assert_right(models[4], logits_of(models[4], 1))


@pytest.mark.parametrize("experts", [4, 8, 12, 16])
@pytest.mark.parametrize("blocks", [20, 132])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_sum_of_down_has_a_place(experts, blocks, batch):
    """With 12 experts two tiles of 32 rows at a time would need 24 places of 16."""
    config = replace(SMALL, hidden_size=2048, num_experts_per_tok=experts)
    shape = api.shape_config(config, batch, api.Device(blocks=blocks, kernels="portable"))
    assert shape.down_tiles * shape.experts_per_part <= STORE_GROUP
    assert shape.down_tiles == 2 or batch == 1 or experts > 8
    for passes in shape.down_pass_choices:
        assert shape.experts_per_part % passes == 0
        assert passes == 1 or shape.experts_per_part // passes % 4 == 0
