"""A server with several engines: what its clients see when one dies, its health, bounds and drain."""

import contextlib
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")

from qwen3_moe_jax.machine import threads  # noqa: E402
from qwen3_moe_jax.serve.settings import Settings  # noqa: E402
from qwen3_moe_jax.testing.fake_engine import FAKE_SLOTS as SLOTS  # noqa: E402
from qwen3_moe_jax.testing.fake_engine import fake_replicas  # noqa: E402
from qwen3_moe_jax.testing.http_server import quick_start, running  # noqa: E402
from tests.serve.bodies import BODIES  # noqa: E402
from tests.serve.waits import until  # noqa: E402


@pytest.fixture
def serve(model_files):
    """Makes servers with fake replicas."""
    with contextlib.ExitStack() as stack:

        def make(*, settings=None, **options):
            start = quick_start(model_files["hermes"])
            settings = Settings(**{"port": 0, "metrics": True, **(settings or {})})
            return stack.enter_context(running(settings, start, engine=fake_replicas(start, **options)))

        yield make


def after_progress(engine, call):
    """Calls it in the loop's thread whenever an engine has written."""
    take = engine._progress

    def progress(message):
        take(message)
        if message.wrote:
            call()

    engine._progress = progress


def hold_when_written(engine):
    """No turn is taken once each of its sequences has tokens."""

    def hold():
        engine.is_held = all(s.is_written for s in engine._streams.values())

    after_progress(engine, hold)


def die_and_go_on(engine):
    del engine._progress  # the hook
    engine.is_held = False
    engine.die()
    engine.launch()


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_of_which_nobody_has_seen_a_part_begins_again(serve, path):
    """And one that streams ends with an error event."""
    server = serve(capacity=100_000, is_held=True)
    pool = server.service.engine
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    texts = {}

    def ask(name, stream):
        body = {**BODIES[path], limit: 400, "stream": stream, "temperature": 0}
        reply = httpx.post(server.url + path, json=body, timeout=240)
        texts[name] = (reply.status_code, reply.text)

    tasks = [threading.Thread(target=ask, args=(s, s)) for s in (True, False)]
    for task in tasks:
        task.start()
    until(lambda: pool.active == 2)
    for engine in pool.engines:
        hold_when_written(engine)
        engine.is_held = False
    until(lambda: all(engine.is_held or not engine.active for engine in pool.engines))
    for engine in pool.engines:
        server.loop.call_soon_threadsafe(die_and_go_on, engine)
    for task in tasks:
        task.join()
    assert texts[False][0] == 200
    assert "the engine stopped" not in texts[False][1]
    assert texts[True][0] == 200
    assert "the engine stopped" in texts[True][1]
    ask("afterwards", False)
    strip = lambda text: re.sub(r'"[a-z]+[_-][0-9a-f]{8,}"|"created(_at)?":\d+|"cached\w*":\d+|\d+', "", text)
    assert strip(texts["afterwards"][1]) == strip(texts[False][1])


def test_health_and_metrics_of_each(serve):
    server = serve()
    pool = server.service.engine
    get = lambda path: httpx.get(server.url + path, timeout=120)
    assert httpx.post(f"{server.url}/v1/completions", json=BODIES["/v1/completions"]).status_code == 200
    server.loop.call_soon_threadsafe(pool.engines[1].die)
    until(lambda: pool.restarts == 1)
    assert get("/health").json() == {
        "status": "ok",
        "replicas": [
            {"status": "ok", "active": 0, "restarts": 0},
            {"status": "loading", "active": 0, "restarts": 1},
        ],
    }
    said = get("/metrics").text
    assert 'qwen3_moe_replica{name="up",replica="1"} 1.0' in said
    assert 'qwen3_moe_replica{name="up",replica="2"} 0.0' in said
    assert 'qwen3_moe_replica{name="restarts",replica="2"} 1.0' in said
    assert "qwen3_moe_engine_restarts 1.0" in said
    assert get("/health/decode").json() == {"status": "idle"}


def test_bounds_of_the_queue_are_the_whole_servers(serve):
    server = serve(is_held=True, settings={"max_queue": 3})
    pool = server.service.engine

    def ask(codes):
        reply = httpx.post(f"{server.url}/v1/completions", json=BODIES["/v1/completions"], timeout=240)
        codes.append(reply.status_code)

    codes: list[int] = []
    tasks = [threading.Thread(target=ask, args=(codes,)) for _ in range(2 * SLOTS + 3)]
    for task in tasks:
        task.start()
    until(lambda: pool.active == 2 * SLOTS + 3)
    refused: list[int] = []
    ask(refused)
    assert refused == [429]
    for engine in pool.engines:
        engine.is_held = False
    for task in tasks:
        task.join()
    assert codes == [200] * len(tasks)


def test_a_drain_ends_the_answers_of_all(serve):
    server = serve(is_held=True, settings={"drain_seconds": 60})
    pool, codes = server.service.engine, []
    ask = lambda: codes.append(
        httpx.post(f"{server.url}/v1/completions", json=BODIES["/v1/completions"], timeout=240).status_code
    )
    tasks = [threading.Thread(target=ask) for _ in range(2 * SLOTS + 4)]
    for task in tasks:
        task.start()
    until(lambda: pool.active == len(tasks))
    server.loop.call_soon_threadsafe(server.server.stop)
    until(lambda: pool.is_draining)
    ask()
    assert codes == [503]
    for engine in pool.engines:
        engine.is_held = False
    for task in tasks:
        task.join()
    assert codes[1:] == [200] * len(tasks)


def test_a_replica_is_killed_under_load(model_files):
    """Both answer alike. No request is lost that was not streaming; the others end with an error event."""
    start = quick_start(model_files["hermes"], slots=1, context=256)
    with running(Settings(port=0), start, replicas=2) as server:
        pool = server.service.engine
        until(lambda: pool.ready.slots == 2)
        environments = [Path(f"/proc/{e.process_id}/environ").read_bytes() for e in pool.engines]
        cores = max(1, threads.cores() // 2)
        assert all(f"QWEN3_MOE_CORES={cores}\0".encode() in e for e in environments)
        ask_all(server, 4)
        for engine in pool.engines:
            assert engine.counters["prefix_lookups"] == 2

        dying = pool.engines[0]
        process = dying.process_id
        after_progress(dying, lambda: kill(process))
        replies = ask_all(server, 8)
        assert sum(text is None for text in replies) <= 1  # what had a slot there
        assert dying.restarts == 1


def kill(process):
    with contextlib.suppress(ProcessLookupError):  # it was killed for its first token
        os.kill(process, signal.SIGKILL)


def ask_all(server, count):
    """The text of each answer to the same seeded request, half of them as streams; None: it broke off."""
    replies = {}
    body = {"prompt": "def f(", "max_tokens": 60, "seed": 7, "temperature": 0.9, "cache_prompt": False}

    def ask(number, stream):
        reply = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=240)
        assert reply.status_code == 200
        replies[number] = text_of_stream(reply.text) if stream else reply.json()["choices"][0]["text"]

    tasks = [threading.Thread(target=ask, args=(n, n % 2 == 0)) for n in range(count)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert len(replies) == count
    assert len(set(replies.values()) - {None}) == 1
    assert all(replies[n] is not None for n in range(1, count, 2))
    return list(replies.values())


def text_of_stream(lines):
    values = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    if "error" in values[-1]:
        assert "the engine stopped" in values[-1]["error"]["message"]
        return None
    assert lines.rstrip().endswith("[DONE]")
    return "".join(value["choices"][0]["text"] for value in values)
