"""How many requests a front of a cluster has at a time: exactly as many as may wait, and none too few."""

import asyncio

import pytest

pytest.importorskip("httpx")

from qwen3_moe_jax.serve.cluster.forward import LostError, make_front
from qwen3_moe_jax.serve.cluster.wire import Head, Last
from qwen3_moe_jax.serve.settings import Settings
from tests.serve.fake_cluster import JSON, FakeEngines, apost, whole


async def settled():
    """When nothing goes on but by what the test does: in turns of the loop, not in time."""
    for _ in range(500):
        await asyncio.sleep(0)


@pytest.mark.parametrize("are_taken", [False, True])
def test_what_waits_is_bounded_to_the_request(are_taken):
    """However many come at once, and whether or not engines have said yet what they took."""

    async def main():
        held = asyncio.Event()

        async def waits(ask):
            await held.wait()
            async for piece in whole(ask):
                yield piece

        engines = FakeEngines(waits, room=4)
        if not are_taken:
            engines.held.clear()
        app = make_front(engines, Settings(max_queue=3))
        tasks = [asyncio.ensure_future(apost(app)) for _ in range(40)]
        await settled()
        held.set()
        engines.held.set()
        replies = await asyncio.gather(*tasks)
        again = await asyncio.gather(*(apost(app) for _ in range(7)))
        return replies, again

    replies, again = asyncio.run(main())
    assert [reply.status_code for reply in replies] == [200] * 7 + [429] * 33
    assert {reply.json()["error"]["code"] for reply in replies[7:]} == {"queue_full"}
    assert [reply.status_code for reply in again] == [200] * 7, "a place was not given back"


def test_a_front_that_has_more_than_its_share_of_the_engines_keeps_its_queue():
    async def main():
        engines = FakeEngines(whole, room=2, takes=8)
        held = asyncio.Event()

        async def waits(ask):
            yield JSON
            await held.wait()

        engines.answers = [waits]
        app = make_front(engines, Settings(max_queue=2))
        tasks = []
        for _ in range(8):  # taken one by one: none of them waits
            tasks.append(asyncio.ensure_future(apost(app)))
            await settled()
        engines.held.clear()
        tasks += [asyncio.ensure_future(apost(app)) for _ in range(5)]
        await settled()
        held.set()
        engines.held.set()
        return [reply.status_code for reply in await asyncio.gather(*tasks)]

    assert sorted(asyncio.run(main())) == [200] * 10 + [429] * 3


STREAM = Head(200, [(b"content-type", b"text/event-stream")])


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_has_an_answer_finds_its_place_free(is_stream):
    """Also before the engine has said that nothing follows, or was lost after it."""

    async def main():
        ended, replies = asyncio.Event(), []

        async def streams(ask):
            yield STREAM if is_stream else JSON
            yield Last(b"data: [DONE]\n\n" if is_stream else b"{}")
            await ended.wait()
            raise LostError

        engines = FakeEngines(streams, whole, room=1, takes=2)
        app = make_front(engines, Settings(max_queue=0))

        async def first(scope, receive, send):
            async def seen(message):
                if message["type"] == "http.response.body" and not replies:
                    replies.append(None)
                    replies[0] = await apost(app)
                    ended.set()
                await send(message)

            await app(scope, receive, seen)

        task = asyncio.ensure_future(apost(first))
        if not is_stream:
            await settled()
            ended.set()
        return await task, replies[0]

    reply, second = asyncio.run(main())
    assert (reply.status_code, second.status_code) == (200, 200)
    assert reply.content == (b"data: [DONE]\n\n" if is_stream else b"{}")


def test_a_request_that_lost_its_engine_keeps_its_place():
    async def main():
        lose = asyncio.Event()

        async def lost(ask):
            await lose.wait()
            raise LostError
            yield

        engines = FakeEngines(lost, whole, room=1)
        app = make_front(engines, Settings(max_queue=0))
        first = asyncio.ensure_future(apost(app))
        await settled()
        refused = asyncio.ensure_future(apost(app))
        await settled()
        lose.set()
        return (await first).status_code, (await refused).status_code, len(engines.asked)

    assert asyncio.run(main()) == (200, 429, 2)
