"""What coding agents send, recorded by ``scripts.check_clients agents --record`` and cut down."""

import json
from pathlib import Path

import pytest

from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.fake_engine import FakeEngine
from qwen3_moe_jax.testing.http_server import quick_start, running

httpx = pytest.importorskip("httpx")

RECORDED = sorted((Path(__file__).parent / "agents").glob("*.json"))
ANSWER = "It is done."


@pytest.fixture(scope="module")
def speaker(model_files):
    """A server whose engine says the answer to everything."""
    start = quick_start(model_files["hermes"])
    engine = FakeEngine(start, capacity=1 << 16, chunk=1 << 16)
    with running(Settings(port=0, name="scripted"), start, engine=engine) as server:
        engine.scheduler.batch.says = tuple(server.service.model.tokenizer.encode(ANSWER))
        yield server


@pytest.mark.parametrize("path", RECORDED, ids=[p.stem for p in RECORDED])
def test_what_agents_send(speaker, path):
    recorded = json.loads(path.read_text())
    reply = httpx.post(speaker.url + recorded["path"], json=recorded["body"], timeout=120)
    assert reply.status_code == 200, reply.text
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    if "messages" in recorded["path"]:
        text = "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta")
        assert events[-1]["type"] == "message_stop"
    elif "responses" in recorded["path"]:
        text = events[-1]["response"]["output"][0]["content"][0]["text"]
        assert events[-1]["type"] == "response.completed"
    else:
        text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        assert events[-1]["usage"]["completion_tokens"] > 0
        assert reply.text.endswith("data: [DONE]\n\n")
    assert text == ANSWER


def test_tools_that_are_no_functions_are_named(speaker):
    body = json.loads((Path(__file__).parent / "agents" / "codex.json").read_text())["body"]
    kinds = {t["type"] for t in body["tools"]} - {"function", "custom"}
    assert kinds, "the recording has some"
    reply = httpx.post(f"{speaker.url}/v1/responses", json=body, timeout=120)
    assert kinds <= set(reply.headers["x-skipped-tools"].split(","))


def test_head_of_the_root(speaker):
    assert httpx.head(f"{speaker.url}/").status_code == 200
