"""The decode kernel's body over an int8 cache, in Pallas' interpreter: what it reads, and what it writes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from tests.kernels.test_decode_step_kernel import (
    CONFIG,
    ODD,
    ODD_SEED,
    ODD_TYPES,
    SEED,
    TYPES,
    assert_as_alone,
    cosine,
    random_cache,
    random_model,
    reference,
    run,
)
from tests.tolerances import DECODE_STEP_COSINE, INT8_SCALE, INT8_STEPS


@pytest.fixture(scope="module")
def models():
    """By the kernels that decode them."""
    odd = replace(ODD, tie_word_embeddings=True)
    return {
        "hopper": random_model(CONFIG, TYPES, SEED),
        "portable": random_model(odd, ODD_TYPES, ODD_SEED),
    }


def int8_cache(config, batch, positions, length=192):
    """Random keys and values, vectors of every size, none at all in one tile; afterwards what is no number of
    this sequence: tokens that others left there."""
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    rng = np.random.default_rng(SEED + 2)
    bytes_ = [rng.integers(-127, 128, shape, dtype=np.int8) for _ in "kv"]
    scales = [np.exp(rng.normal(-4.5, spread, shape[:-1])).astype(np.float32) for spread in (0.3, 2.0)]
    scales[1][:, :, :64, 0] = 0.0
    for b, position in enumerate(positions):
        for scale in scales:
            scale[:, b, position:] = 1e4
    return tuple(jnp.asarray(a) for a in (*bytes_, *scales))


def int8_of(new):
    """The int8 and scales that a cache keeps of keys or values [..., H], in float64."""
    scale = np.abs(new).max(-1, keepdims=True) / 127
    return np.round(new / scale), scale[..., 0]


@pytest.mark.parametrize(("kernels", "batch"), [("hopper", 2), ("portable", 1)])
def test_a_cache_of_int8_is_read_and_written_with_its_scales(models, kernels, batch):
    """The same logits as float64 has with these keys and values, each sequence as alone, and the token's own
    row in the cache."""
    model = models[kernels]
    tokens, positions = [5, 9][:batch], [150, 0][:batch]
    ids = np.array([[[7, 1, 4, 2], [0, 7, 5, 4]]], np.int32)[:, :batch]
    cache = int8_cache(model.config, batch, positions)
    out = run(model, tokens, positions, cache, ids, kernels=kernels)
    assert out.k.dtype == out.v.dtype == jnp.int8

    def kept(new):
        whole, scale = int8_of(new)
        return whole * scale[..., None]

    for b, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        whole, scales = ([np.asarray(a[:, b], np.float64) for a in part] for part in (cache[:2], cache[2:]))
        keys, values = (a * s[..., None] for a, s in zip(whole, scales, strict=True))
        logits, *new, _ = reference(model, token, position, keys, values, ids[:, b], kept)
        assert cosine(out.logits[b], logits) > DECODE_STEP_COSINE
        for stack, scale, expected in zip((out.k, out.v), out.scales, new, strict=True):
            bytes_, size = int8_of(expected)
            row, its_scale = stack[:, b, position], scale[:, b, position]
            np.testing.assert_allclose(its_scale, size, rtol=INT8_SCALE)
            assert np.abs(np.asarray(row, np.int32) - bytes_).max() <= 1
            assert (np.asarray(row) != bytes_).mean() < INT8_STEPS
        for after, before in zip((out.k, out.v, *out.scales), cache, strict=True):
            others = np.arange(after.shape[2]) != position
            np.testing.assert_array_equal(np.asarray(after)[:, b, others], np.asarray(before)[:, b, others])
        if batch > 1:
            one = tuple(a[:, b : b + 1] for a in cache)
            alone = run(model, [token], [position], one, ids[:, b : b + 1], kernels=kernels)
            assert_as_alone(out.logits[b], alone.logits[0])


def test_tokens_of_one_sequence_are_as_one_step_each(models):
    """The second one reads the first one's key and value as int8, with their scales."""
    model, tokens, positions = models["portable"], [5, 9], [128, 129]
    cache = int8_cache(model.config, 1, positions[:1])
    together = run(model, tokens, positions, cache, kernels="portable", one_sequence=True)
    for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        alone = run(model, [token], [position], cache, kernels="portable")
        cache = (alone.k, alone.v, *alone.scales)
        assert_as_alone(together.logits[row], alone.logits[0])
    for one, other in zip((together.k, together.v, *together.scales), cache, strict=True):
        assert_as_alone(one, other, DECODE_STEP_COSINE)  # a step of one number of 128


def test_int8_needs_scales_and_other_caches_have_none(models):
    model = models["hopper"]
    cache = int8_cache(CONFIG, 1, [3])
    with pytest.raises(ValueError, match="int8 needs scales"):
        run(model, [5], [3], cache[:2])
    with pytest.raises(ValueError, match="float16 has scales"):
        run(model, [5], [3], (*random_cache(CONFIG, 1, dtype=jnp.float16), *cache[2:]))
