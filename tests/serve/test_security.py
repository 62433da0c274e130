"""Keys, hosts, origins, sizes, deadlines, broken JSON, engine deaths, shutdown: what must be withstood."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

httpx = pytest.importorskip("httpx")

from qwen3_moe_jax.core.errors import OptionError  # noqa: E402
from qwen3_moe_jax.serve.http import app, guard  # noqa: E402
from qwen3_moe_jax.serve.http.site import PAGE_PATHS  # noqa: E402
from qwen3_moe_jax.serve.run import Server, check_address, make_service  # noqa: E402
from qwen3_moe_jax.serve.settings import Settings  # noqa: E402
from qwen3_moe_jax.testing.http_server import quick_start, running  # noqa: E402

KEY = "sk-test-1"
CHAT = {"messages": [{"role": "user", "content": "[[hello]]"}]}


@pytest.fixture(scope="module")
def guarded(model_files):
    """A server with keys and short deadlines."""
    settings = Settings(
        port=0,
        api_keys=(KEY, "sk-test-2"),
        header_seconds=0.6,
        body_seconds=0.6,
        max_body=200_000,
        max_queue=4,
        origins=("http://friend.example",),
    )
    with running(settings, quick_start(model_files["hermes"], slots=2)) as found:
        yield found


def raw(server, request, wait=240.0):
    """What comes back for bytes on a connection."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(wait)
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def status(answer):
    return int(answer.split(b" ", 2)[1])


def get(path, *headers, method="GET", host="localhost"):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


PATHS = sorted({*app.POSTS, *app.GETS, "/nothing", "/v1", "/docs", "/admin"} - guard.PUBLIC)
SPELLINGS = [lambda p: p, lambda p: p + "/", lambda p: "/" + p, lambda p: p.upper(), lambda p: "/x/.." + p]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_without_a_key(guarded, path):
    path = path.replace("{name:path}", "x")
    for spell in SPELLINGS:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "TRACE"):
            for header in ((), ("Authorization: Bearer wrong",), ("X-Api-Key: sk-test-",)):
                if spell(path).lower() in guard.PUBLIC or spell(path) in PAGE_PATHS:
                    continue
                found = raw(guarded, get(spell(path), *header, method=method))
                assert status(found) in (400, 401), (spell(path), method, found[:200])


def test_what_needs_no_key(guarded):
    for path in sorted(guard.PUBLIC | PAGE_PATHS):
        assert status(raw(guarded, get(path))) == 200
    assert status(raw(guarded, get("/health/decode"))) == 401
    assert status(raw(guarded, get("/v1/models", f"Authorization: Bearer {KEY}"))) == 200
    assert status(raw(guarded, get("/v1/models", f"x-api-key: {KEY}"))) == 200
    upgrade = ("Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    assert status(raw(guarded, get("/v1/models", *upgrade))) == 401


HOSTS = {
    "localhost": 200,
    "localhost:80": 200,
    "LOCALHOST": 200,
    "localhost.": 200,
    "127.0.0.1": 200,
    "[::1]:8080": 200,
    "evil.example": 403,
    "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403,
    "192.0.2.7": 403,
    "localhost:x": 403,
    "[::1": 403,
    "a@localhost": 403,
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts(guarded, host):
    assert status(raw(guarded, get("/livez", host=host))) == HOSTS[host]


TARGETS = {
    "http://localhost/livez": 200,
    "http://localhost:8080/livez?x=http://a/": 200,
    "http://evil.example/livez": 403,
    "http://localhost@evil.example/livez": 403,
    "http://evil.example@localhost/livez": 403,
    "https://evil.example:443/livez": 403,
    "http://evil.example?/livez": 400,  # no path
    "http://localhost/v1/models": 401,
    "http://localhost//v1/models": 401,
    "/http://evil.example/livez": 401,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("host", ["localhost", "evil.example"])
def test_a_target_with_a_host_is_judged_by_that(guarded, target, host):
    """An absolute request line, as for a proxy: the header's host counts only where the target has none."""
    is_own = host == "localhost" or not target.startswith("/")
    assert status(raw(guarded, get(target, host=host))) == (TARGETS[target] if is_own else 403)


def test_a_target_that_is_none_is_refused(guarded):
    for method, target in (("CONNECT", "localhost:443"), ("GET", "http://"), ("GET", "livez"), ("GET", "*")):
        found = status(raw(guarded, get(target, method=method)))
        assert found in (400, 401, 403, 404, 405), (method, target, found)
    twice = get("http://localhost/livez", "Host: evil.example", host="localhost")
    assert status(raw(guarded, twice)) == 400


def test_no_host_two_hosts_and_two_lengths(guarded):
    assert status(raw(guarded, b"GET /livez HTTP/1.0\r\n\r\n")) == 403
    assert status(raw(guarded, get("/livez", "Host: localhost"))) == 400
    both = get("/tokenize", "Content-Length: 3", "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n"
    assert status(raw(guarded, both)) == 400


def test_origins(guarded):
    ask = lambda *headers, method="GET": raw(guarded, get("/livez", *headers, method=method))
    assert status(ask("Origin: http://evil.example")) == 403
    assert status(ask("Origin: null")) == 403
    assert status(ask("Origin: http://localhost")) == 200
    assert status(ask("Origin: http://localhost.evil.example")) == 403
    assert status(ask("Sec-Fetch-Site: cross-site")) == 403
    friend = ask("Origin: http://friend.example")
    assert b"access-control-allow-origin: http://friend.example" in friend
    assert b"access-control-allow-credentials" not in friend
    preflight = raw(guarded, get("/v1/models", "Origin: http://friend.example", method="OPTIONS"))
    assert status(preflight) == 204


def post(server, body, path="/v1/chat/completions", **headers):
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **headers}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=600)


def test_sizes(guarded):
    assert post(guarded, b" " * 300_000).status_code == 413
    chunked = httpx.post(
        f"{guarded.url}/tokenize",
        content=(b" " * 50_000 for _ in range(9)),
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
        timeout=120,
    )
    assert chunked.status_code == 413
    assert status(raw(guarded, get("/livez", "X-Long: " + "a" * 20_000))) == 431
    assert status(raw(guarded, get("/livez", *(f"X-{i}: a" for i in range(120))))) == 431
    assert post(guarded, CHAT, **{"content-type": "text/plain"}).status_code == 415
    assert post(guarded, CHAT, **{"content-encoding": "gzip"}).status_code == 415


def test_deadlines(guarded):
    assert status(raw(guarded, b"GET /livez HTTP/1.1\r\nHost: loc")) == 408
    slow = get(
        "/tokenize", f"x-api-key: {KEY}", "Content-Length: 9", "Content-Type: application/json", method="POST"
    )
    assert status(raw(guarded, slow)) == 408
    assert raw(guarded, b"") == b""


BAD_JSON = [
    b"",
    b"[]",
    b"{",
    b"nonsense",
    b'{"messages": NaN}',
    b'{"a": 1, "a": 2, "messages": []}',
    b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"seed": ' + b"9" * 10_000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"temperature": 1e999, "messages": []}',
]
BAD_MESSAGES = [
    [],
    "text",
    [1],
    [{}],
    [{"role": "user"}],
    [{"role": "robot", "content": "x"}],
    [{"role": "user", "content": 3}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}],
]
NUMBERS = ("max_tokens", "max_completion_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed")
NUMBERS += ("presence_penalty", "frequency_penalty", "repetition_penalty", "top_logprobs", "thinking_budget")
BAD_NUMBERS = [-(10**9), 2**63, 1e308, "1", True, [1], {}]


def refused(reply):
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert not guard_text(reply.text)
    return error


def guard_text(text):
    """Addresses, paths and objects that must not be in an error."""
    import re

    return re.findall(r"0x[0-9a-f]{6,}|/work/|/home/|/usr/|site-packages|Traceback|<[\w.]+ object", text)


def test_bad_json_and_messages(guarded):
    for body in BAD_JSON:
        refused(post(guarded, body))
    for messages in BAD_MESSAGES:
        refused(post(guarded, {"messages": messages}))


@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers(guarded, name):
    for value in BAD_NUMBERS[name == "seed" :]:  # any seed of 64 bits will do
        refused(post(guarded, {**CHAT, name: value}))


def test_other_limits(guarded):
    for extra in (
        {"n": 10**9},
        {"n": 17},
        {"stop": ["x"] * 17},
        {"stop": "x" * 300},
        {"stop": ""},
        {"logit_bias": {str(i): 0 for i in range(1025)}},
        {"chat_template_kwargs": {"x": 1}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"audio": {}},
    ):
        refused(post(guarded, {**CHAT, **extra}))
    long = {"messages": [{"role": "user", "content": "x" * 5000}]}
    assert refused(post(guarded, long))["code"] == "context_length_exceeded"


def slots_are_free(server, seconds=240.0):
    """Whether all slots get free in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counters = server.service.engine.counters
        if not (server.service.engine.active or counters.get("running") or counters.get("queued")):
            return True
        time.sleep(0.05)
    return False


FOREVER = {"messages": [{"role": "user", "content": "[[forever]]"}], "max_tokens": 900}


def go_away(server, body, seconds=0.3):
    """Sends a request, reads for a while, and closes the connection."""
    content = json.dumps(body).encode()
    headers = (f"x-api-key: {KEY}", f"Content-Length: {len(content)}", "Content-Type: application/json")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(get("/v1/chat/completions", *headers, method="POST") + content)
        time.sleep(seconds)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_give_their_slots_back(guarded, stream):
    for _ in range(5):
        go_away(guarded, {**FOREVER, "stream": stream})
    assert slots_are_free(guarded)
    assert post(guarded, CHAT).status_code == 200


def test_overload_is_429_at_once(guarded):
    import threading

    replies = []

    def ask():
        reply = post(guarded, {**FOREVER, "max_tokens": 60})
        replies.append((reply.status_code, reply.headers.get("retry-after")))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [code for code, _ in replies]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 6
    assert all(retry for code, retry in replies if code == 429)


def test_a_killed_engine_comes_back(guarded):
    engine = guarded.service.engine
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{guarded.url}/v1/chat/completions"
    with httpx.stream("POST", url, json={**FOREVER, "stream": True}, headers=headers, timeout=600) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(engine.process_id, signal.SIGKILL)
        rest = "\n".join(lines)
    assert '"error"' in rest
    assert httpx.get(f"{guarded.url}/health", timeout=120).status_code == 503
    assert post(guarded, CHAT).status_code == 503
    end = time.monotonic() + 240
    while httpx.get(f"{guarded.url}/health", timeout=120).status_code != 200 and time.monotonic() < end:
        time.sleep(0.1)
    assert post(guarded, CHAT).status_code == 200
    assert engine.restarts == 1


def test_a_server_without_standard_streams_starts_and_its_log_is_dropped(model_files, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    server = Server(make_service(Settings(port=0), quick_start(model_files["hermes"])))
    logging.getLogger("uvicorn.error").warning("nobody reads this")
    server._socket.close()


def test_the_log_of_the_server_cannot_command_a_terminal(model_files, capsys):
    Server(make_service(Settings(port=0), quick_start(model_files["hermes"])))._socket.close()
    logging.getLogger("uvicorn.error").warning("bad \x1b[2J request")
    assert capsys.readouterr().err == "warning: bad \\x1b[2J request\n"


def test_no_key_no_network():
    with pytest.raises(OptionError, match="api-key-file"):
        check_address(Settings(host="0.0.0.0"))
    check_address(Settings(host="0.0.0.0", api_keys=("k",)))
    check_address(Settings(host="::1"))


def test_sigterm_drains_and_leaves_nothing(model_files):
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "qwen3_moe_jax.cli", "serve", str(model_files["hermes"]), "--port", "0"]
    command += ["--backend", "jax", "--no-gate", "--no-warm-up", "--slots", "2", "--context", "1024"]
    process = subprocess.Popen([*command, "--drain-timeout", "0"], stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr.readline, "")
    seen = []
    for line in lines:
        seen.append(line)
        if line.startswith("ready"):
            break
    assert "max_queue = 256" in "".join(seen)
    children = psutil.Process(process.pid).children(recursive=True)
    listening = [c for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
    listening += [c for p in children for c in p.net_connections() if c.status == "LISTEN"]
    assert len(listening) == 1
    process.terminate()
    assert process.wait(240) == 0
    assert not psutil.wait_procs(children, timeout=240)[1]
