"""What a notebook user sees: names, help, reprs, keywords, one class of answers."""

import inspect
import pickle
import subprocess
import sys

import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax.api import Model

GREEDY = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def model():
    with q3.load(backend="reference", gate=False) as model:
        yield model


def test_the_namespace_shows_the_public_names():
    assert {name for name in dir(q3) if not name.startswith("__")} == set(q3.__all__)
    assert q3.__version__
    for name in q3.__all__:
        assert getattr(q3, name)


def test_help_and_dir_load_no_backend():
    code = (
        "import sys, qwen3_moe_jax as q3; dir(q3)\n"
        "assert not {'jax', 'wgpu', 'huggingface_hub'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["open_stream", "stream", "generate", "answer", "generate_batch"])
def test_each_keyword_is_in_the_signature(name):
    parameters = inspect.signature(getattr(Model, name)).parameters
    wanted = {"max_tokens", "stop", "tools", "thinking", "sampling", "temperature", "top_p", "seed"}
    assert wanted <= set(parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_an_answer_is_a_text_with_fields(model):
    answer = model.generate("def fib(n):", seed=5, **GREEDY)
    (of_batch,) = model.generate_batch(["def fib(n):"], seed=5, **GREEDY)
    assert isinstance(answer, str)
    assert type(answer) is type(of_batch) is q3.Answer
    assert answer == of_batch == answer.text == model.answer("def fib(n):", **GREEDY)
    assert type(answer.text) is str
    assert answer.finish_reason == "length"
    assert answer.tokens == of_batch.tokens
    assert len(answer.tokens) == answer.new_tokens == 4
    assert model.tokenizer.decode(answer.tokens) == answer
    assert (answer.seed, answer.notes) == (5, ())
    again = pickle.loads(pickle.dumps(answer))
    assert (again, again.tokens, again.seed) == (answer, answer.tokens, 5)


def test_reprs_say_what_things_are(model):
    assert "6 layers" in repr(model)
    assert "reference" in repr(model)
    assert "GB" in repr(model)
    assert "ids" in repr(model.tokenizer)
    assert "2 tokens" in repr(model.trace("def f", stages=("l_out",)))
    assert "6 layers, 16 experts" in repr(model.experts("def f"))


def test_a_wrong_keyword_is_named(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate("x", temprature=1)
