"""A front of a cluster and engines of other processes, without what carries requests between them."""

import asyncio
import json

import pytest

httpx = pytest.importorskip("httpx")

from qwen3_moe_jax.core.errors import OptionError  # noqa: E402
from qwen3_moe_jax.core.sampling import Sampling  # noqa: E402
from qwen3_moe_jax.serve.cluster.beginnings import beginning_of, blocks_of_body  # noqa: E402
from qwen3_moe_jax.serve.cluster.forward import MAX_TRIES, LostError, make_front  # noqa: E402
from qwen3_moe_jax.serve.cluster.host import Host, UnwellError  # noqa: E402
from qwen3_moe_jax.serve.cluster.options import options_of  # noqa: E402
from qwen3_moe_jax.serve.cluster.wire import Ask, Head, Last, Taken, pieces  # noqa: E402
from qwen3_moe_jax.serve.headless import EngineLostError  # noqa: E402
from qwen3_moe_jax.serve.http.app import make_api  # noqa: E402
from qwen3_moe_jax.serve.run import make_service  # noqa: E402
from qwen3_moe_jax.serve.settings import Settings  # noqa: E402
from qwen3_moe_jax.testing.fake_engine import FakeEngine, fake_replicas  # noqa: E402
from qwen3_moe_jax.testing.http_server import quick_start  # noqa: E402
from tests.serve.bodies import BODIES  # noqa: E402
from tests.serve.fake_cluster import JSON, FakeEngines, apost, app_requests, get, post, whole  # noqa: E402


async def lost_at_once(ask):
    raise LostError
    yield


async def lost_in_the_middle(ask):
    yield JSON
    yield b'{"a": '
    raise LostError


def failing(status, code):
    async def answer(ask):
        yield Head(status, JSON.headers)
        yield json.dumps({"error": {"code": code}}).encode()

    return answer


# -- what is lost


@pytest.mark.parametrize(
    "first", [lost_at_once, lost_in_the_middle, failing(503, "unavailable"), failing(500, "engine")]
)
def test_what_nobody_has_seen_is_asked_again(first):
    engines = FakeEngines(first, whole)
    reply = post(engines)
    assert (reply.status_code, reply.json(), len(engines.asked)) == (200, {"a": 1}, 2)
    assert reply.headers["x-engine"] == "e0"
    assert reply.headers["x-request-id"].startswith("req_")


def test_a_request_that_loses_engines_again_and_again_ends_with_an_error():
    engines = FakeEngines(lost_in_the_middle)
    reply = post(engines)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine")
    assert len(engines.asked) == MAX_TRIES
    assert post(FakeEngines(failing(503, "unavailable"))).status_code == 503


def test_a_fault_of_the_program_and_a_refusal_are_not_asked_again():
    for answer, status in ((failing(500, "internal"), 500), (failing(429, "queue_full"), 429)):
        engines = FakeEngines(answer)
        assert (post(engines).status_code, len(engines.asked)) == (status, 1)


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_whose_engine_is_lost_ends_with_an_event_of_its_protocol(path, model_files):
    """The server's own stream, cut after some events."""
    start = quick_start(model_files["hermes"])
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"

    async def main():
        service = make_service(Settings(), start)
        service.engine = fake_replicas(start, capacity=4096)
        service.engine.launch()

        async def cut(ask):
            count = 0
            async for piece in pieces(make_api(service), ask):
                yield piece
                count += 1
                if count == 4:
                    raise LostError

        body = {**BODIES[path], limit: 300, "stream": True, "temperature": 0}
        try:
            return await apost(make_front(FakeEngines(cut), Settings()), body, path)
        finally:
            await service.close()

    reply = asyncio.run(main())
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in reply.text.strip().split("\n\n")]
    values = [json.loads(lines[-1].removeprefix("data: ")) for lines in events]
    assert len(values) > 3
    last = values[-1]
    message = "the engine stopped while it was answering"
    if path == "/v1/messages":
        assert events[-1][0] == "event: error"
        assert last["error"] == {"type": "api_error", "message": message}
        assert last["request_id"] == reply.headers["x-request-id"]
    elif path == "/v1/responses":
        assert events[-1][0] == "event: response.failed"
        assert [v["sequence_number"] for v in values] == list(range(len(values)))
        assert last["response"]["id"] == values[0]["response"]["id"]
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"] == {"code": "server_error", "message": message}
    else:
        assert last["error"]["message"] == message
        assert "[DONE]" not in reply.text


def test_a_client_that_goes_away_ends_the_work():
    ended = []

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def main():
        found = pieces(endless, Ask("POST", "/", b"", b"", "", "r"))
        assert isinstance(await anext(found), Head)
        for _ in range(3):
            assert set(await anext(found)) == set(b"x")
        await found.aclose()

    asyncio.run(main())
    assert ended == [True]


def test_what_has_come_together_is_one_piece():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"", b"b", b"c"):
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def main():
        return [piece async for piece in pieces(app, Ask("GET", "/", b"", b"", "", "r"))]

    assert asyncio.run(main()) == [Head(200, []), b"abc"]


def test_the_end_of_an_answer_comes_with_its_last_piece():
    """Who has the last event knows that there is room."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"[DONE]", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def main():
        return [piece async for piece in pieces(app, Ask("GET", "/", b"", b"", "", "r"))]

    assert asyncio.run(main()) == [Head(200, []), b"ab", Last(b"[DONE]")]


# -- where a request goes

LONG = "def f(x):\n    return x\n" * 10


def test_a_request_goes_where_its_beginning_is():
    """Any engine may have a new prompt; what begins alike follows it, in other protocols too."""

    async def main():
        engines = FakeEngines(whole)
        app = make_front(engines, Settings())
        bodies = [
            {"prompt": LONG + "a"},
            {"prompt": "other " * 40},
            {"prompt": LONG + "b"},
            {"prompt": LONG + "c", "cache_prompt": False},
            {"prompt": LONG + "d", "cache_salt": "s"},
        ]
        for body in bodies:
            await apost(app, body)
        return engines.asked

    assert asyncio.run(main()) == ["", "", "e1", "", ""]


def test_a_beginning_is_not_worth_a_long_wait():
    async def main():
        engines = FakeEngines(whole)
        app = make_front(engines, Settings())
        for prompt in (LONG, "other " * 40):
            await apost(app, {"prompt": prompt})
        held = asyncio.Event()

        async def waits(ask):
            yield JSON
            await held.wait()

        engines.answers = [waits]
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.ensure_future(apost(app, {"prompt": LONG})))
            while app_requests(await get(app, "/health")) < len(tasks):
                await asyncio.sleep(0)
        held.set()
        await asyncio.gather(*tasks)
        return engines.asked[2:5]

    assert asyncio.run(main()) == ["e1", "e1", ""]


def test_an_engine_that_was_lost_is_forgotten():
    async def main():
        engines = FakeEngines(whole, lost_at_once, whole)
        app = make_front(engines, Settings())
        for _ in range(2):
            await apost(app, {"prompt": LONG})
        return engines.asked

    assert asyncio.run(main()) == ["", "e1", ""]


def test_beginnings_are_those_of_prompts():
    system = "x-anthropic-billing-header: a1b2\nYou are " + LONG
    other = system.replace("a1b2", "c3d4")
    assert beginning_of({"system": system}) == beginning_of({"system": other})
    blocks = [{"type": "text", "text": system}], [{"type": "text", "text": other}]
    assert beginning_of({"system": blocks[0]}) == beginning_of({"system": blocks[1]})
    assert beginning_of({"messages": [1], "max_tokens": 3, "tools": [2]}) == "[2][1]"
    for body in (b"nonsense", b"[1]", b"[" * 100_000, b'"\xff"'):
        assert blocks_of_body(body, "") == []
    assert len(blocks_of_body(json.dumps({"prompt": "x" * 126}).encode(), "")) == 2


# -- bounds, health, keys


def test_a_request_that_no_engine_takes_ends():
    async def main():
        engines = FakeEngines(whole)
        engines.held.clear()
        return await apost(make_front(engines, Settings(queue_seconds=0.01)))

    reply = asyncio.run(main())
    assert (reply.status_code, "in time" in reply.text) == (503, True)


def test_a_front_answers_itself_how_it_is():
    async def main():
        engines = FakeEngines(whole)
        app = make_front(engines, Settings())
        await apost(app)
        return [await get(app, path) for path in ("/health", "/livez", "/metrics", "/v1/models")]

    health, livez, metrics, models = asyncio.run(main())
    assert health.json() == {"status": "ok", "engines": {"RUNNING": 2}, "requests": {"e1": 0}}
    assert (livez.status_code, metrics.status_code, models.json()) == (200, 501, {"a": 1})

    class NoEngines(FakeEngines):
        async def states(self):
            return {"STARTING": 1}

    reply = asyncio.run(get(make_front(NoEngines(whole), Settings()), "/health"))
    assert (reply.status_code, reply.json()["status"]) == (503, "loading")


def test_a_fault_of_the_front_itself_has_a_clients_form():
    class Broken(FakeEngines):
        async def states(self):
            raise KeyError("secret")

    async def main():
        transport = httpx.ASGITransport(make_front(Broken(whole), Settings()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health")

    reply = asyncio.run(main())
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in reply.text


def test_without_a_key_this_machine_alone_is_served():
    assert post(FakeEngines(whole), address="192.0.2.1").status_code == 403
    settings = Settings(api_keys=("secret",), host="0.0.0.0")
    ask = lambda **headers: post(FakeEngines(whole), settings=settings, address="192.0.2.1", **headers)
    assert ask().status_code == 401
    assert ask(authorization="Bearer secret").status_code == 200


# -- options


def test_options_are_texts_or_values():
    given = {"replicas": "3", "slots": 4, "context": "512", "no_gate": "true", "allow_host": "a, b"}
    options = options_of(given, cluster_gpus=0)
    assert (options.replicas, options.gpus, options.target, options.waves) == (3, 0.0, 4, 8)
    assert (options.room, options_of({**given, "max_replicas": 5}, cluster_gpus=0).room) == (24, 40)
    start, settings = options.start(), options.settings()
    assert (start.slots, start.context, start.gate) == (4, 512, False)
    assert settings.hosts == ("a", "b")
    assert options_of({"mesh": "tp=2,ep=2"}, cluster_gpus=8).gpus == 4
    assert options_of({}, cluster_gpus=1).gpus == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "without a GPU give slots and context"),
        ({"replica": 2}, "replica"),
        ({"replicas": "many"}, "replicas"),
        ({"replicas": 0}, "replicas=0: it must be 1 or more"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2: it must be 3 or more"),
        ({"backend": "wgpu"}, "use qwen3-moe serve"),
        ({"dtype": "int3"}, "it must be one of float32"),
        ({"model": "here.gguf"}, "the same on every host"),
        ({"mesh": "tp=two"}, "mesh"),
        ({"mesh": "tp=2", "gpus": 1}, "takes 2 of each engine"),
        ({"step_ms": "nan"}, "step_ms"),
    ],
)
def test_options_that_cannot_be_are_refused(given, words):
    with pytest.raises(OptionError, match=words):
        options_of(given, cluster_gpus=0)


# -- an engine


def host_of(model, **options):
    """A host whose engine has no process."""
    start = quick_start(model)
    host = Host("e1", Settings(), start)
    host.service = make_service(Settings(), start)
    host.service.engine = FakeEngine(start, slots=2, **options)
    host.app = make_api(host.service)
    return host, host.service.engine


def test_an_engine_that_is_silent_is_not_well(model_files):
    async def main():
        host, engine = host_of(model_files["hermes"], is_held=True)
        engine.launch()
        engine.last_token -= 1000
        host.check()  # it has nothing to do
        engine.submit([1, 2], key="", sampling=Sampling(), max_tokens=2, stop_ids=[])
        host.check()  # it has only just got something to do
        engine.last_token -= 1000
        with pytest.raises(UnwellError, match="written nothing"):
            host.check()
        engine.fault = "it died 4 times"
        with pytest.raises(UnwellError, match="it died 4 times"):
            host.check()
        await engine.close()

    asyncio.run(main())


def test_a_request_waits_for_an_engine_that_is_started_again(model_files):
    async def main():
        host, engine = host_of(model_files["hermes"])
        body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
        found = host.answer(Ask("POST", "/v1/completions", b"", body, "", "r"))
        first = asyncio.ensure_future(anext(found))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not first.done()
        engine.launch()
        assert await first == Taken("e1", 1024, 2 * 1024)
        head, last = [piece async for piece in found]
        assert (head.status, json.loads(last.body)["usage"]["completion_tokens"]) == (200, 2)
        engine.fault, engine.ready = "it died 4 times", None
        with pytest.raises(EngineLostError, match="it died 4 times"):
            await anext(host.answer(Ask("POST", "/v1/completions", b"", body, "", "r")))
        await engine.close()

    asyncio.run(main())
