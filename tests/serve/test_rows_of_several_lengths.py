"""Rows of several lengths: how memory is divided, and that a sequence does not notice in which it is."""

import pytest

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.machine.row_plan import RowClass, plan_equal_rows, plan_rows
from qwen3_moe_jax.serve.engine import scheduler as scheduler_module
from qwen3_moe_jax.serve.engine.jobs import Began, Job, Wrote
from qwen3_moe_jax.serve.engine.pooled import PooledBatch
from qwen3_moe_jax.serve.engine.prefix import PrefixCache
from qwen3_moe_jax.serve.engine.scheduler import Scheduler

H100 = 57_500_000_000 // 98_304
"""Positions beside the weights of Qwen3-30B-A3B in Q4_K_M on a card of 80 GB: 96 KiB each in float16."""

RTX4090 = 4_000_000_000 // 98_304
"""The same on a card of 24 GB."""


@pytest.mark.parametrize(("slots", "in_class"), [(1, None), (4, None), (32, 16), (64, None)])
def test_a_plan_keeps_to_its_bounds(slots, in_class):
    for positions in (300, 5_000, 10_000, RTX4090, 2 * RTX4090, H100):
        for context in (512, 4096, 40_960, 262_144):
            check_bounds(positions, context, slots, in_class)


def check_bounds(positions, context, slots, in_class):
    rows = plan_rows(positions, context, slots, spare=576, in_class=in_class)
    assert 1 <= sum(r.slots for r in rows) <= slots
    assert [r.context for r in rows] == sorted({r.context for r in rows})
    assert all(r.context <= context or r.context == 64 for r in rows)
    if positions > 1000:
        assert sum(r.slots * (r.context + 576) for r in rows) <= positions


def test_more_sequences_than_full_rows():
    assert plan_rows(H100, 40_960, 32, spare=576, in_class=16) == (RowClass(16, 5120), RowClass(11, 40_960))
    assert H100 // (40_960 + 576) == 14
    long = plan_rows(H100, 262_144, 32, spare=576, in_class=16)
    assert (sum(r.slots for r in long), long[-1]) == (24, RowClass(1, 262_144))
    assert H100 // (262_144 + 576) == 2
    small = plan_rows(RTX4090, 40_960, 32, spare=576, in_class=16)
    assert small == (RowClass(2, 4096), RowClass(1, 29_888))
    assert plan_rows(H100, 4096, 32, spare=576) == (RowClass(32, 4096),)


@pytest.mark.parametrize(
    ("positions", "context", "found"),
    [
        (H100, None, RowClass(16, 35_968)),
        (H100, 40_960, RowClass(14, 40_960)),
        (H100, 4096, RowClass(16, 4096)),
        (RTX4090, None, RowClass(8, 4096)),
        (2_000, 4096, RowClass(1, 1408)),
    ],
)
def test_rows_of_one_length_for_sequences_whose_bits_must_not_depend_on_their_row(positions, context, found):
    assert plan_equal_rows(positions, context, 262_144, 16, spare=576) == found


def play(scheduler, jobs):
    """Tokens of each job and how many came from the cache."""
    for one in jobs:
        assert not scheduler.submit(one)
    tokens, cached = {}, {}
    while scheduler.has_work:
        for event in scheduler.turn():
            if isinstance(event, Wrote):
                tokens.setdefault(event.id, []).extend(event.tokens)
            elif isinstance(event, Began):
                cached[event.id] = event.cached
    return tokens, cached


@pytest.fixture
def headroom(monkeypatch):
    monkeypatch.setattr(scheduler_module, "HEADROOM", 8)


@pytest.fixture
def pools(jax_runner):
    """A short row and a long one; of one shape in every test, for each compiles programs."""
    return PooledBatch([jax_runner.open_batch(1, context=c) for c in (256, 64)])


STYLES = (
    Sampling(),
    Sampling(temperature=0.9, top_k=20, seed=3, presence_penalty=1.5, repetition_penalty=1.2),
    Sampling(temperature=1.1, seed=4),
)


@pytest.mark.usefixtures("headroom")
def test_the_same_tokens_wherever_a_sequence_is(pools):
    """Greedy, seeded with penalties, the whole vocabulary: in the long row, and in the short one outgrown."""
    prompt = [(7 * i) % 300 for i in range(40)]
    for style in STYLES:
        slot = pools.admit(prompt, sampling=style, max_tokens=50, slot=1)
        alone = []
        while pools.running:
            alone += [t for p in pools.step(8, prompt_tokens=2048) for t in p.tokens]
        pools.free(slot)
        scheduler = Scheduler(lambda: pools, prefixes=PrefixCache(), keep_log=True)
        found, cached = play(scheduler, [Job(1, "k", prompt, style, 50, scope="s")])
        assert found[1] == alone
        assert [entry[0] for entry in scheduler.log].count("move") == 1
        found, cached = play(scheduler, [Job(2, "k", prompt, style, 50, scope="s")])
        assert (found[2], cached[2]) == (alone, 32)


def test_slots_of_a_pool(pools):
    prompt = list(range(20))
    assert (pools.slots, pools.capacity, pools.room(0), pools.room(1)) == (2, 256, 64, 256)
    assert pools.admit(prompt, max_tokens=200) == 1
    assert pools.admit(prompt, max_tokens=200) == 0, "the longest that is left"
    assert (pools.free_slots, pools.waiting, pools.running) == (0, 2, 2)
    steps = [pools.step(1, prompt_tokens=2048) for _ in range(3)]
    assert {p.slot for found in steps for p in found} == {0, 1}
    pools.free(0)
    pools.copy_row(1, 0, 16)
    assert pools.admit(prompt, slot=0, filled=16, max_tokens=2) == 0
    with pytest.raises(KeyError):
        pools.free(-1)
