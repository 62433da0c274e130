"""The text side of a server: the prompts that a loaded model makes, and a template that cannot be used."""

import asyncio

import pytest

from qwen3_moe_jax.serve.run import tell_of_template
from qwen3_moe_jax.serve.text_model import TextModel
from qwen3_moe_jax.text.prompts import encoded
from qwen3_moe_jax.text.tokenizer import Tokenizer

pytest.importorskip("uvicorn")

TEMPLATE = "<sep>{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|><sep>{% endfor %}"


@pytest.fixture
def model(model_files):
    """A scripted model whose template writes a control token without a bar."""
    found = TextModel(model_files["hermes"])
    tokens = [*found.metadata["tokenizer.ggml.tokens"], "<sep>"]
    types = [*found.metadata["tokenizer.ggml.token_type"], 3]
    found.metadata = {
        **found.metadata,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": TEMPLATE,
    }
    found.tokenizer = Tokenizer(found.metadata)
    return found


def test_a_server_makes_the_prompt_that_the_model_makes(model):
    messages = [{"role": "user", "content": "a <sep> b"}]
    served = model.chat(messages, None, thinking=None)
    assert served.token_ids == encoded(messages, model.metadata, model.tokenizer)[0]
    assert served.token_ids.count(model.tokenizer.vocab_size - 1) == 2


def test_a_template_that_renders_no_chat_is_told_while_the_model_is_loaded(model_files, model):
    class Service:
        pass

    service, lines = Service(), []
    service.model = model
    asyncio.run(tell_of_template(service, lines.append))
    assert lines == []
    for broken in ("{% if %}", "", "{{ raise_exception('never') }}"):
        model.metadata = {**model.metadata, "tokenizer.chat_template": broken}
        asyncio.run(tell_of_template(service, lines.append))
        (line,) = lines
        assert line.startswith("warning: chats will be refused: chat template")
        lines.clear()
