"""Masks on a model of noise: whatever ends validates, bad schemas are 400. And the same words in company."""

import json
import random

import pytest

from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.http_server import quick_start, running
from qwen3_moe_jax.testing.random_schemas import random_schema

httpx = pytest.importorskip("httpx")
jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def noise():
    """The embedded model."""
    with running(Settings(port=0), quick_start(embedded_model(), slots=8, context=512)) as found:
        yield found


def ask(server, **body):
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 1, "top_p": 1, "top_k": 0, **body}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600)


def test_what_ends_validates(noise):
    rng, stopped = random.Random(0), 0
    for number in range(12):
        wanted = random_schema(rng)
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": wanted}}
        reply = ask(noise, response_format=form, seed=number, max_tokens=90)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            stopped += 1
            jsonschema.validate(json.loads(choice["message"]["content"]), wanted)
    assert stopped >= 6


def test_a_call_that_is_required(noise):
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": n, "parameters": parameters}} for n in ("one", "two")]
    for choice, names in (
        ("required", {"one", "two"}),
        ({"type": "function", "function": {"name": "two"}}, {"two"}),
    ):
        reply = ask(noise, tools=tools, tool_choice=choice, max_tokens=100, parallel_tool_calls=False)
        found = reply.json()["choices"][0]
        assert found["finish_reason"] == "tool_calls", found
        (call,) = found["message"]["tool_calls"]
        assert call["function"]["name"] in names
        jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
NESTED = {"type": "object"}
for _ in range(100):
    NESTED = {"type": "object", "properties": {"x": NESTED}}


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": 7},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "(" * 5000 + ")" * 5000},
        {"type": "string", "pattern": "(" * 100 + ")" * 100},
        {"enum": list(range(100_000))},
        {"not": {"type": "string"}},
        {"type": "object", "unevaluatedProperties": False, "dependentSchemas": {"a": {}}},
        LOOP,
        NESTED,
    ],
    ids=["type", "pattern", "long", "groups", "enum", "not", "keyword", "loop", "nested"],
)
def test_schemas_that_cannot_be_used(noise, wanted):
    reply = ask(
        noise, response_format={"type": "json_schema", "json_schema": {"schema": wanted}}, max_tokens=4
    )
    assert reply.status_code == 400, reply.text
    assert httpx.get(f"{noise.url}/health", timeout=120).status_code == 200


def test_others_go_on_beside_a_mask(noise):
    plain = ask(noise, max_tokens=20, seed=1, temperature=0).json()["choices"][0]["message"]["content"]
    import threading

    found = []
    options = {"response_format": {"type": "json_object"}, "max_tokens": 60}
    other = threading.Thread(target=lambda: ask(noise, **options))
    other.start()
    found = ask(noise, max_tokens=20, seed=1, temperature=0).json()["choices"][0]["message"]["content"]
    other.join()
    assert found == plain


def test_cached_tokens_and_the_same_words(noise):
    long = [{"role": "user", "content": "word " * 60}]
    options = {"messages": long, "max_tokens": 12, "temperature": 0}
    fresh = ask(noise, **options, cache_prompt=False).json()
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    first, second = ask(noise, **options).json(), ask(noise, **options).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    words = [r["choices"][0]["message"]["content"] for r in (fresh, first, second)]
    assert words[0] == words[1] == words[2]
    salted = ask(noise, **options, cache_salt="s").json()
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_same_words_alone_and_in_company(noise):
    """Greedy and seeded, narrow and over the whole vocabulary, with and without what rows hold."""
    from concurrent.futures import ThreadPoolExecutor

    styles = (
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 20, "seed": 5},
        {"temperature": 1, "seed": 6},
        {"temperature": 0.9, "top_k": 40, "seed": 7, "presence_penalty": 1.0},
    )
    bodies = [
        {"messages": [{"role": "user", "content": f"{'word ' * 40}number {i}"}], "max_tokens": 16, **style}
        for i, style in enumerate(styles)
    ]
    words = lambda body: ask(noise, **body).json()["choices"][0]["message"]["content"]
    alone = [words({**body, "cache_prompt": False}) for body in bodies]
    assert len(set(alone)) == len(alone)
    with ThreadPoolExecutor(len(bodies)) as together:
        assert list(together.map(words, bodies)) == alone
        assert list(together.map(words, bodies)) == alone, "from rows that were read before"
