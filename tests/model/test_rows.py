"""Prompts that begin in rows of the cache: copied, stored, continued; and tokens under a mask."""

import numpy as np
import pytest

from qwen3_moe_jax.core.sampling import Sampling

STYLES = (Sampling(), Sampling(temperature=0.8, top_k=20, seed=5), Sampling(temperature=1.0, seed=9))


@pytest.fixture
def prompt(source):
    return np.random.default_rng(3).integers(0, 300, 70).tolist()


def run(batch, slot, count=12):
    """Steps until a sequence has so many tokens; then its slot is freed."""
    tokens = []
    while len(tokens) < count:
        tokens += [t for p in batch.step(2) if p.slot == slot for t in p.tokens]
    return tokens[:count]


@pytest.mark.parametrize("sampling", STYLES, ids=["greedy", "narrow", "wide"])
def test_the_same_tokens_from_every_kind_of_row(jax_runner, prompt, sampling):
    options = {"sampling": sampling, "max_tokens": 12}
    batch = jax_runner.open_batch(3, context=256)
    first = batch.admit(prompt, **options)
    wanted = run(batch, first)
    assert batch.row_length(first) >= 64
    batch.free(first)
    other = batch.admit(prompt[:5] + [7] * 20, slot=1, max_tokens=40)  # others decode meanwhile
    batch.step()
    batch.step()
    assert run(batch, batch.admit(prompt, slot=0, filled=64, **options)) == wanted, "in place"
    batch.copy_row(0, 2, 48)
    assert run(batch, batch.admit(prompt, slot=2, filled=48, **options)) == wanted, "from a running row"
    saved = batch.save_row(0, 64)
    batch.free(0)
    batch.free(2)
    assert run(batch, batch.admit([9] * 90, slot=2, max_tokens=12))
    batch.free(2)
    batch.load_row(2, saved)
    assert run(batch, batch.admit(prompt, slot=2, filled=64, **options)) == wanted, "from the store"
    assert batch.row_nbytes(64) == sum(x.nbytes for x in (saved.k, saved.v))
    batch.free(2)
    batch.free(other)


def test_a_row_outlives_other_slots_steps(jax_runner, prompt):
    """What a step computes for a free slot must not land in the row that it keeps."""
    batch = jax_runner.open_batch(2, context=256)
    slot = batch.admit(prompt, max_tokens=12)
    wanted = run(batch, slot)
    batch.free(slot)
    other = batch.admit([3] * 200, slot=1, max_tokens=30)
    run(batch, other, 20)
    assert run(batch, batch.admit(prompt, slot=0, filled=64, max_tokens=12)) == wanted


def test_what_admit_refuses(jax_runner, prompt):
    batch = jax_runner.open_batch(2, context=256)
    batch.admit(prompt)
    with pytest.raises(ValueError, match="not free"):
        batch.admit(prompt, slot=0)
    with pytest.raises(ValueError, match="filled"):
        batch.admit(prompt, filled=len(prompt))
    with pytest.raises(ValueError, match="not free"):
        batch.copy_row(1, 0, 16)


def bits(size, *allowed):
    found = np.zeros(-(-size // 32) * 32, bool)
    found[list(allowed)] = True
    return np.packbits(found, bitorder="little").tobytes()


@pytest.mark.parametrize("sampling", STYLES, ids=["greedy", "narrow", "wide"])
def test_masks_choose_and_hold(jax_runner, prompt, sampling):
    size = jax_runner.config.vocab_size
    batch = jax_runner.open_batch(3, context=256)
    alone = batch.admit(prompt, sampling=sampling, max_tokens=12)
    wanted = run(batch, alone)
    batch.free(alone)
    masked = batch.admit(prompt, sampling=sampling, max_tokens=9, mask=bits(size, 11, size - 1))
    free = batch.admit(prompt, sampling=sampling, max_tokens=12)
    seen = {masked: [], free: []}
    while len(seen[free]) < 12:
        for p in batch.step(4):
            seen[p.slot] += p.tokens
    assert seen[free] == wanted, "a neighbour's mask changes nothing"
    assert len(seen[masked]) == 1
    assert seen[masked][0] in (11, size - 1)
    assert batch.is_held
    assert batch.step(4) == []
    for token in (40, 2000, size - 2):
        batch.allow(masked, bits(size, token))
        assert [p.tokens for p in batch.step(4)] == [[token]]
