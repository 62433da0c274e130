"""Sampling on the device has the meaning of ``reference/sampling.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.token_choice import (
    SamplingArrays,
    _largest_in_one_pass,
    _largest_in_two_passes,
    choose_tokens,
    penalize,
)
from qwen3_moe_jax.reference import sampling as reference
from tests import tolerances

SEED = 20
VOCAB = 300
DRAWS = 20_000


def draw(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Relative frequencies [V] of DRAWS tokens, each at its own position."""
    arrays = SamplingArrays.of([sampling])
    choose = jax.jit(lambda p: choose_tokens(jnp.asarray(logits)[None], arrays, p[None])[0][0])
    tokens = jax.lax.map(choose, jnp.arange(DRAWS), batch_size=500)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=20, top_p=0.8),
        Sampling(temperature=1.3, top_p=0.5),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=0.6, top_k=5, min_p=0.05),
        Sampling(temperature=1.0, top_k=200, top_p=0.9, seed=3),
    ],
    ids=repr,
)
def test_frequencies_follow_the_probabilities(sampling):
    logits = np.random.default_rng(SEED).normal(0, 2, VOCAB).astype(np.float32)
    expected = reference.token_probabilities(logits, sampling)
    frequencies = draw(logits, sampling)
    assert not frequencies[expected == 0].any(), f"a dropped token was drawn (seed {SEED})"
    assert np.abs(frequencies - expected).sum() / 2 < tolerances.SAMPLING_TOTAL_VARIATION


def test_greedy_takes_the_lowest_id_among_equals():
    logits = jnp.zeros((1, VOCAB)).at[0, [7, 11]].set(1.0)
    tokens, _ = choose_tokens(logits, SamplingArrays.of([Sampling()]), jnp.zeros((1,), jnp.int32))
    assert tokens.tolist() == [7]


@pytest.mark.parametrize("way", [_largest_in_one_pass, _largest_in_two_passes])
def test_both_ways_to_the_largest_logit_are_one(way):
    logits = np.random.default_rng(SEED).integers(-3, 4, (5, VOCAB)).astype(np.float32)
    logits[3, 17] = np.inf
    key, token = way(jnp.asarray(logits))
    np.testing.assert_array_equal(token, logits.argmax(axis=1))
    np.testing.assert_array_equal(key, logits.max(axis=1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=4), Sampling(temperature=1.0)]
)
def test_a_row_that_is_not_finite_is_named(value, sampling):
    logits = np.random.default_rng(SEED).normal(size=(2, VOCAB)).astype(np.float32)
    logits[1, 5] = value
    _, finite = choose_tokens(jnp.asarray(logits), SamplingArrays.of([sampling] * 2), jnp.zeros(2, jnp.int32))
    assert finite.tolist() == [True, False]


def test_a_batch_mixes_greedy_and_sampled():
    arrays = SamplingArrays.of([Sampling(), Sampling(temperature=100.0, seed=1)])
    logits = jnp.asarray(np.random.default_rng(SEED).normal(size=(1, VOCAB)), jnp.float32).repeat(2, 0)
    tokens = np.stack([choose_tokens(logits, arrays, jnp.full((2,), p))[0] for p in range(8)])
    assert (tokens[:, 0] == int(jnp.argmax(logits[0]))).all()
    assert len(set(tokens[:, 1].tolist())) > 1


def test_penalties_equal_the_reference():
    rng = np.random.default_rng(SEED)
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.7)
    logits = rng.normal(size=(1, VOCAB)).astype(np.float32)
    prompt, output = rng.random((2, 1, VOCAB)) < 0.2
    ours = penalize(
        jnp.asarray(logits), SamplingArrays.of([sampling]), jnp.asarray(prompt), jnp.asarray(output)
    )
    expected = reference.penalize(logits[0], sampling, (prompt | output)[0], output[0])
    np.testing.assert_allclose(ours[0], expected, rtol=tolerances.FLOAT32_ROUNDINGS)


def test_presence_penalty_does_not_count_the_prompt():
    sampler = reference.Sampler(Sampling(presence_penalty=5.0), [3])
    logits = np.zeros(8)
    logits[3], logits[4] = 2.0, 1.0
    assert [sampler.choose(logits), sampler.choose(logits)] == [3, 4]
