"""What the benchmark of batches does beside its timing runs on the embedded model."""

import jax
import numpy as np

from scripts import bench_batch
from scripts._random_params import MAX_WORDS, random_array


def test_a_random_cache_stands_for_prompts_that_were_read(jax_runner):
    subject = bench_batch.Subject(jax_runner.decoder, jax_runner.params, jax_runner.cache_dtype)
    batch = subject.batch(2, 96)
    bench_batch.admit(batch, bench_batch.prompts(subject.config, 2, 24, 0))
    bench_batch.pretend_read(batch)
    assert not batch.waiting
    assert bench_batch.step(batch, 4) == 8


def test_the_bytes_of_a_step_grow_with_the_experts_in_use(jax_runner):
    subject = bench_batch.Subject(jax_runner.decoder, jax_runner.params, jax_runner.cache_dtype)
    whole = sum(a.nbytes for a in jax.tree.leaves(subject.params))
    few, many = (bench_batch.step_nbytes(subject, n, 0) for n in (1, 64))
    assert 0 < few < many < whole


def test_a_large_array_repeats_its_words(monkeypatch):
    small = np.asarray(random_array(3, (5, 4), 0xFF, 0.0))
    assert 0 <= small.min() <= small.max() < 256
    assert small.size <= MAX_WORDS
    monkeypatch.setattr("scripts._random_params.MAX_WORDS", 8)
    random_array.clear_cache()
    again = np.asarray(random_array(3, (5, 4), 0xFF, 0.0))
    random_array.clear_cache()
    np.testing.assert_array_equal(again, again[np.arange(5) % 2])
