"""Queues, disconnects, slow clients, health, drains: the front over an engine that costs nothing."""

import asyncio
import json
import random
import socket
import sys
import threading
import time

import pytest

httpx = pytest.importorskip("httpx")

from qwen3_moe_jax.serve.http import completions, json_body, streams  # noqa: E402
from qwen3_moe_jax.serve.http.errors import ApiError  # noqa: E402
from qwen3_moe_jax.serve.settings import Settings  # noqa: E402
from qwen3_moe_jax.testing.fake_engine import FakeEngine  # noqa: E402
from qwen3_moe_jax.testing.http_server import quick_start, running  # noqa: E402
from tests.serve import bodies  # noqa: E402
from tests.serve.waits import until  # noqa: E402

KEYS = ("sk-one", "sk-two")
SLOTS, QUEUE = 2, 4


@pytest.fixture
def serve(model_files):
    """Makes servers with a fake engine."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def make(*, is_held=False, capacity=1024, **settings):
            start = quick_start(model_files["hermes"], max_queue=QUEUE)
            engine = FakeEngine(start, slots=SLOTS, capacity=capacity, is_held=is_held)
            settings = {"max_queue": QUEUE, "api_keys": KEYS, "port": 0, **settings}
            return stack.enter_context(running(Settings(**settings), start, engine=engine))

        yield make


def headers(key=KEYS[0]):
    return {"authorization": f"Bearer {key}"}


def body(**options):
    return {"prompt": "abc", "max_tokens": 8, **options}


def ask(server, key=KEYS[0], **options):
    return httpx.post(f"{server.url}/v1/completions", json=body(**options), headers=headers(key), timeout=120)


def at_once(server, bodies):
    """The replies to many requests that are sent together."""

    async def main():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits, headers=headers()) as client:
            url = f"{server.url}/v1/completions"
            return await asyncio.gather(*(client.post(url, json=b) for b in bodies))

    return asyncio.run(main())


def open_stream(server, **options):
    """A connection on which a stream was asked for, and nothing read."""
    content = json.dumps(body(**{"stream": True, **options})).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(120)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(head.encode() + content)
    return connection


def is_idle(server):
    engine = server.service.engine
    return not (engine.active or engine.scheduler.running or engine.scheduler.queue)


def test_ten_times_overload_gives_200_or_429_alone(serve):
    server = serve()
    replies = at_once(server, [body()] * (10 * (SLOTS + QUEUE)))
    codes = [r.status_code for r in replies]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= SLOTS + QUEUE
    for reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) > 0
            assert reply.json()["error"]["type"] == "rate_limit_error"
    assert is_idle(server)
    assert ask(server).status_code == 200


def test_a_full_queue_is_found_before_a_prompt_is_read(serve, monkeypatch):
    server = serve(is_held=True)
    held = [open_stream(server) for _ in range(SLOTS + QUEUE)]
    until(lambda: server.service.engine.active == SLOTS + QUEUE)
    raw, read = server.service.model.raw, []  # those that are held may still be read
    monkeypatch.setattr(server.service.model, "raw", lambda text: read.append(text) or raw(text))
    assert ask(server, prompt="not read").status_code == 429
    assert "not read" not in read
    assert ask(server, prompt=None).status_code == 429, "nor is the body looked at"
    assert ask(server, prompt="a", echo=True, max_tokens=0).status_code == 200, "which takes no slot"
    for connection in held:
        connection.close()
    until(lambda: is_idle(server))


def test_a_request_that_is_queued_already_takes_no_second_place(serve, monkeypatch):
    queued, may_go_on = [], threading.Event()

    async def held_after(receive, work):
        answer = await streams.until_gone(receive, work)
        queued.append(answer)
        while not may_go_on.is_set():
            await asyncio.sleep(0.001)
        return answer

    monkeypatch.setattr(completions, "until_gone", held_after)
    server = serve(is_held=True)
    held = []
    for i in range(SLOTS + QUEUE):
        held.append(open_stream(server))
        until(lambda i=i: len(queued) > i)
    assert server.service.engine.active == SLOTS + QUEUE
    may_go_on.set()
    assert ask(server).status_code == 429
    for connection in held:
        connection.close()
    until(lambda: is_idle(server))


def test_the_queue_is_bounded_by_prompt_tokens(serve):
    server = serve(is_held=True, max_queue_tokens=60)
    held = open_stream(server, prompt=[97] * 50)
    until(lambda: server.service.engine.active == 1)
    assert ask(server, prompt=[97] * 50).status_code == 429
    held.close()
    until(lambda: is_idle(server))


def test_who_waits_too_long_gets_503(serve):
    server = serve(is_held=True, queue_seconds=0.05)
    reply = ask(server)
    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    until(lambda: is_idle(server))


@pytest.mark.parametrize("place", ["queue", "prefill", "decode"])
@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_what_he_has(serve, place, stream):
    server = serve(is_held=place == "queue", capacity=100_000)
    engine = server.service.engine
    length = 90_000 if place == "prefill" else 3
    connection = open_stream(server, prompt=[97] * length, max_tokens=9_000, stream=stream)
    if place == "decode":
        until(lambda: any(r.written for r in list(engine.scheduler.running.values())))
    else:
        until(lambda: engine.active == 1)
    connection.close()
    until(lambda: is_idle(server))
    engine.is_held = False
    assert ask(server).status_code == 200


def test_streams_cut_anywhere_leave_nothing(serve):
    server, rng = serve(capacity=100_000, max_queue=64), random.Random(0)
    tasks = lambda: len(asyncio.all_tasks(server.loop))
    assert ask(server).status_code == 200
    until(lambda: is_idle(server))
    before = tasks()
    for _ in range(60):
        connection = open_stream(server, max_tokens=rng.randrange(1, 5000))
        connection.recv(rng.randrange(1, 3000))
        connection.close()
    until(lambda: is_idle(server) and tasks() <= before)
    assert not server.server._uvicorn.server_state.connections


def test_a_server_that_ends_with_requests_open_ends_them_in_order(model_files):
    """A task that is left in a closed loop says "Event loop is closed" whenever it is collected."""
    start = quick_start(model_files["hermes"], max_queue=QUEUE)
    engine = FakeEngine(start, slots=SLOTS, is_held=True)
    with running(Settings(port=0, api_keys=KEYS), start, engine=engine) as server:
        held = [open_stream(server, stream=stream) for stream in (True, False)]
        until(lambda: engine.active == 2)
    assert server.loop.is_closed()
    assert not asyncio.all_tasks(server.loop)
    for connection in held:
        connection.close()


def test_who_does_not_read_is_dropped_and_others_go_on(serve):
    server = serve(capacity=1 << 20, send_seconds=0.4)
    slow = open_stream(server, max_tokens=900_000)
    until(lambda: server.service.engine.active == 1)
    assert ask(server).status_code == 200
    until(lambda: is_idle(server))
    held = b""
    while part := slow.recv(1 << 20):
        held += part
    assert b"[DONE]" not in held
    slow.close()


def test_many_who_trickle_do_not_hold_up_others(serve):
    server = serve(header_seconds=0.5)
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(300)]
    for connection in sockets:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: loc")
    assert httpx.get(f"{server.url}/livez", timeout=120).status_code == 200
    assert ask(server).status_code == 200
    for connection in sockets:
        connection.settimeout(120)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


def test_health_says_what_the_engine_is(serve):
    server = serve()
    engine = server.service.engine
    get = lambda path: httpx.get(f"{server.url}{path}", headers=headers(), timeout=120)
    state = lambda path: (get(path).status_code, get(path).json()["status"])
    assert state("/health") == (200, "ok")
    assert state("/health/decode") == (200, "idle")
    ready, engine.ready = engine.ready, None
    assert state("/health") == (503, "loading")
    assert ask(server).status_code == 503
    engine.ready = ready
    engine.fault = "it died"
    assert state("/health") == state("/health/decode") == (503, "dead")
    assert state("/livez") == (200, "ok")
    engine.fault = ""
    engine.is_held = True
    stream = open_stream(server)
    until(lambda: engine.active == 1)
    assert state("/health/decode") == (200, "decoding")
    engine.last_token -= 1000
    assert state("/health/decode") == (503, "stalled")
    engine.is_held = False
    until(lambda: is_idle(server))
    stream.close()


def test_a_drain_lets_answers_end_and_takes_no_new_ones(serve):
    server = serve(is_held=True, drain_seconds=60)
    engine = server.service.engine
    stream = open_stream(server)
    until(lambda: engine.active == 1)
    server.loop.call_soon_threadsafe(server.server.stop)
    until(lambda: engine.is_draining)
    assert httpx.get(f"{server.url}/health", timeout=120).json() == {"status": "draining"}
    assert ask(server).status_code == 503
    engine.is_held = False
    whole = b""
    while b"[DONE]" not in whole:
        part = stream.recv(65536)
        assert part, whole
        whole += part


def test_a_second_signal_does_not_wait(serve):
    server = serve(is_held=True, drain_seconds=1e6)
    stream = open_stream(server)
    until(lambda: server.service.engine.active == 1)
    for _ in range(2):
        server.loop.call_soon_threadsafe(server.server.stop)
    until(lambda: not server.loop.is_running())
    stream.close()


def test_one_keys_prompts_are_not_seen_by_another(serve):
    server = serve()
    cached = lambda **o: ask(server, prompt=[97] * 200, **o).json()["usage"]["prompt_tokens_details"][
        "cached_tokens"
    ]
    assert cached() == 0
    assert cached() >= 176
    assert cached(key=KEYS[1]) == 0
    assert cached(cache_salt="mine") == 0
    assert cached(cache_prompt=False) == 0


BODIES = bodies.BODIES | {"/v1/messages": {**bodies.BODIES["/v1/messages"], "max_tokens": 4}}
FIELDS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens", "n", "top_logprobs"),
    "/v1/completions": ("max_tokens", "n", "best_of", "logprobs"),
    "/v1/responses": ("max_output_tokens", "top_logprobs"),
    "/v1/messages": ("max_tokens",),
    "/infill": ("n_predict", "max_tokens"),
}
COMMON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "thinking_budget",
)
WRONG = (-5, 2**31, 2**63, 1e308, "1", True, [1], {"a": 1})


def test_no_number_is_too_wrong(serve):
    """A wrong number is refused, never a crash, and costs no memory."""
    psutil = pytest.importorskip("psutil")
    server = serve()
    with httpx.Client(timeout=120, headers=headers()) as client:
        memory = None
        for path, fields in FIELDS.items():
            for name in (*fields, *(COMMON if path in ("/v1/chat/completions", "/infill") else ())):
                for value in WRONG[name == "presence_penalty" :]:
                    reply = client.post(server.url + path, json={**BODIES[path], name: value})
                    assert reply.status_code == 400, (path, name, value, reply.text)
            memory = memory or psutil.Process().memory_info().rss
        assert psutil.Process().memory_info().rss - memory < 20 << 20
    assert is_idle(server)


def test_numbers_have_few_digits_and_texts_many():
    settings, twenty = Settings(), "9" * 20
    long = json_body.parse(f'{{"a": {twenty}, "b": "{twenty * 3}", "c": [1, -2]}}'.encode(), settings)
    assert long == {"a": int(twenty), "b": twenty * 3, "c": [1, -2]}
    for text in (f"-{twenty}", f"{twenty}1", "9" * 5000):
        with pytest.raises(ApiError, match="too many digits"):
            json_body.parse(f'{{"a": {text}}}'.encode(), settings)


def test_an_error_of_ours_says_nothing(serve, monkeypatch, capfd):
    server = serve()

    def fail(text):
        raise RuntimeError(f"prompt {text} at /home/user with sk-one")

    monkeypatch.setattr(server.service.model, "raw", fail)
    reply = ask(server, prompt="my secret")
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "the server failed"
    assert reply.headers["x-request-id"]
    logged, end = "", time.monotonic() + 60
    while "RuntimeError" not in logged:  # it is said after the reply
        assert time.monotonic() < end
        logged += "".join(capfd.readouterr())
    assert not any(word in logged for word in ("secret", "sk-one", "/home", "Traceback"))


OUTGOING: list = []


def test_the_server_calls_nobody(serve):
    def hook(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            OUTGOING.append(arguments[1][0])

    sys.addaudithook(hook)
    server = serve()
    reply = ask(server, prompt="http://example.com/x")
    assert reply.status_code == 200
    assert set(OUTGOING) <= {"127.0.0.1"}
