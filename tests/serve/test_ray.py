"""A cluster of two nodes of Ray on this machine: engines are killed, and no request is lost.

Skipped without Ray; ``scripts/test_ray`` makes an environment with it and runs these tests.
"""

import contextlib
import importlib.util
import json
import os
import socket
import threading

import psutil
import pytest

httpx = pytest.importorskip("httpx")

from qwen3_moe_jax.core.exit_codes import ExitCode  # noqa: E402
from qwen3_moe_jax.testing import terminal  # noqa: E402
from tests.serve.waits import until  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own code
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

NODE = {"include_dashboard": False, "object_store_memory": 100_000_000}
APP = f"test-{os.getpid()}"
WORKER = "qwen3_moe_jax.serve.engine.worker"
PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}]},
}
STREAMS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
"""Whose first event comes before the first token."""
LONG = "def add(a, b):\n    return a + b\n" * 4


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a cluster of two nodes; nothing of it is left afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        before = descendants()
        made = Cluster()
        try:
            for cpus in (2, 1):
                add_node(made, cpus)
            ray.init(address=made.address, log_to_driver=False)
            yield made.address
        finally:
            ray.shutdown()
            made.shutdown()
            left = [p for p in descendants() if p not in before]
            _, alive = psutil.wait_procs(left, timeout=20)
            for process in alive:
                process.kill()


def add_node(made, cpus):
    """Ray gives a node half a minute to start, little beside other work: then it is started again."""
    for tries_left in (2, 1, 0):
        before = descendants()
        try:
            made.add_node(**NODE, num_cpus=cpus)
            return
        except Exception:
            for process in set(descendants()) - set(before):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not tries_left:
                raise


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_a_batch_has_each_line_once_whatever_is_killed(cluster, tmp_path):
    """An engine is killed, then the command; the same command goes on with what is left."""
    path, out = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    names = [str(number) for number in range(16)]
    path.write_text("\n".join(completion(name) for name in names))
    command = ("batch", str(path), "-o", str(out), "--ray", cluster, "--replicas", "2", "--cpus", "1")
    command += ("--backend", "reference", "--no-gate", "--slots", "1", "--context", "256")
    lines = lambda: out.read_bytes().count(b"\n") if out.exists() else 0
    process = terminal.start(*command)
    try:
        until(lambda: len(engine_processes()) == 2 and lines())
        actor, child = engine_processes()[0]
        actor.kill()
        child.wait(60)  # which has lost its front
        before = lines()
        until(lambda: lines() > before + 1)
    finally:
        process.kill()
    said = process.communicate()[1]
    before = lines()
    assert 2 < before < len(names), said
    done = terminal.start(*command)
    said = done.communicate(timeout=240)[1]
    assert done.returncode == 0, said
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(result["custom_id"] for result in found) == sorted(names)
    assert {result["response"]["status_code"] for result in found} == {200}
    until(lambda: not engine_processes())


def completion(name) -> str:
    body = {"prompt": f"# {name}\n", "max_tokens": 6, "temperature": 0}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


def test_a_cluster_without_room_is_refused(cluster, tmp_path, capfd):
    path = tmp_path / "requests.jsonl"
    path.write_text(completion("a"))
    command = ["batch", str(path), "-o", str(tmp_path / "out"), "--slots", "1", "--context", "256"]
    for options, words in (
        (["--ray", cluster, "--replicas", "9"], "an engine takes 4 CPU; the cluster has 0 GPU, 3 CPU"),
        (["--replicas", "2"], "with --ray alone"),
        (["--ray", "127.0.0.1:1"], "no cluster answers"),
    ):
        done = terminal.start(*command, *options)
        said = done.communicate(timeout=240)[1]
        assert done.returncode == ExitCode.USAGE
        assert words in said


@pytest.fixture(scope="module")
def url(cluster):
    """Of a front with two engines, one on each node."""
    from ray import serve

    from qwen3_moe_jax.serve.ray_app import build

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    options = {"replicas": 2, "cpus": 1, "slots": 4, "context": 512, "backend": "reference", "no_gate": True}
    serve.run(build({**options, "name": "tiny", "drain_timeout": 60, "max_queue": 8}), name=APP)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def body_of(path, *, stream=False, tokens=12, text=None):
    body = dict(PATHS[path])
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    if text is not None:
        body = {"prompt": text}
    return {**body, limit: tokens, "stream": stream, "temperature": 0}


def post(url, path, **options):
    return httpx.post(url + path, json=body_of(path, **options), timeout=240)


def text_of(path, value):
    """What a whole answer says."""
    if path == "/v1/messages":
        return value["content"][0]["text"]
    if path == "/v1/responses":
        return value["output"][0]["content"][0]["text"]
    choice = value["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def engine_processes() -> list[tuple[psutil.Process, psutil.Process]]:
    """The processes of this cluster's engines, each with its child, which writes."""
    found = []
    for process in descendants():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if WORKER in process.cmdline() and parent is not None:
                found.append((parent, process))
    return found


def health(url):
    return httpx.get(f"{url}/health", timeout=60).json()


def texts_of_engines(url) -> dict[str, str]:
    """Of each engine a text whose beginning it alone has read."""
    found = {}
    for number in range(100):
        text = f"# {number}\n{LONG}"
        found.setdefault(post(url, "/v1/completions", text=text, tokens=1).headers["x-engine"], text)
        if len(found) == 2:
            return found
    raise AssertionError("all requests went to one engine")


class Streaming(threading.Thread):
    """A stream that is read to its end; ``engine`` once it has begun."""

    def __init__(self, url, path, **options):
        super().__init__(daemon=True)
        self._url, self.path, self._options = url, path, options
        self.engine, self.text, self.has_begun = "", "", threading.Event()
        self.start()

    def run(self):
        body = body_of(self.path, stream=True, **self._options)
        with httpx.stream("POST", self._url + self.path, json=body, timeout=240) as reply:
            self.engine = reply.headers["x-engine"]
            for part in reply.iter_text():
                self.text += part
                self.has_begun.set()

    @property
    def events(self):
        lines = [line for line in self.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    @property
    def broke_off(self):
        return "the engine stopped while it was answering" in self.text


def test_every_protocol_answers_and_beginnings_have_their_engine(url):
    for path in PATHS:
        reply = post(url, path)
        assert reply.status_code == 200
        assert text_of(path, reply.json())
        assert reply.headers.get_list("x-request-id") == [reply.headers["x-request-id"]]
    assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "tiny"
    assert httpx.post(f"{url}/v1/completions", json={"prompt": 3}, timeout=60).status_code == 400
    assert health(url)["engines"] == {"RUNNING": 2}
    seen = {post(url, "/v1/completions", text=LONG + word, tokens=1).headers["x-engine"] for word in "abcdef"}
    assert len(seen) == 1


def test_what_has_no_room_is_refused(url):
    """Two engines have room for 8 each, and 8 wait."""
    pairs = engine_processes()
    for _, child in pairs:
        child.suspend()
    codes = []
    ask = lambda: codes.append(post(url, "/v1/completions", tokens=1).status_code)
    tasks = [threading.Thread(target=ask, daemon=True) for _ in range(30)]
    for task in tasks:
        task.start()
    try:
        until(lambda: len(codes) >= 6)
    finally:  # the next tests need them
        for _, child in pairs:
            child.resume()
    for task in tasks:
        task.join()
    assert sorted(codes) == [200] * 24 + [429] * 6


def test_an_engine_is_killed_under_load(url):
    """What does not stream the other one answers, as it answers alone; streams end with an error event."""
    texts = texts_of_engines(url)
    asked = [(path, None) for path in PATHS] + [("/v1/completions", text) for text in texts.values()]
    alone = [text_of(path, post(url, path, text=text).json()) for path, text in asked]
    pairs = engine_processes()
    assert len(pairs) == 2
    for _, child in pairs:
        child.suspend()  # nothing ends before the kill
    streams = []
    for path in STREAMS:
        begun = set()
        while begun != texts.keys():
            streams.append(Streaming(url, path))
            until(streams[-1].has_begun.is_set)
            begun.add(streams[-1].engine)
    replies = [None] * len(asked)

    def ask(number):
        path, text = asked[number]
        replies[number] = post(url, path, text=text)

    tasks = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(len(asked))]
    for task in reversed(tasks):  # first those that have their engine
        task.start()
        before = len(streams) + len(tasks) - tasks.index(task)
        until(lambda before=before: sum(health(url)["requests"].values()) == before)
    held = health(url)["requests"]
    for name, count in held.items():
        assert count > sum(stream.engine == name for stream in streams)

    actor, child = pairs[0]
    for process in (actor, child):
        process.kill()
    pairs[1][1].resume()
    for task in tasks:
        task.join()
    for stream in streams:
        stream.join()
    assert [reply.status_code for reply in replies] == [200] * len(asked)
    assert [text_of(path, r.json()) for (path, _), r in zip(asked, replies, strict=True)] == alone
    (living,) = {reply.headers["x-engine"] for reply in replies}
    assert {stream.engine for stream in streams if not stream.broke_off} == {living}
    assert {stream.engine for stream in streams if stream.broke_off} == held.keys() - {living}
    for stream in streams:
        last = stream.events[-1]
        if stream.broke_off:
            kind = last.get("type", "")
            assert kind == {"/v1/responses": "response.failed", "/v1/messages": "error"}.get(stream.path, "")
        else:
            assert "error" not in last or last["error"] is None
    until(lambda: health(url)["engines"] == {"RUNNING": 2})
    assert post(url, "/v1/completions").status_code == 200


def test_a_drain_lets_answers_end(url):
    from ray import serve

    stream = Streaming(url, "/v1/completions", tokens=60)
    until(stream.has_begun.is_set)
    assert "[DONE]" not in stream.text
    serve.delete(APP)
    stream.join()
    assert stream.text.rstrip().endswith("[DONE]")
    assert not engine_processes()
