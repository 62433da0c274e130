"""Several engines behind one front: where sequences go, and what is left when an engine dies."""

import asyncio

import pytest

pytest.importorskip("msgspec")

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.serve.engine.affinity import SentBlocks, blocks_of
from qwen3_moe_jax.serve.engine.client import MAX_RESTARTS, EngineClient, EngineError
from qwen3_moe_jax.serve.engine.frames import Ready, Start
from qwen3_moe_jax.serve.engine.replicas import MAX_DEATHS, Replicas
from qwen3_moe_jax.testing.fake_batch import next_token
from qwen3_moe_jax.testing.fake_engine import FAKE_SLOTS as SLOTS
from qwen3_moe_jax.testing.fake_engine import FakeEngine, fake_replicas


def played(main, **options):
    """Runs a test's coroutine with fake replicas that are ready."""

    async def whole():
        pool = fake_replicas(**options)
        pool.launch()
        try:
            async with asyncio.timeout(120):  # for hangs alone
                return await main(pool)
        finally:
            await pool.close()

    return asyncio.run(whole())


def submit(pool, tokens, *, key="a", scope="s", new=4, **options):
    fields = {
        "key": key,
        "sampling": Sampling(),
        "max_tokens": new,
        "stop_ids": [],
        "scope": scope,
        **options,
    }
    return pool.submit(list(tokens), **fields)


def where(pool, stream):
    """The number of the engine that a sequence went to; None while it waits."""
    return next((n for n, e in enumerate(pool.engines) if e.has(stream)), None)


async def answer(stream):
    """Its tokens, or its error."""
    try:
        return [token async for part in stream for token in part.tokens]
    except EngineError as error:
        return error


def expected(tokens, new=4):
    found = list(tokens)
    for _ in range(new):
        found.append(next_token(found))
    return found[len(tokens) :]


def prompt(number, length=40):
    return [(number * 37 + i * 11) % 241 for i in range(length)]


# -- where a sequence goes


def test_blocks_know_a_prefix_and_its_scope():
    one = blocks_of(prompt(1, 100), "s")
    assert len(one) == 100 // 16
    assert blocks_of(prompt(1, 99), "s") == one
    assert not set(one) & set(blocks_of(prompt(1, 100), "t"))
    assert blocks_of(prompt(1, 100), None) == []
    sent = SentBlocks(len(one) + 2)
    sent.add(one)
    assert sent.match(one) == 96
    assert sent.match(blocks_of(prompt(1, 40) + prompt(2, 60), "s")) == 32
    sent.add(blocks_of(prompt(2, 64), "s"))  # two blocks too many: the oldest prompt loses its end
    assert sent.match(one) == 64
    sent.clear()
    assert sent.match(one) == 0


def test_a_prompt_goes_where_its_prefix_is():
    async def main(pool):
        first = [submit(pool, prompt(n, 64)) for n in range(2)]
        assert [where(pool, s) for s in first] == [0, 1]
        again = [submit(pool, prompt(n, 64) + [7] * 10) for n in (1, 0)]
        assert [where(pool, s) for s in again] == [1, 0]
        assert await asyncio.gather(*map(answer, [*first, *again]))
        stranger = submit(pool, prompt(1, 64), scope="other")
        assert where(pool, stranger) == 0  # nothing is known of it, and the first has as little to do

    played(main, is_held=False)


def test_a_prefix_is_not_worth_a_long_wait():
    async def main(pool):
        seen = [where(pool, submit(pool, prompt(1, 64) + [n] * 16)) for n in range(8)]
        assert seen[:2] == [0, 0]  # one more than the other has is less than reading it again
        assert sorted(seen) == [0, 0, 0, 0, 1, 1, 1, 1]

    played(main, is_held=True)


def test_a_long_prefix_is_worth_more():
    async def main(pool):
        seen = [where(pool, submit(pool, prompt(1, 800) + [n] * 16)) for n in range(8)]
        assert seen[:4] == [0, 0, 0, 0]

    played(main, is_held=True)


def test_turns_are_the_whole_servers():
    """A key with many requests does not hold up another one, whichever engine they would be on."""

    async def main(pool):
        many = [submit(pool, prompt(n), key="many") for n in range(30)]
        one = submit(pool, prompt(99), key="one")
        room = 2 * (SLOTS + 1)
        assert [where(pool, s) is not None for s in many] == [n < room for n in range(30)]
        order = []
        done = [(s, asyncio.ensure_future(s.began.wait())) for s in (*many, one)]
        for stream, task in done:
            task.add_done_callback(lambda _, s=stream: order.append(s.id))
        for engine in pool.engines:
            engine.is_held = False
        answers = await asyncio.gather(*map(answer, [*many, one]))
        assert answers == [expected(prompt(n)) for n in (*range(30), 99)]
        assert order.index(one.id) <= room + 1
        assert pool.active == 0

    played(main, is_held=True)


# -- an engine dies


def test_what_has_no_token_runs_again_and_the_rest_ends_with_an_error():
    async def main(pool):
        streams = [submit(pool, prompt(n), new=200) for n in range(20)]
        dying = pool.engines[0]
        while not any(s.is_written for s in streams if dying.has(s)):
            await asyncio.sleep(0)
        lost = [s.id for s in streams if dying.has(s) and s.is_written]
        again = [s.id for s in streams if not s.is_written]
        assert lost
        assert again
        dying.die()
        assert pool.health == "ok"
        assert not pool.engines[0].active
        found = {s.id: a for s, a in zip(streams, await asyncio.gather(*map(answer, streams)), strict=True)}
        assert {i for i, a in found.items() if isinstance(a, EngineError)} == set(lost)
        for n, stream in enumerate(streams):
            if stream.id not in lost:
                assert found[stream.id] == expected(prompt(n), 200)
        dying.launch()
        assert where(pool, submit(pool, prompt(50))) is not None

    played(main)


def test_order_is_kept_by_what_runs_again():
    async def main(pool):
        streams = [submit(pool, prompt(n)) for n in range(14)]
        on_first = [s.id for s in streams if where(pool, s) == 0]
        pool.engines[0].die()
        waiting = []
        while (job := pool._queue.pop()) is not None:
            waiting.append(job.id)
        assert waiting == on_first + [s.id for s in streams if s.id > 10]

    played(main, is_held=True)


def test_a_sequence_that_kills_engines_ends_with_an_error():
    async def main(pool):
        stream = submit(pool, prompt(1, 900))  # whose prompt takes many steps
        for _ in range(MAX_DEATHS + 1):
            while stream.cached is None:
                await asyncio.sleep(0)
            engine = pool.engines[where(pool, stream)]
            engine.die()
            engine.launch()
        assert isinstance(await answer(stream), EngineError)

    played(main, capacity=1024, chunk=1)


def test_what_waits_outlives_all_engines():
    async def main(pool):
        streams = [submit(pool, prompt(n)) for n in range(20)]
        for engine in pool.engines:
            engine.die()
        assert pool.health == "loading"
        with pytest.raises(EngineError, match="loading"):
            submit(pool, prompt(1))
        for engine in pool.engines:
            engine.is_held = False
            engine.launch()
        assert await asyncio.gather(*map(answer, streams)) == [expected(prompt(n)) for n in range(20)]

    played(main, is_held=True)


def test_a_sequence_that_was_given_up_does_not_run_again():
    async def main(pool):
        streams = [submit(pool, prompt(n)) for n in range(20)]
        for stream in streams[::2]:
            pool.cancel(stream)
        pool.engines[0].die()
        for stream in streams[1::2]:
            pool.cancel(stream)
        assert (pool.active, pool.active_tokens, len(pool._queue)) == (0, 0, 0)
        assert not pool.engines[1].scheduler.has_work

    played(main, is_held=True)


def test_a_question_is_asked_again_elsewhere():
    async def main(pool):
        pool.engines[0]._send = lambda message: None  # it never answers
        questions = [
            asyncio.ensure_future(q) for q in (pool.score([1, 2, 3], first=1, top=1), pool.experts([1, 2]))
        ]
        await asyncio.sleep(0)
        pool.engines[0].die()
        scored, counts = await asyncio.gather(*questions)
        assert (scored.top, counts) == ([[(2, 0.0)], [(3, 0.0)]], [[2, 0]])

    played(main)


def test_each_replica_has_its_own_three_restarts(monkeypatch):
    """One that dies again and again stays dead; the others go on, and its sequences run there."""
    lives = {}

    async def live(self):
        lives[self] = lives.get(self, 0) + 1
        if self is pool.engines[1]:
            return
        self.ready = Ready(64, 1, [(1, 64)], "fake", True, True, False, {})
        self.on_news()
        await asyncio.Event().wait()

    monkeypatch.setattr(EngineClient, "_live", live)
    pool, said = Replicas(lambda number, ids: EngineClient(Start(None), ids=ids), 2), []

    async def main():
        pool.say = said.append
        pool.launch()
        while not pool.engines[1].fault:
            await asyncio.sleep(0)
        states = [e.health for e in pool.engines]
        healths = (pool.health, pool.fault, states)
        await pool.close()
        return healths

    assert asyncio.run(main()) == ("ok", "", ["ok", "dead"])
    assert lives == {pool.engines[0]: 1, pool.engines[1]: 1 + MAX_RESTARTS}
    assert pool.restarts == MAX_RESTARTS
    assert said[-1].startswith("replica 2 of 2: the engine died 4 times")


def test_without_any_engine_everything_ends():
    async def main(pool):
        streams = [submit(pool, prompt(n)) for n in range(20)]
        for engine in pool.engines:
            engine.fault = "it died"
            engine.die()
        assert (pool.health, pool.fault) == ("dead", "it died")
        assert all(isinstance(a, EngineError) for a in await asyncio.gather(*map(answer, streams)))

    played(main, is_held=True)


def test_others_start_when_the_first_is_ready():
    class Slow(FakeEngine):
        def launch(self):
            launched.append(self)

    launched = []

    async def main():
        pool = Replicas(lambda number, ids: Slow(Start(None), ids=ids), 3)
        pool.launch()
        assert launched == [pool.engines[0]]
        FakeEngine.launch(pool.engines[0])
        assert launched == list(pool.engines)
        assert pool.first_ready.is_set()
        assert pool.loaded().slots == pool.engines[0].ready.slots
        await pool.close()

    asyncio.run(main())
