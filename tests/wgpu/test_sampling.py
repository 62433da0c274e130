"""Sampling on the device against the meaning of ``Sampling`` in NumPy."""

import numpy as np
import pytest

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.reference.sampling import penalize, token_probabilities
from tests.tolerances import WGPU_TOTAL_VARIATION
from tests.wgpu import gpu_work
from tests.wgpu.cases import rng_of

DRAWS = 2000

SETTINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=2),
    Sampling(temperature=1.3, top_p=0.9, seed=3),
    Sampling(temperature=0.6, top_k=1, seed=4),
    Sampling(temperature=2.0, min_p=0.1, seed=5),
    Sampling(temperature=1.0, top_k=7, min_p=0.02, top_p=0.95, seed=2**32 - 6),
    Sampling(temperature=0.05, top_k=40, seed=7),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_draws_follow_the_distribution(gpu, sampling):
    logits = (2.5 * rng_of("draws").standard_normal(300)).astype(np.float32)
    tokens = gpu(gpu_work.op, "sample", logits, sampling, DRAWS)
    probs = token_probabilities(logits, sampling)
    assert set(tokens) <= set(np.flatnonzero(probs))
    frequency = np.bincount(tokens, minlength=300) / DRAWS
    assert np.abs(frequency - probs).sum() / 2 <= WGPU_TOTAL_VARIATION


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=1.0, top_k=6, top_p=0.5),
    ],
)
def test_ties_at_a_cut_keep_the_lowest_ids(gpu, sampling):
    logits = np.full(64, -5, np.float32)
    logits[[3, 9, 10, 20, 33, 41, 50, 63]] = 2.0
    tokens = gpu(gpu_work.op, "sample", logits, sampling, 600)
    assert set(tokens) == set(np.flatnonzero(token_probabilities(logits, sampling)))


def test_the_real_vocabulary(gpu):
    """No loop ends early at 151,936 tokens, and the cuts are exact there."""
    rng = rng_of("vocabulary")
    logits = (3 * rng.standard_normal(151_936)).astype(np.float32)
    logits[151_935] = logits.max() + 1
    assert gpu(gpu_work.op, "sample", logits, Sampling())[0] == 151_935
    for sampling in (Sampling(temperature=1.0, top_k=20, top_p=0.8), Sampling(temperature=0.8, top_p=0.95)):
        tokens = gpu(gpu_work.op, "sample", logits, sampling, 40)
        assert set(tokens) <= set(np.flatnonzero(token_probabilities(logits, sampling)))
        assert len(set(tokens)) > 5


def test_greedy_takes_the_lowest_of_equal_ids(gpu):
    logits = np.zeros(1000, np.float32)
    logits[[321, 322, 999]] = 4.0
    assert gpu(gpu_work.op, "sample", logits, Sampling(), 1).tolist() == [321]
    assert gpu(gpu_work.op, "sample", np.full(70, -3e38, np.float32), Sampling(), 1).tolist() == [0]


def test_penalties(gpu):
    rng = rng_of("penalties")
    sampling = Sampling(repetition_penalty=1.4, presence_penalty=0.6)
    for _ in range(20):
        logits = rng.standard_normal(50).astype(np.float32)
        flags = rng.choice([0, 1, 3], 50)
        expected = penalize(logits, sampling, flags > 0, flags == 3)
        found = gpu(gpu_work.op, "sample", logits, sampling, 1, seen=dict(enumerate(flags)))
        assert found.tolist() == [int(np.argmax(expected))]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.8)], ids=["0", "0.7"]
)
def test_logits_that_are_not_finite_are_told(gpu, bad, sampling):
    logits = rng_of("bad").standard_normal(4096).astype(np.float32)
    logits[2345] = bad
    assert gpu(gpu_work.op, "sample", logits, sampling).tolist() == [-1]


def test_the_same_seed_gives_the_same_tokens(gpu):
    prompt, settings = [5, 6, 7], Sampling(temperature=1.0, top_p=0.95, seed=11)
    first = gpu(gpu_work.stream, str(gpu_work.EMBEDDED), prompt, 24, settings)
    again = gpu(gpu_work.stream, str(gpu_work.EMBEDDED), prompt, 24, settings)
    other = gpu(
        gpu_work.stream, str(gpu_work.EMBEDDED), prompt, 24, Sampling(temperature=1.0, top_p=0.95, seed=12)
    )
    assert first == again != other
