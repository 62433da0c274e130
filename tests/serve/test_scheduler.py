"""The scheduler with a fake batch: nothing is lost, order and turns are kept, prefixes are really there."""

import random
from collections import defaultdict

import pytest

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.serve.engine import scheduler as scheduler_module
from qwen3_moe_jax.serve.engine.jobs import Began, Failed, Job, Limits, Wrote
from qwen3_moe_jax.serve.engine.prefix import PrefixCache
from qwen3_moe_jax.serve.engine.scheduler import Scheduler, replay
from qwen3_moe_jax.testing.fake_batch import FakeBatch, next_token


def job(number, length=5, *, key="a", new=3, scope=None, tokens=None, **options):
    tokens = [(number * 7 + i) % 991 for i in range(length)] if tokens is None else tokens
    return Job(number, key, tokens, Sampling(), new, scope=scope, **options)


def expected(job):
    tokens = list(job.token_ids)
    for _ in range(job.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(job.token_ids) :]


def run(scheduler, arrivals=(), cancels=(), limit=200_000):
    """Plays arrivals {turn: [job]} and cancels {turn: [id]}; every event of each job."""
    arrivals, cancels, seen = dict(arrivals), dict(cancels), defaultdict(list)
    turn = 0
    while arrivals or scheduler.has_work:
        for one in arrivals.pop(turn, ()):
            for event in scheduler.submit(one):
                seen[event.id].append(event)
        for number in cancels.pop(turn, ()):
            scheduler.cancel(number)
            seen[number].append("cancelled")
        for event in scheduler.turn():
            seen[event.id].append(event)
        turn += 1
        assert turn < limit
    return seen


def answer(events):
    return [t for e in events if isinstance(e, Wrote) for t in e.tokens]


ROOMS = (40, 40, 40, 64, 64, 256)
"""Slots with rows of several lengths."""


@pytest.fixture
def short_headroom(monkeypatch):
    """So that jobs of a few tokens outgrow their rows."""
    monkeypatch.setattr(scheduler_module, "HEADROOM", 3)


@pytest.mark.parametrize(("seed", "rooms"), [(0, ()), (1, ROOMS), (2, ROOMS)])
def test_ten_thousand_arrivals_cancels_and_failures(seed, rooms, short_headroom):
    rng = random.Random(seed)
    jobs = [
        job(
            n,
            rng.randint(1, 80),
            key=rng.choice("abcde"),
            new=rng.randint(1, 12) if rng.random() < 0.9 else rng.randint(20, 120),
            scope=rng.choice([None, "x", "y"]),
        )
        for n in range(3400)
    ]
    arrivals, cancels = defaultdict(list), defaultdict(list)
    for one in jobs:
        turn = rng.randrange(6000)
        arrivals[turn].append(one)
        if rng.random() < 0.15:
            cancels[turn + rng.randrange(60)].append(one.id)
    batches = []

    def open_batch():
        fails = frozenset(rng.randrange(1, 8_000) for _ in range(30))
        batches.append(FakeBatch(slots=6, rooms=rooms, fails_at=fails, breaks=not len(batches) % 2))
        return batches[-1]

    scheduler = Scheduler(open_batch, limits=Limits(10_000, 10**9), prefixes=PrefixCache(20_000))
    seen = run(scheduler, arrivals, cancels)
    for one in jobs:
        events = seen[one.id]
        ends = [e for e in events if isinstance(e, Failed) or (isinstance(e, Wrote) and e.finish_reason)]
        is_cancelled = "cancelled" in events
        assert len(ends) <= 1
        assert ends or is_cancelled, one
        assert sum(isinstance(e, Began) for e in events) <= 1
        got = answer(events)
        assert got == expected(one)[: len(got)]
        if ends and isinstance(ends[0], Wrote):
            assert got == expected(one)
    assert not scheduler.running
    assert not scheduler.queue
    assert scheduler.queue.tokens == 0
    assert scheduler.batch.free_slots == 6
    assert len(batches) > 1


def test_in_order_within_a_key_and_in_turns_between_keys():
    scheduler = Scheduler(lambda: FakeBatch(slots=1))
    jobs = [job(n, key="a") for n in range(6)] + [job(n, key="b") for n in range(6, 9)]
    seen = run(scheduler, {0: jobs})
    order = sorted(seen, key=lambda n: [e for e in seen[n] if isinstance(e, Began)] and list(seen).index(n))
    assert order == [0, 6, 1, 7, 2, 8, 3, 4, 5]


def test_the_queue_is_bounded_by_count_and_by_tokens():
    scheduler = Scheduler(lambda: FakeBatch(slots=1), limits=Limits(jobs=2, tokens=30))
    scheduler.submit(job(0, 20))
    scheduler.turn()
    assert scheduler.submit(job(1, 20)) == []
    (full,) = scheduler.submit(job(2, 20))
    assert full.code == "queue_full"
    assert scheduler.submit(job(3, 5)) == []
    assert scheduler.submit(job(4, 1))[0].code == "queue_full"
    assert scheduler.submit(job(5, 1, is_resumed=True)) == []
    assert scheduler.submit(job(6, 256))[0].code == "invalid"


def test_who_gets_a_slot_at_once_does_not_count_as_waiting():
    scheduler = Scheduler(lambda: FakeBatch(slots=3), limits=Limits(jobs=2))
    events = [event for n in range(6) for event in scheduler.submit(job(n))]
    assert [e.id for e in events] == [5]


def test_a_resumed_job_is_next():
    scheduler = Scheduler(lambda: FakeBatch(slots=1))
    for one in (job(1), job(2), job(3, is_resumed=True)):
        scheduler.submit(one)
    assert scheduler.turn()[0].id == 3


def test_cancelled_between_two_steps():
    scheduler = Scheduler(lambda: FakeBatch(slots=1))
    for one in (job(1, 100, new=50), job(2)):
        scheduler.submit(one)
    scheduler.turn()  # prefill of the first
    scheduler.cancel(1)
    assert scheduler.batch.free_slots == 1
    assert any(isinstance(e, Began) and e.id == 2 for e in scheduler.turn())
    scheduler.cancel(2)
    scheduler.cancel(99)
    assert not scheduler.has_work


def test_the_log_replayed_gives_the_same_tokens():
    rng = random.Random(5)
    arrivals = defaultdict(list)
    prefix = list(range(40))
    for n in range(60):
        tail = [rng.randrange(900) for _ in range(rng.randint(1, 60))]
        arrivals[rng.randrange(80)].append(job(n, tokens=prefix[: rng.randint(0, 40)] + tail, scope="s"))
    scheduler = Scheduler(lambda: FakeBatch(slots=3), prefixes=PrefixCache(30_000), keep_log=True)
    seen = run(scheduler, arrivals)
    assert scheduler.prefixes.hits > 5
    written = replay(scheduler.log, FakeBatch(slots=3))
    assert written == {n: answer(events) for n, events in seen.items()}


@pytest.mark.parametrize(("chunk", "reused"), [(None, 96), (32, 64)])
def test_whole_chunks_of_prompts_alone_are_reused_where_bits_must_stay(chunk, reused):
    """Written tokens, and the last chunk of a prompt, were computed in other company."""
    first = job(1, 80, new=20, scope="s")
    second = job(2, tokens=[*first.token_ids, *expected(first), 3, 4, 5], scope="s")
    scheduler = Scheduler(lambda: FakeBatch(slots=2), prefixes=PrefixCache(30_000, chunk=chunk))
    run(scheduler, {0: [first]})
    began = [event for event in run(scheduler, {0: [second]})[2] if isinstance(event, Began)]
    assert [event.cached for event in began] == [reused]


@pytest.mark.usefixtures("short_headroom")
def test_who_outgrows_a_row_moves_and_the_log_says_it():
    rng = random.Random(7)
    arrivals = defaultdict(list)
    for n in range(120):
        length, new = rng.randint(1, 60), rng.choice([2, 30, 90])
        arrivals[rng.randrange(300)].append(job(n, length, new=new, scope=rng.choice([None, "s"])))
    make = lambda: FakeBatch(rooms=ROOMS)
    scheduler = Scheduler(make, prefixes=PrefixCache(30_000), keep_log=True)
    seen = run(scheduler, arrivals)
    assert sum(entry[0] == "move" for entry in scheduler.log) > 30
    for one in (j for jobs in arrivals.values() for j in jobs):
        assert answer(seen[one.id]) == expected(one)
    written = replay(scheduler.log, make())
    assert written == {n: answer(events) for n, events in seen.items()}


@pytest.mark.usefixtures("short_headroom")
def test_a_masked_job_moves_when_its_next_mask_is_there():
    scheduler = Scheduler(lambda: FakeBatch(rooms=(8, 64)))
    one = job(1, 4, new=20, first_mask=b"first")
    scheduler.submit(one)
    got = []
    while scheduler.has_work:
        while scheduler.has_work and not scheduler.is_held:
            for event in scheduler.turn():
                got += event.tokens if isinstance(event, Wrote) else []
        assert not scheduler.turn(), "it waits for its mask"
        scheduler.allow(1, b"next")
    assert got == expected(one)


@pytest.mark.usefixtures("short_headroom")
def test_long_rows_are_kept_for_the_first_who_needs_one():
    scheduler = Scheduler(lambda: FakeBatch(rooms=(16, 64)))
    for one in (
        job(1, 40, new=9),
        job(2, 40, key="b", new=3),
        job(3, 40, key="c", new=3),
        job(4, 5, key="d"),
    ):
        scheduler.submit(one)
    order = []
    while scheduler.has_work:
        order += [e.id for e in scheduler.turn() if isinstance(e, Began)]
    assert order[:2] == [1, 4], "a short one passes those that wait for the long row"
    assert order[2:] == [2, 3]


@pytest.mark.usefixtures("short_headroom")
def test_short_ones_take_no_long_row_that_somebody_waits_for():
    scheduler = Scheduler(lambda: FakeBatch(rooms=(12, 12, 64)))
    for number in (1, 2):
        scheduler.submit(job(number, 5, new=30))  # both outgrow their rows
    scheduler.submit(job(3, 5, key="b", new=2))
    scheduler.submit(job(4, 5, key="b", new=2))
    rooms = {}
    while scheduler.has_work:
        scheduler.turn()
        for slot, running in scheduler.running.items():
            rooms.setdefault(running.job.id, []).append(scheduler.batch.room(slot))
    assert max(rooms[1]) == max(rooms[2]) == 64
    assert min(rooms[1]) == 12


def test_a_shared_prefix_is_read_once():
    prefix = list(range(100))
    jobs = [job(n, tokens=[*prefix, 500 + n, 600 + n], scope="s") for n in range(8)]
    batch = FakeBatch(slots=4)
    scheduler = Scheduler(lambda: batch, prefixes=PrefixCache())
    seen = run(scheduler, {0: jobs[:1], 40: jobs[1:]})
    cached = [e.cached for n in range(8) for e in seen[n] if isinstance(e, Began)]
    assert cached[0] == 0
    assert min(cached[1:]) >= 96  # whole steps of the kernels' tiles
    assert batch.read_in_all < 150


def test_also_from_a_row_that_is_running():
    prefix = list(range(64))
    scheduler = Scheduler(lambda: FakeBatch(slots=2), prefixes=PrefixCache())
    scheduler.submit(job(1, tokens=[*prefix, 7], new=100, scope="s"))
    for _ in range(8):
        scheduler.turn()
    scheduler.submit(job(2, tokens=[*prefix, 8], scope="s"))
    assert next(e for e in scheduler.turn() if isinstance(e, Began)).cached == 64


@pytest.mark.parametrize(("scope", "cached"), [("k\0", 64), ("k\0salt", 0), ("other\0", 0), (None, 0)])
def test_prefixes_are_private(scope, cached):
    prefix = list(range(64))
    scheduler = Scheduler(lambda: FakeBatch(slots=2), prefixes=PrefixCache(10**6))
    run(scheduler, {0: [job(1, tokens=[*prefix, 7], scope="k\0")]})
    seen = run(scheduler, {0: [job(2, tokens=[*prefix, 8], scope=scope)]})
    assert seen[2][0].cached == cached


def test_rows_that_are_overwritten_come_back_from_the_store():
    scheduler = Scheduler(lambda: FakeBatch(slots=1), prefixes=PrefixCache(100 * 200))
    talk = lambda n, *more: job(n, tokens=[n % 2 * 300 + i for i in range(60)] + list(more), scope="s")
    run(scheduler, {0: [talk(0)], 50: [talk(1)], 100: [talk(2, 5)]})
    assert scheduler.prefixes.hits == 1
    assert scheduler.prefixes.store_bytes <= 100 * 200


@pytest.mark.parametrize("agents", [4, 8])
def test_agents_reuse_what_they_can(agents):
    """Turns of agents with one tool prefix; every turn repeats what was said and adds to it."""
    rng = random.Random(1)
    batch = FakeBatch(slots=4, capacity=4096)
    scheduler = Scheduler(lambda: batch, prefixes=PrefixCache(100 * 40_000))
    shared = [rng.randrange(900) for _ in range(400)]
    talks = {a: shared + [rng.randrange(900) for _ in range(20)] for a in range(agents)}
    possible = cached = number = 0
    for turn in range(10):
        for agent in range(agents):
            number += 1
            prompt = talks[agent]
            if number > 1:
                possible += len(shared) if turn == 0 else len(prompt) - 25
            seen = run(scheduler, {0: [job(number, tokens=prompt, new=20, scope="s")]})
            cached += next(e.cached for e in seen[number] if isinstance(e, Began))
            talks[agent] = prompt + answer(seen[number]) + [rng.randrange(900) for _ in range(25)]
    assert cached >= 0.9 * possible
