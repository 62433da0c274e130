"""Fields of a kind that no client should send: 400 that names the place, and never a fault of the server."""

import pytest

from qwen3_moe_jax.serve.http import wishes
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.http.responses import from_responses
from qwen3_moe_jax.text.chat_template import MessageError, special_tokens

pytest.importorskip("uvicorn")


@pytest.mark.parametrize("function", ["x", 3, ["x"], {"name": 3}, True])
def test_a_choice_of_a_tool_whose_function_is_none(function):
    with pytest.raises(ApiError, match="tool_choice must be"):
        wishes.choice({"type": "function", "function": function}, has_tools=True, names=["x"])


@pytest.mark.parametrize("name", ["content", "summary"])
@pytest.mark.parametrize("value", [3, True, {"a": 1}, [3], [{"type": "summary_text", "text": 3}]])
def test_reasoning_that_is_no_text(name, value):
    items = [{"type": "reasoning", name: value}, {"role": "user", "content": "x"}]
    with pytest.raises(MessageError, match=rf"input\[0\]\.{name}"):
        from_responses(items, None)


def test_reasoning_in_parts_is_one_text():
    parts = [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]
    items = [{"type": "reasoning", "summary": parts, "content": None}, {"role": "user", "content": "x"}]
    assert from_responses(items, None)[0]["reasoning_content"] == "ab"


@pytest.mark.parametrize("kind", ["web_search", "猫", "a\r\nset-cookie: x", "\0", "x" * 500, "\x7f\x1b"])
def test_types_of_tools_that_are_left_out_make_a_header(kind):
    (value,) = wishes.skipped_header([kind]).values()
    value.encode("latin-1")
    assert value.isprintable()
    assert len(value) <= 200
    assert wishes.skipped_header([]) == {}


@pytest.mark.parametrize("tokens", [None, 3, 1.5, "x", True])
def test_special_tokens_of_a_vocabulary_that_is_none(tokens):
    assert special_tokens({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 0}) == {}


def test_a_tool_of_any_type_is_left_out_over_http(server):
    import httpx

    body = {
        "messages": [{"role": "user", "content": "[[hello]]"}],
        "max_tokens": 1,
        "tools": [{"type": "猫"}, {"type": "a\r\nb"}],
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200
    assert answer.headers["x-skipped-tools"] == "?,a  b"
